"""Run a whole study: pre-train, fine-tune every cell, score it, report. What is done is not done again."""

from __future__ import annotations

import gc
import hashlib
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config.load.config import Config
from core.config.load.load import add_config_arguments, load_config

from core.errors import CommandParser, Interrupted, RunsFailed, UserError, run_command
from core.files import drop_states, write_atomically, write_json
from core.runs.cells import (
    cells,
    check_cell,
    check_pretraining,
    check_ssl,
    is_scored,
    needs_pretraining,
    require_backbone,
    ssl_methods,
)
from core.runs.claims import Claimed, claim
from study.plan import Run, logged, print_plan, studies, study_runs, time_left

if TYPE_CHECKING:
    from core.data.records import DataSource

STAGES = ("pretrain", "ssl", "finetune", "encoders", "report")
DEFAULT_STAGES = ("pretrain", "ssl", "finetune", "report")  # of `encoders` only those who ask have the weights
FUNCTIONS = {  # looked up by name: core imports no stage package
    "pretrain": "ddpm_pretraining.train:pretrain",
    "ssl": "ssl_baselines.train:pretrain_encoder",
    "finetune_cell": "landmarks_finetuning.train:finetune_cell",
    "evaluate": "landmarks_finetuning.evaluate:evaluate",
    "mean_shape": "landmarks_finetuning.evaluate:evaluate_mean_shape",
    "report": "landmarks_finetuning.report.build:build_report",
}
POLL_SECONDS = 5.0  # between two looks at what other processes hold
NEWS_SECONDS = 60.0  # between two lines about it
REPORTED = (".json", ".jsonl", ".csv", ".png", ".npz")  # what of a study a report may show
REPORTING = (".py", ".j2", ".js", ".css", ".csv")  # what of the code makes it
Do = Callable[[list[Run], dict[Path, int | None]], dict[Path, str]]


def function(name: str) -> Callable[..., Any]:
    """The registered stage function."""
    module, _, attribute = FUNCTIONS[name].partition(":")
    return getattr(import_module(module), attribute)


def check_shots(config: Config, source: DataSource) -> None:
    """Fail now, not after pre-training, when a cell asks for labels or splits that are not there."""
    from core.data.dataset import select_shots

    for shots in config.finetune.shots:
        select_shots(source.require("train"), shots, 0, "first")
    source.require(config.evaluation.split)
    if config.finetune.validation == "official":
        source.require("validation")


def check_done(config: Config, stages: tuple[str, ...]) -> None:
    """Fail now when a run that is there was made with other settings: it would neither be used nor be done again."""
    if {"pretrain", "finetune"} & set(stages) and needs_pretraining(config):
        check_pretraining(config)
    for method in ssl_methods(config) if {"ssl", "finetune"} & set(stages) else ():
        check_ssl(config, method)
    for study in studies(config, stages):
        for cell in cells(study):
            check_cell(study, cell)


def check_start_weights(config: Config, to_come: Sequence[str]) -> None:
    """Fail now, not after pre-training, when an encoder that cells start from cannot be had or does not fit.

    The encoders of the backbones in `to_come` are made by this very study.
    """
    from core.networks.encoders import START_WEIGHTS, start_encoder_unet

    for backbone in START_WEIGHTS:
        waiting = any(cell.backbone == backbone and not is_scored(config, cell) for cell in cells(config))
        if waiting and backbone not in to_come:
            start_encoder_unet(config, backbone, channels=1, landmarks=1)


def prepare(config: Config, stages: tuple[str, ...]) -> list[Run]:
    """Check that the study can run from end to end, print its plan and return its runs.

    Where all of them are done, neither the data nor the modules that would read them are touched.
    """
    source, runs = None, study_runs(config, stages)
    if not all(run.done for run in runs):
        from core.data.dataset import load_source

        if "encoders" in stages:
            require_backbone(config, "imagenet")
        source = load_source(config.dataset)
        if studies(config, stages):
            check_shots(config, source)
    check_done(config, stages)
    if source is not None:
        for study in studies(config, stages):
            check_start_weights(study, ssl_methods(config) if "ssl" in stages else ())
    print_plan(config, stages, source)
    return runs


