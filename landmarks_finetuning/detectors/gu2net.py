"""GU2Net as a detector: its heatmaps are probabilities of each pixel by itself, trained by a summed cross-entropy."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from core.config.config import Config
from core.config.load import load_config
from core.data.source import load_source
from core.networks.gu2net import HALVINGS, GU2Net
from core.networks.weights import Weights
from landmarks_finetuning.decoding import sigma_pixels
from landmarks_finetuning.heatmaps import draw_target

LEAST_LOG = -100.0  # where a logarithm is cut off, as in torch's binary cross-entropy
LARGEST_LOG = -1e-6  # of a probability: its complement must have a logarithm, and that a gradient


def start_gu2net(config: Config, _backbone: str, channels: int, landmarks: int, _start: Path | None = None) -> GU2Net:
    """A fresh GU2Net for the study's data set and those of finetune.gu2net.together, random weights."""
    others = [load_source(load_config(path).dataset) for path in config.finetune.gu2net.together]
    return GU2Net(len(config.dataset.image_size), channels,
                  (landmarks, *(len(source.landmark_names) for source in others)))


def rebuild_gu2net(weights: Weights, size: tuple[int, ...]) -> GU2Net:
    """The GU2Net that `weights` came from, for inputs of `size`."""
    return GU2Net(len(size), weights.channels, weights.header["landmarks"], weights.header["data_set"])


def gu2net_loss(outputs: Tensor, points: Tensor, config: Config, crop: bool = False, weights: Tensor | None = None
                ) -> Tensor:
    """Binary cross-entropy of the product with finetune.target, summed over pixels, landmarks and images.

    outputs (B, N, *size) are the product's logarithms. Landmarks outside a crop are taught to be nowhere; see
    interface.Loss.
    """
    finetune = config.finetune
    target = draw_target(points, outputs.shape[2:], finetune.target, sigma_pixels(finetune.sigma, config.dataset))
    cost = binary_cross_entropy(outputs, target).flatten(2).sum(dim=2)
    present = ~points.isnan().any(dim=2)
    counts = present if weights is None else present * weights
    return (cost * counts).sum()


def binary_cross_entropy(logarithms: Tensor, target: Tensor) -> Tensor:
    """-target log p - (1 - target) log(1 - p), elementwise and in float32, of probabilities given as log p."""
    log = logarithms.float().clamp(max=LARGEST_LOG)
    # each of the two is exact where the other cancels
    small = torch.log1p(-log.clamp(max=-math.log(2)).exp())
    large = torch.log(-torch.expm1(log.clamp(min=-math.log(2))))
    complement = torch.where(log < -math.log(2), small, large)
    return -(target * log.clamp(min=LEAST_LOG) + (1 - target) * complement)


def probabilities(outputs: Tensor) -> Tensor:
    """What the published decoder of heatmaps thresholds: the product itself."""
    return outputs.exp()


def deepest(config: Config) -> tuple[int, ...]:
    """The size of the map at its deepest batch normalisation."""
    return tuple(length >> HALVINGS for length in config.dataset.image_size)
