"""Projection heads, and the encoder with a head that every method trains."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.networks.encoders import Encoder


class Pooled(nn.Module):
    """An encoder and the spatial mean of its deepest features: (B, C, H, W) -> (B, width)."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.width = encoder, encoder.out_channels[-1]

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width)."""
        return self.encoder(images)[-1].mean(dim=(2, 3))


class Projected(nn.Module):
    """Backbone, projector and, where a method has one, predictor: (B, C, H, W) -> (B, out)."""

    def __init__(self, backbone: Pooled, projector: nn.Module, predictor: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector
        self.predictor = predictor or nn.Identity()

    def project(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out), without the predictor."""
        return self.projector(self.backbone(images))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out)."""
        return self.predictor(self.project(images))


def normalised_mlp(*sizes: int, last_norm: bool = True) -> nn.Sequential:
    """Linear layers of `sizes`, batch normalisation and ReLU between them, normalisation without scale at the end."""
    layers: list[nn.Module] = []
    for first, second in pairwise(sizes[:-1]):
        layers += [nn.Linear(first, second, bias=False), nn.BatchNorm1d(second), nn.ReLU()]
    layers.append(nn.Linear(sizes[-2], sizes[-1], bias=False))
    return nn.Sequential(*layers, *([nn.BatchNorm1d(sizes[-1], affine=False)] if last_norm else []))


class Prototypes(nn.Module):
    """DINO's head: three layers with GELU, a normalised bottleneck, cosines with `out` prototypes.

    `norm` adds batch normalisation before each GELU, so that images start out with different answers.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, out: int, norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for first, second in pairwise((width, hidden, hidden)):
            layers += [nn.Linear(first, second), *([nn.BatchNorm1d(second)] if norm else []), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Linear(bottleneck, out, bias=False)  # of length 1: used by direction only
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, width) -> (B, out) cosines."""
        directions = self.layers(pooled)
        with torch.autocast(pooled.device.type, enabled=False):  # bf16 cosines are too coarse for temperatures of 0.04
            weight = self.prototypes.weight
            return F.linear(F.normalize(directions.to(weight.dtype), dim=1), F.normalize(weight, dim=1))
