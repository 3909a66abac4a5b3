"""What a study comes down to: its runs in order, what is left of them, and how long that takes, as measured so far."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from core.config.config import Config
from core.errors import UserError
from core.runs.cells import pretraining_configs
from core.runs.inputs import INPUTS
from core.runs.places import is_pretrained
from study.runs import Run, studies
from study.timing import seconds_per_step, steps_left, time_left

if TYPE_CHECKING:
    from core.data.records import DataSource  # imports for seconds: a plan of what is done needs no data










def print_plan(config: Config, stages: tuple[str, ...], source: DataSource | None, runs: list[Run]) -> None:
    """Stages, splits and leaks of `source`, if it was read, checkpoints found, runs left, steps and time to come."""
    print(f"study {config.experiment.name} in {config.experiment_dir}; stages {' '.join(stages)}")
    if source is not None:
        counts = ", ".join(f"{len(records)} {name}" for name, records in source.splits.items())
        print(f"data  {config.dataset.name} ({source.layout}) at {source.root}: {counts}; "
              f"{len(source.landmark_names)} landmarks; {len(source.pretraining_records())} images for pre-training")
        if studies(config, stages):
            from core.data.leaks import find_leaks, leak_lines

            if config.evaluation.folds is not None:
                print(f"note  cross-validation: {len(source.splits['train'])} labels in {config.evaluation.folds} "
                      "folds, each predicted by runs that did not see it; pre-training sees all images, without labels")
            elif source.unscored:
                print("note  every label is for training (dataset.json gives no splits): a fixed schedule, and "
                      "predictions on unlabelled images in place of a score")
                labels, shots = len(source.splits["train"]), max(config.finetune.shots)
                if shots < labels:
                    print(f"note  {shots} of the {labels} labels train, as finetune.shots says; --shots {labels} takes "
                          "all")
            print_equal_draws(config, len(source.splits["train"]))
            for line in leak_lines(find_leaks(source, config.dataset)):
                print(line)
    if source is not None:
        print_device(config.experiment.device)
    for each in pretraining_configs(config) if "pretrain" in stages else ():
        checkpoints = sorted(path.name for path in (each.experiment_dir / "ddpm").glob("ema_iter*.safetensors"))
        print(f"pretrain{'' if each is config else ' on crops'}  "
              f"{'done' if is_pretrained(each) else f'{each.ddpm.iterations} steps'}; checkpoints found: "
              f"{', '.join(checkpoints) or 'none'}")
    print_other_inputs(runs)
    for run in runs:
        if run.stage == "ssl":
            print(f"ssl  {run.arguments[0]}: {'done' if run.done else f'{run.steps} steps'}")
    if studies(config, stages):
        print_cells([run for run in runs if run.stage in ("mean_shape", "finetune", "pool")])
    for run in runs:
        if not run.done and run.failure() is not None:
            print(f"failed last time, to be tried again: {run.folder}: {run.failure()}")
    print(f"optimiser steps to come: {sum(steps_left(run) for run in runs)}")
    measured = {kind: seconds_per_step(kind, runs) for kind in dict.fromkeys(run.kind for run in runs if run.steps)}
    rates = [f"{kind} {rate:.3g} s" for kind, rate in measured.items() if rate is not None]
    print(f"a step takes, by the runs of this study: {', '.join(rates) or 'no run measured yet'}")
    print(f"training time to come: {time_left(runs)}")


def print_equal_draws(config: Config, labels: int) -> None:
    """A note where each draw takes all of the `labels`: what differs between them is the training's own chance."""
    finetune = config.finetune
    held_out = isinstance(finetune.validation, int)  # drawn as well, so that each draw trains on others
    if config.evaluation.folds is None and not held_out and labels in finetune.shots and len(finetune.draws) > 1:
        print(f"note  each draw of {labels} labels takes all {labels}: finetune.draws [{finetune.draws[0]}] trains on "
              "them once")


def print_device(name: str) -> None:
    """A note where this machine lacks the device: a study may be planned on another machine than it runs on."""
    from core.training.device import resolve_device

    try:
        resolve_device(name)
    except UserError as error:
        print(f"note  {error}; on this machine every run that trains would fail")


def print_other_inputs(runs: list[Run]) -> None:
    """Runs made from, or scored on, other data than there are now, by their reasons; and those that do not say."""
    stale = Counter(reason for run in runs if (reason := run.stale()) is not None)
    for reason, count in stale.items():
        print(f"stale  {count} run{'s' * (count > 1)}, to be set aside and done again: {reason}")
    outdated = Counter(reason for run in runs if run.stale() is None and (reason := run.outdated()) is not None)
    for reason, count in outdated.items():
        print(f"scored on other images  {count} run{'s' * (count > 1)}, to be scored again: {reason}")
    unknown = sum(run.ended and not (run.folder / INPUTS).is_file() for run in runs)
    if unknown:
        print(f"unverified  {unknown} runs record no inputs (they are of an older version): taken as they are")


def print_cells(runs: list[Run]) -> None:
    """How many fine-tuning runs there are and which of them are left."""
    remaining = [run for run in runs if not run.done]
    print(f"finetune  {len(runs)} runs, {len(runs) - len(remaining)} done, {len(remaining)} left "
          f"({sum(steps_left(run) for run in remaining)} steps at most)")
    for run in remaining:
        print(f"    {run.arguments[0].backbone:<11}{run.folder}")










