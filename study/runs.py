"""What a study comes down to: its runs in the order in which they are begun, and what is done of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from core.config.config import Config
from core.config.second_stage import FOLDER, second_of
from core.config.starts import BACKBONES, MEAN_SHAPE, SSL_METHODS
from core.errors import DamagedFile
from core.formats.json_files import read_object
from core.runs.cells import (
    cells,
    encoder_studies,
    needs_pretraining,
    pretraining_configs,
    settings_compared,
    ssl_methods,
)
from core.runs.inputs import SCORED, GroupedImages, image_changes, input_changes, read_record
from core.runs.places import (
    Cell,
    cell_dir,
    choosing_path,
    ddpm_paths,
    encoder_path,
    second_start_path,
    ssl_dir,
    start_path,
)
from core.training.run_log import logged


@dataclass(frozen=True, eq=False)
class Run:
    """Something that is trained or scored in a folder of its own, by one process at a time.

    `stage` is run with `config` and `arguments`; the run is done when its `results` are there. Runs of one `kind` take
    the same time a step. `needs` are the folders of the runs that it starts from, `start` the weights file in one of
    them or elsewhere, `second_start` that of its second stage, `chosen_by` the one whose features choose its images.
    `inputs` are the images that the data set gives it now, `test` those that it is scored on (None: known to be as they
    were, or not known yet).
    """

    stage: Literal["pretrain", "ssl", "mean_shape", "finetune", "pool"]
    config: Config
    arguments: tuple[Any, ...]
    kind: str
    folder: Path
    results: tuple[Path, ...]
    steps: int
    needs: tuple[Path, ...] = ()
    start: Path | None = None
    second_start: Path | None = None
    chosen_by: Path | None = None
    inputs: GroupedImages | None = None
    test: GroupedImages | None = None

    @property
    def done(self) -> bool:
        """Whether its results are there, whole, and made from what it would be made from now."""
        return self.ended and self.stale() is None and self.outdated() is None

    @property
    def ended(self) -> bool:
        """Whether its results are there, whatever they were made from."""
        return all(path.is_file() for path in self.results) and not self.unfinished_steps

    @property
    def unfinished_steps(self) -> int:
        """Steps that a pre-training whose checkpoints are there has still to take: its iterations were raised."""
        step = logged(self.folder / "metrics.jsonl")[1] if self.stage == "pretrain" else 0
        return max(0, self.steps - step) if step else 0

    @property
    def is_pretraining(self) -> bool:
        """Whether others start from it."""
        return self.stage in ("pretrain", "ssl")

    def stale(self) -> str | None:
        """How what it was made from differs from what it would be made from now; None where it does not.

        A pre-training that has ended stands although unlabelled images were added since.
        """
        may_grow = self.is_pretraining and self.ended
        changes = (input_changes(self.folder, self.inputs, self.start, may_grow, self.chosen_by),
                   input_changes(self.folder / FOLDER, None, self.second_start))
        return "; ".join(change for change in changes if change is not None) or None

    def outdated(self) -> str | None:
        """How the test images that it was scored on differ from those there are now; None where they do not."""
        scores = [path / "metrics.json" for path in self.needs] if self.stage == "pool" else []
        if self.ended and any(path.is_file() and path.stat().st_mtime_ns > self.results[0].stat().st_mtime_ns
                              for path in scores):
            return "a fold was scored since"
        if self.test is None:
            return None
        record = read_record(self.folder / SCORED)
        return None if record is None else "; ".join(image_changes(record["images"], self.test)) or None

    @property
    def failure_path(self) -> Path:
        """failed.json: why, when and at which step the last try ended, where it failed."""
        return self.folder / "failed.json"

    def failure(self) -> str | None:
        """The message of failed.json, where there is one."""
        path = self.failure_path
        if not path.is_file():
            return None
        try:
            return str(read_object(path, "the run is tried again").get("message", "for an unknown reason"))
        except DamagedFile as error:
            return str(error)


def studies(config: Config, stages: tuple[str, ...]) -> list[Config]:
    """The configs whose cells `stages` run: one for each of the settings compared, and of them for each encoder."""
    chosen = ([config] if "finetune" in stages else []) + (encoder_studies(config) if "encoders" in stages else [])
    return [each for study in chosen for each in settings_compared(study)]


def study_runs(config: Config, stages: tuple[str, ...]) -> list[Run]:
    """Every run of `stages`, once, in the order in which they are begun."""
    runs = []
    for each in pretraining_configs(config) if "pretrain" in stages else ():
        kind = "pretrain" if each is config else "pretrain on crops"
        runs.append(Run("pretrain", each, (), kind, each.experiment_dir / "ddpm", ddpm_paths(each),
                        each.ddpm.iterations))
    for method in ssl_methods(config.finetune) if "ssl" in stages else ():
        runs.append(Run("ssl", config, (method,), f"ssl {method}", ssl_dir(config, method),
                        (encoder_path(config, method),), config.ssl.iterations))
    runs += [cell_run(study, cell) for study in studies(config, stages) for cell in cells(study)]
    unique: dict[Path, Run] = {}
    for run in runs:
        unique.setdefault(run.folder, run)  # studies of encoders share the guesses
    return list(unique.values())


def cell_run(config: Config, cell: Cell) -> Run:
    """The run of a fine-tuning cell, of the mean shape, which takes no step, or of what joins their folds."""
    folder, finetune = cell_dir(config, cell), config.finetune
    results = (folder / "metrics.json",)
    chosen_by = choosing_path(config) if finetune.selection == "coverage" else None
    if config.evaluation.folds is not None and cell.fold is None:
        folds = tuple(cell_dir(config, replace(cell, fold=number + 1)) for number in range(config.evaluation.folds))
        start = None if cell.backbone == MEAN_SHAPE else start_path(config, cell.backbone)
        return Run("pool", config, (cell,), "pool", folder, results, 0, folds, start)
    needs: tuple[Path, ...] = ()
    if chosen_by is not None and needs_pretraining(finetune):
        needs = (config.experiment_dir / "ddpm",)
    if cell.backbone == MEAN_SHAPE:
        return Run("mean_shape", config, (cell,), MEAN_SHAPE, folder, results, 0, needs, chosen_by=chosen_by)
    steps = optimiser_steps(config, cell, finetune.self_training.images)
    if cell.backbone == "ddpm":
        needs = tuple(each.experiment_dir / "ddpm" for each in pretraining_configs(config))
    elif cell.backbone in SSL_METHODS and cell.backbone in ssl_methods(config.finetune):
        needs += (ssl_dir(config, cell.backbone),)
    kind = f"{cell.backbone} {finetune.encoder}" if BACKBONES[cell.backbone] == "encoder_unet" else cell.backbone
    second_start = None
    if second_of(config, cell.backbone) is not None:
        second_start = second_start_path(config, cell.backbone)
    return Run("finetune", config, (cell,), kind, folder, results, steps, needs, start_path(config, cell.backbone),
               second_start, chosen_by)


def optimiser_steps(config: Config, cell: Cell, unlabelled: int) -> int:
    """Those of a cell's stages, in its first training and its rounds of self-training on so many images."""
    finetune, total = config.finetune, 0
    settings = finetune.self_training
    for number in range((settings.rounds_of(cell.shots) if unlabelled else 0) + 1):
        answered = unlabelled if number or settings.matches(cell.backbone, cell.shots) else 0
        second = second_of(config, cell.backbone, cell.shots, answered)
        total += finetune.optimiser_steps(-(-(cell.shots + answered) // (finetune.batch_size * finetune.accumulation)))
        total += 0 if second is None else second.finetune.optimiser_steps(0)
    return total
