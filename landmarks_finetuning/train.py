"""Fine-tune a landmark detector on a few labelled images."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from core.config.config import Config
from core.config.load import add_config_arguments, add_resume_argument, load_config
from core.config.starts import BACKBONES, ENCODER_LEVELS
from core.data.augment import augment
from core.data.dataset import ImageSet, load_images
from core.data.digests import data_digests
from core.data.shots import labelled_subset
from core.data.source import load_source
from core.errors import CommandParser, UserError, run_command
from core.formats.geometry import apply_maps
from core.networks.weights import save_weights
from core.runs.cells import require_backbone, single_setting
from core.runs.claims import claim
from core.runs.identity import check_cell
from core.runs.inputs import check_inputs, write_inputs
from core.runs.places import Cell, cell_dir, choosing_path, is_scored, start_path
from core.runs.record import write_run_config
from core.training.batches import BatchPlan, gather
from core.training.device import resolve_device, resolve_precision
from core.training.loop import LoopSettings, Training, train
from landmarks_finetuning.coverage import coverage_order
from landmarks_finetuning.detectors.registry import build_detector
from landmarks_finetuning.heatmaps import draw_target
from landmarks_finetuning.inference import locate, run_batched, sigma_pixels
from landmarks_finetuning.losses import LOSSES
from landmarks_finetuning.metrics import physical_errors
from landmarks_finetuning.shape import mean_shape
from landmarks_finetuning.starts import START_WEIGHTS


class HeatmapRegression:
    """The fine-tuning task: heatmaps of the labelled landmarks."""

    def __init__(self, config: Config, run_dir: Path, header: dict, training: ImageSet,
                 validation: ImageSet | None) -> None:
        self.config, self.run_dir, self.header = config, run_dir, header
        self.device = resolve_device(config.experiment.device)
        self.training = training.to(self.device)
        self.validation = None if validation is None else validation.to(self.device)
        self.shape = np.array(header["shape"], dtype=np.float64)
        self.sigma = sigma_pixels(config.finetune.sigma, config.dataset)

    def _loss(self, outputs: Tensor, points: Tensor, crop: bool = False) -> Tensor:
        finetune = self.config.finetune
        target = draw_target(points, outputs.shape[2:], finetune.target, self.sigma)
        absent = ~points.isnan().any(dim=2) & ~target.flatten(2).any(dim=2) if crop else None
        return LOSSES[finetune.loss](outputs.float(), target, absent)

    def loss(self, model: nn.Module, indices: np.ndarray, generator: torch.Generator) -> Tensor:
        """Heatmap loss of one augmented micro-batch, of crops where images are larger; drawn on the device."""
        return self.loss_of(model, *self.draw(indices, generator))

    def draw(self, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Augmented images and landmarks of a micro-batch."""
        images, chosen = gather(self.training.images, indices, self.device)
        images, points = augment(images, self.training.truth[chosen], self.config.finetune.augmentation, generator,
                                 self.training.crops(chosen))
        return images, points

    def loss_of(self, model: nn.Module, *drawn: Tensor) -> Tensor:
        """Heatmap loss of drawn images and landmarks."""
        images, points = drawn
        return self._loss(model(images), points, not self.training.fits)

    def names(self, indices: np.ndarray) -> list[str]:
        """File names of a micro-batch."""
        return [self.training.records[i].image.name for i in indices]

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Loss and physical mean radial error on the validation images, decoded as in scoring."""
        validation = self.validation
        if validation is None:
            return {}
        losses, errors = [], []
        truth, spacings = validation.original_points(), validation.spacings()
        for chosen, outputs, maps in run_batched(
                model, validation, self.config.evaluation, self.device, self.config.experiment.precision):
            seen = torch.from_numpy(apply_maps(truth[chosen], maps)).to(self.device)
            losses += [self._loss(outputs, seen).item()] * len(chosen)
            points, _ = locate(outputs, maps, self.config.finetune, self.sigma, shape=self.shape)
            errors.append(physical_errors(points, truth[chosen], None if spacings is None else spacings[chosen]))
        return {"validation_loss": float(np.mean(losses)), "validation_mre": float(np.nanmean(np.concatenate(errors)))}

    def milestone(self, model: nn.Module, step: int) -> None:
        """The last step of a fixed schedule without validation: these weights are the result."""
        self._save(model, step)

    def improved(self, model: nn.Module, step: int) -> None:
        """A new lowest validation loss: these weights are the best so far."""
        self._save(model, step)

    def _save(self, model: nn.Module, step: int) -> None:
        save_weights(self.run_dir / "best.safetensors", model, self.config.plain(), {**self.header, "iteration": step})


def loop_settings(config: Config, cell: Cell, plan: BatchPlan) -> LoopSettings:
    """The loop's settings for one cell."""
    finetune, experiment = config.finetune, config.experiment
    device = resolve_device(experiment.device)
    iterations = finetune.optimiser_steps(plan.steps_per_epoch)
    return LoopSettings(
        title=f"{cell.backbone} {cell.shots} shots draw {cell.draw}",
        identity=f"{cell.backbone}, {cell.shots} shots, draw {cell.draw}, seed {cell.seed} of experiment.seed "
                 f"{experiment.seed}",
        iterations=iterations, seed=plan.seed,
        device=device, precision=resolve_precision(experiment.precision, device),
        learning_rate=getattr(finetune.learning_rate, cell.backbone), weight_decay=finetune.weight_decay,
        clip=finetune.clip, accumulation_reduction=finetune.accumulation_reduction, ema_decay=finetune.ema_decay,
        log_every=finetune.log_every, save_every=finetune.save_every,
        validate_every=finetune.validate_every or plan.steps_per_epoch, scheduler=finetune.scheduler,
        warmup_iterations=finetune.warmup_iterations, plateau_factor=finetune.plateau_factor,
        plateau_patience=finetune.plateau_patience, early_stop_patience=finetune.early_stop_patience,
        compile=experiment.compile, cuda_graphs=experiment.cuda_graphs,
        milestones=frozenset({iterations} if finetune.validation == "none" else ()))


