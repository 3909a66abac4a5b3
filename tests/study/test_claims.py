"""Several launchers on one study, killed owners, runs that fail, and launches that find nothing to do."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from core.config.load import load_config
from core.errors import Interrupted, RunsFailed, UserError
from core.runs.claims import LOCK, Claimed, claim
from core.runs.places import Cell, cell_dir
from study import report_page
from study.prepare import data_stamp, remember
from study.report_page import ingredients
from study.run import run_study
from study.runner import failed_at, take
from study.runs import study_runs
from tests import stub_stages
from tests.conftest import PROJECT, TINY, merged

STAGES = ("pretrain", "finetune", "report")
SCRATCH = "scratch/{}/shots002_draw0_seed0"


@pytest.fixture
def study(tmp_path):
    """The config file of a pre-training and six cells: the mean shape, ddpm and scratch, two draws each."""
    path = tmp_path / "study.json"
    path.write_text(json.dumps(merged(TINY, {
        "experiment": {"output_dir": str(tmp_path / "runs")}, "dataset": {"root": str(tmp_path / "nowhere")},
        "finetune": {"draws": [0, 1]}})))
    return path


@pytest.fixture
def stubs(study, tmp_path, monkeypatch):
    """The study's config, whose stages are stubs in this process and take no time."""
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))
    stub_stages.stub(monkeypatch.setattr)
    monkeypatch.setattr(stub_stages.time, "sleep", lambda seconds: None)
    return load_config(study)


@pytest.fixture
def start(study, tmp_path, monkeypatch):
    """start(NAME=value) -> a running launcher of the study with stubs and these variables of environment."""
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))
    started = []

    def begin(**variables):
        environment = {**os.environ, **variables}
        process = subprocess.Popen([sys.executable, "-m", "tests.stub_stages", "--config", study], cwd=PROJECT,
                                   env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def begun():
    """How often each run was begun: {"landmarks/scratch/.../shots002_draw0_seed0": 1, ...}."""
    return Counter(line[1].partition("/tiny/")[2] for line in stub_stages.lines() if line[0] == "begin")


def folders(config):
    return {str(run.folder.relative_to(config.experiment_dir)) for run in study_runs(config, STAGES)}


# --- claims ---


def test_claim_is_exclusive(tmp_path):
    with claim(tmp_path / "a/b"), claim(tmp_path / "c"):
        with pytest.raises(Claimed, match=rf"a/b is being worked on by process {os.getpid()} on \S+ since 20\S+ "), \
                claim(tmp_path / "a/b"):
            pass
        assert (tmp_path / "a/b" / LOCK).is_file()  # the vain try left it
    assert list(tmp_path.iterdir()) == []  # nothing was written in the folders: they go again
    (tmp_path / "d").mkdir()
    with claim(tmp_path / "d"):
        pass
    with claim(tmp_path / "a/b"):
        (tmp_path / "a/b/file").touch()
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["a", "a/b", "a/b/file", "d"]


def test_claim_waits(tmp_path):
    order = []

    def other():
        with claim(tmp_path, wait=True):
            order.append("other")

    with claim(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "other"]


def test_lock_of_a_removed_file_is_no_claim(tmp_path, monkeypatch):
    """The last owner removes the file between our opening and locking it: the next one is locked, and it counts."""
    lock, calls = fcntl.flock, []

    def late(descriptor, flags):
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        lock(descriptor, flags)

    monkeypatch.setattr(fcntl, "flock", late)
    with claim(tmp_path), pytest.raises(Claimed), claim(tmp_path):
        pass
    assert len(calls) == 3


def test_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(descriptor, flags):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=f"{LOCK} cannot be locked: Function not implemented; .* with locks"), \
            claim(tmp_path / "a"):
        pass


@pytest.mark.parametrize("module, place, arguments", [
    ("ddpm_pretraining.train", "ddpm", ()),
    ("ssl_baselines.train", "ssl/dino", ("--method", "dino")),
    ("landmarks_finetuning.train", SCRATCH, ("--backbone", "scratch", "--shots", 2)),
    ("landmarks_finetuning.evaluate", SCRATCH, None),
])  # fmt: skip
def test_single_stages_take_the_claim(study, run_main, tmp_path, module, place, arguments):
    """One line and exit 2 while another process has the run; else the stage's own complaint, and no folder is left."""
    config = load_config(study)
    cell = cell_dir(config, Cell("scratch", 2, 0, 0))
    folder = cell if place == SCRATCH else config.experiment_dir / place
    arguments = (folder,) if arguments is None else ("--config", study, *arguments)
    folder.mkdir(parents=True)
    with claim(folder):
        status, out, error = run_main(module, *arguments)
        assert (status, out) == (2, "") and re.fullmatch(rf"error: {folder} is being worked on by [^\n]+\n", error)
    assert list(folder.iterdir()) == []
    folder.rmdir()
    status, _, error = run_main(module, *arguments)
    assert status == 2 and "is being worked on" not in error and not folder.exists()


# --- several launchers ---


