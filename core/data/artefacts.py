"""What X-ray pictures show beside the patient: collimation, markers, uneven exposure; in volumes the same as boxes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

DARKEST = 0.15  # up to this share of the brightness is left outside the collimator
LEAVES = (0.7, 1.0)  # distance of a collimator's side from the centre, of half the size
TILT = 0.15  # of a collimator's side, per axis
MARKER = (0.05, 0.12)  # side of a marker, of the size
STROKE = 0.3  # of a marker's side
BRIGHT = (0.8, 1.0)
GRADIENT = 0.5  # largest change of log brightness from the centre to an edge, along each axis


def add_artefacts(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """(B, C, *size) in [0, 1] with uneven exposure, a dark border and an L-shaped marker, each with `probability`."""
    places = _places(tuple(images.shape[2:]), images.device, images.dtype)
    used = torch.rand((3, len(images)), generator=generator, device=images.device) < probability
    exposed, collimated, marked = (each.view(-1, *(1,) * (images.ndim - 1)) for each in used)
    images = torch.where(exposed, expose(images, places, generator), images)
    images = torch.where(collimated, collimate(images, places, generator), images)
    return torch.where(marked, mark(images, places, generator), images)


def expose(images: Tensor, places: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Brightness times the exponential of a plane that is 0 in the centre, cut at 1."""
    slopes = _uniform(images, len(places), (-GRADIENT, GRADIENT), generator)
    return (images * _plane(slopes, places).exp()).clamp(0, 1)


def collimate(images: Tensor, places: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Dark outside a convex body with two sides about square to each axis; one side in two is outside the image."""
    left = _uniform(images, 1, (0, DARKEST), generator)[0]
    inside = torch.ones((), device=images.device, dtype=images.dtype)
    for axis in range(len(places)):
        for sign in (-1.0, 1.0):
            normal = _uniform(images, len(places), (-TILT, TILT), generator)
            normal[axis] = torch.full_like(left, sign)
            distance, shut = _uniform(images, 2, (0, 1), generator)
            far = LEAVES[0] + (LEAVES[1] - LEAVES[0]) * distance + 9.0 * (shut < 0.5)
            half = images.shape[axis + 2] / 2  # pixels: an edge is one pixel wide
            inside = torch.minimum(inside, ((far - _plane(normal, places)) * half + 0.5).clamp(0, 1))
    return images * (left + (1 - left) * inside)


def mark(images: Tensor, places: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """A bright letter L in the plane of the last two axes, as thick as it is wide along another one."""
    bright = _uniform(images, 1, BRIGHT, generator)[0]
    sides = [2 * side for side in _uniform(images, len(places), MARKER, generator)]  # the image is 2 long
    firsts = [first * (2 - side) - 1
              for first, side in zip(_uniform(images, len(places), (0, 1), generator), sides, strict=True)]
    offsets = [(place - first) / side for place, first, side in zip(places, firsts, sides, strict=True)]
    within = reduce(torch.logical_and, ((offset >= 0) & (offset < 1) for offset in offsets))
    letter = within & ((offsets[-1] < STROKE) | (offsets[-2] >= 1 - STROKE))
    return torch.where(letter, bright, images)


def _places(size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """For each axis the pixels' centres from -1 to 1, shaped to be spread over (B, C, *size)."""
    return [((torch.arange(length, device=device, dtype=dtype) * 2 + 1) / length - 1).view(
        -1, *(1,) * (len(size) - axis - 1)) for axis, length in enumerate(size)]


def _plane(slopes: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, (slope * place for slope, place in zip(slopes, places, strict=True)))


def _uniform(images: Tensor, count: int, limits: tuple[float, float], generator: torch.Generator) -> list[Tensor]:
    """`count` numbers for each image, as (B, 1, .., 1)."""
    shape = (count, len(images), *(1,) * (images.ndim - 1))
    drawn = torch.rand(shape, generator=generator, device=images.device, dtype=images.dtype)
    return list(limits[0] + (limits[1] - limits[0]) * drawn)
