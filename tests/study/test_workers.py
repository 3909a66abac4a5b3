"""A launcher that spreads a study over several processes and GPUs of a machine."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from core.config.load import load_config
from core.errors import Interrupted
from core.runs.claims import claim
from core.runs.places import Cell, cell_dir
from core.training.stop_signal import StopSignal
from study import workers
from study.runs import study_runs
from study.workers import gpus_of_workers, spread, visible_gpus
from tests import stub_stages
from tests.conftest import PROJECT, TINY, error_of, merged

STAGES = ("pretrain", "finetune", "report")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The config file of a pre-training and six cells: the mean shape, ddpm and scratch, two draws each."""
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    path = tmp_path / "study.json"
    path.write_text(json.dumps(merged(TINY, {
        "experiment": {"output_dir": str(tmp_path / "runs"), "device": "auto"},
        "dataset": {"root": str(tmp_path / "nowhere")}, "finetune": {"draws": [0, 1]}})))
    return path


@pytest.fixture
def start(study):
    """start(*options, NAME=value) -> a running launcher of the study with stubs and these variables of environment."""
    started = []

    def begin(*options, **variables):
        process = subprocess.Popen([sys.executable, "-m", "tests.stub_stages", "--config", study, *options],
                                   cwd=PROJECT, env={**os.environ, "STUB_GPUS": "", **variables}, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()  # its workers end themselves
        process.communicate()


def seen(what="begin"):
    """How often each run was begun, ended or saved: {"landmarks/scratch/.../shots002_draw0_seed0": 1, ...}."""
    return Counter(line[1].partition("/tiny/")[2] for line in stub_stages.lines() if line[0] == what)


def folders(study):
    config = load_config(study)
    return {str(run.folder.relative_to(config.experiment_dir)) for run in study_runs(config, STAGES)}


def hanging(study):
    """The folder of a run that hangs, and its name in seen()."""
    config = load_config(study)
    folder = cell_dir(config, Cell("scratch", 2, 0, 0))
    return folder, str(folder.relative_to(config.experiment_dir))


def owner_of(folder):
    """The process that hangs in a run, once it does."""
    stub_stages.wait_until(lambda: ["hang", str(folder)] in [line[:2] for line in stub_stages.lines()])
    [pid] = [int(line[2]) for line in stub_stages.lines() if line[:2] == ["hang", str(folder)]]
    return pid


def wait_for_others(study, hung):
    others = folders(study) - {hung}
    stub_stages.wait_until(lambda: others <= set(seen("end")))
    return others


# --- who gets which GPU ---


@pytest.mark.parametrize("device, count, gpus, visible, wanted", [
    ("auto", None, 2, ["0", "1", "2"], ["0", "1"]),
    ("auto", 3, None, ["0", "1"], ["0", "1", "0"]),
    ("cuda", 4, 2, ["3", "5", "6"], ["3", "5", "3", "5"]),
    ("auto", 1, 2, ["0", "1"], ["0"]),
    ("auto", 2, None, [], [None, None]),
    ("cpu", 2, None, ["0", "1"], [None, None]),
])  # fmt: skip
def test_gpus_are_given_out_in_turn(monkeypatch, device, count, gpus, visible, wanted):
    monkeypatch.setattr(workers, "visible_gpus", lambda: visible)
    assert gpus_of_workers(device, count, gpus) == wanted


def test_what_cannot_be_given_out(monkeypatch):
    monkeypatch.setattr(workers, "visible_gpus", lambda: ["0"])
    assert "--gpus 2: this machine has 1 CUDA GPU to use; choose at most 1, or --w" in error_of(
        gpus_of_workers, "auto", None, 2)
    assert 'experiment.device is "cuda:1"; choose auto or' in error_of(gpus_of_workers, "cuda:1", 2, None)
    assert 'experiment.device is "cpu"' in error_of(gpus_of_workers, "cpu", None, 1)
    assert error_of(gpus_of_workers, "auto", 0, None) == "--workers 0: must be at least 1"
    assert error_of(gpus_of_workers, "auto", None, -1) == "--gpus -1: must be at least 1"
    monkeypatch.setattr(workers, "visible_gpus", list)
    assert "has no CUDA GPU to use; choose --workers for" in error_of(gpus_of_workers, "auto", 1, 1)


def test_visible_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-8932f937,99")  # 99 is not there
    assert visible_gpus() == ["4", "GPU-8932f937"]


def test_command_line_refuses_in_one_line(study, run_main):
    status, out, error = run_main("study.launch", "--config", study, "--gpus", 64)
    assert (status, out) == (2, "") and re.fullmatch(r"error: --gpus 64: this machine has [^\n]+\n", error)
    status, out, error = run_main("study.launch", "--config", study, "--slurm", "--workers", 2)
    assert (status, out) == (2, "") and re.fullmatch(r"error: --slurm goes without --workers [^\n]+\n", error)
    assert not (study.parent / "runs").exists()


# --- several workers ---


def test_two_workers(study, start, tmp_path):
    """Every run once, by both; each sees a GPU of its own and half the cores; the launcher builds the report."""
    process = start("--gpus", "2", STUB_GPUS="3 5 6")
    out, error = process.communicate(timeout=200)
    assert process.returncode == 0 and error == "", error
    assert seen() == dict.fromkeys(folders(study) | {"report"}, 1)
    by = {Path(folder): int(pid) for what, folder, pid in stub_stages.lines() if what == "begin"}
    gpus = {pid: (folder / "gpu").read_text() for folder, pid in by.items() if folder.name != "report"}
    assert sorted(gpus.values()) == ["3", "5"]
    assert by[tmp_path / "runs/tiny/report"] == process.pid
    logs = tmp_path / "runs/tiny/logs"
    [first] = [pid for pid, gpu in gpus.items() if gpu == "3"]
    assert f"worker 1 on GPU 3: process {first}, output in {logs}/worker1.log\nworker 2 on GPU 5: " in out
    assert "done 7 of 7 runs; training time to come, for one process: about 0 s\nreport: " in out
    assert "done 7 of 7 runs" in (logs / "worker2.log").read_text() and not list(tmp_path.rglob("claim.lock"))


def test_cores_are_shared_out(study, monkeypatch):
    runs, given = study_runs(load_config(study), STAGES), []

    class Context:
        pid = 1

        def Process(self, **keywords):
            given.append(keywords["args"][2])
            return self

        def start(self):
            """Nothing."""

    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda _: Context())
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    workers.Team(runs, {}).start(1, None, 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    workers.Team(runs, {}).start(2, "3", 3)
    assert given == [{"OMP_NUM_THREADS": "2"}, {"CUDA_VISIBLE_DEVICES": "3"}]


def test_killed_worker(study, start):
    """kill -9 of a worker: the other one continues its run, and the launch says so."""
    folder, hung = hanging(study)
    process = start("--workers", "2", STUB_HANG=hung)
    pid = owner_of(folder)
    others = wait_for_others(study, hung)
    os.kill(pid, signal.SIGKILL)
    out, error = process.communicate(timeout=100)
    assert process.returncode == 0, error
    assert re.fullmatch(rf"worker \d on the CPU was killed by SIGKILL in {folder} \(see \S+/logs/worker\d.log\); "
                        r"1 go on with what it left\n", error)
    assert seen() == {**dict.fromkeys(others | {"report"}, 1), hung: 2} and "done 7 of 7 runs" in out


def test_no_worker_is_left(study, start):
    """Status 1, what is left is named, the report shows the rest; the same command does it."""
    folder, hung = hanging(study)
    process = start("--workers", "1", STUB_HANG=hung)
    os.kill(owner_of(folder), signal.SIGKILL)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 1 and f"SIGKILL in {folder} " in error and "no other is left\n" in error
    assert f"\n  {folder}: no worker was left to do it; their logs say more\n" in error
    assert "3 of 7 runs failed; the same command tries them again" in error and seen()["report"] == 1
    process = start("--workers", "1", STUB_HANG=hung)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 0 and seen()[hung] == 2, error


def test_failed_run(study, start):
    """One failure, told once by the launcher as it happens and once at the end; nobody tries it again."""
    folder, hung = hanging(study)
    process = start("--workers", "2", STUB_FAIL=hung)
    out, error = process.communicate(timeout=100)
    line = f"{folder}: RuntimeError: out of luck\n"
    assert process.returncode == 1 and "done 6 of 7 runs" in out and "\nreport: " in out
    assert error == (f"failed: {line}error: 1 of 7 runs failed; the same command tries them again\n  {line}")
    assert seen() == dict.fromkeys(folders(study) | {"report"}, 1)
    process = start("--workers", "1")  # what failed in an earlier launch has not failed in this one
    _, error = process.communicate(timeout=100)
    assert process.returncode == 0 and error == "" and seen()[hung] == 2


def test_failed_pretraining_fails_what_needs_it(study, start):
    process = start("--workers", "2", STUB_FAIL="ddpm")
    _, error = process.communicate(timeout=100)
    assert process.returncode == 1 and "3 of 7 runs failed" in error
    assert error.count(f": it needs {study.parent / 'runs/tiny/ddpm'}\n") == 2 + 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped(study, start, number):
    """The launcher tells every worker once, waits until all have saved, and ends with 130."""
    folder, hung = hanging(study)
    process = start("--workers", "2", STUB_HANG=hung)
    owner_of(folder)
    wait_for_others(study, hung)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "interrupted: all workers have saved and stopped; the same command goes on from there\n"
    assert seen("saved") == {hung: 1} and not seen()["report"]


def test_workers_of_a_killed_launcher_save_and_stop(study, start):
    folder, hung = hanging(study)
    process = start("--workers", "2", STUB_HANG=hung)
    owner_of(folder)
    process.kill()
    stub_stages.wait_until(lambda: seen("saved") == {hung: 1})


def test_terminal_reaches_the_launcher_alone(study, start):
    """Workers have process groups of their own: a terminal's Ctrl-C would otherwise come twice."""
    folder, hung = hanging(study)
    process = start("--workers", "1", STUB_HANG=hung)
    pid = owner_of(folder)
    assert os.getpgid(pid) == pid != os.getpgid(process.pid)


@pytest.mark.parametrize("first, second, at_once", [
    (signal.SIGINT, signal.SIGINT, True), (signal.SIGTERM, signal.SIGTERM, True),
    (signal.SIGTERM, signal.SIGINT, False), (signal.SIGINT, signal.SIGTERM, False)])
def test_two_kinds_of_signals_ask_for_one_stop(first, second, at_once):
    """A job that is cancelled gets SIGTERM in every process, and the launcher's SIGINT as well: it still saves."""
    with pytest.raises(KeyboardInterrupt) if at_once else nullcontext(), StopSignal() as stop:
        signal.raise_signal(first)
        assert stop.received
        signal.raise_signal(second)


def test_finished_study_starts_no_worker(study, monkeypatch):
    runs = study_runs(load_config(study), STAGES)
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        for path in run.results:
            path.write_text("{}")
    monkeypatch.setattr(workers.multiprocessing, "get_context", None)
    assert spread(runs, {}, ["0", "1"]) == {}


def test_minutely_news(study, tmp_path, monkeypatch, capsys):
    """What each worker is doing, by the claims that it holds."""
    runs = study_runs(load_config(study), STAGES)

    class Worker:
        name, pid = "worker 1 on GPU 0", os.getpid()

    team = workers.Team(runs, {})
    team.living, team.doing = {Worker(): tmp_path, Worker(): tmp_path}, {}
    team.doing[next(iter(team.living))] = runs[0]
    with claim(runs[0].folder):
        (runs[0].folder / "metrics.jsonl").write_text('{"step": 4, "loss": 1, "seconds": 2.0}\n')
        team.tell()
    assert capsys.readouterr().out == (f"worker 1 on GPU 0: {runs[0].folder}: step 4 of 6\n"
                                       "worker 1 on GPU 0: waits for the others\n")


# --- pre-training on all GPUs together ---


@pytest.fixture
def together(study, monkeypatch):
    """together(code) -> the first run of the study, its pre-training, done by Python `code` in place of a job."""
    calls = []

    def use(code):
        def command(module, processes, *arguments):
            calls.append((module, processes, arguments))
            return [sys.executable, "-c", code]

        monkeypatch.setattr("core.training.distributed.distributed_command", command)
        return study_runs(load_config(study), STAGES)[0], calls

    return use


def test_one_job_pretrains_on_all_gpus(together):
    run, calls = together("import os; assert os.environ['CUDA_VISIBLE_DEVICES'] == 'a,b'")
    workers.pretrain_together(run, ["a", "b", "c", "d"][:2])
    [(module, processes, (option, path))] = calls
    assert (module, processes, option) == ("ddpm_pretraining.train", 2, "--config")
    assert load_config(path).plain() == run.config.plain()


def test_no_gpu_is_without_an_image(together):
    run, calls = together("")
    workers.pretrain_together(run, [str(n) for n in range(99)])
    assert calls[0][1] == run.config.ddpm.batch_size * run.config.ddpm.accumulation


def test_a_failed_job_is_left_to_the_workers(together, capsys):
    run, _ = together("raise SystemExit(1)")
    workers.pretrain_together(run, ["0", "1"])
    assert "ended with status 1; the workers see to it" in capsys.readouterr().err


def test_a_stop_reaches_the_job_which_saves(together):
    code = "import os, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(130)); " \
           "os.kill(os.getppid(), signal.SIGTERM); signal.pause()"
    run, _ = together(code)
    with pytest.raises(Interrupted, match="has saved and stopped"):
        workers.pretrain_together(run, ["0", "1"])


def test_workers_start_when_the_job_is_done(start, study):
    process = start("--gpus", "2", STUB_GPUS="0 1", STUB_TOGETHER="1")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert [line[0] for line in stub_stages.lines()][0] == "together"
    assert out.index("pre-training on GPUs 0, 1 together") < out.index("worker 1 on GPU 0")
    assert set(seen("begin")) == folders(study) - {"ddpm"} | {"report"}
