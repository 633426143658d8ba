#!/bin/sh
# What a machine with a GPU is asked, in three calls of at most nine minutes each, with what is installed or carried there:
#   bench/gpu.sh A|B|C OUT [--commit ID] [--caches FILE] [--dry]        (bench/README.md: what to carry, in which order)
# PYTHON names the interpreter (python3). Packages that the machine lacks are carried in a folder named in PYTHONPATH.
root=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH="$root:$root/kernels:$root/bench${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m fastbyol_bench.gpu.calls "$@"
