"""Joint random movement of images and landmarks in any dimension, and intensity changes, batched on the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from core.config.section import Augmentation
from core.data.artefacts import add_artefacts
from core.data.elastic import displacement_field, draw_knots, undo_displacement


@lru_cache(maxsize=256)
def constant(values: float | tuple[float, ...], device: torch.device) -> Tensor:
    """float64 `values` on the device, copied there once, for a copy waits for a GPU; not to be written to."""
    return torch.tensor(values, device=device, dtype=torch.float64)


def draw_affines(count: int, size: tuple[int, ...], settings: Augmentation, generator: torch.Generator) -> Tensor:
    """(count, D, D + 1) float64 maps from source to augmented pixel coordinates, rotation and scale about the centre.

    With probability 1 - settings.probability a map is the identity. In 3D the turns are about x, then y, then z.
    """
    dims, device = len(size), generator.device

    def uniform(limit: float | Tensor, *shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator, device=device, dtype=torch.float64) * 2 - 1) * limit

    planes = list(combinations(range(dims), 2))  # of axes (z, y, x): those of turns about x, y and z
    limits = constant(settings.rotation_degrees, device)
    angles = torch.deg2rad(uniform(limits, count, len(planes)))
    factors = 1 + uniform(settings.scale, count)
    shifts = uniform(settings.translation, count, dims) * constant(size, device)
    used = torch.rand(count, generator=generator, device=device) < settings.probability
    identity = torch.eye(dims, device=device, dtype=torch.float64)
    matrix = identity.expand(count, dims, dims)
    for index, (first, second) in enumerate(planes):
        turn = identity.repeat(count, 1, 1)
        cosine, sine = angles[:, index].cos(), angles[:, index].sin()
        turn[:, first, first], turn[:, second, second] = cosine, cosine
        turn[:, first, second], turn[:, second, first] = -sine, sine
        matrix = turn @ matrix
    matrix = torch.where(used[:, None, None], matrix * factors[:, None, None], identity)
    shifts = torch.where(used[:, None], shifts, torch.zeros_like(shifts))
    centre = (constant(size, device) - 1) / 2
    offset = centre + shifts - matrix @ centre
    return torch.cat((matrix, offset[..., None]), dim=2)


def draw_crops(firsts: Tensor, sizes: Tensor, crop: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """First pixels (B, D) float64 of random crops of what each image fills: `sizes` (B, D) pixels from `firsts` on.

    Along an axis where the image is no larger than the crop, it is centred in the crop.
    """
    spare = sizes.double() - constant(crop, sizes.device)
    drawn = torch.rand(spare.shape, generator=generator, device=generator.device, dtype=torch.float64)
    return firsts + torch.where(spare > 0, (drawn * (spare + 1)).floor(), (spare / 2).ceil())


def move_points(points: Tensor, affines: Tensor) -> Tensor:
    """(B, N, D) points through (B, D, D + 1) maps; NaN stays NaN."""
    return points @ affines[:, :, :-1].transpose(1, 2) + affines[:, None, :, -1]


def warp_images(images: Tensor, affines: Tensor, size: tuple[int, ...] | None = None,
                bent: Tensor | None = None) -> Tensor:
    """(B, C, *old) resampled (linear, border replicated) to (B, C, *size) so that what was at p lies at affine(p).

    With `bent` (B, D, *size), displacements of the size of each axis, it lies at the q where q + bent(q) = affine(p).
    """
    size = size or tuple(images.shape[2:])
    old_half, half = (constant(tuple(lengths), images.device) / 2 for lengths in (images.shape[2:], size))
    inverse, _ = torch.linalg.inv_ex(affines[:, :, :-1])  # inv would wait for a GPU, to raise for a singular one
    offset = -(inverse @ affines[:, :, -1:])[..., 0]
    # grid_sample's frame: u = (i + 0.5) / half - 1 on each axis, axes reversed (x first)
    matrix = inverse * half / old_half[:, None]
    shift = (inverse @ (half - 0.5) + offset + 0.5) / old_half - 1
    matrix, shift = matrix.flip(1).to(images.dtype), shift.flip(1).to(images.dtype)
    place = (-1, len(size), *(1,) * len(size))
    grid = shift.view(place)
    for axis in reversed(range(len(size))):  # affine_grid, axis by axis: only the last product is of the grid's size
        steps = (torch.arange(size[axis], device=images.device, dtype=images.dtype) * 2 + 1) / size[axis] - 1
        grid = torch.addcmul(grid, steps.view(-1, *(1,) * (len(size) - axis - 1)), matrix[:, :, axis].reshape(place))
    for axis, along in enumerate(() if bent is None else bent.unbind(dim=1)):  # the frame is 2 long
        grid = torch.addcmul(grid, along[:, None], matrix[:, :, axis].reshape(place), value=2)
    return F.grid_sample(images, grid.movedim(1, -1), mode="bilinear", padding_mode="border", align_corners=False)


def change_intensity(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """(B, C, *size) in [0, 1]: random gamma, contrast and brightness, one draw per image, clipped to [0, 1]."""
    shape = (images.shape[0], *(1,) * (images.ndim - 1))
    gamma, contrast, brightness = (
        (torch.rand(shape, generator=generator, device=images.device) * 2 - 1) * strength for _ in range(3))
    images = (images.clamp(0, 1).log2_() * torch.exp(gamma)).exp2_()  # a power, in half its time
    return torch.addcmul((brightness - contrast) / 2, images, 1 + contrast).clamp_(0, 1)  # contrast about 0.5


class Crops(NamedTuple):
    """What of the images is wanted: `size`, from first pixels (B, D) on, which may be fractions, or are drawn."""

    size: tuple[int, ...]
    corners: Tensor | Callable[[torch.Generator], Tensor]


@overload
def augment(images: Tensor, points: Tensor, settings: Augmentation, generator: torch.Generator,
            crops: Crops | None = None) -> tuple[Tensor, Tensor]: ...


@overload
def augment(images: Tensor, points: None, settings: Augmentation, generator: torch.Generator,
            crops: Crops | None = None) -> tuple[Tensor, None]: ...


def augment(images: Tensor, points: Tensor | None, settings: Augmentation, generator: torch.Generator,
            crops: Crops | None = None) -> tuple[Tensor, Tensor | None]:
    """Augment a batch; image and landmarks move together exactly.

    (B, C, *canvas), (B, N, D) or None -> the same in pixels of the output, of the images' size or that of `crops`.
    """
    crop = tuple(images.shape[2:]) if crops is None else crops.size
    affines = draw_affines(images.shape[0], crop, settings, generator)
    if crops is not None:
        corners = crops.corners if isinstance(crops.corners, Tensor) else crops.corners(generator)
        affines = torch.cat((affines[:, :, :-1], affines[:, :, -1:] - affines[:, :, :-1] @ corners[..., None]), dim=2)
    knots, bent = None, None
    if settings.elastic:
        knots = draw_knots(len(images), len(crop), settings.elastic, settings.probability, generator)
        bent = displacement_field(knots, crop).to(images.dtype)
    images = warp_images(images, affines, crop, bent)
    if settings.artefacts:
        images = add_artefacts(images, settings.artefacts, generator)
    if settings.intensity:
        images = change_intensity(images, settings.intensity, generator)
    if points is not None:
        points = move_points(points, affines)
        points = points if knots is None else undo_displacement(knots, points, crop, settings.elastic)
    return images, points
