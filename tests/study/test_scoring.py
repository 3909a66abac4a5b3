"""Runs scored by a process beside the training of the next ones: the same results, each failure under its own run."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from core.runs.claims import LOCK, Claimed, claim
from study import runner
from study.run import failures_so_far
from study.runner import MOST_WAITING, run_all, score_cell
from study.runs import study_runs
from study.scoring import Failure, Scorer
from tests.conftest import PROJECT

STAGES = ("finetune",)


@pytest.fixture
def config(make_config, tmp_path):
    """Two cells that start from scratch, and their mean shapes, of which nothing is done."""
    return make_config(tmp_path / "runs", finetune={"backbones": ["scratch"], "draws": [0, 1]})


def write_metrics(run):
    """A score of no time that says where it was made."""
    (run.folder / "metrics.json").write_text(json.dumps({"process": os.getpid()}))




def second_draw_is_broken(run):
    """In place of score_beside."""
    return Failure("ValueError: no such landmark", "the traceback") if run.arguments[0].draw else write_metrics(run)


def second_draw_is_killed(run):
    """As the system does where memory ends."""
    if run.arguments[0].draw == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    write_metrics(run)


def second_draw_has_no_memory(run):
    """As beside a training that fills the GPU."""
    return Failure("OutOfMemoryError: CUDA out of memory") if run.arguments[0].draw else write_metrics(run)


def never_ends(run):
    (run.folder / "begun").touch()
    time.sleep(100)


def takes_its_time(run):
    time.sleep(0.5)
    write_metrics(run)


def finetuning(config):
    return [run for run in study_runs(config, STAGES) if run.stage == "finetune"]


@pytest.fixture
def trained(monkeypatch):
    """Folders in the order in which runs were trained; nothing is trained."""
    order: list[Path] = []

    def train_cell(run):
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "last.pt").touch()
        order.append(run.folder)

    monkeypatch.setattr(runner, "train_cell", train_cell)
    return order


def test_results_are_those_of_scoring_in_turn(config):
    runs = study_runs(config, STAGES)
    assert run_all(runs, failures_so_far(config, STAGES), beside=True) == {} and all(run.done for run in runs)
    for run in finetuning(config):
        assert not list(run.folder.glob("*.pt")) and not (run.folder / LOCK).exists()
        scores = [path for path in run.folder.rglob("*") if path.is_file() and path.name != "metrics.jsonl"]
        beside = {path: path.read_bytes() for path in scores}
        made = {path for path in scores if path.suffix in (".csv", ".npz", ".png") or path.name == "metrics.json"}
        assert len(made) == 5  # two overlays
        for path in made:
            path.unlink()
        score_cell(run)
        assert {path: path.read_bytes() for path in scores} == beside


def test_each_failure_is_of_its_own_run(config, trained, monkeypatch, capsys):
    monkeypatch.setattr(runner, "score_beside", second_draw_is_broken)
    first, second = finetuning(config)
    failed = run_all([first, second], failures_so_far(config, STAGES), beside=True)
    assert failed == {second.folder: "ValueError: no such landmark"} and trained == [first.folder, second.folder]
    record = json.loads(second.failure_path.read_text())
    assert record["message"] == failed[second.folder] and record["traceback"] == "the traceback"
    assert first.done and not first.failure_path.exists() and not list(config.experiment_dir.rglob(LOCK))
    said = capsys.readouterr()
    assert said.err == f"failed: {second.folder}: ValueError: no such landmark\n" and "done 1 of 2 runs" in said.out


def test_a_killed_process_fails_the_run_in_hand_alone(config, trained, monkeypatch):
    monkeypatch.setattr(runner, "score_beside", second_draw_is_killed)
    runs = finetuning(config.model_copy(update={"finetune": config.finetune.model_copy(update={"draws": (0, 1, 2)})}))
    failed = run_all(runs, dict.fromkeys([run.folder for run in runs]), beside=True)
    assert failed == {runs[1].folder: "the process that scored it was killed by SIGKILL"}
    assert runs[0].done and runs[2].done


def test_what_has_no_memory_beside_a_training_is_scored_after_it(config, trained, monkeypatch):
    monkeypatch.setattr(runner, "score_beside", second_draw_has_no_memory)
    monkeypatch.setattr(runner, "score_cell", write_metrics)
    runs = finetuning(config)
    assert run_all(runs, failures_so_far(config, STAGES), beside=True) == {}
    where = [json.loads((run.folder / "metrics.json").read_text())["process"] for run in runs]
    assert where[0] != os.getpid() == where[1]


def test_a_run_is_claimed_until_it_is_scored(config, trained):
    """And leaving the block, as by Ctrl-C, ends the process and releases the claims."""
    run, other = finetuning(config)
    with pytest.raises(KeyboardInterrupt), Scorer(never_ends) as scorer, ExitStack() as claims:
        claims.enter_context(claim(run.folder))
        scorer.hand_over(run, claims.pop_all())
        while not (run.folder / "begun").exists():
            time.sleep(0.01)
        process = scorer.process
        assert scorer.holds(run) and not scorer.holds(other) and not list(scorer.outcomes(1))
        with pytest.raises(Claimed), claim(run.folder):
            pass
        os.kill(process.pid, signal.SIGINT)  # a terminal's, which the one that asks answers
        time.sleep(0.1)
        assert process.is_alive()
        raise KeyboardInterrupt
    assert process.exitcode == -signal.SIGKILL
    with claim(run.folder):
        pass


KILLED = """
import os, signal, sys, time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from study.scoring import Scorer
from tests.study.test_scoring import never_ends

