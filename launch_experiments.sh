#!/usr/bin/env bash
# Sets up .venv when it is missing, then runs a study. ./launch_experiments.sh --help
set -euo pipefail
cd "$(dirname "$0")"
source ./setup_venv.sh requirements.txt
# Threads that wait without spinning: on shared cores a step is else many times slower.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
exec .venv/bin/python -m core.launch "$@"
