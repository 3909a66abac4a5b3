"""The shell launcher hands its arguments to the study and keeps them from the set-up."""

import subprocess

import pytest

from tests.conftest import PROJECT


def test_arguments_reach_the_study():
    if not (PROJECT / ".venv/.installed-requirements.txt").is_file():
        pytest.skip("the launcher has not set up .venv here")
    done = subprocess.run([PROJECT / "launch_experiments.sh", "--config", "nowhere.json", "--dry-run"],
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert "config file nowhere.json does not exist" in done.stderr and "installing" not in done.stderr
