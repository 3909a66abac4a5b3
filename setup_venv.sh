# Sourced with the requirement files that a command needs: installs them into .venv, again only when one changes.
PYTHON="${PYTHON:-python3}"
for requirements in "$@"; do
    stamp=".venv/.installed-$requirements"
    if [ ! -f "$stamp" ] || ! cmp -s "$requirements" "$stamp"; then
        if ! "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; then
            echo "error: $PYTHON is not Python 3.11 to 3.13; name one with PYTHON=/path/to/python3" >&2
            exit 2
        fi
        [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
        echo "installing $requirements into .venv (about a minute the first time)" >&2
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        cp "$requirements" "$stamp"
    fi
done
