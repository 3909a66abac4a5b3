"""How far off a landmark is likely to be, in mm: expected radial error and 90 % radius of its heatmap, and calibration.

The expected radial error of a probability map p about a point c is sum_x p(x) |x - c| (McCouat and Voiculescu 2022,
Contour-Hugging Heatmaps for Landmark Detection, CVPR). Distances are measured in stored pixels times their spacing,
whatever the grid of the map, and never below a pixel's own extent (see `_distances`). Maps are (B, N, *size) scores:
log-probabilities over pixels up to a constant each. Everything here holds for any number of dimensions, for whole
images and for a crop about each landmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MASS = 0.9  # of a map within its radius, and of the truths that a calibrated circle holds
CHUNK_PIXELS = 2**22  # of the maps whose distances are held at a time
BINS = 2048  # of distance, from the point to the farthest corner of its map
TEMPERATURES = np.geomspace(1 / 16, 16, 25)  # what is tried; between them a parabola
OUTLIERS = 0.05  # share of truths that may lie anywhere in the map: one gross miss must not blur all maps
LANDMARK_SPREAD = 0.5  # prior standard deviation of a landmark's log temperature about the pooled one
POOLED_SPREAD = 2.0  # of the pooled one about 0


class Spread(NamedTuple):
    """Of maps about points, (B, N) float64, in mm where the spacing is known, else in stored pixels; NaN: no value."""

    expected_error: np.ndarray
    radius90: np.ndarray


@dataclass(frozen=True, eq=False)
class Calibration:
    """What validation labels taught: maps p become p^(1 / temperature), then both figures are scaled.

    `temperatures` (N,), or (B, 1) for maps of one landmark each; `images` and `landmarks` count the validation labels
    that it was fitted on.
    """

    temperatures: np.ndarray
    error_scale: float
    radius_scale: float
    images: int
    landmarks: int


# ---- measuring


def measure_spread(scores: Tensor, points: Tensor, to_stored: np.ndarray, spacing: np.ndarray | None,
                   calibration: Calibration | None = None) -> Spread:
    """Expected radial errors and 90 % radii of maps `scores` (B, N, *size) about `points` (B, N, D), pixels of the map.

    `to_stored` (B, D, D + 1), or (B, N, D, D + 1) where each landmark has a crop of its own, leads from the map's
    pixels to stored ones; `spacing` (B, D) is mm per stored pixel, None: distances are in stored pixels.
    """
    steps = distance_steps(to_stored, spacing, points.shape[1])
    temperatures = np.ones(1) if calibration is None else calibration.temperatures
    rows = scores.flatten(0, 1)
    count, chunk = len(rows), max(1, CHUNK_PIXELS // rows[0].numel())
    heat = torch.from_numpy(np.broadcast_to(temperatures, points.shape[:2]).flatten()).to(rows.device, torch.float32)
    centres = points.reshape(count, -1).cpu().numpy().astype(np.float64)
    parts = [_spread_of(rows[first : first + chunk], heat[first : first + chunk], centres[first : first + chunk],
                        steps[first : first + chunk]) for first in range(0, count, chunk)]
    errors, radii = (torch.cat(part).double().cpu().numpy().reshape(points.shape[:2])
                     for part in zip(*parts, strict=True))
    if calibration is None:
        return Spread(errors, radii)
    return Spread(errors * calibration.error_scale, radii * calibration.radius_scale)


def distance_steps(to_stored: np.ndarray, spacing: np.ndarray | None, landmarks: int) -> np.ndarray:
    """(B * N, D, D): what a step along each axis of a map is in reporting units, the steps being its columns."""
    steps = to_stored[..., :-1] if to_stored.ndim == 4 else to_stored[:, None, :, :-1]
    if spacing is not None:
        steps = steps * spacing[:, None, :, None]
    return np.broadcast_to(steps, (len(steps), landmarks, *steps.shape[2:])).reshape(-1, *steps.shape[2:])


def _spread_of(scores: Tensor, heat: Tensor, centres: np.ndarray, steps: np.ndarray) -> tuple[Tensor, Tensor]:
    """(R,) expected errors and (R,) 90 % radii of maps (R, *size)."""
    size = scores.shape[1:]
    mass = (scores.flatten(1).float() / heat[:, None]).softmax(dim=1)
    distances = _distances(size, centres, steps, scores.device).flatten(1)
    expected = (mass * distances).sum(dim=1)
    width = distances.amax(dim=1, keepdim=True) / BINS
    bins = (distances / width).long().clamp_(max=BINS - 1)
    within = torch.zeros(len(scores), BINS, device=scores.device).scatter_add_(1, bins, mass).cumsum(dim=1)
    last = torch.searchsorted(within, torch.full_like(within[:, :1], MASS)).clamp_(max=BINS - 1)
    before = torch.where(last > 0, within.gather(1, (last - 1).clamp(min=0)), 0.0)
    share = ((MASS - before) / (within.gather(1, last) - before).clamp(min=1e-12)).clamp(0, 1)
    return expected, ((last + share) * width)[:, 0]


def _distances(size: torch.Size, centres: np.ndarray, steps: np.ndarray, device: torch.device) -> Tensor:
    """(R, *size) lengths of `steps` (R, D, D) times each pixel's offset from `centres` (R, D), as root mean squares.

    A probability is that of a pixel's whole area: even in the pixel that holds the point the truth is somewhere in it,
    a twelfth of the pixel's side squared off along each axis in the mean square.
    """
    metric = np.swapaxes(steps, 1, 2) @ steps  # d^2 = offset^T metric offset
    dims = len(size)

    def row(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).float().to(device).view(-1, *[1] * dims)

    offsets = [torch.arange(length, device=device).view(*[1] * (axis + 1), -1, *[1] * (dims - axis - 1))
               - row(centres[:, axis]) for axis, length in enumerate(size)]
    squares = row(np.trace(metric, axis1=1, axis2=2) / 12)
    for axis, offset in enumerate(offsets):
        squares = squares + row(metric[:, axis, axis]) * offset**2
    for one, other in combinations(range(dims), 2):
        if np.abs(metric[:, one, other]).max() > 1e-9 * metric[:, one, one].max():  # only where axes are turned
            squares = squares + row(2 * metric[:, one, other]) * (offsets[one] * offsets[other])
    return squares.clamp(min=0).sqrt()


# ---- calibrating


def log_likelihoods(scores: Tensor, truth: Tensor) -> np.ndarray:
    """(B, N, T): log-probability of the pixel nearest to `truth` (B, N, D) under the map at each of TEMPERATURES.

    A share OUTLIERS of the truths may be anywhere in the map. NaN where the truth is, or where it lies outside.
    """
    size = torch.tensor(scores.shape[2:])
    pixel = truth.cpu().round()
    inside = ((pixel >= 0) & (pixel <= size - 1)).all(dim=2)  # NaN compares false
    index = torch.zeros(truth.shape[:2], dtype=torch.long)
    for axis, length in enumerate(size.tolist()):
        index = index * length + pixel[..., axis].nan_to_num().clamp(0, length - 1).long()
    flat = scores.flatten(2)
    own = flat.gather(2, index[..., None].to(flat.device))[..., 0]
    chances = torch.stack([own / heat - (flat / heat).logsumexp(dim=2) for heat in TEMPERATURES.tolist()], dim=2)
    mixed = (1 - OUTLIERS) * chances.double().exp() + OUTLIERS / flat.shape[2]
    return np.where(inside[..., None], mixed.log().cpu().numpy(), np.nan)


def fit_temperatures(likelihoods: np.ndarray) -> np.ndarray:
    """(N,) temperatures from `likelihoods` (M, N, T) of `log_likelihoods`: the most probable ones.

    Maximum likelihood takes each truth where it lies, so that maps are ranked by shape and not by their mean alone; the
    scales of a Calibration then make errors right in mm. Where labels are few, a landmark's log temperature is drawn
    to the one that fits all landmarks together (a normal prior of LANDMARK_SPREAD, worth about four labels in 2D).
    """
    heat = np.log(TEMPERATURES)
    sums = np.nansum(likelihoods, axis=0)
    pooled = _peak(sums.sum(axis=0) - heat**2 / (2 * POOLED_SPREAD**2), heat)
    prior = (heat - pooled) ** 2 / (2 * LANDMARK_SPREAD**2)
    return np.exp([_peak(row - prior, heat) for row in sums])


def _peak(values: np.ndarray, at: np.ndarray) -> float:
    """Where `values` on the even grid `at` are largest, by the parabola through the largest and its neighbours."""
    middle = int(np.clip(values.argmax(), 1, len(at) - 2))
    low, best, high = values[middle - 1 : middle + 2]
    bend = low - 2 * best + high
    shift = (low - high) / (2 * bend) if bend < 0 else 0.0
    if values.argmax() != middle or not abs(shift) <= 1:  # at the grid's end
        return float(at[values.argmax()])
    return float(at[middle] + shift * (at[1] - at[0]))


def fit_scales(temperatures: np.ndarray, spread: Spread, errors: np.ndarray) -> Calibration:
    """The Calibration of validation images (M, N) whose `spread` was measured at `temperatures`, both scales being 1.

    Over all landmarks together: the mean expected error becomes the mean error, and 90 % radii hold the truths of 90 %
    of them: the ceil(0.9 (n + 1))-th smallest of n ratios of error to radius (split-conformal: Papadopoulos et al.
    2002; with fewer than 9 the largest, which promises less). ValueError where no landmark has a truth.
    """
    seen = ~np.isnan(errors)
    if not seen.any():
        raise ValueError("a calibration needs at least one validation label")
    ratios = np.sort(errors[seen] / np.maximum(spread.radius90[seen], np.finfo(np.float64).tiny))
    rank = min(int(np.ceil(round(MASS * (len(ratios) + 1), 9))), len(ratios))
    expected = spread.expected_error[seen].mean()
    return Calibration(temperatures, float(errors[seen].mean() / expected) if expected > 0 else 1.0,
                       float(ratios[rank - 1]), int(seen.any(axis=1).sum()), int(seen.sum()))
