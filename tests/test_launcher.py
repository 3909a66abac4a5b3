"""The shell launcher hands its arguments to the study and keeps them from the set-up."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_arguments_reach_the_study():
    if not (ROOT / ".venv/.installed-requirements.txt").is_file():
        pytest.skip("the launcher has not set up .venv here")
    done = subprocess.run([ROOT / "launch_experiments.sh", "--config", "nowhere.json", "--dry-run"],
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert "config file nowhere.json does not exist" in done.stderr and "installing" not in done.stderr
