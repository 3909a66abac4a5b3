"""GU2Net: a U-Net of separable convolutions for several data sets, times a global branch of each (Zhu et al. 2021).

All data sets share the pointwise convolutions; depthwise kernels, norms, first and last layers are their own. Any
number of dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.networks.convolutions import ANY_CONV, BATCH_NORM, LINEAR, MAX_POOL

WIDTH = 64
DOWN = ((64, 64, 64), (64, 128, 128), (128, 256, 256), (256, 512, 512), (512, 512, 512))  # in, between, out
UP = ((1024, 512, 256), (512, 256, 128), (256, 128, 64), (128, 64, 64))
HALVINGS = len(UP)
DILATIONS = (1, 2, 5, 2, 1)
REDUCTION = 4  # of the size, that the global branch sees


class SeparableUnit(nn.Module):
    """Depthwise 3^D, pointwise, batch norm, LeakyReLU; the pointwise convolution is that of all data sets."""

    def __init__(self, dims: int, channels_in: int, channels_out: int, data_sets: int) -> None:
        super().__init__()
        self.depthwise = nn.ModuleList(ANY_CONV[dims](channels_in, channels_in, 3, padding=1, groups=channels_in)
                                       for _ in range(data_sets))
        self.pointwise = ANY_CONV[dims](channels_in, channels_out, 1)
        self.norms = nn.ModuleList(BATCH_NORM[dims](channels_out) for _ in range(data_sets))

    def forward(self, x: Tensor, data_set: int) -> Tensor:
        """(B, channels_in, *size) -> (B, channels_out, *size)."""
        x = self.norms[data_set](self.pointwise(self.depthwise[data_set](x)))
        return F.leaky_relu(x, 0.01)


class DoubleUnit(nn.Module):
    """Two separable units: widths (in, between, out)."""

    def __init__(self, dims: int, widths: tuple[int, int, int], data_sets: int) -> None:
        super().__init__()
        first, between, last = widths
        self.first = SeparableUnit(dims, first, between, data_sets)
        self.second = SeparableUnit(dims, between, last, data_sets)

    def forward(self, x: Tensor, data_set: int) -> Tensor:
        """(B, in, *size) -> (B, out, *size)."""
        return self.second(self.first(x, data_set), data_set)


class LocalBranch(nn.Module):
    """The U-Net: (B, channels, *size) -> (B, landmarks of the data set, *size), before the sigmoid."""

    def __init__(self, dims: int, channels: int, landmarks: Sequence[int]) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(ANY_CONV[dims](channels, WIDTH, 1) for _ in landmarks)
        self.down = nn.ModuleList(DoubleUnit(dims, widths, len(landmarks)) for widths in DOWN)
        self.up = nn.ModuleList(DoubleUnit(dims, widths, len(landmarks)) for widths in UP)
        self.outputs = nn.ModuleList(ANY_CONV[dims](WIDTH, count, 1) for count in landmarks)
        self.pool, self.mode = MAX_POOL[dims], LINEAR[dims]

    def forward(self, x: Tensor, data_set: int) -> Tensor:
        """See the class; sizes need not be divisible."""
        first, *deeper = self.down
        kept = [first(self.inputs[data_set](x), data_set)]
        for unit in deeper:
            kept.append(unit(self.pool(kept[-1], 2), data_set))
        x = kept.pop()
        for unit in self.up:
            skip = kept.pop()
            x = F.interpolate(x, scale_factor=2, mode=self.mode, align_corners=True)
            missing = [wanted - given for wanted, given in zip(skip.shape[2:], x.shape[2:], strict=True)]
            margins = [margin for length in reversed(missing) for margin in (length // 2, length - length // 2)]
            x = unit(torch.cat((skip, F.pad(x, margins)), dim=1), data_set)
        return self.outputs[data_set](x)


class GlobalBranch(nn.Module):
    """Image and local maps at a quarter of their size -> a map for each landmark there, before the sigmoid.

    Its receptive field is 25 of its pixels, 100 of the image's.
    """

    def __init__(self, dims: int, channels: int, landmarks: int) -> None:
        super().__init__()
        conv = ANY_CONV[dims]
        self.image, self.maps = conv(channels, WIDTH, 3, padding=1), conv(landmarks, WIDTH, 3, padding=1)
        layers: list[nn.Module] = []
        for dilation in DILATIONS:
            layers += [conv(2 * WIDTH, 2 * WIDTH, 3, padding=dilation, dilation=dilation), BATCH_NORM[dims](2 * WIDTH),
                       nn.ReLU()]
        self.layers = nn.Sequential(*layers, conv(2 * WIDTH, landmarks, 1))

    def forward(self, image: Tensor, maps: Tensor) -> Tensor:
        """(B, C, *size) and (B, N, *size) -> (B, N, *size / 4)."""
        size = [max(1, length // REDUCTION) for length in image.shape[2:]]
        image, maps = (F.interpolate(each, size=size, mode="nearest") for each in (image, maps))
        seen = torch.cat((self.image(image), self.maps(maps)), dim=1)
        return self.layers(seen)


class GU2Net(nn.Module):
    """(B, channels, *size) -> (B, N, *size): the logarithm of local times global probability, of `data_set`.

    landmarks: of each data set. The network answers for data set `data_set`, an attribute that may be set.
    """

    def __init__(self, dims: int, channels: int, landmarks: Sequence[int], data_set: int = 0) -> None:
        super().__init__()
        self.channels, self.landmarks, self.data_set = channels, tuple(landmarks), data_set
        self.local_branch = LocalBranch(dims, channels, landmarks)
        self.global_branches = nn.ModuleList(GlobalBranch(dims, channels, count) for count in landmarks)

    @property
    def out_channels(self) -> int:
        """Landmarks of its data set."""
        return self.landmarks[self.data_set]

    @property
    def identity(self) -> dict[str, Any]:
        """What a weights file must say, beside channels, for the network to be rebuilt."""
        return {"network": "gu2net", "landmarks": list(self.landmarks), "data_set": self.data_set}

    def forward(self, x: Tensor) -> Tensor:
        """See the class; the product is taken as a sum of logarithms in float32."""
        local = self.local_branch(x, self.data_set).float()
        coarse = F.logsigmoid(self.global_branches[self.data_set](x, local.sigmoid()).float())
        return F.logsigmoid(local) + F.interpolate(coarse, size=x.shape[2:], mode="nearest")
