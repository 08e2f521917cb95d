#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, nvcc and a Python with torch for CUDA and transformers: builds
# the kernels for that GPU, measures the read stream, checks parity on every Pythia shape up to
# 2.8b, times decode against stock, and runs small steps under compute-sanitizer. Writes
# benchmarks/gpu.json and benchmarks/gpu.md, and prints a short table last. Each part has a time
# limit; all together end within 9 minutes. Exit status: 0 all passed, 1 something failed or was cut
# off, 2 no GPU.
# Environment: PYTHON (python3), BUILD (build/gpu).
set -uo pipefail
if (($#)); then
  sed -n '2,/^set /{/^# /s/^# //p}' "$0"
  [[ $1 == -h || $1 == --help ]]
  exit $(($? * 2))
fi
cd "$(dirname "$0")/.."
umask 022 # a library that others may write is refused
python=$(command -v "${PYTHON:-python3}" || echo "${PYTHON:-python3}")
[[ $python != */* || $python == /* ]] || python=$PWD/$python
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PATH=$PATH:/usr/local/cuda/bin
command -v make >/dev/null || export CMAKE_GENERATOR=Ninja
ends=500 # seconds after the start by which the parts are over

if ! command -v nvidia-smi >/dev/null || [[ $(nvidia-smi -L 2>/dev/null) != *GPU* ]]; then
  echo 'no GPU: nvidia-smi finds none' >&2
  exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "no GPU for $python: torch.cuda.is_available() is not True" >&2
  exit 2
fi
nvidia-smi -L
build=${BUILD:-build/gpu}
rm -rf "$build/parts"
mkdir -p "$build/parts"
root=$PWD build=$(cd "$build" && pwd)
parts=$build/parts

# A library, and the package beside it as an install would lay it out: folder, cmake's options.
build_package() {
  local to=$1
  shift
  cmake -S "$root" -B "$to" -DCMAKE_BUILD_TYPE=Release -DHFF_CUDA=ON "$@" &&
    cmake --build "$to" --parallel "$(nproc)" --target hf_fusion || return 1
  rm -rf "$to/site"
  mkdir -p "$to/site"
  cp -r "$root/hf_fusion" "$to/site/" && cp -r "$root/patches" "$to/site/hf_fusion/" &&
    cp "$to/libhf_fusion.so" "$to/site/hf_fusion/"
}
# The one that is measured, and one whose waits trap after 2 s, in which a deadlock is found.
build_both() {
  local arch
  arch=$("$python" -c 'import torch; m, n = torch.cuda.get_device_capability(); print(f"{m}{n}")')
  [[ $arch == 90 ]] && arch=90a
  build_package "$build" "-DCMAKE_CUDA_ARCHITECTURES=$arch-real" &&
    build_package "$build/watchdog" "-DCMAKE_CUDA_ARCHITECTURES=$arch-real" -DHFF_WATCHDOG=ON \
      "-DHFF_KERNELS=$build"
}
export -f build_package build_both
export root python build
rm -rf "$build/site" "$build/watchdog/site"
watched=$build/watchdog
if ! timeout 270 bash -c build_both >"$build/log" 2>&1; then
  tail -n 30 "$build/log" >&2
  echo 'the build failed, or took more than 270 s' >&2
  [[ -e $build/site/hf_fusion/libhf_fusion.so ]] || exit 1
  watched=$build # late or broken is only what finds deadlocks
fi

# In the folder of a package, which `python -m` looks into first: folder, command.
within() {
  local site=$1/site
  shift
  (cd "$site" && exec "$@")
}
part() { # folder, name, seconds, name of its JSON, options
  local folder=$1 name=$2 limit=$3 out=$4 left=$((ends - SECONDS)) status
  shift 4
  ((left > 5)) || return 124
  ((limit < left)) || limit=$left
  echo "== $out, at most $limit s"
  within "$folder" timeout --signal=INT --kill-after=5 "$limit" "$python" \
    -m hf_fusion.harness.gpu "$name" --out "$parts/$out.json" "$@"
  status=$?
  ((status == 0)) || echo "$out ended with status $status"
  return $status
}

# Every tool over the same small steps, in the time that is left; only this library's kernels are
# watched, and no calls of the runtime, of which torch makes some that fail. initcheck is not among
# the tools: it would not see what kernels of torch have written.
sanitize() {
  local tool status left outcome rows=()
  for tool in memcheck racecheck synccheck; do
    left=$((ends - SECONDS))
    ((left > 60)) && left=60
    ((left > 5)) || left=5
    echo "== compute-sanitizer, $tool, at most $left s"
    within "$build" timeout --kill-after=2 "$left" compute-sanitizer --tool "$tool" \
      --error-exitcode 9 --report-api-errors no --kernel-name kns=hff "$python" \
      -m hf_fusion.harness.gpu small --head-dims 80 --out "$parts/under_$tool.json" \
      >"$parts/$tool.log" 2>&1
    status=$?
    tail -n 1 "$parts/$tool.log"
    outcome=failed
    ((status == 0)) && outcome=passed
    ((status == 124 || status == 137)) && outcome='cut off'
    rows+=("{\"tool\": \"$tool\", \"status\": $status, \"outcome\": \"$outcome\",
             \"passed\": $([[ $outcome == passed ]] && echo true || echo false)}")
  done
  local IFS=,
  echo "{\"part\": \"sanitizer\", \"complete\": true, \"rows\": [${rows[*]}]}" \
    >"$parts/sanitizer.json"
}

# A kernel that traps, or never ends, takes its process along: where one does, each rung has a
# process of its own, and what is sound goes on to the next part.
sound=(attention attention+up 'full, chain' 'full, token')
ended() { # name of a JSON, status: all was done, or time was up
  (($2 == 124)) || grep -q '"complete": true' "$parts/$1.json" 2>/dev/null
}
over_rungs() { # folder, name, seconds, seconds of a rung by itself
  local rungs=("${sound[@]}") n
  part "$1" "$2" "$3" "$2" --rungs "${rungs[@]}"
  ended "$2" $? && return
  sound=()
  for n in "${!rungs[@]}"; do
    part "$1" "$2" "$4" "${2}_$n" --rungs "${rungs[n]}"
    ended "${2}_$n" $? && sound+=("${rungs[n]}")
  done
}
part "$build" stream 40 stream
over_rungs "$watched" small 40 25
((${#sound[@]})) && over_rungs "$build" parity 110 30
((${#sound[@]})) && over_rungs "$build" speed 150 50
((${#sound[@]})) || echo 'every rung has failed: no larger steps are run'
sanitize

within "$build" "$python" -m hf_fusion.harness.gpu_report "$parts" --out "$root/benchmarks" \
  --commit "$(git rev-parse --short=12 HEAD 2>/dev/null)"
