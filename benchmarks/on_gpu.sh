#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, nvcc and a CUDA torch, without network and within ten
# minutes. Usage: benchmarks/on_gpu.sh RESULTS
# RESULTS: folder for build.log, tests.log, sanitizer.log, claims.jsonl, claims.log and machine.txt.
set -uo pipefail
results=$(realpath -m "${1:?usage: benchmarks/on_gpu.sh RESULTS}")
mkdir -p "$results"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
failed=0

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

# The extension lies in d4s/, so the checkout itself is the package.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
timeout 120 python3 -m pytest python_tests/test_ops.py python_tests/test_closed_form.py -k cuda \
  >"$results/tests.log" 2>&1 || failed=1
tail -n 1 "$results/tests.log"

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    timeout 90 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
      python3 -m pytest python_tests/test_ops.py -q -x -p no:cacheprovider \
      -k "cuda and not 1000 and (key_covariance or symmetrize or write_back or l1_norms)" \
      >>"$results/sanitizer.log" 2>&1 || failed=1
  done
  grep "ERROR SUMMARY\|RACECHECK SUMMARY" "$results/sanitizer.log"
fi

timeout 240 python3 -m benchmarks.claims --json --device cuda \
  >"$results/claims.jsonl" 2>"$results/claims.log" || failed=1
cat "$results/claims.jsonl"
exit "$failed"
