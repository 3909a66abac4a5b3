"""A study submitted as a job array: submitit's local executor runs it, a stand-in for sbatch shows what SLURM gets."""

import json
import os
import re
import signal
from collections import Counter
from pathlib import Path

import pytest

from core.config.load import load_config
from core.errors import Interrupted
from core.runs.places import Cell, cell_dir
from core.training.stop_signal import StopSignal
from study import cluster
from study.cluster import REQUEUES, StudyTask, submit
from study.runs import study_runs
from tests import stub_stages
from tests.conftest import PROJECT, TINY, error_of, merged

STAGES = ("pretrain", "finetune", "report")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A pre-training and three cells of a data set that is not there, with stubs for stages, here and in the tasks."""
    monkeypatch.chdir(PROJECT)
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))
    stub_stages.stub(monkeypatch.setattr)
    monkeypatch.setattr(cluster, "StudyTask", stub_stages.StubTask)
    path = tmp_path / "study.json"
    path.write_text(json.dumps(merged(TINY, {
        "experiment": {"output_dir": str(tmp_path / "runs")}, "dataset": {"root": str(tmp_path / "nowhere")},
        "slurm": {"tasks": 2, "gpus_per_node": 0, "timeout_min": 5}})))
    return load_config(path)


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A machine with stand-ins for SLURM's commands; sbatch keeps what it gets; returns its folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {"srun": "exit 1", "sbatch": f"n=$(ls {folder} | wc -l); cp \"$1\" {folder}/job$n; "
                                           "echo Submitted batch job $n"}
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def counted(what="begin"):
    return Counter(Path(line[1]).parts[-3] if "landmarks" in line[1] else Path(line[1]).name
                   for line in stub_stages.lines() if line[0] == what)


def test_two_tasks_share_the_study(config, monkeypatch):
    """Every run once though one fails, which both report; submitted again, that one is done; then none is left."""
    scratch = cell_dir(config, Cell("scratch", 2, 0, 0))
    with monkeypatch.context() as patch:
        patch.setenv("STUB_FAIL", str(scratch.relative_to(config.experiment_dir)))
        jobs = submit(config, STAGES, "local")
        why = [str(job.exception()) for job in jobs]
    assert len(jobs) == 2
    assert all(f"RunsFailed: 1 of 4 runs failed; the same command tries them again\n  {scratch}: RuntimeError: out of "
               "luck" in text for text in why), why
    assert counted() == {"ddpm": 2, "scratch": 1, "mean_shape": 1, "report": 1}  # the pre-training, and the ddpm cell
    jobs = submit(config, STAGES, "local")
    assert [job.result() for job in jobs] == [str(config.experiment_dir / "report/index.html")]
    assert counted() == {"ddpm": 2, "scratch": 2, "mean_shape": 1, "report": 2}
    assert submit(config, STAGES, "local") == []


def test_task_that_reaches_its_time_limit(config, monkeypatch):
    """At submitit's signal it saves, is requeued, and goes on."""
    hung = cell_dir(config, Cell("scratch", 2, 0, 0))
    monkeypatch.setenv("STUB_HANG", str(hung.relative_to(config.experiment_dir)))
    slurm = config.slurm.model_copy(update={"tasks": 1})
    [job] = submit(config.model_copy(update={"slurm": slurm}), ("finetune", "report"), "local")
    stub_stages.wait_until(lambda: counted("hang")["scratch"])
    [task] = [int(line[2]) for line in stub_stages.lines() if line[0] == "hang"]
    os.kill(task, signal.SIGUSR2)
    assert job.result() == str(config.experiment_dir / "report/index.html")
    assert counted("saved") == {"scratch": 1} and counted("end") == {"mean_shape": 1, "ddpm": 1, "scratch": 1,
                                                                     "report": 1}
    assert "Requeued job" in job.stderr() + job.stdout()


@pytest.mark.parametrize("signals, requeued", [
    ((signal.SIGUSR2,), True), ((signal.SIGUSR2, signal.SIGUSR2), True), ((signal.SIGTERM,), False)])
