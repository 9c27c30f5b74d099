#!/usr/bin/env bash
# What `make gpu` runs: build, tests, compute-sanitizer and benchmark on the GPUs found here, in less than nine minutes.
#
#   OUT=folder       where logs and results go (benchmarks/results)
#   STEPS="..."      some of: build tests memcheck racecheck kernels counters linear scaling idioms accuracy training
#                    clients tune benchmark (by default the first four, linear and benchmark)
#   CASES="..."      which cases are measured, a regular expression ("." for all takes longer than the others leave)
#   ARCHIVE=a.tgz    packs all that is in OUT into one file
#   PYTHON=python3   one with a CUDA build of torch; it needs no network and no environment of its own
#
# A step that fails or runs out of time leaves its log, and the next one runs; the benchmark has what the others leave.
# The summary comes last, with what has to hold. Everything there is, in three times as long:
#
#   make gpu
#   STEPS='build scaling benchmark' CASES=. make gpu
#   STEPS='build kernels counters tune idioms accuracy training clients' make gpu
set -u
cd "$(dirname "$0")/.." || exit 1

OUT=${OUT:-benchmarks/results}
CASES=${CASES:-'^(Llama [23], bfloat16(, prob.*)?|VAR, bfloat16|ImageNet|MNIST.*|(Cityscapes|ADE20K)(, channels_last)?)$'}
STEPS=${STEPS:-build tests memcheck racecheck linear benchmark}
ARCHIVE=${ARCHIVE:+$(cd "$(dirname "$ARCHIVE")" && pwd)/$(basename "$ARCHIVE")}
TOTAL=530 # seconds
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
export OUT
for step in $STEPS; do rm -f "$OUT/$step.log" "$OUT/$step"-[0-9].log; done
SECONDS=0

has_cuda() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

python=
for candidate in "${PYTHON:-python3}" python3 python; do
  if command -v "$candidate" >/dev/null && has_cuda "$candidate"; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "No Python here has a torch that finds a GPU: set PYTHON to one that has."
  exit 1
fi

arch_list() {
  "$python" -c 'import torch
devices = range(torch.cuda.device_count())
print(";".join(sorted({"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in devices})))'
}

FORCE_CUDA=1
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(arch_list)}
MAX_JOBS=${MAX_JOBS:-$(nproc)}
PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
export FORCE_CUDA TORCH_CUDA_ARCH_LIST MAX_JOBS PYTHONPATH

names=() states=() times=() notes=()
failed=0

report() { # step, state, seconds, note
  names+=("$1") states+=("$2") times+=("$3") notes+=("$4")
  [ "$2" = ok ] || [ "$2" = skipped ] || failed=1
  echo "--- $1: $2, $3 s${4:+, $4}"
}

wanted() { case " $STEPS " in *" $1 "*) true ;; *) false ;; esac; }

# What is left of the total, but no more than $1 seconds.
limit() {
  local left=$((TOTAL - SECONDS))
  [ "$left" -lt 1 ] && left=1
  [ "$left" -gt "$1" ] && left=$1
  echo "$left"
}

state_of() { # exit status
  case $1 in
    0) echo ok ;;
    124 | 137) echo 'out of time' ;;
    *) echo failed ;;
  esac
}

# step, seconds at most, command: into a log of the step's name.
run_step() {
  local name=$1 most=$2 began=$SECONDS status
  shift 2
  echo "--- $name, at most $most s: $*"
  timeout --kill-after=10 "$most" "$@" >"$OUT/$name.log" 2>&1 &
  wait $! # so that a signal is heard at once
  status=$?
  [ $status -eq 0 ] || tail -n 20 "$OUT/$name.log"
  report "$name" "$(state_of $status)" $((SECONDS - began)) "$(tail -n 1 "$OUT/$name.log" | cut -c 1-100)"
}

pytest=("$python" -m pytest -q -m gpu tests/test_gpu.py --noconftest -c pyproject.toml -p no:cacheprovider
  -p no:xdist --tb=short --maxfail=40)

# Six processes share the GPU: a test's time is mostly that of the host, which makes the references.
run_tests() {
  local kinds='rows_of|side_by_side|more_rows or large_images or huge|compiled or gradcheck or graph or every_target'
  local -a parts=() ids=()
  local began=$SECONDS most i status worst=0 note= kind IFS='|'
  for kind in $kinds; do parts+=("not test_values and ($kind)"); done
  parts+=(test_values "not test_values and not (${kinds//|/ or })")
  IFS=$' \t\n'
  most=$(limit 240)
  echo "--- tests, at most $most s: ${pytest[*]}"
  for i in "${!parts[@]}"; do
    OMP_NUM_THREADS=3 timeout --kill-after=10 "$most" "${pytest[@]}" -k "${parts[$i]}" --durations=5 \
      >"$OUT/tests-$((i + 1)).log" 2>&1 &
    ids+=($!)
  done
  for i in "${!parts[@]}"; do
    wait "${ids[$i]}"
    status=$?
    [ "$status" -eq 0 ] || { worst=$status && tail -n 25 "$OUT/tests-$((i + 1)).log"; }
    note="$note${note:+ | }$(tail -n 1 "$OUT/tests-$((i + 1)).log" | tr -d = | cut -c 1-30)"
  done
  report tests "$(state_of $worst)" $((SECONDS - began)) "$note"
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

run_sanitizer() { # tool
  local tool=$1 sanitizer
  local -a command
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
  run_step "$tool" "$(limit 90)" "${command[@]}" "${pytest[@]}" -k sanitizer
}

run_benchmark() {
  local most
  most=$(limit "$TOTAL")
  run_step benchmark "$most" "$python" -m benchmarks.run --device cuda --only "$CASES" \
    --seconds $((most > 60 ? most - 40 : most / 2))
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

summary() {
  local i
  echo
  wanted benchmark && [ -e "$OUT/benchmark.log" ] && sed -n '/Medians; copies/,/What has to hold/p' "$OUT/benchmark.log" |
    sed '$d'
  "$python" -m benchmarks.limits
  printf '%-10s  %-11s  %5s  %s\n' step result s note
  for i in "${!names[@]}"; do
    printf '%-10s  %-11s  %5d  %s\n' "${names[$i]}" "${states[$i]}" "${times[$i]}" "${notes[$i]}"
  done
  [ -n "$ARCHIVE" ] && (cd "$OUT" && tar -czf "$ARCHIVE" --exclude='*.tgz' -- *) && echo "packed into $ARCHIVE"
  echo "in all ${SECONDS} s, in $OUT"
  exit "$failed"
}

stop() {
  trap '' INT TERM
  # shellcheck disable=SC2046
  kill $(jobs -p) 2>/dev/null
  wait
  report stopped 'by a signal' "$SECONDS" ''
  summary
}
trap stop INT TERM

echo "$("$python" --version), $("$python" -c 'import torch
print("torch", torch.__version__, "on", torch.cuda.get_device_name())'), for $TORCH_CUDA_ARCH_LIST"
wanted build && run_step build "$(limit 200)" "$python" setup.py --quiet build_ext --inplace
wanted tests && run_tests
wanted memcheck && run_sanitizer memcheck
wanted racecheck && run_sanitizer racecheck
wanted kernels && run_module kernels 90
wanted counters && run_counters
wanted linear && run_module linear 90 --seconds 30
wanted tune && run_module tune 60 --seconds 1
wanted scaling && run_module scaling 220 --seconds 0.8
wanted idioms && run_module idioms 60 --seconds 25
wanted accuracy && run_module accuracy 60
wanted training && run_module training 240
wanted clients && run_module clients 240
wanted benchmark && run_benchmark
summary
