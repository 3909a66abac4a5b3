"""Pre-train the diffusion U-Net on unlabelled images and keep EMA checkpoints."""

from __future__ import annotations

import io
import shlex
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from core.config.config import Config
from core.config.load import add_config_arguments, add_resume_argument, load_config
from core.data.augment import augment
from core.data.dataset import ImageSet, PackedSet, load_images, load_unlabelled
from core.data.digests import data_digests
from core.data.source import load_source
from core.errors import CommandParser, UserError
from core.files import write_atomically
from core.networks.unet import UNet
from core.networks.weights import save_weights
from core.runs.claims import claim
from core.runs.identity import check_pretraining, training_settings
from core.runs.inputs import INPUTS, check_inputs, write_inputs
from core.runs.places import ema_path
from core.runs.record import write_run_config
from core.runs.requirements import check_memory
from core.training.batches import BatchPlan, ReadAhead, gather, on_device, step_generator
from core.training.device import resolve_device, resolve_precision
from core.training.distributed import ALONE, Job, Ranks, join, run_rank
from core.training.loop import LoopSettings, Training, train
from core.training.memory import Step, fit_step
from core.training.run_log import logged
from ddpm_pretraining.diffusion import OBJECTIVES
from ddpm_pretraining.sampling import denoising_strip, grid_picture, sample, sampler_of

VALIDATION_SEED = 987654321
SHOWN = 2  # images of the denoising strip


