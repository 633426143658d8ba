#!/bin/sh
# Pack what a machine without a network lacks for the calls: packages for its Python, and FFCV with its libraries.
#   bench/carry.sh FILE.tar.gz [PYTHON_VERSION]      (here, after `make setup`; 3.12 by default; about 6 MB)
# There, unpack FILE into a folder of its own and put that first on PYTHONPATH. PYTHON names the interpreter here.
set -eu
file=${1:?usage: bench/carry.sh FILE.tar.gz [PYTHON_VERSION]}
version=${2:-3.12}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ ! -e "$file" ] || { echo "carry.sh: $file is there already: name a new file, or remove it" >&2; exit 1; }
# Its folder, if its extension loads, without the seconds that the import of all of it takes.
ffcv=$("$python" -c 'import ctypes, glob; from importlib.util import find_spec
(folder,) = find_spec("ffcv").submodule_search_locations
(extension,) = glob.glob(f"{folder}/_libffcv*.so"); ctypes.CDLL(extension); print(folder)' 2>/dev/null) ||
  { echo "carry.sh: no FFCV in $python: run make setup" >&2; exit 1; }
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
platforms=$(for glibc in 28 17; do printf -- '--platform manylinux_2_%s_x86_64 ' $glibc; done)
# shellcheck disable=SC2086 # one word each
"$python" -m pip --disable-pip-version-check --quiet install --target "$dir" --no-compile --only-binary=:all: \
  --implementation cp --python-version "$version" $platforms pydantic typer rich safetensors
cp -R "$ffcv" "$dir/ffcv"
# The extension has no functions of Python's (FFCV calls it through ctypes), so that any version loads it under this name.
mv "$dir"/ffcv/_libffcv*.so "$dir/ffcv/_libffcv.abi3.so"
if [ "$version" != 3.11 ]; then # FFCV imports distutils.log, which is gone from Python 3.12 on
  mkdir "$dir/distutils" && : >"$dir/distutils/__init__.py"
  echo 'import logging; warn = logging.getLogger("distutils").warning' >"$dir/distutils/log.py"
fi
rm -rf "$dir/bin"
tar -C "$dir" --exclude=__pycache__ -czf "$file" .
du -h "$file"