def test_two_launchers_at_once(study, start, tmp_path):
    """Every run is begun once; while one pre-trains, the other does what does not need it, then waits, then goes on."""
    config = load_config(study)
    both = [start(STUB_START=str(tmp_path / "start"), STUB_OTHERS="4") for _ in range(2)]
    ends = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert begun() == dict.fromkeys(folders(config) | {"report"}, 1)
    order = [(what, Path(folder).parts[-3], process) for what, folder, process in stub_stages.lines()]
    pretrained = next(i for i, line in enumerate(stub_stages.lines()) if line[0] == "end" and line[1].endswith("ddpm"))
    before, after = order[:pretrained], order[pretrained + 1:]
    assert sum(what == "end" for what, *_ in before) == 4 and not [line for line in before if line[1] == "ddpm"]
    assert len({process for *_, process in before}) == 2 and len({line[1] for line in after} - {"runs"}) == 1
    waits = r"waiting for other processes, 3 runs left: step 0 of 6; \S+/ddpm is being worked on by process \d+ on "
    assert any(re.search(waits, out) for out, _ in ends), ends  # the other one may wait as well, for the last cell
    assert all("done 7 of 7 runs; training time to come: about 0 s" in out for out, _ in ends)
    assert not list(tmp_path.rglob(LOCK))


def test_killed_owner(study, start):
    """kill -9 of a launcher in the middle of a run: one that waits for it does it, though a child still lives."""
    config = load_config(study)
    hung = cell_dir(config, Cell("scratch", 2, 0, 0))
    first = start(STUB_HANG=str(hung.relative_to(config.experiment_dir)), STUB_CHILD="1")
    stub_stages.wait_until(lambda: ["child", str(hung)] in [line[:2] for line in stub_stages.lines()])
    second = start()
    others = folders(config) - {str(hung.relative_to(config.experiment_dir))}
    ended = {str(config.experiment_dir / folder) for folder in others}
    stub_stages.wait_until(lambda: ended <= {line[1] for line in stub_stages.lines() if line[0] == "end"})
    [child] = [int(line[2]) for line in stub_stages.lines() if line[0] == "child"]
    assert begun() == dict.fromkeys(folders(config), 1)
    first.send_signal(signal.SIGKILL)
    try:
        _, error = second.communicate(timeout=60)
        os.kill(child, 0)  # lives on
    finally:
        os.kill(child, signal.SIGKILL)
    assert second.returncode == 0, error
    assert begun() == {**dict.fromkeys(others | {"report"}, 1), str(hung.relative_to(config.experiment_dir)): 2}
    assert (hung / "metrics.json").is_file() and not (hung / "failed.json").exists()


# --- runs that fail ---


def failing(monkeypatch, error, backbone="scratch", draw=0):
    """Fine-tuning raises `error` for this cell."""
    usual = stub_stages.finetune_cell

    def fail(config, cell):
        if (cell.backbone, cell.draw) == (backbone, draw):
            stub_stages.note("begin", cell_dir(config, cell))
            raise error
        return usual(config, cell)

    monkeypatch.setattr(stub_stages, "finetune_cell", fail)


@pytest.mark.parametrize("error, message, traced", [
    (UserError("loss is nan at step 7"), "loss is nan at step 7", False),
    (RuntimeError("CUDA out of memory.\nTried"), "RuntimeError: CUDA out of memory. Tried", True),
    (ZeroDivisionError(), "ZeroDivisionError: ", True),
])
def test_failed_run_is_reported_and_the_rest_is_run(stubs, study, run_main, monkeypatch, error, message, traced):
    folder = cell_dir(stubs, Cell("scratch", 2, 0, 0))
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 4, "loss": 1, "seconds": 2.0}\n')
    with monkeypatch.context() as patch:
        failing(patch, error)
        status, out, told = run_main("study.launch", "--config", study, "--stages", *STAGES)
    assert status == 1 and out.endswith(f"report: {stubs.experiment_dir}/report/index.html\n")
    assert told.endswith(f"error: 1 of 7 runs failed; the same command tries them again\n  {folder}: {message}\n")
    assert begun() == dict.fromkeys(folders(stubs) | {"report"}, 1) and "done 6 of 7 runs" in out
    kept = json.loads((folder / "failed.json").read_text())
    assert (kept["message"], kept["step"]) == (message, 4) and re.fullmatch(r"\d{4}-\d\d-\d\d [\d:]{8}", kept["time"])
    assert ("in fail\n" in (kept["traceback"] or "")) is traced

    status, out, _ = run_main("study.launch", "--config", study, "--stages", *STAGES)
    assert status == 0 and "done 7 of 7 runs" in out and "done 6" not in out
    assert begun()[str(folder.relative_to(stubs.experiment_dir))] == 2 and sum(begun().values()) == 8 + 2
    assert not (folder / "failed.json").exists()


