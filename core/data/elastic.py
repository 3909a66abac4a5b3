"""Smooth random displacements (B-splines on a coarse grid, Rueckert et al. 1999) that can always be undone."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

CELLS = 4  # of the coarse grid along each axis
STEEPEST = 0.5  # largest change of the displacement along a step, of that step: below 1 nothing folds
EXACT = 1e-3  # pixels


def draw_knots(count: int, dims: int, amplitude: float, probability: float, generator: torch.Generator) -> Tensor:
    """(count, D, *(CELLS + 3,) * D) float64 coefficients of displacements up to `amplitude`, of the size of each axis.

    With probability 1 - `probability` they are 0. Where neighbours differ so much that the displacement could change by
    more than STEEPEST of a step (largest component, each axis in units of its size), all of an image's are lessened.
    """
    shape, device = (count, dims, *(CELLS + 3,) * dims), generator.device
    knots = (torch.rand(shape, generator=generator, device=device, dtype=torch.float64) * 2 - 1) * amplitude
    used = torch.rand(count, generator=generator, device=device) < probability
    # a spline's derivative is a mean of its coefficients' differences, over the cell's length 1 / CELLS
    steepest = torch.stack([knots.diff(dim=axis + 2).abs().flatten(2).amax(dim=2) for axis in range(dims)]).sum(dim=0)
    lessened = (STEEPEST / (CELLS * steepest.amax(dim=1).clamp(min=1e-12))).clamp(max=1) * used
    return knots * lessened.view(-1, *(1,) * (dims + 1))


def displacement_field(knots: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, D, *size) displacement of every pixel, of the size of each axis."""
    field = knots
    for axis, length in enumerate(size):
        field = (field.movedim(axis + 2, -1) @ _pixel_weights(length, knots.device)).movedim(-1, axis + 2)
    return field


def displacements(knots: Tensor, points: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, N, D) displacement in pixels at `points` (B, N, D) in pixels; outside as at the nearest edge of the image."""
    values = knots[:, None].expand(-1, points.shape[1], *knots.shape[1:])  # (B, N, D, *knots)
    for axis in reversed(range(len(size))):
        weights = _weights(((points[..., axis] + 0.5) / size[axis]).clamp(0, 1) * CELLS)
        values = (values @ weights[(..., *(None,) * (values.ndim - 4), slice(None), None)]).squeeze(-1)
    return torch.stack([values[..., axis] * length for axis, length in enumerate(size)], dim=-1)


def undo_displacement(knots: Tensor, points: Tensor, size: tuple[int, ...], amplitude: float) -> Tensor:
    """The points q (B, N, D) with q + displacement(q) = `points`, to EXACT pixels; NaN stays NaN.

    Each step of q = points - displacement(q) leaves at most STEEPEST of the error (Banach), so that their number is
    known beforehand: nothing waits for a device.
    """
    found = points
    furthest = max(amplitude * max(size), EXACT)
    for _ in range(1 + math.ceil(math.log(furthest / EXACT, 1 / STEEPEST))):
        found = points - displacements(knots, found, size)
    return found


@lru_cache(maxsize=64)
def _pixel_weights(length: int, device: torch.device) -> Tensor:
    """(CELLS + 3, length): what each coefficient counts at each pixel's centre; not to be written to."""
    centres = (torch.arange(length, dtype=torch.float64) + 0.5) / length * CELLS
    return _weights(centres).T.contiguous().to(device)


def _weights(places: Tensor) -> Tensor:
    """(..) places in cells -> (.., CELLS + 3) values of the cubic B-splines centred at -1, 0 .. CELLS + 1."""
    centres = torch.arange(-1, CELLS + 2, device=places.device, dtype=places.dtype)
    away = (places[..., None] - centres).abs()
    inner, outer = 2 / 3 - away**2 + away**3 / 2, (2 - away).clamp(min=0) ** 3 / 6
    return torch.where(away < 1, inner, outer)
