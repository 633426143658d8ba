#!/bin/sh
# All that a machine with a GPU can tell, under ten minutes a call, with what is installed there:
#   bench/gpu.sh OUT [--stage tests|bench|train|profile]... [--budget-s 540] [--dry-run]
# PYTHON names the interpreter (python3). Packages that the machine lacks can be carried in a folder named in PYTHONPATH; what is
# still missing is left out and said in OUT/summary.json. --dry-run says it beforehand. See bench/fastbyol_bench/gpu_machine.py.
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?usage: bench/gpu.sh OUT [--stage STAGE]...}
shift
PYTHONPATH="$root:$root/kernels:$root/bench${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m fastbyol_bench.gpu_machine --out "$out" "$@"