def test_failed_pretraining(stubs, monkeypatch, capsys):
    """What needs it is not begun, nor forgotten; the others are run."""
    monkeypatch.setattr(stub_stages, "pretrain", lambda config: None)
    with pytest.raises(RunsFailed, match="3 of 7 runs failed") as caught:
        run_study(stubs, STAGES)
    home = stubs.experiment_dir
    assert f"{home / 'ddpm'}: {home / 'ddpm'} ended without ema_iter000003.safetensors, ema_iter" in str(caught.value)
    assert str(caught.value).count(f": it needs {home / 'ddpm'}") == 2
    assert not [folder for folder in begun() if "ddpm" in folder] and sum(begun().values()) == 4 + 1


def test_failure_of_another_process_is_not_tried_again_by_the_same_launch(stubs):
    run = study_runs(stubs, STAGES)[-1]
    run.folder.mkdir(parents=True)
    run.failure_path.write_text('{"message": "first"}')
    before = failed_at(run)
    os.utime(run.failure_path, ns=(before + 1, before + 1))  # written again meanwhile
    assert take(run, before) == "first" and not begun()
    assert take(run, before + 1) is None and sum(begun().values()) == 1


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Interrupted("saved at step 3 of 4", "python -m x --resume")])
def test_ctrl_c_stops_everything(stubs, study, run_main, monkeypatch, stop):
    """What goes on is the launch, and not the one stage that it was at."""
    failing(monkeypatch, stop, "ddpm", 1)
    status, out, error = run_main("study.launch", "--config", study, "--stages", *STAGES)
    saved = "what was saved stays" if isinstance(stop, KeyboardInterrupt) else "saved at step 3 of 4"
    assert error == f"interrupted: {saved}; the same command goes on from there\n"
    assert status == 130 and "done 5 of 7" in out
    assert sum(begun().values()) == 6 and not list(stubs.experiment_dir.rglob("failed.json"))
    assert not list(stubs.experiment_dir.rglob(LOCK))


def test_ctrl_c_that_a_library_makes_an_error_of_stops_everything(stubs, study, run_main, monkeypatch, request):
    """Outside a training loop, as while images are scored."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, usual))
    perform = stub_stages.perform

    def struck(asked):
        if asked.stage == "finetune":
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            raise RuntimeError("unexpected pos 64 vs 0")
        perform(asked)

    monkeypatch.setattr("study.runner.perform", struck)
    status, _, error = run_main("study.launch", "--config", study, "--stages", *STAGES)
    assert status == 130 and error.startswith("interrupted: ")
    assert not list(stubs.experiment_dir.rglob("failed.json")) and not begun()["report"]


# --- nothing to do ---


def test_report_is_built_when_something_changed(stubs, monkeypatch):
    def built():
        run_study(stubs, STAGES)
        return begun()["report"]

    assert (built(), built()) == (1, 1)
    metrics = cell_dir(stubs, Cell("scratch", 2, 1, 0)) / "metrics.json"
    metrics.write_text('{"mre": 1}')
    assert (built(), built()) == (2, 2)
    extra = stubs.experiment_dir / "landmarks/vit/default/shots002_draw0_seed0/metrics.json"
    extra.parent.mkdir(parents=True)
    extra.write_text("{}")
    assert (built(), built()) == (3, 3)
    extra.unlink()  # leaves nothing newer behind
    assert (built(), built()) == (4, 4)
    (stubs.experiment_dir / "report/index.html").unlink()
    assert (built(), built()) == (5, 5)
    monkeypatch.setattr(report_page, "REPORTING", (".csv",))  # other code
    assert (built(), built()) == (6, 6)


def test_finished_study_imports_and_reads_little(study, tmp_path):
    """Not torch, not numpy, not pandas, not the data, which are not even there."""
    config = load_config(study)
    for run in study_runs(config, STAGES):
        run.folder.mkdir(parents=True, exist_ok=True)
        for path in run.results:
            path.write_text("{}")
    page = config.experiment_dir / "report/index.html"
    page.parent.mkdir()
    page.touch()
    (page.parent / "ingredients.sha256").write_text(ingredients(config.experiment_dir))
    remember(config.experiment_dir, data_stamp(config.dataset), study_runs(config, STAGES))
    code = ("import sys, study.launch; study.launch.main()\n"
            "print(sorted({'torch', 'numpy', 'pandas', 'scipy', 'PIL', 'tensorboard'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code, "--config", study], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "finetune  6 runs, 6 done, 0 left" in done.stdout and done.stdout.endswith(f"report: {page}\n[]\n")


def test_a_lock_that_cannot_be_made_ends_in_one_line(tmp_path):
    for target in (tmp_path / "nowhere" / "file", tmp_path / "file"):
        folder = tmp_path / target.parent.name
        folder.mkdir(exist_ok=True)
        (folder / LOCK).unlink(missing_ok=True)
        (folder / LOCK).symlink_to(target.with_name("none") / "deeper")
        with pytest.raises(UserError, match=r"claim.lock cannot be claimed: it is a link; delete it"), claim(folder):
            pass
    with pytest.raises(UserError, match=r"/proc/runs.* cannot be claimed: "), claim(Path("/proc/runs/study/ddpm")):
        pass
