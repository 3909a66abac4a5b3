"""What a study comes down to: its runs in order, what is left of them, and how long that takes, as measured so far."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.config.config import Config
from core.config.finetune import BACKBONES
from core.config.ssl import SSL_METHODS
from core.runs.cells import cells, encoder_studies, needs_pretraining, settings_compared, ssl_methods
from core.runs.places import MEAN_SHAPE, Cell, cell_dir, ddpm_paths, encoder_path, is_pretrained, ssl_dir
from core.training.run_log import read_metrics

if TYPE_CHECKING:
    from core.data.records import DataSource  # imports for seconds: a plan of what is done needs no data


@dataclass(frozen=True, eq=False)
class Run:
    """Something that is trained or scored in a folder of its own, by one process at a time.

    `stage` is run with `config` and `arguments`; the run is done when its `results` are there. Runs of one `kind` take
    the same time a step. `needs` is the folder of the run that it starts from.
    """

    stage: Literal["pretrain", "ssl", "mean_shape", "finetune"]
    config: Config
    arguments: tuple[Any, ...]
    kind: str
    folder: Path
    results: tuple[Path, ...]
    steps: int
    needs: Path | None = None

    @property
    def done(self) -> bool:
        """Whether its results are there."""
        return all(path.is_file() for path in self.results)

    @property
    def failure_path(self) -> Path:
        """failed.json: why, when and at which step the last try ended, where it failed."""
        return self.folder / "failed.json"

    def failure(self) -> str | None:
        """The message of failed.json, where there is one."""
        path = self.failure_path
        return json.loads(path.read_text(encoding="utf8"))["message"] if path.is_file() else None


def studies(config: Config, stages: tuple[str, ...]) -> list[Config]:
    """The configs whose cells `stages` run: one for each of the settings compared, and of them for each encoder."""
    chosen = ([config] if "finetune" in stages else []) + (encoder_studies(config) if "encoders" in stages else [])
    return [each for study in chosen for each in settings_compared(study)]


def study_runs(config: Config, stages: tuple[str, ...]) -> list[Run]:
    """Every run of `stages`, once, in the order in which they are begun."""
    runs = []
    if "pretrain" in stages and needs_pretraining(config):
        runs.append(Run("pretrain", config, (), "pretrain", config.experiment_dir / "ddpm", ddpm_paths(config),
                        config.ddpm.iterations))
    for method in ssl_methods(config) if "ssl" in stages else ():
        runs.append(Run("ssl", config, (method,), f"ssl {method}", ssl_dir(config, method),
                        (encoder_path(config, method),), config.ssl.iterations))
    runs += [cell_run(study, cell) for study in studies(config, stages) for cell in cells(study)]
    unique: dict[Path, Run] = {}
    for run in runs:
        unique.setdefault(run.folder, run)  # studies of encoders share the guesses
    return list(unique.values())


def cell_run(config: Config, cell: Cell) -> Run:
    """The run of a fine-tuning cell, or of the mean shape, which takes no step."""
    folder, finetune = cell_dir(config, cell), config.finetune
    results = (folder / "metrics.json",)
    if cell.backbone == MEAN_SHAPE:
        return Run("mean_shape", config, (cell,), MEAN_SHAPE, folder, results, 0)
    group = finetune.batch_size * finetune.accumulation
    steps = finetune.optimiser_steps(-(-cell.shots // group))
    needs = None
    if cell.backbone == "ddpm" and needs_pretraining(config):
        needs = config.experiment_dir / "ddpm"
    elif cell.backbone in SSL_METHODS and cell.backbone in ssl_methods(config):
        needs = ssl_dir(config, cell.backbone)
    kind = f"{cell.backbone} {finetune.encoder}" if BACKBONES[cell.backbone] == "encoder_unet" else cell.backbone
    return Run("finetune", config, (cell,), kind, folder, results, steps, needs)


def print_plan(config: Config, stages: tuple[str, ...], source: DataSource | None) -> None:
    """Stages, splits and leaks of `source`, if it was read, checkpoints found, runs left, steps and time to come."""
    runs = study_runs(config, stages)
    print(f"study {config.experiment.name} in {config.experiment_dir}; stages {' '.join(stages)}")
    if source is not None:
        counts = ", ".join(f"{len(records)} {name}" for name, records in source.splits.items())
        print(f"data  {config.dataset.name} ({source.layout}) at {source.root}: {counts}; "
              f"{len(source.landmark_names)} landmarks; {len(source.pretraining_records())} images for pre-training")
        if studies(config, stages):
            from core.data.leaks import find_leaks, leak_lines

            for line in leak_lines(find_leaks(source, config.dataset)):
                print(line)
    if "pretrain" in stages and needs_pretraining(config):
        found = sorted(path.name for path in (config.experiment_dir / "ddpm").glob("ema_iter*.safetensors"))
        print(f"pretrain  {'done' if is_pretrained(config) else f'{config.ddpm.iterations} steps'}; checkpoints found: "
              f"{', '.join(found) or 'none'}")
    for run in runs:
        if run.stage == "ssl":
            print(f"ssl  {run.arguments[0]}: {'done' if run.done else f'{run.steps} steps'}")
    if studies(config, stages):
        print_cells([run for run in runs if run.stage in ("mean_shape", "finetune")])
    for run in runs:
        if not run.done and run.failure() is not None:
            print(f"failed last time, to be tried again: {run.folder}: {run.failure()}")
    print(f"optimiser steps to come: {sum(steps_left(run) for run in runs)}")
    measured = {kind: seconds_per_step(kind, runs) for kind in dict.fromkeys(run.kind for run in runs if run.steps)}
    rates = [f"{kind} {rate:.3g} s" for kind, rate in measured.items() if rate is not None]
    print(f"a step takes, by the runs of this study: {', '.join(rates) or 'no run measured yet'}")
    print(f"training time to come: {time_left(runs)}")


def print_cells(runs: list[Run]) -> None:
    """How many fine-tuning runs there are and which of them are left."""
    left = [run for run in runs if not run.done]
    print(f"finetune  {len(runs)} runs, {len(runs) - len(left)} done, {len(left)} left "
          f"({sum(steps_left(run) for run in left)} steps at most)")
    for run in left:
        print(f"    {run.arguments[0].backbone:<11}{run.folder}")


def logged(path: Path) -> tuple[float, int]:
    """Seconds that a metrics.jsonl accounts for, and the steps done in them."""
    timed = [line for line in read_metrics(path) if "seconds" in line]
    return sum(line["seconds"] for line in timed), timed[-1]["step"] if timed else 0


def steps_left(run: Run) -> int:
    """Optimiser steps until a run is done, at most."""
    return 0 if run.done else max(0, run.steps - logged(run.folder / "metrics.jsonl")[1])


def seconds_per_step(kind: str, runs: list[Run]) -> float | None:
    """Mean over what was done of `kind`, finished or begun, whatever the shots; None when nothing was measured.

    Of fine-tuning in the variants of `runs`, or, for the diffusion U-Net, where these are all new, in its other ones.
    """
    folders = {run.folder if run.stage != "finetune" else run.folder.parent for run in runs if run.kind == kind}
    paths = [{path for folder in folders for pattern in ("metrics.jsonl", "shots*/metrics.jsonl")
              for path in folder.glob(pattern)}]
    if BACKBONES.get(kind) == "unet":
        paths.append({path for folder in folders for path in folder.parent.glob("*/shots*/metrics.jsonl")})
    for some in paths:
        measured = [logged(path) for path in some]
        steps = sum(count for _, count in measured)
        if steps:
            return sum(seconds for seconds, _ in measured) / steps
    return None


def time_left(runs: list[Run]) -> str:
    """How long one process trains for what is left of `runs`, from the rates of this study; scoring is not counted."""
    steps: dict[str, int] = {}
    for run in runs:
        left = steps_left(run)
        if left:
            steps[run.kind] = steps.get(run.kind, 0) + left
    rates = {kind: seconds_per_step(kind, runs) for kind in steps}
    known = [steps[kind] * rate for kind, rate in rates.items() if rate is not None]
    parts = [f"about {duration(sum(known))}"] if known or not steps else []
    unknown = [f"{count} steps of {kind}" for kind, count in steps.items() if rates[kind] is None]
    parts += [f"{', '.join(unknown)} (no run measured yet)"] if unknown else []
    return " and ".join(parts)


def duration(seconds: float) -> str:
    """90 s, 25 min or 3.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
