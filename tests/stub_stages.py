"""Stages that only write down what they are called for, for tests of the launcher: `python -m tests.stub_stages`.

Every call adds `begin` and `end` lines with the run's folder and the process to $STUB_LOG. $STUB_HANG names a folder
whose run never ends when it is begun first, but is `saved` at a Ctrl-C (with $STUB_CHILD it has a process that outlives
it), $STUB_FAIL one that fails; pre-training lasts until $STUB_OTHERS other runs have ended; two launchers of the same
$STUB_START wait for each other; $STUB_GPUS are the machine's, which pre-train together with $STUB_TOGETHER. Imports
nothing heavy.
"""

import os
import time
from pathlib import Path

from core.errors import run_command
from core.runs.places import cell_dir, ddpm_paths
from study import cluster, launch, report_page, run, runner, workers
from study.cluster import StudyTask
from study.runs import study_runs

LIMIT_SECONDS = 100


def lines() -> list[list[str]]:
    """[what, folder, process] of every call so far."""
    log = Path(os.environ["STUB_LOG"])
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def note(what: str, folder: Path) -> None:
    """One line, whole, also beside other processes."""
    with Path(os.environ["STUB_LOG"]).open("a") as file:
        file.write(f"{what} {folder} {os.getpid()}\n")


def wait_until(condition) -> None:
    """Poll; TimeoutError when it takes too long."""
    end = time.monotonic() + LIMIT_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("waited in vain")
        time.sleep(0.02)


def work(folder: Path, *results: Path) -> Path:
    """A run of a fifth of a second."""
    note("begin", folder)
    folder.mkdir(parents=True, exist_ok=True)
    hang = os.environ.get("STUB_HANG")
    fail = os.environ.get("STUB_FAIL")
    if fail and str(folder).endswith(fail):
        raise RuntimeError("out of luck")
    (folder / "gpu").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if hang and str(folder).endswith(hang) and sum(line[:2] == ["begin", str(folder)] for line in lines()) == 1:
        note("hang", folder)
        if "STUB_CHILD" in os.environ and os.fork() == 0:  # as a loader's worker that outlives its owner
            note("child", folder)
            time.sleep(LIMIT_SECONDS)
            os._exit(0)
        try:
            time.sleep(LIMIT_SECONDS)
        except KeyboardInterrupt:
            note("saved", folder)
            raise
    time.sleep(0.2)
    if folder.name == "ddpm":
        wait_until(lambda: sum(line[0] == "end" for line in lines()) >= int(os.environ.get("STUB_OTHERS", 0)))
        time.sleep(0.5)
    note("end", folder)
    for path in results:
        path.write_text("{}")
    return folder


def pretrain(config):
    return work(config.experiment_dir / "ddpm", *ddpm_paths(config))


def finetune_cell(config, cell):
    return work(cell_dir(config, cell))


def mean_shape(config, cell):
    return work(cell_dir(config, cell), cell_dir(config, cell) / "metrics.json")


def evaluate(run_dir):
    (run_dir / "metrics.json").write_text("{}")


def stub(patch) -> None:
    """Put these stages in place of the real ones by `patch(module, name, value)`, without a look at data."""
    patch(runner, "perform", perform)
    patch(runner, "trains_on_gpu", lambda run: False)
    patch(report_page, "build", build)
    patch(run, "prepare", study_runs)
    patch(run, "data_stamp", lambda dataset: "")
    patch(run, "check_launch", lambda *_: None)
    patch(cluster, "prepare", study_runs)


def build(experiment_dir):
    return work(experiment_dir / "report", experiment_dir / "report/index.html")


def perform(asked):
    """In place of study.runner's."""
    if asked.stage == "pretrain":
        pretrain(asked.config)
    elif asked.stage == "mean_shape":
        mean_shape(asked.config, *asked.arguments)
    else:
        evaluate(finetune_cell(asked.config, *asked.arguments))


def pretrain_together(run, gpus) -> None:
    """In place of torchrun's job; without $STUB_TOGETHER it is left to the workers."""
    if "STUB_TOGETHER" in os.environ:
        print(f"pre-training on GPUs {', '.join(gpus)} together", flush=True)
        note("together", run.folder)
        run.folder.mkdir(parents=True)
        for path in run.results:
            path.write_text("{}")


def install() -> None:
    """Have the launcher call these stages, without a look at data."""
    stub(setattr)
    runner.POLL_SECONDS = 0.05
    if "STUB_GPUS" in os.environ:
        workers.visible_gpus = os.environ["STUB_GPUS"].split
    workers.pretrain_together = pretrain_together


class StubTask(StudyTask):
    """A task of a job array with these stages."""

    def __call__(self) -> str | None:
        """As usual."""
        install()
        return super().__call__()


def main() -> None:
    """The launcher with these stages."""
    install()
    if "STUB_START" in os.environ:
        start = Path(os.environ["STUB_START"])
        start.mkdir(exist_ok=True)
        (start / str(os.getpid())).touch()
        wait_until(lambda: len(list(start.iterdir())) == 2)
    launch.main()


if __name__ == "__mp_main__":  # in a worker of such a launcher
    install()
if __name__ == "__main__":
    run_command(main)
