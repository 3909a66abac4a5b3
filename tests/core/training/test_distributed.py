"""Jobs of torchrun's: how they end, and what they say, when something is wrong or somebody presses Ctrl-C."""

import os
import shlex
import signal
import subprocess
import sys

from core.formats.pickles import read_pickle
from core.training.distributed import distributed_command
from tests.conftest import PROJECT

PRETRAINING = "ddpm_pretraining.train"
# A module that pre-trains and in rank 1's n-th step does what its first arguments say.
THREADS = "threads: 1, as OMP_NUM_THREADS says\n"
SABOTAGE = """
import os, runpy, sys
import core.training.loop as loop
what, number, *arguments = sys.argv[1:]
step = loop.Training.optimiser_step
def struck(self):
    if os.environ["RANK"] == "1" and self.step == 2:
        if what == "raise":
            raise KeyError("a defect")
        os.kill(os.getppid() if what == "parent" else os.getpid(), int(number))
    return step(self)
loop.Training.optimiser_step = struck
sys.argv = ["train", *arguments]
runpy.run_module("ddpm_pretraining.train", run_name="__main__")
"""

# Pre-training in an interpreter whose own end aborts the process, as a thread of gloo's with a late tensor may.
ABORTING = """
import atexit, os, sys
import ddpm_pretraining.train as training
class Late:
    def __del__(self, abort=os.abort):
        abort()
late = Late()
atexit.register(lambda: print("asked at exit", flush=True) if os.environ.get("RANK") == "0" else None)
training.run_rank(training.main)
"""


def job(tmp_path, module, *arguments):
    """(exit status, stdout, lines of stderr but for the progress bar's) of a job of two processes."""
    paths = f"{tmp_path}:{PROJECT}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(distributed_command(module, 2, *map(str, arguments)), cwd=PROJECT, env=environment, text=True,
                          capture_output=True, timeout=600, check=False)
    lines = done.stderr.replace("\r", "\n").splitlines()
    return done.returncode, done.stdout, [line for line in lines if line.strip() and "pre-train phantom: " not in line]


def sabotaged(tmp_path, what, number, *arguments):
    (tmp_path / "sabotage.py").write_text(SABOTAGE)
    return job(tmp_path, "sabotage", what, int(number), *arguments)


def test_a_mistake_in_the_config_is_one_line(tmp_path, config_file):
    path = config_file(ddpm={"batch_sise": 2})
    status, out, lines = job(tmp_path, PRETRAINING, "--config", path)
    assert (status, out, len(lines)) == (2, "", 1), lines
    assert lines[0].startswith(f'error: {path}: unknown key ddpm.batch_sise (did you mean "batch_size"?)')


def test_a_killed_process_ends_the_job(tmp_path, config_file):
    """One line with its rank; what was saved stays, the claim is gone, and the same command goes on."""
    path, run_dir = config_file(), tmp_path / "runs/tiny/ddpm"
    status, out, lines = sabotaged(tmp_path, "self", signal.SIGKILL, "--config", path)
    assert (status, out, len(lines)) == (1, THREADS, 1), lines
    assert lines[0].startswith("error: rank 1 (process ") and "was killed by SIGKILL" in lines[0]
    assert read_pickle(run_dir / "last.pt")["step"] == 2
    status, out, lines = job(tmp_path, PRETRAINING, "--config", path)
    assert (status, lines) == (0, []) and out == f"{THREADS}pre-training is done: {run_dir}\n"
    assert read_pickle(run_dir / "last.pt")["step"] == 6


def test_the_interpreters_own_end_is_not_the_jobs(tmp_path, config_file):
    """A process that aborts in it would end the job with a failure; what was registered for the exit still runs."""
    (tmp_path / "aborting.py").write_text(ABORTING)
    status, out, lines = job(tmp_path, "aborting", "--config", config_file())
    assert (status, lines) == (0, []), lines
    assert out == f"{THREADS}pre-training is done: {tmp_path / 'runs/tiny/ddpm'}\nasked at exit\n"
    status, _, lines = job(tmp_path, "aborting", "--config", config_file(ddpm={"batch_sise": 2}))
    assert (status, len(lines)) == (2, 1), lines
    assert "unknown key ddpm.batch_sise" in lines[0]


def test_a_defect_in_one_process_ends_the_job(tmp_path, config_file):
    status, _, lines = sabotaged(tmp_path, "raise", 0, "--config", config_file())
    assert status == 1 and [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert lines[-1].startswith("error: rank 1 (process ") and lines[-1].endswith("failed: KeyError: 'a defect'")
    assert sum(line == "[rank1]: KeyError: 'a defect'" for line in lines) == 1  # the end of its traceback


def test_ctrl_c_saves_once(tmp_path, config_file):
    """torchrun gets SIGINT; one line says how to go on, and what it says is so."""
    path, run_dir = config_file(ddpm={"iterations": 5000, "save_every": 5000}), tmp_path / "runs/tiny/ddpm"
    status, out, lines = sabotaged(tmp_path, "parent", signal.SIGINT, "--config", path)
    assert (status, out, len(lines)) == (130, THREADS, 1), lines
    step = read_pickle(run_dir / "last.pt")["step"]
    assert lines[0].startswith(f"interrupted: saved at step {step} of 5000; continue with: ") and 3 <= step < 5000
    offered = shlex.split(lines[0].partition("continue with: ")[2])
    assert offered == ["python", *distributed_command(PRETRAINING, 2)[1:], "--config", str(run_dir / "config.json"),
                       "--resume"]
    assert sys.executable == distributed_command(PRETRAINING, 2)[0] and not (run_dir / "previous.pt").exists()
