#!/usr/bin/env bash
# What `make gpu` runs: build, one test of every kernel, the table of limits, all tests, compute-sanitizer and others'
# losses, on the GPUs found here, in less than eight minutes.
#
#   OUT=folder       where logs and results go (benchmarks/output; benchmarks/results is what the pages are made of)
#   STEPS="..."      some of: build smoke benchmark tests memcheck racecheck peers linear kernels counters tune scaling
#                    idioms accuracy training frameworks (by default the first eight)
#   CASES="..."      which cases are measured, a regular expression ("." for all takes longer than the others leave)
#   TOTAL=470        seconds, of which each step has its share
#   ARCHIVE=a.tgz    packs all that is in OUT into one file, after every step and at the end
#   PYTHON=python3   one with a CUDA build of torch; it needs no network and no environment of its own
#
# A step that fails or runs out of time leaves its log, and the next one runs. The order is that of what is most worth
# knowing. The summary comes last, with what has to hold. On a machine that gives back one folder:
#
#   D=$OUT; OUT=$(mktemp -d) ARCHIVE=$D/a.tgz make gpu
#
# Everything there is, in three times as long:
#
#   make gpu
#   STEPS='build scaling benchmark' CASES=. make gpu
#   STEPS='build kernels counters tune idioms accuracy training frameworks' make gpu
set -u
cd "$(dirname "$0")/.." || exit 1

OUT=${OUT:-benchmarks/output}
CASES=${CASES:-'^(Llama [23], bfloat16(, prob.*)?|VAR, bfloat16|ImageNet|MNIST.*|(Cityscapes|ADE20K)(, channels_last)?)$'}
STEPS=${STEPS:-build smoke benchmark tests memcheck racecheck peers linear}
ARCHIVE=${ARCHIVE:-}
[ -z "$ARCHIVE" ] || { mkdir -p "$(dirname "$ARCHIVE")" && ARCHIVE=$(realpath "$ARCHIVE"); } || exit 1
TOTAL=${TOTAL:-470}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
export OUT
for step in $STEPS summary; do rm -f "$OUT/$step.log" "$OUT/$step"-[0-9]*.log; done
SECONDS=0

# After every step, since whoever ends this script may not ask. The last archive stays until the next one is whole.
pack() {
  [ -n "$ARCHIVE" ] || return 0
  (cd "$OUT" && tar -czf "$ARCHIVE.part" --exclude='*.tgz' --exclude='*.part' -- * && mv "$ARCHIVE.part" "$ARCHIVE")
}
trap pack EXIT

# The GPUs' architectures and what is here, if a Python's torch finds a GPU. Once, as loading torch takes seconds.
probe() {
  "$1" -c 'import platform, torch
devices = range(torch.cuda.device_count())
print(";".join(sorted({"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in devices})))
print("Python", platform.python_version(), "torch", torch.__version__, "on", torch.cuda.get_device_name())' 2>/dev/null
}

python=
for candidate in "${PYTHON:-python3}" python3 python; do
  if command -v "$candidate" >/dev/null && found=$(probe "$candidate"); then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "No Python here has a torch that finds a GPU: set PYTHON to one that has." | tee "$OUT/summary.log"
  exit 1
fi

FORCE_CUDA=1
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(head -n 1 <<<"$found")}
MAX_JOBS=${MAX_JOBS:-$(nproc)}
PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
PYTHONUNBUFFERED=1 # the last line of a log is where a step was
export FORCE_CUDA TORCH_CUDA_ARCH_LIST MAX_JOBS PYTHONPATH PYTHONUNBUFFERED

names=() states=() times=() notes=()
failed=0

report() { # step, state, seconds, note
  names+=("$1") states+=("$2") times+=("$3") notes+=("$4")
  [ "$2" = ok ] || [ "$2" = skipped ] || failed=1
  echo "--- $1: $2, $3 s${4:+, $4}" | tee -a "$OUT/summary.log"
  pack
}

wanted() { case " $STEPS " in *" $1 "*) true ;; *) false ;; esac; }

# A step's seconds: $1 of each 470, and no more than are left.
limit() {
  local most=$(($1 * TOTAL / 470)) left=$((TOTAL - SECONDS))
  [ "$most" -lt 1 ] && most=1
  [ "$left" -lt 0 ] && left=0
  echo $((left < most ? left : most))
}

state_of() { # exit status
  case $1 in
    0) echo ok ;;
    124 | 137) echo 'out of time' ;;
    *) echo failed ;;
  esac
}

# Runs a command in the background, with all processes that it starts: log, seconds at most, command.
start() {
  local log=$1 most=$2
  shift 2
  timeout --kill-after=4 "$most" "$@" >"$log" 2>&1 &
}

# The exit status of a process that has until then ($SECONDS). One that not even SIGKILL ends, as it waits for a GPU, is
# left behind.
finish() {
  while kill -0 "$1" 2>/dev/null; do
    [ "$SECONDS" -lt "$2" ] || return 137
    sleep 0.2
  done
  wait "$1"
}

