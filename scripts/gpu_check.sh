#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, nvcc and a Python with torch for CUDA and transformers: builds the
# kernels for that GPU, measures the read stream, checks parity on every Pythia shape up to 2.8b, times
# decode against stock, and runs small steps under compute-sanitizer. Writes benchmarks/gpu.json and
# benchmarks/gpu.md, and prints a short table last. Each part has a time limit; all together end
# within 9 minutes. Exit status: 0 all passed, 1 something failed or was cut off, 2 no GPU.
# Environment: PYTHON (python3), BUILD (build/gpu).
set -uo pipefail
cd "$(dirname "$0")/.."
umask 022 # a library that others may write is refused
python=${PYTHON:-python3}
build=${BUILD:-build/gpu}
parts=$build/parts
export PYTHONPATH=$build/site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
  echo 'no GPU: nvidia-smi finds none' >&2
  exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "no GPU for $python: torch.cuda.is_available() is not True" >&2
  exit 2
fi
nvidia-smi -L

# The package as an install would lay it out, beside the library that cmake builds.
build_package() {
  local arch
  arch=$("$python" -c 'import torch; m, n = torch.cuda.get_device_capability(); print(f"{m}{n}")')
  [[ $arch == 90 ]] && arch=90a
  cmake -S . -B "$build" -DCMAKE_BUILD_TYPE=Release -DHFF_CUDA=ON \
    -DCMAKE_CUDA_ARCHITECTURES="$arch-real" &&
    cmake --build "$build" --parallel "$(nproc)" --target hf_fusion || return 1
  rm -rf "$build/site" "$parts"
  mkdir -p "$build/site" "$parts"
  cp -r hf_fusion "$build/site/" && cp -r patches "$build/site/hf_fusion/" &&
    cp "$build/libhf_fusion.so" "$build/site/hf_fusion/"
}
export -f build_package
export python build parts
if ! timeout 150 bash -c build_package >"${TMPDIR:-/tmp}/gpu_build.log" 2>&1; then
  tail -n 30 "${TMPDIR:-/tmp}/gpu_build.log" >&2
  echo 'the build failed, or took more than 150 s' >&2
  exit 1
fi

part() { # name, seconds
  echo "== $1, at most $2 s"
  timeout --signal=INT --kill-after=5 "$2" "$python" -m hf_fusion.harness.gpu "$1" \
    --out "$parts/$1.json"
  local status=$?
  ((status == 0)) || echo "$1 ended with status $status"
}
part stream 20
part small 25
part parity 110
part speed 150

# Every tool over the same small steps; only this library's kernels are watched.
echo '== compute-sanitizer, at most 15 s a tool'
rows=()
for tool in memcheck racecheck synccheck initcheck; do
  log=$parts/$tool.log
  timeout --kill-after=2 15 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    --kernel-regex kns=hff "$python" -m hf_fusion.harness.gpu small \
    --out "$parts/under_$tool.json" >"$log" 2>&1
  status=$?
  tail -n 1 "$log"
  rows+=("{\"tool\": \"$tool\", \"status\": $status, \"passed\": $( ((status == 0)) && echo true || echo false)}")
done
(
  IFS=,
  echo "{\"part\": \"sanitizer\", \"complete\": true, \"rows\": [${rows[*]}]}" >"$parts/sanitizer.json"
)

"$python" -m hf_fusion.harness.gpu_report "$parts" --out benchmarks \
  --commit "$(git rev-parse --short=12 HEAD 2>/dev/null)"
