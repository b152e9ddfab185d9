#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: conformance of every GPU target that can run there, and speed
# beside torch eager, torch.compile and transformers' generate. One JSON, one table.
#
#     bench/gpu/run.sh [--wheels DIR] [--out DIR] [--rehearse]
#
# --wheels DIR   installs every wheel in DIR first, into a folder of its own, with no network
# --out DIR      where results.json and table.md go; gpu-results if not given
# --rehearse     runs the CPU targets on tiny models instead: shows that the script works
#
# What the machine lacks (onnxruntime-gpu, apache-tvm, tensorrt, torch, weights) is left out by name.
# PYTHON=... chooses the interpreter.
set -euo pipefail

wheels="" out="gpu-results" rehearse=()
while (($#)); do
  case $1 in
    --wheels) wheels=$(realpath "$2"); shift 2 ;;
    --out) out=$2; shift 2 ;;
    --rehearse) rehearse=(--rehearse); shift ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
done
mkdir -p "$out"
out=$(realpath "$out")
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}

if [[ -n $wheels ]]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade \
    --target "$out/site" "$wheels"/*.whl
  export PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" bench/gpu/suite.py --out "$out" "${rehearse[@]}"
