#!/usr/bin/env bash
# Make a virtual environment and install Tartarus into it, editable, with the extra that is asked for.
# Usage: scripts/setup-venv.sh VENV EXTRA. Safe to run again; an existing environment is updated.
set -euo pipefail
venv=$1
extra=$2
cd "$(dirname "$0")/.."

if [[ ! -x $venv/bin/python ]]; then
    for python in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            break
        fi
        python=
    done
    if [[ -z $python ]]; then
        echo "Tartarus needs Python 3.11 or later; found: $(python3 --version 2>&1). Set PYTHON=/path/to/python3.11" >&2
        exit 1
    fi
    if ! "$python" -m venv "$venv" >/dev/null; then
        rm -rf "$venv"
        echo "$python can't make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 1
    fi
fi

echo "Installing Tartarus with its '$extra' tools into $venv …"
# A package mirror's hiccup should not end a setup: once more, aloud.
install=("$venv/bin/python" -m pip install -qq --disable-pip-version-check --editable ".[$extra]")
"${install[@]}" || { echo "Retrying …" >&2; sleep 3; "${install[@]}"; }
