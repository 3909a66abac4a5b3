"""Projection heads, and the encoder with a head that every method trains."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class Pooled(nn.Module):
    """An encoder and the spatial mean of its deepest features: (B, C, H, W) -> (B, width)."""

    def __init__(self, encoder: nn.Module) -> None:
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
    layers.append(nn.Linear(*sizes[-2:], bias=False))
    return nn.Sequential(*layers, *([nn.BatchNorm1d(sizes[-1], affine=False)] if last_norm else []))


class Prototypes(nn.Module):
    """DINO's head: three layers with GELU, a normalised bottleneck, cosines with `out` prototypes; no batch norm."""

    def __init__(self, width: int, hidden: int, bottleneck: int, out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                    nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Linear(bottleneck, out, bias=False)  # of length 1: used by direction only
        for layer in (*self.layers[::2], self.prototypes):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, width) -> (B, out) cosines."""
        return F.linear(F.normalize(self.layers(pooled), dim=1), F.normalize(self.prototypes.weight, dim=1))
