"""Heatmap detectors: the diffusion U-Net, with or without a fixed timestep, or a U-Net around an encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from core.config.config import Config
from core.networks.unet import UNet
from core.networks.weights import Weights, load_weights
from core.runs.places import start_path
from landmarks_finetuning.starts import check_same_network


class HeatmapUNet(UNet):
    """(B, C, *size) -> (B, N, *size) raw heatmaps. `timestep` None: no time embedding (the paper), else that step."""

    timestep: int | None = None

    @property
    def identity(self) -> dict[str, str | int | None]:
        """What a weights file must say, beside config and channels, for the network to be rebuilt."""
        return {"network": "unet", "timestep": self.timestep}

    def forward(self, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """The published recipe ignores time; a fixed timestep keeps the features as pre-training saw them."""
        if self.timestep is not None:
            timesteps = torch.full((x.shape[0],), self.timestep, device=x.device)
        return super().forward(x, timesteps)


def rebuild_unet(weights: Weights, size: tuple[int, ...]) -> HeatmapUNet:
    """The U-Net that `weights` came from, for inputs of `size`."""
    model = HeatmapUNet(weights.unet, weights.channels, weights.out_channels, size)
    model.timestep = weights.header["timestep"]
    return model


def start_unet(config: Config, backbone: str, channels: int, landmarks: int, start: Path | None = None) -> HeatmapUNet:
    """A fresh U-Net. Backbone "ddpm" takes the pre-trained weights, "scratch" none; the output conv is new."""
    model, path = HeatmapUNet(config.unet, channels, landmarks, config.dataset.image_size), start
    if path is None:
        path = start_path(config, backbone)
    if path is not None:
        weights = load_weights(path)
        check_same_network(path, weights, config.unet, channels)
        kept = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith("final_conv.")}
        model.load_state_dict({**model.state_dict(), **kept})
        model.timestep = config.finetune.timestep
    return model
