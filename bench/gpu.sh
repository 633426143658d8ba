#!/bin/sh
# bench/gpu.sh OUT [--stage tests|bench|train|profile]...: see bench/fastbyol_bench/gpu_machine.py
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?usage: bench/gpu.sh OUT [--stage STAGE]...}
shift
PYTHONPATH="$root:$root/kernels:$root/bench:$PYTHONPATH" exec "${PYTHON:-python3}" -m fastbyol_bench.gpu_machine --out "$out" "$@"
