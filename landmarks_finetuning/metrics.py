"""Radial errors of landmark predictions in mm or pixels, and their summaries: means, percentiles, success rates.

Points are (M, N, D) arrays in tensor-axis order ((y, x) or (z, y, x)), pixel centres at integers, NaN where not
annotated; errors are (M, N), NaN where not scored. M images (or volumes), N landmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from core.errors import UserError

ROUNDING_NOISE = 1e-9  # (18, 24) px at 0.1 mm is 3.0000000000000004 mm: it still counts as within 3 mm


def physical_errors(pred: np.ndarray, truth: np.ndarray, spacing: np.ndarray | None = None) -> np.ndarray:
    """Radial errors (M, N) of unrounded points (M, N, D) in original pixels; `spacing` (M, D) is mm per pixel.

    The unit is mm, or pixels without a spacing. NaN where the truth is. Raises UserError where an annotated
    landmark has no finite prediction: it would otherwise drop out of the mean.
    """
    return radial_errors(_scaled(pred - truth, spacing), pred, truth)


def _scaled(difference: np.ndarray, spacing: np.ndarray | None) -> np.ndarray:
    return difference if spacing is None else difference * spacing[:, None, :]


def radial_errors(difference: np.ndarray, pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Lengths (M, N) of `difference` (M, N, D) between `pred` and `truth`, in its unit; NaN where the truth is.

    Raises UserError where an annotated landmark has no finite prediction.
    """
    lost = ~np.isfinite(pred).all(axis=-1) & np.isfinite(truth).all(axis=-1)
    if lost.any():
        image, landmark = np.argwhere(lost)[0]
        raise UserError(f"the prediction of landmark {landmark + 1} in image {image + 1} is not a finite position "
                        f"({lost.sum()} such in all): it cannot be scored")
    return np.sqrt(np.square(difference).sum(axis=-1))


def annotator_distances(annotators: np.ndarray, spacing: np.ndarray | None = None) -> np.ndarray:
    """How far two people's points (M, 2, N, D) of the same landmarks lie apart: (M, N), NaN where one has none.

    In mm with a `spacing` (M, D) of mm per pixel, else in pixels.
    """
    return np.linalg.norm(_scaled(annotators[:, 0] - annotators[:, 1], spacing), axis=-1)


def share_within(errors: np.ndarray, distances: np.ndarray) -> float | None:
    """Percent of the errors (M, N) that are at most the distance (M, N) of the same landmark and image.

    None where no landmark has both.
    """
    both = ~np.isnan(errors) & ~np.isnan(distances)
    return 100.0 * float((errors[both] <= distances[both] + ROUNDING_NOISE).mean()) if both.any() else None


def summarise(errors: np.ndarray, thresholds: Sequence[float]) -> dict:
    """Summary of errors (M, N) over all scored landmarks and, under "per_landmark", lists over the N landmarks.

    Keys: mre (the micro mean: over all landmarks of all images), macro_mre (the mean of the landmarks' own means), std
    (population), median, p95 in the errors' unit; sdr {threshold: percent of errors <= threshold} with thresholds
    written as "2", "2.5"; count. Ready for JSON: a landmark never scored has None.
    Raises UserError when nothing can be scored.
    """
    if np.isnan(errors).all():
        raise UserError("nothing can be scored: no landmark of these images is annotated")
    columns = [_statistics(column, thresholds) for column in errors.T]
    per_landmark: dict[str, Any] = {key: [column[key] for column in columns] for key in columns[0]}
    per_landmark["sdr"] = {f"{t:g}": [column["sdr"][f"{t:g}"] for column in columns] for t in thresholds}
    return {**_statistics(errors, thresholds), "macro_mre": macro_mean(per_landmark["mre"]),
            "per_landmark": per_landmark}


def macro_mean(landmark_means: Sequence[float | None]) -> float:
    """The mean of the landmarks' own mean errors, each landmark alike; those never scored (None) do not count."""
    return float(np.mean([mean for mean in landmark_means if mean is not None]))


def _statistics(errors: np.ndarray, thresholds: Sequence[float]) -> dict:
    scored = errors[~np.isnan(errors)]
    if scored.size == 0:
        empty = dict.fromkeys(("mre", "std", "median", "p95"))
        return {**empty, "sdr": {f"{t:g}": None for t in thresholds}, "count": 0}
    return {"mre": float(scored.mean()), "std": float(scored.std()), "median": float(np.median(scored)),
            "p95": float(np.percentile(scored, 95)),
            "sdr": {f"{t:g}": 100.0 * float(within(scored, t).mean()) for t in thresholds},
            "count": int(scored.size)}


def within(errors: np.ndarray, threshold: float) -> np.ndarray:
    """1.0 where an error is at most `threshold`, 0.0 where it is above, NaN where nothing was scored."""
    return np.where(np.isnan(errors), np.nan, errors <= threshold + ROUNDING_NOISE)