def attempt(run: Run) -> str | None:
    """Train and score a run that is claimed; returns None, or why it failed, which failed.json says as well.

    An interruption passes. The one place that catches Exception: the runs of a study are independent, and what may end
    one (memory, a damaged file, a defect, each library with its own exceptions) has no common base. Nothing is hidden:
    the message is printed and listed, the traceback kept, and the launch ends in status 1.
    """
    try:
        run_dir = function(run.function)(run.config, *run.arguments)
        if run.function == "finetune_cell":
            function("evaluate")(run_dir)
            drop_states(run_dir)
        missing = [path.name for path in run.results if not path.is_file()]
        if missing:
            raise UserError(f"{run.folder} ended without {', '.join(missing)}")
    except Interrupted:
        raise
    except Exception as error:  # noqa: BLE001
        said = " ".join(str(error).split())
        message, trace = said, None
        if not isinstance(error, UserError):
            message, trace = f"{type(error).__name__}: {said}", traceback.format_exc()
        write_json(run.failure_path, {
            "message": message, "time": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
            "step": logged(run.folder / "metrics.jsonl")[1], "traceback": trace})
    else:
        run.failure_path.unlink(missing_ok=True)
        return None
    gc.collect()  # here the traceback is gone: what it held of a GPU's memory is free for the next run
    return message


def failed_at(run: Run) -> int | None:
    """When failed.json was written, None where there is none."""
    return run.failure_path.stat().st_mtime_ns if run.failure_path.is_file() else None


def take(run: Run, failed_before: int | None) -> str | None:
    """Claim a run and do what is left of it; returns why it failed, here or meanwhile in another process.

    Raises Claimed when another process has it now.
    """
    with claim(run.folder):
        if run.done:
            return None
        if failed_at(run) not in (None, failed_before):
            return run.failure()
        return attempt(run)


def run_all(runs: list[Run], failed_before: dict[Path, int | None]) -> dict[Path, str]:
    """Do what is left of `runs`, beside other processes that may do the same; returns {folder: why it failed}.

    What another process holds is left to it and looked at again when nothing else is left; what it leaves undone,
    because it was killed, is done here; what failed there since `failed_before` counts as failed. What needs a run
    waits for it, or fails with it.
    """
    failed: dict[Path, str] = {}
    held: dict[Run, str] = {}  # and by whom
    news = 0.0
    while left := [run for run in runs if not run.done and run.folder not in failed]:
        held = {}
        for run in left:
            if any(run.needs == other.folder and other.folder not in failed and not other.done for other in left):
                continue
            try:
                why = f"it needs {run.needs}" if run.needs in failed else take(run, failed_before[run.folder])
            except Claimed as other:
                held[run] = str(other)
                continue
            if why is not None:
                failed[run.folder] = why
                print(f"failed: {run.folder}: {why}", file=sys.stderr, flush=True)
            print_progress(runs, failed)
            news = 0.0
        if held and not any(run.done or run.folder in failed for run in left):
            if time.monotonic() >= news:
                print_waiting(held, len(left))
                news = time.monotonic() + NEWS_SECONDS
            time.sleep(POLL_SECONDS)
    if held:  # until others had done the last ones
        print_progress(runs, failed)
    return failed


def print_progress(runs: list[Run], failed: Collection[Path]) -> None:
    """How many runs are done and how long the others take."""
    left = [run for run in runs if not run.done and run.folder not in failed]
    done = sum(run.done for run in runs)
    print(f"done {done} of {len(runs)} runs; training time to come: {time_left(left)}", flush=True)


def print_waiting(held: dict[Run, str], left: int) -> None:
    """What is waited for, who does it, and how far it is."""
    run, owner = next(iter(held.items()))
    step = f"step {logged(run.folder / 'metrics.jsonl')[1]} of {run.steps}"
    print(f"waiting for other processes, {left} runs left: {step if run.steps else 'scoring'}; {owner}", flush=True)


