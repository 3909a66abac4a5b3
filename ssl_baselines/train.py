"""Pre-train an encoder on unlabelled radiographs with MoCo v3, SimCLR v2 or DINO."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from core.config.config import Config
from core.config.load import add_config_arguments, add_resume_argument, load_config
from core.config.starts import SSL_METHODS
from core.data.dataset import ImageSet, load_images
from core.data.digests import data_digests
from core.data.records import DataSource
from core.data.source import load_source
from core.errors import CommandParser, run_command
from core.networks.encoders import build_encoder
from core.networks.weights import save_tensors
from core.runs.cells import require_backbone
from core.runs.claims import claim
from core.runs.identity import check_ssl, training_settings
from core.runs.inputs import INPUTS, check_inputs, write_inputs
from core.runs.places import encoder_path, ssl_dir
from core.runs.record import write_run_config
from core.runs.requirements import check_memory
from core.training.batches import BatchPlan
from core.training.device import resolve_device, resolve_precision
from core.training.loop import LoopSettings, Training, train
from ssl_baselines.collapse import alarm, effective_rank, embedding_spread
from ssl_baselines.dino import DINO
from ssl_baselines.heads import Pooled, Projected
from ssl_baselines.mocov3 import MoCoV3
from ssl_baselines.simclrv2 import SimCLRv2
from ssl_baselines.views import ViewBatches, ViewMaker, default_workers, make_views, view_stream

METHODS: dict[str, type[MoCoV3 | SimCLRv2 | DINO]] = {"mocov3": MoCoV3, "simclrv2": SimCLRv2, "dino": DINO}
VALIDATION_SEED = 987654321
HELD_IMAGES = 64  # looked at for collapse
LEAST_HELD = 8  # fewer would say little


class Method(Protocol):
    """What the methods have in common; models are those that `network` makes, of a kind of the method's own."""

    keeps_average: bool  # whether the encoder that is kept is the moving average's
    views: list[ViewMaker]

    @property
    def momentum(self) -> float | None:
        """Of the moving average; None: no average."""

    @property
    def momentum_schedule(self) -> str:
        """Of the moving average: "constant" or "cosine"."""

    def network(self, backbone: Pooled) -> Projected:
        """The network that is trained."""

    def embed(self, model: Any, average: Any, views: list[Tensor], step: int) -> tuple[Tensor, ...]:
        """Views (B, C, H, W) -> embeddings, as `loss` takes them."""

    def loss(self, model: Any, embedded: tuple[Tensor, ...], step: int) -> Tensor:
        """The scalar loss."""

    def figures(self, model: Any, embedded: tuple[Tensor, ...], step: int) -> dict[str, float]:
        """What else the log says of the embeddings."""


