"""The landmarks' common shape as a prior: where one lands on another structure, the others say where it belongs.

The labelled shapes' Procrustes mean is fitted to the landmarks found in an image by a robust similarity (translation,
rotation, scale), and every heatmap is weighted by a Gaussian about its fitted place before it is decoded again. With
modes the mean may also change as the labelled shapes do (point distribution model, Cootes et al. 1995): a shape is then
(1 + M, N, D), the mean and M modes, each as far as one standard deviation goes; (N, D) is the mean alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError

SCALES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.15, 0.15, 0.15)  # of the shape's size: what counts as an outlier, annealed
SCATTER = 0.05  # of the shape's size: of found landmarks about the model, along each axis
EXPLAINED = 0.95  # of the labelled shapes' variance: modes beyond it are noise
LABELS_PER_MODE = 2  # beside the one for the mean


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


def shape_modes(shapes: np.ndarray, mean: np.ndarray, most: int) -> np.ndarray:
    """Up to `most` main ways (M, N, D) in which labelled shapes (K, N, D), moved onto their `mean` (N, D), differ.

    Each is one standard deviation long, the strongest first. There are no more than one for LABELS_PER_MODE labels, and
    than explain EXPLAINED of the variance. A landmark that is not annotated (NaN) counts as if it lay at the mean's.
    """
    off = np.stack([_similarity(shape, mean, np.ones(len(shape))) for shape in shapes]) - mean
    off = np.where(np.isfinite(off).all(axis=2, keepdims=True), off, 0.0).reshape(len(shapes), -1)
    _, lengths, ways = np.linalg.svd(off, full_matrices=False)
    variances = lengths**2 / max(1, len(shapes) - 1)
    if most < 1 or variances.sum() < 1e-12:
        return np.zeros((0, *mean.shape))
    needed = 1 + int(np.searchsorted(variances.cumsum() / variances.sum(), EXPLAINED))
    count = min(most, needed, (len(shapes) - 1) // LABELS_PER_MODE)
    return (ways * np.sqrt(variances)[:, None])[:count].reshape(count, *mean.shape)


def stored_shape(header: Mapping[str, Any]) -> np.ndarray | None:
    """The shape of a detector's header: its mean, with its modes if it has any; None in files older than the prior."""
    if header.get("shape") is None:
        return None
    mean = np.array(header["shape"], dtype=np.float64)
    return np.stack([mean, *np.array(header["shape_modes"])]) if "shape_modes" in header else mean


def fit_shape(shape: np.ndarray, points: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """`shape` (N, D) moved onto `points` (..., N, D) by similarities, (..., N, D); NaN where too few are known.

    Weights are the confidences (..., N), cut down for outliers by the Geman-McClure function with a scale that shrinks
    (graduated non-convexity, Blake & Zisserman 1987), so that a third of the points may lie anywhere. A shape with
    modes (1 + M, N, D) is bent by them as well.
    """
    mean, modes = (shape, None) if shape.ndim == 2 else (shape[0], shape[1:])
    if modes is not None and points.ndim > 2:
        return np.stack([fit_shape(shape, *pair) for pair in zip(points, confidence, strict=True)])
    size, weights, bent = shape_size(shape), np.asarray(confidence, dtype=np.float64), mean
    for scale in SCALES:
        if modes is not None:
            bent = _bend(mean, modes, _similarity(points, bent, weights + 1e-9), weights)
        fitted = _similarity(bent, points, weights + 1e-9)
        off = np.linalg.norm(fitted - points, axis=-1) / size
        weights = confidence / (1 + (off / scale) ** 2) ** 2
    return fitted


def _bend(mean: np.ndarray, modes: np.ndarray, points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """mean + sum of b modes (N, D), the most probable for `points` (N, D) in the mean's place, with `weights` (N,).

    Every b is normal with variance 1, found landmarks scatter by SCATTER: weighted least squares with a ridge, which
    shrinks a mode of small variance most. NaN on either side does not count.
    """
    known = np.isfinite(points).all(axis=1) & np.isfinite(mean).all(axis=1)
    across = np.repeat(np.sqrt(weights[known]), mean.shape[1]) / (SCATTER * shape_size(mean))
    ways = modes[:, known].reshape(len(modes), -1) * across
    off = (points - mean)[known].reshape(-1) * across
    return mean + np.tensordot(np.linalg.solve(ways @ ways.T + np.eye(len(modes)), ways @ off), modes, axes=1)


def shape_size(shape: np.ndarray) -> float:
    """Root mean square distance of the landmarks from their centroid, in pixels; of a shape with modes its mean's."""
    mean = shape if shape.ndim == 2 else shape[0]
    known = mean[np.isfinite(mean).all(axis=1)]
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
