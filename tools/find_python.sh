#!/usr/bin/env bash
# Prints the path of a Python 3.12 that can really be used, or explains what to install.
#
# PYTHON=/path/to/python3.12 names one explicitly: then no other is tried.
# A candidate counts only if it runs (version managers put shims on PATH that fail), is 3.12 (the
# version constraints.txt was frozen for), can make virtual environments and has Python.h.
set -u

probe='
import os, sys, sysconfig
if sys.version_info[:2] != (3, 12):
    sys.exit("is Python %d.%d" % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    sys.exit("cannot make virtual environments (Debian, Ubuntu: install python3.12-venv)")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    sys.exit("has no Python.h to build against (Debian, Ubuntu: install python3.12-dev)")
print(os.path.realpath(sys.executable))
'

rejected=""

# Prints the interpreter's real path and succeeds, or remembers why it is of no use.
try() {
    local answer
    if answer=$("$1" -I -c "$probe" 2>&1 </dev/null); then
        printf '%s\n' "$answer"
        return 0
    fi
    rejected+="  $1: ${answer%%$'\n'*}"$'\n'
    return 1
}

if [[ -n "${PYTHON:-}" ]]; then
    try "$PYTHON" && exit 0
    printf 'PYTHON=%s cannot be used:\n%s' "$PYTHON" "$rejected" >&2
    exit 1
fi

candidates=()
while IFS= read -r found; do candidates+=("$found"); done < <(type -aP python3.12 python3 2>/dev/null)
shopt -s nullglob
candidates+=("${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12)
candidates+=("${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}"/*3.12*/bin/python3.12)

for candidate in "${candidates[@]+"${candidates[@]}"}"; do
    try "$candidate" && exit 0
done

{
    echo "No usable Python 3.12 was found. Any one of these provides it:"
    echo "  apt-get install python3.12 python3.12-venv python3.12-dev   (Ubuntu 24.04)"
    echo "  pyenv install 3.12"
    echo "  uv python install 3.12"
    echo "or name one: make PYTHON=/path/to/python3.12 ..."
    if [[ -n "$rejected" ]]; then
        echo "Looked at, and why not:"
        printf '%s' "$rejected"
    fi
} >&2
exit 1