# Which test failed first, or was running when the process ended.
culprit() { # log
  local line
  line=$(grep -a -m 1 -E '^tests/.* (FAILED|ERROR)' "$1" || grep -a -E '^tests/.*::' "$1" | tail -n 1)
  sed -E 's/^[^:]*:://; s/ (PASSED|FAILED|ERROR|SKIPPED).*//; s/ +$//' <<<"$line"
}

# step, seconds at most, command: into a log of the step's name.
run_step() {
  local name=$1 most=$2 began=$SECONDS status note where
  shift 2
  if [ "$most" -eq 0 ]; then
    report "$name" 'no time' 0 'the others have taken all of it'
    return
  fi
  echo "--- $name, at most $most s: $*"
  start "$OUT/$name.log" "$most" "$@"
  finish $! $((began + most + 6))
  status=$?
  note=$(tail -n 1 "$OUT/$name.log" | cut -c 1-100)
  if [ $status -ne 0 ]; then
    tail -n 20 "$OUT/$name.log"
    where=$(culprit "$OUT/$name.log")
    note="${where:+$where | }$note"
  fi
  report "$name" "$(state_of $status)" $((SECONDS - began)) "$note"
}

# Thread: a kernel that hangs holds the main thread in a call, where no signal is heard; the process has to end.
test_timeout() { "$python" -c 'import pytest_timeout' >/dev/null 2>&1 && echo "--timeout=$1 --timeout-method=thread"; }

pytest=("$python" -m pytest -v --noconftest -c pyproject.toml -p no:cacheprovider -p no:xdist --tb=short)

# Every kernel against the CPU, in one process. Launches wait for their kernels, so that an error is its own test's.
run_smoke() {
  # shellcheck disable=SC2046
  CUDA_LAUNCH_BLOCKING=1 run_step smoke "$(limit 45)" "${pytest[@]}" -x $(test_timeout 30) -m smoke tests/test_gpu.py
}

