#!/usr/bin/env bash
# Prints a Python of one of the versions that are asked for, the first that starts.
# A name on PATH may be a shim that does not; pyenv's own folders are looked at, too.
set -u
for version in "$@"; do
    for python in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python3 \
        python3 python; do
        # Debian's python3 may come without what a virtual environment needs.
        found=$("$python" -c '
import ensurepip, sys, venv
print("%d.%d" % sys.version_info[:2], sys.executable)' 2>/dev/null) || continue
        if [ "${found%% *}" = "$version" ]; then
            echo "${found#* }"
            exit 0
        fi
    done
done
echo "There is no Python $(printf '%s, ' "$@" | sed 's/, $//; s/\(.*\), /\1 or /') with its venv module here: install one, or name it by PYTHON=." >&2
exit 1
