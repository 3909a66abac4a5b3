"""Networks that say of every patch how far off each landmark lies, and whether it lies there (Noothout et al. 2020).

Outputs are (B, N * D + N, *grid), one position for each patch: the displacements from its centre, ordered by landmark,
then axis, and the logits of presence. Any number of dimensions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.networks.convolutions import ANY_CONV, AVERAGE_POOL, BATCH_NORM

BLOCKS = (3, 4, 6, 3)  # of the four stages, as in ResNet34
NORM_ON_SHORTCUT = {2: True, 3: False}  # as released
LOCAL_PATCH = 2  # pixels of a window


class Block(nn.Module):
    """Two times [3^D convolution, batch norm, ReLU], and the shortcut; nothing after the sum."""

    def __init__(self, dims: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        conv, norm = ANY_CONV[dims], BATCH_NORM[dims]
        self.layers = nn.Sequential(conv(channels_in, channels_out, 3, padding=1), norm(channels_out), nn.ReLU(),
                                    conv(channels_out, channels_out, 3, padding=1), norm(channels_out), nn.ReLU())
        self.shortcut = nn.Sequential()
        if channels_in != channels_out:
            self.shortcut.append(conv(channels_in, channels_out, 1))
            if NORM_ON_SHORTCUT[dims]:
                self.shortcut.append(norm(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, *size) -> (B, channels_out, *size)."""
        return self.layers(x) + self.shortcut(x)


def head(dims: int, channels: int, outputs: int, groups: int = 1) -> nn.Sequential:
    """Three 1^D convolutions with ReLU between; `channels` and `outputs` of each group."""
    conv, inner = ANY_CONV[dims], groups * channels
    return nn.Sequential(conv(inner, inner, 1, groups=groups), nn.ReLU(), conv(inner, inner, 1, groups=groups),
                         nn.ReLU(), conv(inner, groups * outputs, 1, groups=groups))


class GlobalNetwork(nn.Module):
    """The first step: (B, channels, *size) -> outputs for patches of `patch` pixels, a power of 2.

    width: of the first stage. Sizes that patches do not fill are padded with zeros at the far end.
    """

    def __init__(self, dims: int, channels: int, landmarks: int, width: int, patch: int) -> None:
        super().__init__()
        self.channels, self.out_channels, self.width, self.patch = channels, landmarks, width, patch
        halvings = int(math.log2(patch))
        inner = width // 2
        layers: list[nn.Module] = [ANY_CONV[dims](channels, inner, 7, stride=2, padding=3), BATCH_NORM[dims](inner),
                                   nn.ReLU()]
        for stage, blocks in enumerate(BLOCKS):
            if stage < halvings - 1:
                layers += [AVERAGE_POOL[dims](2), BATCH_NORM[dims](inner), nn.ReLU()]
            for _ in range(blocks):
                layers.append(Block(dims, inner, width * 2**stage))
                inner = width * 2**stage
        self.features = nn.Sequential(*layers)
        self.displacement, self.presence = head(dims, inner, landmarks * dims), head(dims, inner, landmarks)

    @property
    def identity(self) -> dict[str, Any]:
        """What a weights file must say, beside channels, for the network to be rebuilt."""
        return {"network": "global_to_local", "width": self.width, "patch": self.patch}

    def forward(self, x: Tensor) -> Tensor:
        """See the module."""
        margins = [margin for length in reversed(x.shape[2:]) for margin in (0, -length % self.patch)]
        features = self.features(F.pad(x, margins))
        return torch.cat((self.displacement(features), self.presence(features)), dim=1)


class LocalNetworks(nn.Module):
    """The second step: a network for each landmark, on a window of its own, all in groups of one.

    (B, N * channels, *window) -> outputs for patches of 2 pixels. width: of the first convolutions.
    """

    def __init__(self, dims: int, channels: int, landmarks: int, width: int) -> None:
        super().__init__()
        self.channels, self.out_channels, self.width = channels, landmarks, width
        layers: list[nn.Module] = []
        inner = channels
        for index, outer in enumerate((width,) * 4 + (2 * width,) * 2):
            if index == 4:
                layers.append(AVERAGE_POOL[dims](LOCAL_PATCH))
            layers += [ANY_CONV[dims](landmarks * inner, landmarks * outer, 3, padding=1, groups=landmarks),
                       BATCH_NORM[dims](landmarks * outer), nn.ReLU()]
            inner = outer
        self.features = nn.Sequential(*layers)
        self.displacement, self.presence = head(dims, inner, dims, landmarks), head(dims, inner, 1, landmarks)

    @property
    def identity(self) -> dict[str, Any]:
        """What a weights file must say, beside channels, for the network to be rebuilt."""
        return {"network": "local_networks", "width": self.width}

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        features = self.features(x)
        return torch.cat((self.displacement(features), self.presence(features)), dim=1)
