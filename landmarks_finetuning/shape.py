"""The landmarks' common shape as a prior: where one lands on another structure, the others say where it belongs.

The labelled shapes' Procrustes mean is fitted to the landmarks found in an image by a robust similarity (translation,
rotation, scale), and every heatmap is weighted by a Gaussian about its fitted place before it is decoded again. With
modes the mean may also change as the labelled shapes do (point distribution model, Cootes et al. 1995).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.config.section import Augmentation
from core.errors import UserError

SCALES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.15, 0.15, 0.15)  # of the shape's size: what counts as an outlier, annealed
SCATTER = 0.05  # of the shape's size: of found landmarks about the model, along each axis
EXPLAINED = 0.95  # of the labelled shapes' variance: modes beyond it are noise
LABELS_PER_MODE = 2  # beside the one for the mean
TURNED, SCALED = np.deg2rad(10), 0.15  # what others may lie beyond the labelled poses, where augmentation says less


class Poses(NamedTuple):
    """How images' shapes lie, as similarities of the mean shape.

    They are turned by at most `turn` radians from `rotation` (D, D), which acts on rows; scale: (least, most).
    """

    rotation: np.ndarray
    turn: float
    scale: tuple[float, float]

    @classmethod
    def of(cls, shapes: np.ndarray, mean: np.ndarray, augmentation: Augmentation) -> Poses | None:
        """The poses of labelled shapes (K, N, D), and as far beyond them as `augmentation` goes, at least a little.

        A detector does not know other poses. None where no shape has landmarks enough.
        """
        pose = _pose(mean, shapes, np.ones(shapes.shape[:2]))
        rotations, scales = pose.rotation[pose.enough], pose.scale[pose.enough]
        if not len(scales):
            return None
        left, _, right = np.linalg.svd(rotations.sum(axis=0))
        left[:, -1] *= np.sign(np.linalg.det(left @ right))
        middle = left @ right
        turn = max(TURNED, float(np.deg2rad(np.max(augmentation.rotation_degrees))))
        factor = 1 + max(SCALED, augmentation.scale)
        return cls(middle, float(_angles(middle.T @ rotations).max()) + turn,
                   (float(scales.min()) / factor, float(scales.max()) * factor))

    def nearest(self, rotations: np.ndarray) -> np.ndarray:
        """`rotations` (..., D, D), those that turn too far turned back about their own axis as far as they have to."""
        relative = self.rotation.T @ rotations
        angles = _angles(relative)[..., None, None]
        if (angles <= self.turn).all():
            return rotations
        sines = np.sin(angles)
        axes = (relative - relative.swapaxes(-1, -2)) / np.where(abs(sines) < 1e-6, np.inf, 2 * sines)
        turned = np.eye(len(self.rotation)) + np.sin(self.turn) * axes + (1 - np.cos(self.turn)) * axes @ axes
        return np.where(angles <= self.turn, rotations, self.rotation @ turned)


@dataclass(frozen=True, eq=False)
class Shape:
    """The mean (N, D) of labelled shapes in network pixels, NaN where no label has a landmark.

    modes (M, N, D): ways in which they differ, each as far as one standard deviation goes. poses: how they lie in the
    images; None = anyhow.
    """

    mean: np.ndarray
    modes: np.ndarray | None = None
    poses: Poses | None = None

    @classmethod
    def of(cls, shapes: np.ndarray, augmentation: Augmentation, modes: int = 0) -> Shape:
        """The shape of labelled shapes (K, N, D), with up to `modes` modes; `augmentation` is that of the training."""
        mean = mean_shape(shapes)
        ways = shape_modes(shapes, mean, modes)
        return cls(mean, ways if len(ways) else None, Poses.of(shapes, mean, augmentation))

    @classmethod
    def stored(cls, header: Mapping[str, Any]) -> Shape | None:
        """The shape in a detector's header; None in files older than the prior."""
        if header.get("shape") is None:
            return None
        modes, poses = header.get("shape_modes"), header.get("shape_poses")
        return cls(
            np.array(header["shape"], dtype=np.float64), None if modes is None else np.array(modes),
            None if poses is None else Poses(np.array(poses["rotation"]), poses["turn"], tuple(poses["scale"])))

    def header(self) -> dict[str, Any]:
        """What `stored` reads, for JSON."""
        mean = [[None if np.isnan(value) else value for value in point] for point in self.mean.tolist()]
        poses = None if self.poses is None else self.poses._replace(rotation=self.poses.rotation.tolist())._asdict()
        return {"shape": mean, **({} if self.modes is None else {"shape_modes": self.modes.tolist()}),
                **({} if poses is None else {"shape_poses": poses})}

    @property
    def size(self) -> float:
        """Root mean square distance of the mean's landmarks from their centroid, in pixels."""
        known = self.mean[np.isfinite(self.mean).all(axis=1)]
        return float(np.sqrt(((known - known.mean(axis=0)) ** 2).sum(axis=1).mean())) if len(known) else 0.0

    def fit(self, points: np.ndarray, confidence: np.ndarray) -> np.ndarray:
        """The shape moved onto `points` (..., N, D) by similarities, (..., N, D); NaN where too few are known.

        Weights are the confidences (..., N), cut down for outliers by the Geman-McClure function with a scale that
        shrinks (graduated non-convexity, Blake & Zisserman 1987), so that a third of the points may lie anywhere.
        """
        if self.modes is not None and points.ndim > 2:
            return np.stack([self.fit(*pair) for pair in zip(points, confidence, strict=True)])
        weights, bent = np.asarray(confidence, dtype=np.float64), self.mean
        for scale in SCALES:
            if self.modes is not None:
                bent = self._bent(_similarity(points, bent, weights + 1e-9), weights)
            fitted = _similarity(bent, points, weights + 1e-9, self.poses)
            off = np.linalg.norm(fitted - points, axis=-1) / self.size
            weights = confidence / (1 + (off / scale) ** 2) ** 2
        return fitted

    def _bent(self, points: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """mean + sum of b modes (N, D), the most probable for `points` (N, D) in the mean's place, with `weights` (N,).

        Every b is normal with variance 1, found landmarks scatter by SCATTER: weighted least squares with a ridge,
        which shrinks a mode of small variance most. NaN on either side does not count.
        """
        assert self.modes is not None
        known = np.isfinite(points).all(axis=1) & np.isfinite(self.mean).all(axis=1)
        across = np.repeat(np.sqrt(weights[known]), points.shape[1]) / (SCATTER * self.size)
        ways = self.modes[:, known].reshape(len(self.modes), -1) * across
        off = (points - self.mean)[known].reshape(-1) * across
        best = np.linalg.solve(ways @ ways.T + np.eye(len(ways)), ways @ off)
        return self.mean + np.tensordot(best, self.modes, axes=1)


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


def add_shape_prior(outputs: Tensor, fitted: np.ndarray, spread_px: float) -> Tensor:
    """Raw outputs (B, N, *size) plus the log of a Gaussian of `spread_px` about `fitted` (B, N, D); NaN adds 0."""
    places = torch.from_numpy(fitted).to(outputs.device)
    total = outputs.float()
    dims = outputs.ndim - 2
    for axis, length in enumerate(outputs.shape[2:]):
        off = (torch.arange(length, device=places.device) - places[..., axis, None]) ** 2 / (-2 * spread_px**2)
        total = total + off.nan_to_num().float().reshape(*off.shape[:2], *(1,) * axis, -1, *(1,) * (dims - axis - 1))
    return total


class _Pose(NamedTuple):
    """Similarities: rows less `source` are turned by `rotation`, scaled by `scale` and moved to `target`."""

    rotation: np.ndarray  # (..., D, D)
    scale: np.ndarray  # (...)
    source: np.ndarray  # (..., 1, D)
    target: np.ndarray  # (..., 1, D)
    enough: np.ndarray  # (...): whether more than D points are known on both sides


def _pose(moving: np.ndarray, fixed: np.ndarray, weights: np.ndarray, poses: Poses | None = None) -> _Pose:
    """The weighted least-squares similarities from `moving` onto `fixed`, no mirror (Umeyama 1991), within `poses`."""
    dims = moving.shape[-1]
    both = np.isfinite(moving).all(axis=-1) & np.isfinite(fixed).all(axis=-1)
    enough = both.sum(axis=-1) > dims
    both = both & enough[..., None]
    weights = np.where(both, weights, 0.0)
    weights = weights / np.where(enough, weights.sum(axis=-1), 1.0)[..., None]
    source, target = (np.where(both[..., None], points, 0.0) for points in (moving, fixed))
    source_mean, target_mean = (weights[..., None, :] @ points for points in (source, target))
    source, target = source - source_mean, target - target_mean
    together = (weights[..., None] * source).swapaxes(-1, -2) @ target
    left, _, right = np.linalg.svd(together)
    left[..., -1] *= np.sign(np.linalg.det(left @ right))[..., None]
    rotation = left @ right if poses is None else poses.nearest(left @ right)
    variance = (weights[..., None] * source**2).sum(axis=(-1, -2))
    along = (together * rotation).sum(axis=(-1, -2))
    scale = np.where(variance > 0, along / np.where(variance > 0, variance, 1.0), 1.0)
    return _Pose(rotation, scale if poses is None else scale.clip(*poses.scale), source_mean, target_mean, enough)


def _similarity(moving: np.ndarray, fixed: np.ndarray, weights: np.ndarray, poses: Poses | None = None) -> np.ndarray:
    """All of `moving` (..., N, D) through `_pose` onto `fixed`.

    Either may be one for all of the other; weights (..., N). NaN throughout where fewer than D + 1 points are in both.
    """
    pose = _pose(moving, fixed, weights, poses)
    moved = ((moving - pose.source) @ pose.rotation) * pose.scale[..., None, None] + pose.target
    return np.where(pose.enough[..., None, None], moved, np.nan)


def _angles(rotations: np.ndarray) -> np.ndarray:
    """By how many radians `rotations` (..., D, D) turn, D = 2 or 3."""
    dims = rotations.shape[-1]
    return np.arccos(((np.trace(rotations, axis1=-2, axis2=-1) - (dims - 2)) / 2).clip(-1, 1))


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