def ingredients(experiment_dir: Path) -> str:
    """A digest of names, sizes and times of everything a report is made of and by: the study's files and the code.

    Not the commit: it says nothing of code that was changed since, nor of runs that were deleted.
    """
    report, core = experiment_dir / "report", Path(__file__).resolve().parent
    stage = core.parent / FUNCTIONS["report"].partition(".")[0]
    places = [(experiment_dir, REPORTED), (core, REPORTING), (stage, REPORTING)]
    digest = hashlib.sha256()
    for folder, suffixes in places:
        for path in sorted(folder.rglob("*")):
            if path.suffix in suffixes and report not in path.parents and path.is_file():
                found = path.stat()
                digest.update(f"{path.relative_to(folder)} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def report_page(config: Config) -> Path:
    """The study's report, built unless it is there and made of the same files by the same code."""
    folder = config.experiment_dir / "report"
    page, label = folder / "index.html", folder / "ingredients.sha256"

    def is_current(digest: str) -> bool:
        return page.is_file() and label.is_file() and label.read_text() == digest

    if is_current(ingredients(config.experiment_dir)):
        return page
    with claim(folder, wait=True):
        digest = ingredients(config.experiment_dir)  # before it is built: what changes meanwhile calls for another one
        if not is_current(digest):
            function("report")([config.experiment_dir])
            write_atomically(label, digest.encode())
    return page


def failures_so_far(config: Config, stages: tuple[str, ...]) -> dict[Path, int | None]:
    """When each run of the study failed last: what failed since then failed in this launch."""
    return {run.folder: failed_at(run) for run in study_runs(config, stages)}


def run_study(config: Config, stages: tuple[str, ...], do: Do | None = None,
              failed_before: dict[Path, int | None] | None = None) -> Path | None:
    """Run what is left of `stages`; returns the report's page when there is one.

    `do` is run_all or something like it; `failed_before` the failures_so_far of the launch that this process belongs
    to, None where it is one by itself. Raises UserError before anything is run when the study cannot be run from end to
    end, and RunsFailed after the rest is done and reported when single runs failed.
    """
    failed_before = failures_so_far(config, stages) if failed_before is None else failed_before
    runs = prepare(config, stages)
    failed = (do or run_all)(runs, failed_before)
    worth = not failed or any(run.done for run in runs)
    page = report_page(config) if "report" in stages and worth else None
    if failed:
        listed = "".join(f"\n  {folder}: {why}" for folder, why in failed.items())
        raise RunsFailed(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again{listed}")
    return page


def launched(config: Config, stages: tuple[str, ...], workers: int | None, gpus: int | None, slurm: bool
             ) -> Path | None:
    """The study run here, by one process or several, or submitted; returns the report's page when there is one."""
    do = None
    if workers is not None or gpus is not None:
        if slurm:
            raise UserError("--slurm goes without --workers and --gpus: slurm.tasks says how many share the study, "
                            "slurm.gpus_per_node how many GPUs each has")
        from study.workers import gpus_of_workers, spread

        do = partial(spread, gpus=gpus_of_workers(config.experiment.device, workers, gpus))
    if slurm:
        from study.cluster import submit

        if submit(config, stages):
            return None
    return run_study(config, stages, do)


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="./launch_experiments.sh", description=__doc__,
        epilog="example: ./launch_experiments.sh --config configs/cephalo.json --stages pretrain finetune report")
    add_config_arguments(parser)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(DEFAULT_STAGES),
                        help="encoders: compare VGG19, DenseNet161 and ResNeXt50 on ImageNet weights")
    parser.add_argument("--shots", nargs="+", type=int, help="numbers of labelled images, instead of the config's")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds, instead of the config's")
    parser.add_argument("--workers", type=int, metavar="N",
                        help="share the runs among N processes, which take the GPUs in turn, or the CPU")
    parser.add_argument("--gpus", type=int, metavar="N", help="use N GPUs of this machine, a process for each")
    parser.add_argument("--slurm", action="store_true",
                        help="submit the study as a job array, as the config's section slurm says, and return")
    parser.add_argument("--dry-run", action="store_true", help="print what is left and how long it takes, and stop")
    arguments = parser.parse_args()
    overrides = list(arguments.set)
    overrides += [f"finetune.shots={arguments.shots}"] if arguments.shots else []
    overrides += [f"finetune.seeds={arguments.seeds}"] if arguments.seeds else []
    config = load_config(arguments.config, overrides)
    stages = tuple(stage for stage in STAGES if stage in arguments.stages)
    if arguments.dry_run:
        prepare(config, stages)
        return
    page = launched(config, stages, arguments.workers, arguments.gpus, arguments.slurm)
    if page is not None:
        print(f"report: {page}")


if __name__ == "__main__":
    run_command(main)
