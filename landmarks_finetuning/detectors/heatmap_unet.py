"""The U-Net as a landmark detector: pre-trained or from scratch, N heatmap channels, fixed or no timestep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from core.checkpoint import Weights, load_weights
from core.config import Config, parse_config
from core.dataset import map_points
from core.errors import UserError
from core.train_loop import autocast, resolve_device, resolve_precision
from core.unet import UNet
from landmarks_finetuning.heatmaps import decode


class HeatmapUNet(UNet):
    """(B, C, *size) -> (B, N, *size) raw heatmaps. `timestep` None: no time embedding (the paper), else that step."""

    timestep: int | None = None

    def forward(self, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """The published recipe ignores time; a fixed timestep keeps the features as pre-training saw them."""
        if self.timestep is not None:
            timesteps = torch.full((x.shape[0],), self.timestep, device=x.device)
        return super().forward(x, timesteps)


def build_detector(config: Config, backbone: str, channels: int, landmarks: int) -> HeatmapUNet:
    """A fresh detector. Backbone "ddpm" takes the pre-trained weights, "scratch" none; the output conv is new."""
    model = HeatmapUNet(config.unet, channels, landmarks, config.dataset.image_size)
    if backbone == "ddpm":
        path = pretrained_path(config)
        weights = load_weights(path)
        check_same_network(path, weights, config, channels)
        kept = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith("final_conv.")}
        model.load_state_dict({**model.state_dict(), **kept})
        model.timestep = config.finetune.timestep
    return model


def pretrained_path(config: Config) -> Path:
    """The weights file that fine-tuning starts from."""
    finetune = config.finetune
    if finetune.checkpoint is not None:
        return Path(finetune.checkpoint)
    iteration = finetune.pretraining_iteration or max(config.ddpm.checkpoint_iterations)
    return config.experiment_dir / "ddpm" / f"ema_iter{iteration:06d}.safetensors"


def check_same_network(path: Path, weights: Weights, config: Config, channels: int) -> None:
    """UserError naming the key in which the checkpoint's network differs from the config's."""
    held, wanted = weights.unet.model_dump(), config.unet.model_dump()
    for key in wanted:
        if held[key] != wanted[key]:
            raise UserError(f"{path} holds a network with {key} {held[key]}, the config asks unet.{key} {wanted[key]}; "
                            f"set unet.{key} to {held[key]}, or choose another checkpoint")
    if weights.channels != channels:
        raise UserError(f"{path} was trained on {weights.channels} channels, the images have {channels}")


class TrainedDetector:
    """A detector read from best.safetensors: everything it needs stands in the file's header."""

    def __init__(self, path: Path, overrides: dict | None = None) -> None:
        weights = load_weights(path)
        if weights.header.get("kind") != "detector":
            raise UserError(f'{path} holds a "{weights.header.get("kind")}", not a landmark detector')
        self.header = weights.header
        self.config = parse_config({**weights.header["config"], **(overrides or {})}, str(path))
        self.landmark_names: list[str] = weights.header["landmark_names"]
        self.device = resolve_device(self.config.experiment.device)
        size = self.config.dataset.image_size
        model = HeatmapUNet(weights.unet, weights.channels, weights.out_channels, size)
        model.load_state_dict(weights.tensors)
        model.timestep = weights.header["timestep"]
        self.model = model.to(self.device).eval()

    def heatmaps(self, images: Tensor) -> Tensor:
        """(M, C, *size) -> (M, N, *size) raw float32 outputs, in batches, on the CPU."""
        return run_batched(self.model, images, self.config, self.device)


@torch.no_grad()
def run_batched(model: nn.Module, images: Tensor, config: Config, device: torch.device) -> Tensor:
    """Raw float32 outputs of `model` for `images` on the CPU, in batches of evaluation.batch_size."""
    precision = resolve_precision(config.experiment.precision, device)
    outputs = []
    for batch in images.split(config.evaluation.batch_size):
        with autocast(device, precision):
            outputs.append(model(batch.to(device)).float().cpu())
    return torch.cat(outputs)


def sigma_pixels(config: Config) -> float:
    """finetune.sigma, stated for 256-pixel images, in pixels of this study's input (mean over its axes)."""
    return config.finetune.sigma * float(np.mean(config.dataset.image_size)) / 256


def locate(outputs: Tensor, original_sizes: np.ndarray, config: Config,
           decoder: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Raw outputs (M, N, *size) -> points (M, N, D) in original pixels and confidences (M, N)."""
    finetune = config.finetune
    points, confidence = decode(outputs, decoder or finetune.decoder, finetune.loss, sigma_pixels(config))
    size: Sequence[int] = config.dataset.image_size
    return map_points(points.numpy(), np.array(size), original_sizes[:, None]), confidence.numpy()