# Many processes share the GPU: a test's time is mostly that of the host, which makes the references. First what no
# emulator shows, then values. Each test is in one part: of the first that names it, or in the last.
run_tests() {
  local -a first=(overlap 'graph and not compiled' same_bits 'stream or wait or another_device'
    'out_of_bounds or raises' 'reports or threads or process' inplace compiled)
  local -a second=(gradients_from_the_forward test_values rows_of_every_length rows_of side_by_side
    'more_rows or large_images' 'huge or memory or widened' 'gradcheck or backwards or scale' 'every_target or linear')
  local began=$SECONDS most kind others= worst=0 note= number=0
  most=$(limit 110)
  if [ "$most" -eq 0 ]; then
    report tests 'no time' 0 'the others have taken all of it'
    return
  fi
  echo "--- tests, at most $most s: ${pytest[*]}"
  local -a parts=()
  for kind in "${first[@]}" "${second[@]}"; do
    parts+=("($kind)${others:+ and not ($others)}")
    others="$others${others:+ or }$kind"
  done
  parts+=("not ($others)")
  run_parts $((most * 6 / 10)) 0 ${#first[@]}
  run_parts $((most - (SECONDS - began))) ${#first[@]} ${#parts[@]}
  report tests "$(state_of $worst)" $((SECONDS - began)) "$note"
}

# seconds at most, the first of `parts` and the one after the last: all of them at once.
run_parts() {
  local most=$1 deadline=$((SECONDS + $1 + 6)) i status log
  local -a ids=()
  for ((i = $2; i < $3; ++i)); do
    # shellcheck disable=SC2046
    OMP_NUM_THREADS=2 start "$OUT/tests-$((i + 1)).log" $((most < 1 ? 1 : most)) "${pytest[@]}" --maxfail=10 \
      --durations=5 $(test_timeout 60) -m gpu -k "${parts[$i]}" tests/test_gpu.py
    ids+=($!)
  done
  for ((i = $2; i < $3; ++i)); do
    log="$OUT/tests-$((i + 1)).log"
    finish "${ids[$((i - $2))]}" "$deadline"
    status=$?
    [ "$status" -eq 5 ] && status=0 # there is none of this kind, as for a second GPU
    if [ "$status" -ne 0 ]; then
      worst=$status
      tail -n 25 "$log"
      note="$note${note:+ | }$(culprit "$log")"
    fi
  done
}

find_sanitizer() {
  local nvcc
  nvcc=$(command -v nvcc || true)
  for candidate in "$(command -v compute-sanitizer || true)" \
    "${CUDA_HOME:-/usr/local/cuda}"/{bin,compute-sanitizer}/compute-sanitizer \
    "${nvcc:+$(dirname "$nvcc")/compute-sanitizer}"; do
    if [ -n "$candidate" ] && [ -x "$candidate" ]; then
      echo "$candidate"
      return
    fi
  done
}

run_sanitizer() { # tool, seconds at most, arguments of pytest
  local tool=$1 most=$2 sanitizer
  local -a command
  shift 2
  sanitizer=$(find_sanitizer)
  if [ -z "$sanitizer" ]; then
    report "$tool" skipped 0 'there is no compute-sanitizer'
    return
  fi
  # Libraries ask the driver for functions that it may not have, which is no error of theirs.
  command=("$sanitizer" --tool "$tool" --error-exitcode 99 --report-api-errors no)
  # Our own kernels alone, by their namespace: torch's would take most of the time.
  if "$sanitizer" --help 2>/dev/null | grep -q -e '--kernel-regex\b'; then
    command+=(--kernel-regex kns=xent)
  fi
  # Each tensor an allocation of its own, so that memcheck sees where it ends.
  [ "$tool" = memcheck ] && command=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${command[@]}")
  run_step "$tool" "$(limit "$most")" "${command[@]}" "${pytest[@]}" --maxfail=10 "$@"
}

run_memcheck() {
  run_sanitizer memcheck 50 -k 'sanitizer and (index and bfloat16 or soft and float32)' tests/test_gpu.py
}

# It may report hazards where there are none: asynchronous copies that a warp's barrier orders, and clusters' memory.
run_racecheck() {
  local -a some=()
  for layout in 'small rows' 'rows of a warp' 'rows of a block' 'rows of a cluster' image; do
    some+=("tests/test_gpu.py::test_sanitizer[$layout-index-bfloat16]")
  done
  run_sanitizer racecheck 30 "${some[@]}"
}

# To load torch and to draw the inputs is not in the seconds.
run_benchmark() {
  local most
  most=$(limit 80)
  run_step benchmark "$most" "$python" -m benchmarks.run --device cuda --only "$CASES" --without '^native compiled$' \
    --seconds $((most > 40 ? most - 20 : most / 2))
}

run_peers() {
  local most
  most=$(limit 35)
  run_step peers "$most" "$python" -m benchmarks.run --device cuda --only '^(Llama 2, bfloat16|VAR, bfloat16|ImageNet)$' \
    --without '^(?!ours$|native compiled$|liger)' --seconds $((most > 20 ? most - 12 : most / 2)) \
    --part peers
}

# Everything else that is measured: step, seconds at most, arguments.
run_module() {
  local name=$1 most=$2
  shift 2
  run_step "$name" "$(limit "$most")" "$python" -m "benchmarks.$name" --device cuda "$@"
}

# Nsight Compute, on one launch of each kernel.
run_counters() {
  local command table="$OUT/counters.csv"
  if ! command -v ncu >/dev/null; then
    report counters skipped 0 'there is no ncu'
    return
  fi
  command=$("$python" -m benchmarks.kernels --ncu "$table")
  run_step counters "$(limit 150)" bash -c "$command && '$python' -m benchmarks.kernels --counters '$table'"
}

results() {
  local i
  echo
  wanted benchmark && [ -e "$OUT/benchmark.log" ] && sed -n '/Medians; copies/,/Limits on an H200/p' "$OUT/benchmark.log" |
    sed '$d'
  timeout 30 "$python" -m benchmarks.limits
  wanted build && grep -a 'Registers are spilled' "$OUT/build.log"
  printf '%-10s  %-11s  %5s  %s\n' step result s note
  for i in "${!names[@]}"; do
    printf '%-10s  %-11s  %5d  %s\n' "${names[$i]}" "${states[$i]}" "${times[$i]}" "${notes[$i]}"
  done
  echo "in all ${SECONDS} s, in $OUT"
}

summary() {
  results 2>&1 | tee -a "$OUT/summary.log"
  exit "$failed"
}

stop() {
  trap '' INT TERM HUP
  pack
  # shellcheck disable=SC2046
  kill $(jobs -p) 2>/dev/null
  report stopped 'by a signal' "$SECONDS" ''
  summary
}
trap stop INT TERM HUP

echo "$(tail -n 1 <<<"$found"), for $TORCH_CUDA_ARCH_LIST" | tee -a "$OUT/summary.log"
wanted build && run_step build "$(limit 120)" "$python" setup.py --quiet build_ext --inplace
wanted smoke && run_smoke
wanted benchmark && run_benchmark
wanted tests && run_tests
wanted memcheck && run_memcheck
wanted racecheck && run_racecheck
wanted peers && run_peers
wanted linear && run_module linear 90 --seconds 30
wanted kernels && run_module kernels 90
wanted counters && run_counters
wanted tune && run_module tune 60 --seconds 1
wanted scaling && run_module scaling 220 --seconds 0.8
wanted idioms && run_module idioms 60 --seconds 25
wanted accuracy && run_module accuracy 60
wanted training && run_module training 240
wanted frameworks && run_module frameworks 240
summary
