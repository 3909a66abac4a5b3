"""Run a whole study: pre-train, fine-tune every cell, score it, report. What is done is not done again."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

from core.config.config import Config
from core.config.load import add_config_arguments, load_config
from core.errors import CommandParser, UserError, run_command
from core.runs.claims import claim
from study.check.launched import tell_check
from study.prepare import prepare, with_inputs
from study.run import run_study
from study.runner import set_aside
from study.runs import study_runs

STAGES = ("pretrain", "ssl", "finetune", "encoders", "report")
DEFAULT_STAGES = ("pretrain", "ssl", "finetune", "report")  # of `encoders` only those who ask have the weights


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


def set_stale_pretraining_aside(config: Config, stages: tuple[str, ...]) -> None:
    """Make room for pre-trainings of the images there are now where they were done with others."""
    from core.data.source import load_source

    runs = [run for run in study_runs(config, stages) if run.is_pretraining]
    for run in with_inputs(runs, load_source(config.dataset)):
        with claim(run.folder):
            reason = run.stale()
            if reason is not None:
                set_aside(run, reason)


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
    parser.add_argument("--redo-pretraining", action="store_true",
                        help="set pre-trainings of other images than there are now aside, and pre-train again")
    parser.add_argument("--dry-run", action="store_true",
                        help="print what is left, how long it takes and what the check said, and stop")
    arguments = parser.parse_args()
    overrides = list(arguments.set)
    overrides += [f"finetune.shots={arguments.shots}"] if arguments.shots else []
    overrides += [f"finetune.seeds={arguments.seeds}"] if arguments.seeds else []
    config = load_config(arguments.config, overrides, ["imagenet"] if "encoders" in arguments.stages else [])
    stages = tuple(stage for stage in STAGES if stage in arguments.stages)
    if arguments.redo_pretraining and not arguments.dry_run:
        set_stale_pretraining_aside(config, stages)
    if arguments.dry_run:
        words = ["python", "-m", "study.check", "--config", str(arguments.config)]
        words += ["--set", *overrides] if overrides else []
        tell_check(config, prepare(config, stages), shlex.join(words))
        return
    launched(config, stages, arguments.workers, arguments.gpus, arguments.slurm)


if __name__ == "__main__":
    run_command(main)