run = SimpleNamespace(folder=Path(sys.argv[1]))
scorer = Scorer(never_ends)
scorer.hand_over(run, ExitStack())
while not (run.folder / "begun").exists():
    time.sleep(0.01)
print(scorer.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_process_of_a_killed_launcher_ends(tmp_path):
    """At once, for its claims are free."""
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    status = Path(f"/proc/{int(done.stdout)}/status")
    end = time.monotonic() + 20
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < end:
        time.sleep(0.02)
    assert not status.exists() or "State:\tZ" in status.read_text()  # Z: dead, and nobody has asked for its status


def test_a_cut_scoring_is_done_again_without_training(config, monkeypatch):
    """The next launch finds the state of a run that is trained and not scored."""
    run = finetuning(config)[0]
    runner.train_cell(run)
    steps = (run.folder / "metrics.jsonl").read_bytes()
    assert not run.done and run_all([run], {run.folder: None}, beside=True) == {}
    assert run.done and (run.folder / "metrics.jsonl").read_bytes() == steps


def test_training_waits_where_scoring_falls_behind(config, trained, monkeypatch):
    runs = finetuning(config.model_copy(update={"finetune": config.finetune.model_copy(
        update={"draws": tuple(range(6))})}))
    waiting = []
    hand_over = Scorer.hand_over
    monkeypatch.setattr(Scorer, "hand_over", lambda scorer, run, claims: (
        waiting.append(len(scorer.waiting)), hand_over(scorer, run, claims)))
    monkeypatch.setattr(runner, "score_beside", takes_its_time)
    assert run_all(runs, dict.fromkeys([run.folder for run in runs]), beside=True) == {}
    assert max(waiting) == MOST_WAITING and trained == [run.folder for run in runs]


def test_a_single_run_and_a_cpu_start_no_process(config, trained, monkeypatch):
    monkeypatch.setattr(runner, "score_cell", write_metrics)
    runs = finetuning(config)
    for some, beside in ((runs[:1], True), (runs[1:], None)):
        assert run_all(some, failures_so_far(config, STAGES), beside) == {}
    where = {json.loads((run.folder / "metrics.json").read_text())["process"] for run in runs}
    assert where == {os.getpid()}
