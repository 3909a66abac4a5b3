"""What a fine-tuning run trains, one after the other: a detector of whole images, and one of finer crops."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from core.config.config import Config
from core.config.recipes import recipe
from core.config.second_stage import second_of
from core.data.dataset import ImageSet, load_images
from core.data.records import Record
from core.errors import UserError
from core.networks.unet import UNet
from core.runs.identity import training_settings
from core.runs.inputs import GroupedImages, write_inputs
from core.runs.places import Cell, second_start_path, start_path
from core.runs.record import write_run_config
from core.training.batches import BatchPlan
from core.training.device import resolve_device, resolve_precision
from core.training.loop import LoopSettings, Training, train
from core.training.memory import Step, fit_step
from landmarks_finetuning.decoding import sigma_pixels
from landmarks_finetuning.detectors.interface import Kind, Network, StageTask
from landmarks_finetuning.detectors.registry import DETECTORS, kind_of
from landmarks_finetuning.inference import TrainedDetector
from landmarks_finetuning.losses import LOSSES
from landmarks_finetuning.predictions import find_landmarks
from landmarks_finetuning.refinement import FirstAnswers, first_errors, guessed_errors
from landmarks_finetuning.regression import WeightedImages
from landmarks_finetuning.self_training import mixed_order
from landmarks_finetuning.shape import Shape


class CellData(NamedTuple):
    """The images of a cell: labelled ones, and unlabelled ones with the answers of the round before."""

    training: tuple[Record, ...]
    validation: tuple[Record, ...]
    landmark_names: tuple[str, ...]
    digests: GroupedImages
    answered: tuple[Record, ...] = ()
    certainty: np.ndarray | None = None  # (answered images, N)
    rounds: int = 0  # of self-training, of the whole run
    chosen: tuple[str, ...] | None = None  # under finetune.selection "coverage": ids, and the weights that chose them
    chosen_by: Path | None = None
    spacing_mm: tuple[float, ...] | None = None  # the data set's own, see core.data.records.DataSource

    def load(self, config: Config) -> tuple[WeightedImages, ImageSet | None]:
        """Training and validation images as `config` has them."""
        images = load_images((*self.training, *self.answered), config.dataset)
        validation = load_images(self.validation, config.dataset) if self.validation else None
        if self.certainty is None:
            return WeightedImages(images, np.arange(len(self.training))), validation
        settings = config.finetune.self_training
        weights = np.concatenate([np.ones((len(self.training), len(self.landmark_names))),
                                  self.certainty**settings.power])
        order = mixed_order(len(self.training), len(self.answered), settings.share)
        return WeightedImages(images, order, weights), validation


class Stage(NamedTuple):
    """One training of a run: its folder, what makes it, and the command that continues it."""

    folder: Path
    cell: Cell
    data: CellData
    resume: str | None
    command: str

    def run(self, config: Config, task: StageTask, model: Network, plan: BatchPlan, start: Path | None,
            name: str = "") -> None:
        """Train `model`, or continue where it stopped, beside a record of what it is made from."""
        write_run_config(self.folder, config.plain(), {"stage": "finetune", **task.header})
        write_inputs(self.folder, self.data.digests, start, self.data.chosen_by)
        resume = "last" if self.resume is None and (self.folder / "last.pt").exists() else self.resume
        settings = loop_settings(config, self.cell, plan, name, bool(self.data.validation))
        training = Training(model, task, plan, fitting(model, config, settings))
        train(training, self.folder, resume, self.command)


def train_first(config: Config, stage: Stage) -> None:
    """Train the detector of whole images, or of random crops of them."""
    images, validation = stage.data.load(config)
    kind = kind_of(stage.cell.backbone)
    model, header = fresh_detector(config, stage.cell, stage.data, images, kind)
    task = kind.task(config, stage.folder, header, images, validation, kind)
    plan = batch_plan(config, stage.cell, task.count, kind)
    stage.run(config, task, model, plan, start_path(config, stage.cell.backbone))


def train_second(config: Config, stage: Stage) -> None:
    """Train the detector of crops about the answers of the first one, which is done and lies a folder above."""
    second = second_of(config, stage.cell.backbone, stage.cell.shots, len(stage.data.answered))
    start = second_start_path(config, stage.cell.backbone)
    again = kind_of(stage.cell.backbone).second
    if second is None or again is None:
        raise ValueError(f"{stage.cell.backbone} has one stage")
    kind = kind_of(stage.cell.backbone) if again.network is None else DETECTORS[again.network]
    images, validation = stage.data.load(second)
    first = answer_first(TrainedDetector(stage.folder.parent / "best.safetensors"), stage.data, config, validation,
                         second.dataset.image_size)
    model, header = fresh_detector(second, stage.cell, stage.data, images, kind, start)
    header |= {"kind": "second stage", "spread_pixels": first.spread}
    task = again.task(second, stage.folder, header, images, validation, kind, config, first)
    stage.run(second, task, model, batch_plan(second, stage.cell, task.count, kind), start, "refined ")


def fresh_detector(config: Config, cell: Cell, data: CellData, images: WeightedImages, kind: Kind,
                   start: Path | None = None) -> tuple[Network, dict[str, Any]]:
    """A detector as it starts, and the header of its weights file; `start` as in interface.Start."""
    torch.manual_seed(cell_seed(config, cell))
    model = kind.start(config, cell.backbone, images.images.images.shape[1], len(data.landmark_names), start)
    labelled = images.images.truth[: len(data.training)].numpy()
    shape = Shape.of(labelled, config.finetune.augmentation, config.finetune.shape_modes)
    return model, {
        "kind": "detector", "backbone": cell.backbone, **model.identity, "shots": cell.shots, "draw": cell.draw,
        "seed": cell.seed, "dataset": config.dataset.name, "landmark_names": list(data.landmark_names),
        "sigma_pixels": sigma_pixels(config.finetune.sigma, config.dataset),
        "spacing_mm": None if data.spacing_mm is None else list(reversed(data.spacing_mm)),
        **shape.header(),
        "training_images": [record.id for record in data.training], "validation_labels": len(data.validation),
        "rounds": data.rounds,
        **({} if cell.fold is None else {"fold": cell.fold, "folds": config.evaluation.folds}),
        **({} if data.chosen is None else {"chosen_images": list(data.chosen)})}


def cell_seed(config: Config, cell: Cell) -> int:
    """Of initialisation, order and augmentation."""
    return config.experiment.seed + 1000 * cell.seed + cell.draw


def batch_plan(config: Config, cell: Cell, count: int, kind: Kind) -> BatchPlan:
    """Which of `count` images, or crops, each step sees. UserError where batch normalisation would see too little."""
    finetune = recipe(config, cell.backbone).finetune
    plan = BatchPlan(count, finetune.batch_size, finetune.accumulation, finetune.sampling, False,
                     cell_seed(config, cell))
    check_batches(config, cell, plan, None if kind.deepest is None else kind.deepest(config))
    return plan


def answer_first(detector: TrainedDetector, data: CellData, config: Config, validation: ImageSet | None,
                 size: tuple[int, ...]) -> FirstAnswers:
    """What the second stage learns from the first: its answers on validation images, and how far off they are.

    `validation`: these images as the second stage has them; `size`: of its crops.
    """
    if validation is None:
        return FirstAnswers(guessed_errors(size), None)
    answers = find_landmarks(detector, load_images(data.validation, config.dataset), refined=False).points
    return FirstAnswers(first_errors(answers, validation), answers)


def loop_settings(config: Config, cell: Cell, plan: BatchPlan, stage: str, validated: bool) -> LoopSettings:
    """The loop's settings for one cell, or one `stage` of it; not `validated`: the last step's weights are kept."""
    finetune, experiment = recipe(config, cell.backbone).finetune, config.experiment
    device = resolve_device(experiment.device)
    iterations = finetune.optimiser_steps(plan.steps_per_epoch)
    return LoopSettings(
        title=f"{stage}{cell.backbone} {cell.shots} shots draw {cell.draw}",
        identity=f"{stage}{cell.backbone}, {cell.shots} shots, draw {cell.draw}, seed {cell.seed} of experiment.seed "
                 f"{experiment.seed}",
        made_with=training_settings(config, "training", cell.backbone),
        iterations=iterations, seed=plan.seed,
        device=device, precision=resolve_precision(experiment.precision, device),
        learning_rate=getattr(finetune.learning_rate, cell.backbone), weight_decay=finetune.weight_decay,
        clip=finetune.clip, accumulation_reduction=finetune.accumulation_reduction, ema_decay=finetune.ema_decay,
        log_every=finetune.log_every, save_every=finetune.save_every,
        validate_every=finetune.validate_every or plan.steps_per_epoch, scheduler=finetune.scheduler,
        cycle_iterations=finetune.cycle_iterations, optimizer=finetune.optimizer,
        warmup_iterations=finetune.warmup_iterations, plateau_factor=finetune.plateau_factor,
        plateau_patience=finetune.plateau_patience, early_stop_patience=finetune.early_stop_patience,
        compile=experiment.compile, cuda_graphs=experiment.cuda_graphs,
        milestones=frozenset(() if validated else {iterations}))


def fitting(model: nn.Module, config: Config, settings: LoopSettings) -> LoopSettings:
    """The settings with which a U-Net's step fits into the device's memory; see core.training.memory.fit_step."""
    if not isinstance(model, UNet):
        return settings  # batch normalisation would see another batch in each part
    finetune = config.finetune

    def loss(outputs: Tensor) -> Tensor:
        return LOSSES[finetune.loss](outputs.float(), torch.empty(outputs.shape))

    step = Step(model, lambda images: (torch.empty(images, model.channels, *config.dataset.image_size),), loss,
                settings.precision, finetune.ema_decay is not None)
    most = fit_step(step, finetune.batch_size, config.experiment.activation_checkpointing, settings.device,
                    "finetune.batch_size")
    return replace(settings, most_images=most)


def check_batches(config: Config, cell: Cell, plan: BatchPlan, deepest: tuple[int, ...] | None) -> None:
    """UserError where batch normalisation would see a single value for each channel of its `deepest` map."""
    if deepest is not None and plan.smallest_batch == 1 and math.prod(deepest) == 1:
        raise UserError(f'backbone "{cell.backbone}" cannot be trained on one image of '
                        f"{list(config.dataset.image_size)} pixels at a time; choose a larger dataset.image_size, or "
                        'finetune.sampling "stream" with a finetune.batch_size above 1')
