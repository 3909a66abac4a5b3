"""Windows cut out of images, at places of their own."""

from __future__ import annotations

import torch
from torch import Tensor


def cut_windows(images: Tensor, chosen: Tensor, corners: Tensor, size: tuple[int, ...]) -> Tensor:
    """Windows (B, C, *size) of images[chosen], from whole-number first pixels `corners` (B, D) on.

    images (M, C, *canvas); what lies outside an image repeats its border. Only the windows are read, and nothing waits
    for a GPU.
    """
    dims = len(size)
    index = []
    for axis, (length, whole) in enumerate(zip(size, images.shape[2:], strict=True)):
        places = (corners[:, axis, None] + torch.arange(length, device=corners.device)).clamp(0, whole - 1)
        index.append(places.view(-1, *(length if a == axis else 1 for a in range(dims))))
    return images.movedim(1, -1)[(chosen.view(-1, *(1,) * dims), *index)].movedim(-1, 1)