class SelfSupervision:
    """The pre-training task: what the method's loss says of random views."""

    training: Training[Projected]  # from `follow` on, which comes before the first step

    def __init__(self, config: Config, name: str, training: ImageSet, validation: ImageSet | None) -> None:
        self.config, self.name = config, name
        self.method: Method = METHODS[name](config)
        self.device = resolve_device(config.experiment.device)
        self.records = training.records
        self.images = grey_images(training)
        chosen = self.images if validation is None or len(validation.records) < LEAST_HELD else grey_images(validation)
        chosen = chosen[:HELD_IMAGES]
        self.held = make_views(chosen, range(len(chosen)), self.method.views, [VALIDATION_SEED])
        self.stream: Iterator[list[Tensor]] | None = None

    def follow(self, training: Training[Projected]) -> None:
        """Take the loop's step and moving average, the momentum encoder or teacher, from `training`."""
        self.training = training

    def loss(self, model: nn.Module, indices: np.ndarray, generator: torch.Generator) -> Tensor:
        """The method's loss on the next micro-batch of views, which is the plan's as `indices` are."""
        ssl, training = self.config.ssl, self.training
        if self.stream is None:
            workers = default_workers(self.device) if ssl.workers is None else ssl.workers
            batches = ViewBatches(self.images, self.method.views, training.plan, training.settings.seed)
            self.stream = view_stream(batches, training.step * ssl.accumulation, ssl.iterations * ssl.accumulation,
                                      workers, pin=self.device.type == "cuda")
        embedded = self._embed(model, training.ema, next(self.stream))
        with torch.autocast(self.device.type, enabled=False):
            return self.method.loss(model, embedded, training.step)

    def _embed(self, model: nn.Module, average: nn.Module, views: list[Tensor]) -> tuple[Tensor, ...]:
        """The method's embeddings in float32."""
        layout = torch.channels_last
        seen = [view.to(self.device, non_blocking=True).to(memory_format=layout).float() / 255 for view in views]
        return tuple(part.float() for part in self.method.embed(model, average, seen, self.training.step))

    def names(self, indices: np.ndarray) -> list[str]:
        """File names of a micro-batch."""
        return [self.records[i].image.name for i in indices]

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Loss on the same views of the same images every time, what their embeddings say, and an alarm if nothing."""
        student = self.training.model.eval()
        embedded = self._embed(student, self.training.ema, self.held)
        figures = {"validation_loss": self.method.loss(student, embedded, step).item(),
                   **spread_figures(self.kept.backbone, self.held[0], self.device),
                   **self.method.figures(student, embedded, step)}
        warning = alarm(figures)
        if warning is not None:
            tqdm.write(f"warning: {self.name} step {step}: {warning}", file=sys.stderr)
        return figures

    @property
    def kept(self) -> Projected:
        """The network whose encoder is the result."""
        return self.training.ema if self.method.keeps_average else self.training.model

    def milestone(self, model: nn.Module, step: int) -> None:
        """The last step: keep the encoder."""
        encoder = self.config.finetune.encoder
        header = {"kind": "encoder", "network": "encoder", "encoder": encoder, "channels": 1, "method": self.name,
                  "preset": self.config.ssl.preset, "iteration": step, "dataset": self.config.dataset.name}
        save_tensors(encoder_path(self.config, self.name), self.kept.backbone.encoder.state_dict(),
                     self.config.plain(), header)

    def improved(self, model: nn.Module, step: int) -> None:
        """Nothing: the losses of different steps say little about the features."""


def grey_images(images: ImageSet) -> list[np.ndarray]:
    """What each image fills of the canvas, (H, W) uint8."""
    return [(whole[0][images.seen(i)] * 255).round().byte().numpy() for i, whole in enumerate(images.images)]


def spread_figures(backbone: Pooled, views: Tensor, device: torch.device) -> dict[str, float]:
    """Spread and effective rank of the pooled features of `views`, (M, 1, H, W) uint8."""
    features = backbone(views.to(device).float() / 255).float()
    return {"embedding_spread": embedding_spread(features), "effective_rank": effective_rank(features)}


def loop_settings(config: Config, name: str, method: Method) -> LoopSettings:
    """The loop's settings for an encoder's pre-training."""
    ssl, experiment = config.ssl, config.experiment
    device = resolve_device(experiment.device)
    return LoopSettings(
        title=f"{name} {config.dataset.name}", identity=f"{name} of experiment.seed {experiment.seed}",
        made_with=training_settings(config, "ssl", name),
        iterations=ssl.iterations, seed=experiment.seed, device=device,
        precision=resolve_precision(experiment.precision, device), learning_rate=ssl.learning_rate,
        weight_decay=ssl.weight_decay, clip=ssl.clip, accumulation_reduction="mean", ema_decay=method.momentum,
        ema_schedule=method.momentum_schedule, log_every=ssl.log_every, save_every=ssl.save_every,
        validate_every=ssl.validate_every, scheduler=ssl.scheduler, warmup_iterations=ssl.warmup_iterations,
        compile=experiment.compile, milestones=frozenset({ssl.iterations}))


def build_task(config: Config, name: str, source: DataSource) -> SelfSupervision:
    """Images of `source`, views and, as `training`, network and optimiser of method `name`, before the first step."""
    images = load_images(source.pretraining_records(), config.dataset, "images")
    validation_records = source.splits["validation"]
    validation = load_images(validation_records, config.dataset) if validation_records else None
    task = SelfSupervision(config, name, images, validation)
    torch.manual_seed(config.experiment.seed)
    network = task.method.network(Pooled(build_encoder(config.finetune.encoder, 1)))
    settings, ssl = loop_settings(config, name, task.method), config.ssl
    plan = BatchPlan(len(images.records), ssl.batch_size, ssl.accumulation, "stream", True, settings.seed)
    task.follow(Training(network, task, plan, settings))
    return task


def pretrain_encoder(config: Config, name: str, resume: str | None = None) -> Path:
    """Pre-train finetune.encoder by method `name`; returns the run's folder. A finished run returns at once."""
    check_memory(config)
    require_backbone(config, name)
    run_dir = ssl_dir(config, name)
    check_ssl(config, name)
    if resume is None and (run_dir / "last.pt").exists():
        resume = "last"
    source = load_source(config.dataset)
    inputs = {"pretraining": data_digests(source.pretraining_records(), source.landmark_names, config.dataset)}
    check_inputs(run_dir, inputs, may_grow=encoder_path(config, name).is_file())
    training = build_task(config, name, source).training
    settings = training.settings
    write_run_config(run_dir, config.plain(), {"stage": "ssl", "method": name, "preset": config.ssl.preset,
                                               "images": training.plan.count, "precision": settings.precision,
                                               "device": str(settings.device)})
    if not (run_dir / INPUTS).is_file():
        write_inputs(run_dir, inputs)
    command = (f"python -m ssl_baselines.train --config {shlex.quote(str(run_dir / 'config.json'))} --method {name}")
    train(training, run_dir, resume, command)
    if not encoder_path(config, name).is_file():  # gone, but the state of its step is there
        training.milestone()
    return run_dir


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m ssl_baselines.train", description=__doc__,
        epilog="example: python -m ssl_baselines.train --config configs/cephalo.json --method dino")
    add_config_arguments(parser)
    parser.add_argument("--method", required=True, choices=SSL_METHODS)
    add_resume_argument(parser)
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set, [arguments.method])
    with claim(ssl_dir(config, arguments.method)):
        run_dir = pretrain_encoder(config, arguments.method, arguments.resume)
    print(f"pre-training is done: {run_dir}")


if __name__ == "__main__":
    run_command(main)
