#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, nvcc and a CUDA torch, without network and within ten
# minutes. Usage: benchmarks/on_gpu.sh RESULTS [SECONDS]
# RESULTS: folder for build.log, tests.log, claims.jsonl, claims.log, sanitizer.log and machine.txt.
# What is most wanted comes first; the sanitizer gets what is left of SECONDS (570).
set -uo pipefail
results=$(realpath -m "${1:?usage: benchmarks/on_gpu.sh RESULTS [SECONDS]}")
end=$((SECONDS + ${2:-570}))
mkdir -p "$results"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
failed=0

# left MOST: seconds until the end, at most MOST, at least 1
left() {
  local rest=$((end - SECONDS))
  rest=$((rest < $1 ? rest : $1))
  echo $((rest > 1 ? rest : 1))
}

{
  nvidia-smi
  nvcc --version
  python3 -c "import sys, torch; print(sys.version, torch.__version__, torch.version.cuda)"
} >"$results/machine.txt" 2>&1

# Only this machine's architecture: a third of the compilation.
architecture=$(python3 -c "import torch; print('%d%d' % torch.cuda.get_device_capability())") || exit 1
cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE="$(command -v python3)" -DD4S_CUDA=ON \
  -DCMAKE_CUDA_ARCHITECTURES="$architecture" >"$results/build.log" 2>&1 &&
  cmake --build build/gpu >>"$results/build.log" 2>&1 || { tail -n 30 "$results/build.log"; exit 1; }

# The extension lies in d4s/ops/, so the checkout itself is the package.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
timeout -k 10 "$(left 120)" python3 -m pytest python_tests -k cuda -p no:cacheprovider \
  --ignore python_tests/test_build.py --ignore python_tests/test_style.py >"$results/tests.log" 2>&1 || failed=1
tail -n 1 "$results/tests.log"

# A row is written as soon as it is measured, so a run that is cut off keeps the others. Kernels first.
for part in "key_covariance or l1_norms or write_back" "bench_closed_form" \
  "targets or whole_sequence" "covariance_of_all_layers"; do
  timeout -s INT -k 10 "$(left 150)" python3 -m benchmarks.claims --json --device cuda --only "$part" \
    >>"$results/claims.jsonl" 2>>"$results/claims.log" || failed=1
done
cat "$results/claims.jsonl"

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    # Only our kernels; errors that CUDA reports by itself are torch asking what there is.
    timeout -k 10 "$(left 60)" compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
      --report-api-errors no --kernel-regex kns=d4s python3 -m pytest python_tests/test_ops.py -q \
      -p no:cacheprovider -k "cuda and not 1000 and (key_covariance or symmetrize or write_back or l1_norms)" \
      >>"$results/sanitizer.log" 2>&1
    status=$?
    # A machine that refuses the tool, or time that ran out, is no error of a kernel.
    [ "$status" -eq 1 ] && ! grep -q "Device not supported" "$results/sanitizer.log" && failed=1
  done
  grep "ERROR SUMMARY\|RACECHECK SUMMARY\|not supported" "$results/sanitizer.log"
fi
exit "$failed"