class Denoising:
    """The pre-training task: predict the noise that was added (paper eq. 5), or what ddpm.objective says."""

    def __init__(self, config: Config, run_dir: Path, training: ImageSet | PackedSet, validation: ImageSet | None
                 ) -> None:
        self.config, self.run_dir = config, run_dir
        self.device = resolve_device(config.experiment.device)
        self.training = training.to(self.device)
        self.validation = None if validation is None else validation.to(self.device)
        shown = validation or (training if isinstance(training, ImageSet) else training.beginning(SHOWN))
        self.shown = self._centres(shown)[:SHOWN].to(self.device)
        self.process = OBJECTIVES[config.ddpm.objective](config.ddpm, self.device)
        self.loop: Training[UNet] | None = None

    def follow(self, loop: Training[UNet]) -> None:
        """Read images that stay on disk ahead of `loop`."""
        self.loop = loop
        if isinstance(self.training, PackedSet):
            read = partial(self.training.read, pinned=self.device.type == "cuda")
            self.ahead = ReadAhead(read, loop.own_batches)

    def loss(self, model: nn.Module, indices: np.ndarray, generator: torch.Generator) -> Tensor:
        """Mean loss of one micro-batch."""
        return self.part_loss(model, indices, generator, slice(None))

    def part_loss(self, model: nn.Module, indices: np.ndarray, generator: torch.Generator, part: slice) -> Tensor:
        """Mean loss of a part of a micro-batch, whose randomness is drawn for the whole of it."""
        return self.loss_of(model, *(drawn[part] for drawn in self.draw(indices, generator, part)))

    def draw(self, indices: np.ndarray, generator: torch.Generator, part: slice = slice(None)) -> tuple[Tensor, ...]:
        """Augmented images, noise and timesteps of a micro-batch; only images of `part` are read from a disk."""
        images, chosen = self._gather(indices, part)
        images, _ = augment(images, None, self.config.ddpm.augmentation, generator, self.training.crops(chosen))
        timesteps = self.process.draw_timesteps(len(images), generator)
        return images, torch.randn(images.shape, generator=generator, device=self.device), timesteps

    def _gather(self, indices: np.ndarray, part: slice) -> tuple[Tensor, Tensor]:
        """Images and indices of a micro-batch on the device, images of a PackedSet outside `part` as zeros."""
        if isinstance(self.training, ImageSet):
            return gather(self.training.images, indices, self.device)
        chosen, own = on_device(indices, self.device), indices[part]
        raw = self.training.read(own) if self.loop is None else self.ahead.take(self.loop.step, own)
        read = self.training.normalised(raw.to(self.device, non_blocking=True), chosen[part])
        if len(own) == len(indices):
            return read, chosen
        images = read.new_zeros((len(indices), *read.shape[1:]))
        images[part] = read
        return images, chosen

    def loss_of(self, model: nn.Module, *drawn: Tensor) -> Tensor:
        """Mean loss of drawn images, noise and timesteps."""
        return self.process.losses(model, *drawn).mean()

    def terms(self, *drawn: Tensor) -> int:
        """See core.training.loop.SplitTask: images count alike."""
        return len(drawn[0])

    def names(self, indices: np.ndarray) -> list[str]:
        """File names of a micro-batch."""
        return [self.training.records[i].image.name for i in indices]

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Loss on the validation images, whole and by quartile of the timestep; the same noise every time."""
        if self.validation is None:
            return {}
        generator = step_generator(VALIDATION_SEED, 0, 0, self.device)
        total = self.config.ddpm.num_train_timesteps
        quartiles = []
        for quartile in range(4):
            losses = []
            for images in self._centres(self.validation).split(self.config.evaluation.batch_size):
                images = images.to(self.device)
                low, high = quartile * total // 4, (quartile + 1) * total // 4
                timesteps = torch.randint(low, high, (len(images),), generator=generator, device=self.device)
                noise = torch.randn(images.shape, generator=generator, device=self.device)
                losses.append(self.process.losses(model, images, noise, timesteps))
            quartiles.append(torch.cat(losses).mean().item())
        figures = {f"validation_loss_q{i + 1}": loss for i, loss in enumerate(quartiles)}
        return {"validation_loss": sum(quartiles) / 4, **figures}

    def _centres(self, images: ImageSet) -> Tensor:
        """(M, C, *network_size): the middle of every image."""
        spare = (np.array(images.images.shape[2:]) - images.network_size) // 2
        middle = (slice(None), slice(None), *map(slice, spare.tolist(), (spare + images.network_size).tolist()))
        return images.images[middle]

    def milestone(self, model: nn.Module, step: int) -> None:
        """Keep the EMA weights and draw pictures at the configured steps."""
        ddpm = self.config.ddpm
        if step % ddpm.sample_every == 0 or step == ddpm.iterations:
            self._save_pictures(model, step)
        if step in ddpm.checkpoint_iterations:  # last: where its weights are, a step is done
            header = {"kind": "ddpm", "iteration": step, "dataset": self.config.dataset.name}
            save_weights(ema_path(self.config.experiment_dir, step), model, self.config.plain(), header)

    def _save_pictures(self, model: nn.Module, step: int) -> None:
        ddpm = self.config.ddpm
        generator = step_generator(VALIDATION_SEED, 1, 0, self.device)
        shape = (ddpm.sample_count, *self.shown.shape[1:])
        images = sample(self.process, model, shape, generator, sampler_of(ddpm))[-1]
        save_picture(self.run_dir / "samples" / f"samples_iter{step:06d}.png", grid_picture(images, columns=4))
        strip = denoising_strip(self.process, model, self.shown, generator)
        save_picture(self.run_dir / "samples" / f"strip_iter{step:06d}.png", strip)

    def improved(self, model: nn.Module, step: int) -> None:
        """Nothing: the checkpoint is chosen by iteration, not by denoising loss."""


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG atomically."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def loop_settings(config: Config) -> LoopSettings:
    """The loop's settings for pre-training."""
    ddpm, experiment = config.ddpm, config.experiment
    device = resolve_device(experiment.device)
    pictures = {*range(ddpm.sample_every, ddpm.iterations + 1, ddpm.sample_every), ddpm.iterations}
    return LoopSettings(
        title=f"pre-train {config.dataset.name}", identity=f"ddpm of experiment.seed {experiment.seed}",
        made_with=training_settings(config, "pretraining", "ddpm"),
        iterations=ddpm.iterations, seed=experiment.seed, device=device,
        precision=resolve_precision(experiment.precision, device), learning_rate=ddpm.learning_rate,
        weight_decay=ddpm.weight_decay, clip=ddpm.clip, accumulation_reduction=ddpm.accumulation_reduction,
        ema_decay=ddpm.ema_decay, log_every=ddpm.log_every, save_every=ddpm.save_every,
        validate_every=ddpm.validate_every, warmup_iterations=ddpm.warmup_iterations, compile=experiment.compile,
        cuda_graphs=experiment.cuda_graphs,
        milestones=frozenset(pictures | set(ddpm.checkpoint_iterations)))


