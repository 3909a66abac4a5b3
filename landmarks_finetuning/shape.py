"""The landmarks' common shape as a prior: where one lands on another structure, the others say where it belongs.

The labelled shapes' Procrustes mean is fitted to the landmarks found in an image by a robust similarity (translation,
rotation, scale), and every heatmap is weighted by a Gaussian about its fitted place before it is decoded again.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError

SCALES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.15, 0.15, 0.15)  # of the shape's size: what counts as an outlier, annealed


def mean_shape(shapes: np.ndarray) -> np.ndarray:
    """Generalised Procrustes mean (N, D) of labelled shapes (K, N, D), at the pose and scale of the fullest one.

    Each landmark is averaged over the shapes that have it (NaN = not annotated); NaN where none has, or where a shape
    shares fewer than D + 1 landmarks with the mean.
    """
    mean = shapes[np.isfinite(shapes).all(axis=2).sum(axis=1).argmax()]
    for _ in range(3):
        aligned = _similarity(shapes, mean, np.ones(shapes.shape[:2]))
        present = np.isfinite(aligned).all(axis=2)
        total = np.where(present[..., None], aligned, 0.0).sum(axis=0)
        mean = np.where(present.any(axis=0)[:, None], total / np.maximum(present.sum(axis=0), 1)[:, None], np.nan)
    return mean


def fit_shape(shape: np.ndarray, points: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """`shape` (N, D) moved onto `points` (..., N, D) by similarities, (..., N, D); NaN where too few are known.

    Weights are the confidences (..., N), cut down for outliers by the Geman-McClure function with a scale that shrinks
    (graduated non-convexity, Blake & Zisserman 1987), so that a third of the points may lie anywhere.
    """
    size, weights = shape_size(shape), np.asarray(confidence, dtype=np.float64)
    for scale in SCALES:
        fitted = _similarity(shape, points, weights + 1e-9)
        off = np.linalg.norm(fitted - points, axis=-1) / size
        weights = confidence / (1 + (off / scale) ** 2) ** 2
    return fitted


def shape_size(shape: np.ndarray) -> float:
    """Root mean square distance of the landmarks from their centroid, in pixels."""
    known = shape[np.isfinite(shape).all(axis=1)]
    return float(np.sqrt(((known - known.mean(axis=0)) ** 2).sum(axis=1).mean())) if len(known) else 0.0


def add_shape_prior(outputs: Tensor, fitted: np.ndarray, spread_px: float) -> Tensor:
    """Raw outputs (B, N, *size) plus the log of a Gaussian of `spread_px` about `fitted` (B, N, D); NaN adds 0."""
    places = torch.from_numpy(fitted).to(outputs.device)
    total = outputs.float()
    dims = outputs.ndim - 2
    for axis, length in enumerate(outputs.shape[2:]):
        off = (torch.arange(length, device=places.device) - places[..., axis, None]) ** 2 / (-2 * spread_px**2)
        total = total + off.nan_to_num().float().reshape(*off.shape[:2], *(1,) * axis, -1, *(1,) * (dims - axis - 1))
    return total


def _similarity(moving: np.ndarray, fixed: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """All of `moving` (..., N, D) through the weighted least-squares similarity onto `fixed`, no mirror (Umeyama 1991).

    Either may be one for all of the other; weights (..., N). NaN throughout where fewer than D + 1 points are in both.
    """
    dims = moving.shape[-1]
    both = np.isfinite(moving).all(axis=-1) & np.isfinite(fixed).all(axis=-1)
    enough = both.sum(axis=-1) > dims
    both = both & enough[..., None]
    weights = np.where(both, weights, 0.0)
    weights = weights / np.where(enough, weights.sum(axis=-1), 1.0)[..., None]
    source, target = (np.where(both[..., None], points, 0.0) for points in (moving, fixed))
    source_mean, target_mean = (weights[..., None, :] @ points for points in (source, target))  # (..., 1, D)
    source, target = source - source_mean, target - target_mean
    left, stretch, right = np.linalg.svd((weights[..., None] * source).swapaxes(-1, -2) @ target)
    signs = np.ones(stretch.shape)
    signs[..., -1] = np.sign(np.linalg.det(left @ right))
    variance = (weights[..., None] * source**2).sum(axis=(-1, -2))
    scale = np.where(variance > 0, (stretch * signs).sum(axis=-1) / np.where(variance > 0, variance, 1.0), 1.0)
    turned = (moving - source_mean) @ ((left * signs[..., None, :]) @ right)
    return np.where(enough[..., None, None], turned * scale[..., None, None] + target_mean, np.nan)


def mean_shape_prediction(centred: np.ndarray) -> np.ndarray:
    """The mean (N, D) of labelled points (K, N, D) about their images' centres: the floor any detector has to beat.

    Each landmark is averaged over the labels that have it (NaN = not annotated); one that no label has is put at the
    mean of the others. Raises UserError if no label has any landmark.
    """
    centred = np.asarray(centred, dtype=np.float64)
    present = ~np.any(np.isnan(centred), axis=-1)
    counts = present.sum(axis=0)
    if not counts.any():
        raise UserError("the mean shape needs at least one labelled landmark in the training subset")
    sums = np.where(present[..., None], centred, 0.0).sum(axis=0)
    mean = sums / np.maximum(counts, 1)[:, None]
    mean[counts == 0] = mean[counts > 0].mean(axis=0)
    return mean