def test_only_the_time_limit_requeues(config, monkeypatch, signals, requeued):
    """While the loop's own handlers are in place: a cancelled task stops and stays so; a second notice does nothing."""
    asked = []

    def study(*_, **__):
        with StopSignal() as stop:
            for number in signals:
                signal.raise_signal(number)
            assert stop.received and asked == []
        raise Interrupted("saved")

    monkeypatch.setattr(cluster, "run_study", study)
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGUSR2, lambda number, frame: asked.append(number))
    try:
        if requeued:
            StudyTask(config, STAGES, {})()
        else:
            with pytest.raises(Interrupted):
                StudyTask(config, STAGES, {})()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert asked == [signal.SIGUSR2] * requeued


def test_what_slurm_gets(config, sbatch, capsys):
    """Two arrays, the second after the first; limits, partition and further parameters of the config; not run here."""
    slurm = config.slurm.model_copy(update={
        "tasks": 3, "partition": "gpu", "timeout_min": 90, "gpus_per_node": 2, "cpus_per_task": 6, "mem_gb": 20.0,
        "parameters": {"slurm_account": "me", "slurm_additional_parameters": {"nice": 7}}})
    finetune = config.finetune.model_copy(update={"draws": (0, 1)})
    config = config.model_copy(update={"slurm": slurm, "finetune": finetune})
    jobs = submit(config, STAGES)
    assert [job.job_id for job in jobs] == ["3_0", "3_1", "3_2"] and stub_stages.lines() == []
    first, second = ((sbatch / name).read_text() for name in ("job2", "job3"))
    for option in ("partition=gpu", "time=90", "gpus-per-node=2", "cpus-per-task=6", "mem=20GB", "account=me", "nice=7",
                   "job-name=tiny", "signal=USR2@90"):
        assert f"#SBATCH --{option}\n" in first and f"#SBATCH --{option}\n" in second, option
    assert "--array" not in first and "#SBATCH --array=0-2%3\n" in second
    assert "dependency" not in first and "#SBATCH --dependency=afterany:2\n" in second
    one, three = (job.submission() for job in (cluster.Job(jobs[0].paths.folder, "2"), jobs[2]))
    assert (one.function.stages, three.function.stages) == (("pretrain",), STAGES)
    assert three._timeout_countdown == REQUEUES and set(three.function.failed_before.values()) == {None}
    assert (f"submitted job 2: 1 task(s) for pretrain; logs in {config.experiment_dir}/slurm\nsubmitted job 3: 3 "
            "task(s) for pretrain finetune report, afterany:2;") in capsys.readouterr().out


def test_refused_in_one_line(config, sbatch, monkeypatch):
    wrong = config.slurm.model_copy(update={"parameters": {"slurm_acount": "me"}})
    said = error_of(submit, config.model_copy(update={"slurm": wrong}), STAGES)
    assert said.startswith("slurm.parameters: Unknown argument 'acount' for executor 'slurm'") and "account" in said
    (sbatch / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition\nspecified: gpu' >&2; exit 1\n")
    assert error_of(submit, config, STAGES) == "--slurm: sbatch: error: invalid partition specified: gpu"
    monkeypatch.setenv("PATH", "/nowhere")
    assert re.match("--slurm: this machine has no sbatch; ", error_of(submit, config, STAGES))


def test_command_line_without_sbatch(config, run_main, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    status, out, error = run_main("study.launch", "--config", tmp_path / "study.json", "--slurm")
    assert (status, out) == (2, "") and re.fullmatch(r"error: --slurm: this machine has no sbatch; [^\n]+\n", error)
    assert not (tmp_path / "runs").exists()


def test_command_line_of_a_finished_study(config, sbatch, run_main, tmp_path, monkeypatch):
    """Nothing is submitted: the report is built where it is missing."""
    for run in study_runs(config, STAGES):
        run.folder.mkdir(parents=True, exist_ok=True)
        for path in run.results:
            path.write_text("{}")
    status, out, _ = run_main("study.launch", "--config", tmp_path / "study.json", "--slurm")
    assert status == 0 and out == f"report: {config.experiment_dir}/report/index.html\n"
    assert sorted(path.name for path in sbatch.iterdir()) == ["sbatch", "srun"]
