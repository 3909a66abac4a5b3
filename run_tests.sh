#!/usr/bin/env bash
# Sets up .venv when it is missing, then runs the linter, the type checker and the tests, two at a time. Arguments go to pytest;
# -n 0 runs one test at a time, in this process.
set -euo pipefail
cd "$(dirname "$0")"
source ./setup_venv.sh requirements.txt requirements-export.txt requirements-test.txt
.venv/bin/ruff check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
