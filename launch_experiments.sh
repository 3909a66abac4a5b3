#!/usr/bin/env bash
# Sets up .venv when it is missing, then runs a study. ./launch_experiments.sh --help
set -euo pipefail
cd "$(dirname "$0")"
source ./setup_venv.sh requirements.txt
exec .venv/bin/python -m study.launch "$@"