def fitting(model: UNet, config: Config, settings: LoopSettings) -> LoopSettings:
    """The settings with which a step fits into the device's memory; see core.training.memory.fit_step."""
    ddpm = config.ddpm

    def inputs(images: int) -> tuple[Tensor, ...]:
        return torch.empty(images, model.channels, *config.dataset.image_size), torch.zeros(images, dtype=torch.long)

    step = Step(model, inputs, lambda outputs: F.mse_loss(outputs.float(), torch.empty(outputs.shape)),
                settings.precision, ddpm.ema_decay is not None)
    most = fit_step(step, ddpm.batch_size, config.experiment.activation_checkpointing, settings.device,
                    "ddpm.batch_size")
    return replace(settings, most_images=most)


def pretrain(config: Config, resume: str | None = None, ranks: Ranks = ALONE) -> Path:
    """Pre-train as the config says, with the other processes of `ranks`; returns the run's folder.

    A finished run returns at once.
    """
    check_memory(config)
    run_dir = config.experiment_dir / "ddpm"
    if resume is None and ranks.told((run_dir / "last.pt").exists()):
        resume = "last"
    with ranks.leader_first():
        check_pretraining(config)
        source = load_source(config.dataset)
        records = source.pretraining_records()
        inputs = {"pretraining": data_digests(records, source.landmark_names, config.dataset)}
        check_inputs(run_dir, inputs, may_grow=logged(run_dir / "metrics.jsonl")[1] >= config.ddpm.iterations)
        images = load_unlabelled(records, config.dataset, "images" if ranks.leads else None)
        validation_records = source.splits["validation"]
        validation = load_images(validation_records, config.dataset) if validation_records else None
    torch.manual_seed(config.experiment.seed)
    task = Denoising(config, run_dir, images, validation)
    channels = task.shown.shape[1]
    model = UNet(config.unet, channels, channels, config.dataset.image_size)
    ddpm, settings = config.ddpm, loop_settings(config)
    plan = BatchPlan(len(images.records), ddpm.batch_size, ddpm.accumulation, ddpm.sampling, True, settings.seed)
    training: Training[UNet]
    if ranks.count == 1 or not isinstance(ranks, Job):
        settings = fitting(model, config, settings)
        training = Training(model, task, plan, settings)
    else:
        from core.training.parallel import TRAININGS  # imports for seconds

        model.activation_checkpointing = config.experiment.activation_checkpointing is True
        training = TRAININGS[config.experiment.sharding](model, task, plan, settings, ranks)
    task.follow(training)
    if ranks.leads:
        write_run_config(run_dir, config.plain(), {"stage": "ddpm", "images": len(images.records),
                                                   "precision": settings.precision, "device": str(settings.device),
                                                   "processes": ranks.count})
        if not (run_dir / INPUTS).is_file():
            write_inputs(run_dir, inputs)
    command = f"{ranks.command('ddpm_pretraining.train')} --config {shlex.quote(str(run_dir / 'config.json'))}"
    train(training, run_dir, resume, command)
    keep_again(training, config)
    return run_dir


def keep_again(training: Training, config: Config) -> None:
    """Write the last weights once more where their state is there and they are gone; UserError for earlier ones.

    A state holds the weights of its own step alone.
    """
    gone = [iteration for iteration in config.ddpm.checkpoint_iterations
            if training.ranks.told(not ema_path(config.experiment_dir, iteration).is_file())]
    if training.step in gone:
        training.milestone()
        gone.remove(training.step)
    if gone:
        path = ema_path(config.experiment_dir, gone[0])
        raise UserError(f"{path} is gone, and {path.parent / 'last.pt'} is past that step: put it back, leave "
                        f"{gone[0]} out of ddpm.checkpoint_iterations, or delete {path.parent} to pre-train again")


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m ddpm_pretraining.train", description=__doc__,
        epilog="example: python -m ddpm_pretraining.train --config configs/cephalo.json --set ddpm.iterations=2000; "
        "on 4 GPUs: python -m core.training.distributed --nproc-per-node 4 -m ddpm_pretraining.train --config ...")
    add_config_arguments(parser)
    add_resume_argument(parser)
    with join() as ranks:
        arguments = parser.parse_args()
        config = load_config(arguments.config, arguments.set)
        with claim(config.experiment_dir / "ddpm") if ranks.leads else nullcontext():
            run_dir = pretrain(config, arguments.resume, ranks)
        if ranks.leads:
            print(f"pre-training is done: {run_dir}")


if __name__ == "__main__":
    run_rank(main)
