"""Heatmaps of a network to points and how far off these may be: what every heatmap detector shares."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.config.dataset import Dataset
from core.config.finetune import LossSettings
from core.formats.geometry import apply_maps, inverse
from landmarks_finetuning.heatmaps import LogMaps, confidence, find_points, log_maps, require_finite
from landmarks_finetuning.shape import Shape, add_shape_prior
from landmarks_finetuning.uncertainty import Calibration, measure_spread


def sigma_pixels(sigma: float, dataset: Dataset) -> float:
    """finetune.sigma in pixels of this study's input.

    Of images resized to dataset.image_size it is stated for 256 pixels (mean over the axes); with dataset.resample_mm
    pixels have one size in mm, and it counts them as they are: another crop, the same sigma in mm.
    """
    return sigma if dataset.makes_windows else sigma * float(np.mean(dataset.image_size)) / 256


class Decoded(NamedTuple):
    """In the pixels of the maps: points (B, N, D), float64 on the CPU, and the scores (B, N, *size) they were read off.

    The scores, on the outputs' device, are log-probabilities up to a constant for each map, under the shape prior.
    confidence (B, N) in [0, 1] is a weight: the mass of the network's own map about the point.
    """

    points: Tensor
    scores: Tensor
    confidence: Tensor


def decode_maps(outputs: Tensor, settings: LossSettings, sigma: float, decoder: str | None = None,
                shape: Shape | None = None) -> Decoded:
    """Raw outputs (B, N, *size) -> points, and the maps they come from; `sigma` is the heatmaps' in network pixels.

    With the labels' common `shape` points are decoded again under
    settings.shape_prior, to whose fit each landmark counts by the mass of its map about it. `decoder` replaces
    settings.decoder.
    """
    decoder, loss = decoder or settings.decoder, settings.loss
    seen = log_maps(outputs, loss)
    points = find_points(outputs, seen, decoder, loss, sigma)
    raw = decoder == "contour_centroid"  # thresholds raw outputs, which a prior must not shift
    points, sure = _copied(points, confidence(seen, points, loss, sigma), seen)
    if shape is None or settings.shape_prior is None or raw:
        return Decoded(points, seen.scores, sure)
    fitted = shape.fit(points.numpy(), sure.numpy())
    weighted = add_shape_prior(outputs, fitted, settings.shape_prior * shape.size)
    points = find_points(weighted, seen._replace(scores=weighted), decoder, loss, sigma)
    points, sure = _copied(points, confidence(seen, points, loss, sigma), seen)
    return Decoded(points, weighted, sure)


def _copied(points: Tensor, sure: Tensor, maps: LogMaps) -> tuple[Tensor, Tensor]:
    """Points (B, N, D) and confidences (B, N) on the CPU, by one copy: one wait for the device."""
    copied = torch.cat((points.to(sure.device), sure[..., None], maps.finite[..., None].double()), dim=2).cpu()
    require_finite(copied[..., -1] > 0)
    return copied[..., :-2], copied[..., -2]


class Located(NamedTuple):
    """Landmarks in stored pixels, and how far off they may be in mm where the spacing is known, else stored pixels."""

    points: np.ndarray  # (B, N, D)
    expected_error: np.ndarray  # (B, N), NaN where the loss says nothing of it
    radius90: np.ndarray  # (B, N), the same
    confidence: np.ndarray  # (B, N) in [0, 1], a weight: see `Decoded`


def locate(outputs: Tensor, maps: np.ndarray, settings: LossSettings, sigma: float, decoder: str | None = None,
           shape: Shape | None = None, spacing: np.ndarray | None = None,
           calibration: Calibration | None = None, measure: bool = True) -> Located:
    """Raw outputs (B, N, *size) -> points (B, N, D) in stored pixels with expected errors and 90 % radii (B, N).

    `maps` (B, D, D + 1) lead from stored to network pixels, `spacing` (B, D) is mm per stored pixel. The rest is as
    for `decode_maps`. A softmax over landmarks says which landmark a pixel belongs to, not where one lies: NaN there,
    and where they are not to be measured.
    """
    decoded, to_stored = decode_maps(outputs, settings, sigma, decoder, shape), inverse(maps)
    points = apply_maps(decoded.points.numpy(), to_stored)
    if settings.loss != "cross_entropy_pixels" or not measure:
        nothing = np.full(points.shape[:2], np.nan)
        return Located(points, nothing, nothing, decoded.confidence.numpy())
    spread = measure_spread(decoded.scores, decoded.points, to_stored, spacing, calibration)
    return Located(points, *spread, decoded.confidence.numpy())
