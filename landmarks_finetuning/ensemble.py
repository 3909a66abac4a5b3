"""Several looks at an image, and several networks: their raw outputs, averaged in the image's own frame.

The mean of raw outputs is, for a softmax over pixels, the mean log-probability up to a constant for each heatmap; of
patches it is the mean logarithm of each one's displacements and the mean logit of its presence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from core.config.section import Augmentation
from core.data.augment import draw_affines, warp_images

SEED = 0
VIEWS = Augmentation(probability=1.0, rotation_degrees=2.0, scale=0.03, translation=0.02)
GAMMA = 0.1  # largest log of the exponent of a view's intensities


def over_views(outputs_of: Callable[[Tensor], Tensor], inputs: Tensor, count: int) -> Tensor:
    """Raw outputs (B, N, *size) for `inputs` (B, C, *size) in [0, 1], averaged over `count` views.

    The first view is the image itself. The others, the same for every image, are turned, zoomed and shifted a little
    (VIEWS), their intensities are raised to a power near 1, and their outputs are moved back. Where a view did not
    reach, what it has at its border counts.
    """
    total = outputs_of(inputs)
    if count == 1:
        return total
    size, generator = tuple(inputs.shape[2:]), torch.Generator().manual_seed(SEED)
    affines = draw_affines(count - 1, size, VIEWS, generator)
    powers = ((torch.rand(count - 1, generator=generator) * 2 - 1) * GAMMA).exp().tolist()
    for affine, power in zip(affines, powers, strict=True):
        back = torch.linalg.inv(affine[:, :-1])
        back = torch.cat((back, -back @ affine[:, -1:]), dim=1)
        there, back = (each.to(inputs.device).expand(len(inputs), -1, -1) for each in (affine, back))
        total = total + warp_images(outputs_of(warp_images(inputs.clamp(0, 1) ** power, there)), back)
    return total / count


class MeanOutputs(nn.Module):
    """The mean of what several networks give."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, N, *size), float32."""
        total = self.networks[0](x).float()
        for network in self.networks[1:]:
            total = total + network(x).float()
        return total / len(self.networks)
