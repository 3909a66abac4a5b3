# Sourced with the requirement files that a command needs: installs them into .venv, again only when one changes.
PYTHON="${PYTHON:-python3}"
installed() { [ -f ".venv/.installed-$1" ] && cmp -s "$1" ".venv/.installed-$1"; }
for requirements in "$@"; do
    if ! installed "$requirements"; then
        if ! "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; then
            echo "error: $PYTHON is not Python 3.11 to 3.13; name one with PYTHON=/path/to/python3" >&2
            exit 2
        fi
        mkdir -p .venv
        exec 9>.venv/.lock
        flock 9 # of two launchers started at once one installs
        if ! installed "$requirements"; then
            [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
            echo "installing $requirements into .venv (6 GB; a few minutes the first time)" >&2
            .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
            cp "$requirements" ".venv/.installed-$requirements"
        fi
        exec 9>&-
    fi
done