def check_backbone(config: Config, backbone: str) -> None:
    """UserError where a detector cannot start from `backbone` under this config, or its weights cannot be had."""
    require_backbone(config, backbone)
    if backbone in START_WEIGHTS:
        START_WEIGHTS[backbone](config)  # now, not after the images are read


def check_batches(config: Config, cell: Cell, plan: BatchPlan) -> None:
    """UserError where batch normalisation would see a single value for each channel of an encoder's last map."""
    alone = plan.smallest_batch == 1 and math.prod(config.dataset.image_size) == 4 ** (ENCODER_LEVELS - 1)
    if BACKBONES[cell.backbone] == "encoder_unet" and alone:
        raise UserError(f'backbone "{cell.backbone}" cannot be trained on one image of '
                        f"{list(config.dataset.image_size)} pixels at a time; choose a larger dataset.image_size, or "
                        'finetune.sampling "stream" with a finetune.batch_size above 1')


def finetune_cell(config: Config, cell: Cell, resume: str | None = None) -> Path:
    """Train one cell; returns its folder. An interrupted run continues, a finished one returns at once."""
    check_backbone(config, cell.backbone)
    run_dir = cell_dir(config, cell)
    check_cell(config, cell)
    source = load_source(config.dataset)
    order = coverage_order(config, source, cell.shots)
    training_records, validation_records = labelled_subset(source, config.finetune, cell.shots, cell.draw, order)
    inputs = {use: data_digests(records, source.landmark_names, config.dataset)
              for use, records in (("training", training_records), ("validation", validation_records))}
    start = start_path(config, cell.backbone)
    check_inputs(run_dir, inputs, start)
    if resume is None and (run_dir / "last.pt").exists():
        resume = "last"
    if resume is None and is_scored(config, cell):
        return run_dir  # by a launcher, which left no state
    if config.finetune.loss == "cross_entropy_channels" and len(source.landmark_names) == 1:
        raise UserError('finetune.loss "cross_entropy_channels" compares landmarks with each other and this data set '
                        'has one; choose "cross_entropy_pixels"')
    images = load_images(training_records, config.dataset)
    validation = load_images(validation_records, config.dataset) if validation_records else None
    shape = mean_shape(images.truth.numpy())
    finetune, seed = config.finetune, config.experiment.seed + 1000 * cell.seed + cell.draw
    torch.manual_seed(seed)
    model = build_detector(config, cell.backbone, images.images.shape[1], len(source.landmark_names))
    header = {"kind": "detector", "backbone": cell.backbone, **model.identity, "shots": cell.shots, "draw": cell.draw,
              "seed": cell.seed, "dataset": config.dataset.name,
              "landmark_names": list(source.landmark_names),
              "sigma_pixels": sigma_pixels(config.finetune.sigma, config.dataset),
              "shape": [[None if np.isnan(value) else value for value in point] for point in shape.tolist()],
              "training_images": [record.id for record in training_records],
              "validation_labels": len(validation_records),
              **({} if order is None else {"chosen_images": list(order[: cell.shots])})}
    plan = BatchPlan(len(images.records), finetune.batch_size, finetune.accumulation, finetune.sampling, False, seed)
    check_batches(config, cell, plan)
    settings = loop_settings(config, cell, plan)
    task = HeatmapRegression(config, run_dir, header, images, validation)
    write_run_config(run_dir, config.plain(), {"stage": "finetune", **header})
    write_inputs(run_dir, inputs, start, None if order is None else choosing_path(config))
    command = (f"python -m landmarks_finetuning.train --config {shlex.quote(str(run_dir / 'config.json'))} "
               f"--backbone {cell.backbone} --shots {cell.shots} --draw {cell.draw} --seed {cell.seed}")
    train(Training(model, task, plan, settings), run_dir, resume, command)
    return run_dir


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m landmarks_finetuning.train", description=__doc__,
        epilog="example: python -m landmarks_finetuning.train --config configs/cephalo.json --backbone ddpm --shots 10")
    add_config_arguments(parser)
    parser.add_argument("--backbone", required=True, help=f"what to start from: {', '.join(BACKBONES)}")
    parser.add_argument("--encoder", help="of backbones imagenet and random: instead of finetune.encoder")
    parser.add_argument("--shots", type=int, required=True, help="number of labelled images")
    parser.add_argument("--draw", type=int, default=0, help="which labelled subset")
    parser.add_argument("--seed", type=int, default=0, help="initialisation and order")
    add_resume_argument(parser)
    arguments = parser.parse_args()
    if arguments.encoder is not None and BACKBONES.get(arguments.backbone) == "unet":
        raise UserError(f'--encoder is for backbones with an encoder; "{arguments.backbone}" is the diffusion U-Net')
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: seeds count from 0")
    encoder = [] if arguments.encoder is None else [f"finetune.encoder={arguments.encoder}"]
    config = load_config(arguments.config, [*arguments.set, *encoder], [arguments.backbone])
    config = single_setting(config, arguments.backbone)
    cell = Cell(arguments.backbone, arguments.shots, arguments.draw, arguments.seed)
    with claim(cell_dir(config, cell)):
        run_dir = finetune_cell(config, cell, arguments.resume)
    print(f"training is done: {run_dir}; score it with: python -m landmarks_finetuning.evaluate {run_dir}")


if __name__ == "__main__":
    run_command(main)
