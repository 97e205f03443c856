#!/usr/bin/env bash
# install.sh PYTHON FOLDER: this package and what it was tested with, into a virtual
# environment. Python 3.11 gets the previous lane (previous_lane/).
set -euo pipefail
python=$1 venv=$2
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

requirements=requirements.txt projects=(--editable .)
axolotl=$(sed -n 's/^axolotl==//p' "$requirements")
if [ "$version" = 3.11 ]; then
    requirements=previous_lane/requirements.txt projects+=(--editable ./previous_lane)
    axolotl=$(sed -n 's/^axolotl==//p' "$requirements")
fi
echo "Installing Axolotl $axolotl with $python (Python $version) into $venv."

[ -d "$venv" ] || "$python" -m venv "$venv"
"${pip[@]}" install --quiet --upgrade pip
if [ "$version" = 3.13 ]; then
    # Axolotl pins a zstandard without a wheel for 3.13, whose build wants a cffi that
    # does not load there; with this one it builds.
    "${pip[@]}" install --quiet setuptools $(grep '^cffi==' "$requirements")
    "${pip[@]}" install --quiet --no-build-isolation $(grep '^zstandard==' "$requirements")
fi
# The pins are complete: nothing to resolve.
"${pip[@]}" install --quiet --no-deps --requirement "$requirements"
"${pip[@]}" install --quiet --no-deps "${projects[@]}"
