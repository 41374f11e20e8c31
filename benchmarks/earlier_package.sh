#!/usr/bin/env bash
# Makes an environment of its own for the earlier diffq package (PyPI, 0.2.4), to run it as a
# black box: for the golden files of tests/legacy and to compare speeds. Needs a C compiler.
#
#     bash benchmarks/earlier_package.sh [FOLDER] [PYTHON]    # .venv-earlier and python3
#
# That package is licensed for non-commercial use only; nothing of it enters this project.
set -euo pipefail

folder=${1:-.venv-earlier}
python=${2:-python3}

"$python" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check -q install)
"${pip[@]}" torch==2.13.0 numpy
# Apart from torch, which asks for a newer setuptools than this package builds with. pip warns.
"${pip[@]}" 'setuptools<70' wheel cython
"${pip[@]}" --no-build-isolation --no-deps diffq==0.2.4
# From elsewhere, so that the checkout's diffq is not found first.
(cd "$folder" && bin/python -c 'from importlib.metadata import version as v; import diffq
print("diffq", v("diffq"), "with torch", v("torch"))')
