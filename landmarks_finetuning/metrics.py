"""Radial errors of landmark predictions: the physical scorer, the published scorer, summaries and baselines.

Points are (M, N, D) arrays in tensor-axis order ((y, x) or (z, y, x)), pixel centres at integers, NaN where not
annotated; errors are (M, N), NaN where not scored. M images (or volumes), N landmarks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from core.errors import UserError
from landmarks_finetuning.heatmaps import contour_centroid, draw_target

CEPHALO_SIZE = (2400, 1935)  # height, width
CEPHALO_SPACING_MM = 0.1
WRIST_MM = 50.0
WRIST_POINTS = (0, 4)
SMALLEST_SIGMA_PX = (2 * np.log(2)) ** -0.5  # 0.85: at or below, the half-maximum disk is one pixel, without an area
FEWEST_PATIENTS = 4  # for an interval: of fewer, too many resamples hold one patient alone and have no spread
ROUNDING_NOISE = 1e-9  # (18, 24) px at 0.1 mm is 3.0000000000000004 mm: it still counts as within 3 mm


# ---- errors


def physical_errors(pred: np.ndarray, truth: np.ndarray, spacing: np.ndarray | None = None) -> np.ndarray:
    """Radial errors (M, N) of unrounded points (M, N, D) in original pixels; `spacing` (M, D) is mm per pixel.

    The unit is mm, or pixels without a spacing. NaN where the truth is. Raises UserError where an annotated
    landmark has no finite prediction: it would otherwise drop out of the mean.
    """
    pred, truth = np.asarray(pred, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    scale = 1.0 if spacing is None else np.asarray(spacing, dtype=np.float64)[:, None, :]
    return _radial_errors((pred - truth) * scale, pred, truth)


def _radial_errors(difference: np.ndarray, pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
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
    scale = 1.0 if spacing is None else np.asarray(spacing, dtype=np.float64)[:, None, :]
    return np.linalg.norm((annotators[:, 0] - annotators[:, 1]) * scale, axis=-1)


def share_within(errors: np.ndarray, distances: np.ndarray) -> float | None:
    """Percent of the errors (M, N) that are at most the distance (M, N) of the same landmark and image.

    None where no landmark has both.
    """
    both = ~np.isnan(errors) & ~np.isnan(distances)
    return 100.0 * float((errors[both] <= distances[both] + ROUNDING_NOISE).mean()) if both.any() else None


# ---- the published scorer


def paper_errors(rule: str, predictions: np.ndarray, truth_original: np.ndarray, original_sizes: np.ndarray,
                 input_size: int | Sequence[int], sigma: float) -> np.ndarray:
    """Radial errors (M, N) as the published code computes them, quirks and all: mm, or network pixels for chest.

    `predictions` (M, N, 2) are in pixels of the S x S network input (from `contour_centroid` or `round_original`)
    and are rounded; `truth_original` (M, N, 2) is in original pixels, `original_sizes` (M, 2) is (height, width).
    The truth is re-extracted from the disk (sigma in network pixels) drawn at its rounded position, and rounded.
    `rule` is a key of PAPER_RULES. Raises UserError for another rule, an input that is not square, or a sigma whose
    disk has no area.
    """
    if rule not in PAPER_RULES:
        raise UserError(f'paper scorer: unknown rule "{rule}"; choose one of {", ".join(PAPER_RULES)}')
    side = _square_side(input_size)
    if sigma <= SMALLEST_SIGMA_PX:
        raise UserError(f"paper scorer: with sigma {sigma:g} px a disk is a single pixel, whose contour has no area; "
                        "use a sigma above 0.85 px (a larger network input)")
    predictions = np.rint(np.asarray(predictions, dtype=np.float64))
    truth = _reextract_truth(round_original(truth_original, original_sizes, side), side, sigma)
    return _radial_errors((predictions - truth) * PAPER_RULES[rule](truth, side), predictions, truth)


def round_original(
    points_original: np.ndarray, original_sizes: np.ndarray, input_size: int | Sequence[int]
) -> np.ndarray:
    """Original coordinates x S / size, rounded half to even (no half-pixel shift): the published resizing of points.

    (M, N, 2) original pixels and (M, 2) sizes (height, width) -> (M, N, 2) pixels of the S x S network input.
    """
    sizes = np.asarray(original_sizes, dtype=np.float64)[:, None, :]
    return np.rint(np.asarray(points_original, dtype=np.float64) * _square_side(input_size) / sizes)


def _square_side(input_size: int | Sequence[int]) -> int:
    sides = set(np.atleast_1d(input_size).tolist())
    if len(sides) != 1:
        size = " x ".join(str(side) for side in input_size)
        raise UserError(f"paper scorer: it is defined for a square network input, not {size}; use the physical scorer")
    return int(sides.pop())


def _reextract_truth(points: np.ndarray, side: int, sigma: float) -> np.ndarray:
    """Rounded centroids of the disks drawn at `points` (M, N, 2), image by image; NaN stays NaN."""
    extracted = [contour_centroid(draw_target(torch.from_numpy(image[None]), (side, side), "disk", sigma))[0].numpy()
                 for image in points]
    return np.where(np.isnan(points).any(axis=-1, keepdims=True), np.nan, np.rint(np.reshape(extracted, points.shape)))


def _cephalo_factors(truth: np.ndarray, side: int) -> np.ndarray:
    """mm per network pixel for (y, x): the published code multiplies x by the height's factor and y by the width's."""
    height, width = CEPHALO_SIZE
    return np.array([width, height]) / side * CEPHALO_SPACING_MM


def _hand_factors(truth: np.ndarray, side: int) -> np.ndarray:
    """(M, 1, 1) mm per network pixel: the wrist, landmarks 1 and 5 of the re-extracted truth, is 50 mm wide."""
    first, second = WRIST_POINTS
    distance = np.linalg.norm(truth[:, first] - truth[:, second], axis=-1)
    unscalable = ~(distance > 0) & ~np.isnan(truth).any(axis=-1).all(axis=-1)
    if unscalable.any():
        raise UserError(f"paper scorer: image {np.argmax(unscalable) + 1} has no distance between the wrist landmarks "
                        "1 and 5, so the hand rule cannot scale it to mm")
    return WRIST_MM / distance[:, None, None]


def _chest_factors(truth: np.ndarray, side: int) -> np.ndarray:
    return np.ones(2)


PAPER_RULES = {"cephalo": _cephalo_factors, "hand": _hand_factors, "chest": _chest_factors}


# ---- summaries


def summarise(errors: np.ndarray, thresholds: Sequence[float]) -> dict:
    """Summary of errors (M, N) over all scored landmarks and, under "per_landmark", lists over the N landmarks.

    Keys: mre (the micro mean: over all landmarks of all images), macro_mre (the mean of the landmarks' own means), std
    (population), median, p95 in the errors' unit; sdr {threshold: percent of errors <= threshold} with thresholds
    written as "2", "2.5"; count. Ready for JSON: a landmark never scored has None.
    Raises UserError when nothing can be scored.
    """
    errors = np.asarray(errors, dtype=np.float64)
    if np.isnan(errors).all():
        raise UserError("nothing can be scored: no landmark of these images is annotated")
    columns = [_statistics(column, thresholds) for column in errors.T]
    per_landmark = {key: [column[key] for column in columns] for key in columns[0] if key != "sdr"}
    per_landmark["sdr"] = {f"{t:g}": [column["sdr"][f"{t:g}"] for column in columns] for t in thresholds}
    return {**_statistics(errors, thresholds), "macro_mre": macro_mean(per_landmark["mre"]),
            "per_landmark": per_landmark}


def macro_mean(landmark_means: Sequence[float | None]) -> float:
    """The mean of the landmarks' own mean errors, each landmark alike; those never scored (None) are left out."""
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


def patient_sums(values: np.ndarray, groups: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """(P,) sums and (P,) counts of the scored values (M, N) of each patient (`groups`, (M,)) who has any.

    Raises UserError when nothing can be scored.
    """
    values = np.asarray(values, dtype=np.float64)
    patients, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(index, weights=np.nansum(values, axis=1), minlength=len(patients))
    counts = np.bincount(index, weights=(~np.isnan(values)).sum(axis=1), minlength=len(patients))
    if not counts.any():
        raise UserError("nothing can be scored: no landmark of these images is annotated")
    return sums[counts > 0], counts[counts > 0]


def bootstrap_interval(errors: np.ndarray, groups: Sequence, seed: int, samples: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of all scored errors (M, N), resampling patients (`groups`, (M,)).

    Images of one patient are drawn together (cluster bootstrap); see `studentised_interval`. (NaN, NaN) for fewer than
    FEWEST_PATIENTS. Raises UserError when nothing can be scored.
    """
    sums, counts = patient_sums(errors, groups)
    low, high = studentised_interval(sums[:, None], counts[:, None], seed, samples)
    return float(low[0]), float(high[0])


def studentised_interval(sums: np.ndarray, counts: np.ndarray, seed: int,
                         samples: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap-t intervals (K,), (K,) of the K means sums.sum(0) / counts.sum(0), resampling the P patients.

    `sums` and `counts` are (P, K). Each resample's deviation from the mean is divided by the resample's own standard
    error (of a ratio, linearised); the quantiles of that ratio take the place of Student's (Efron and Tibshirani 1993,
    An Introduction to the Bootstrap, section 12.5). Resamples without a spread are left out.
    Percentiles are too narrow on skewed errors: in 1000 simulated data sets of 6, 12, 24, 50, 150 patients they held
    the truth in 82, 88, 91, 92, 93 %, these intervals in 93, 94, 94, 94, 94 % (python -m benchmarks.coverage).
    """
    if len(sums) < FEWEST_PATIENTS:
        return np.full(sums.shape[1], np.nan), np.full(sums.shape[1], np.nan)
    mean = sums.sum(axis=0) / counts.sum(axis=0)
    centred = sums - mean * counts
    _, error = _deviation(np.ones((1, len(sums))), centred, counts)
    patients = np.full(len(sums), 1 / len(sums))
    weights = np.random.default_rng(seed).multinomial(len(sums), patients, size=samples).astype(np.float64)
    deviation, spread = _deviation(weights, centred, counts)
    ratio = np.divide(deviation, spread, out=np.full_like(spread, np.nan), where=spread > 1e-6 * error)
    ratio[:, error[0] <= 1e-12 * np.abs(mean)] = 0.0  # all patients are alike
    high, low = np.nanpercentile(ratio, (2.5, 97.5), axis=0)
    return mean - low * error[0], mean - high * error[0]


def _deviation(weights: np.ndarray, centred: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of the resamples (rows of `weights`, (B, P)) about the sample's mean, and their standard errors; (B, K)."""
    totals = weights @ counts
    mean = weights @ centred / totals
    squares = weights @ centred**2 - 2 * mean * (weights @ (centred * counts)) + mean**2 * (weights @ counts**2)
    return mean, np.sqrt(np.maximum(squares, 0.0)) / totals


# ---- the baseline without an image


def mean_shape_prediction(train_points: np.ndarray, train_sizes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The mean of the labelled shapes as a prediction for every image: the floor any detector has to beat.

    `train_points` (K, N, D) in network pixels of images of `train_sizes` (K, D); `sizes` (M, D) are those of the
    images to predict. Shapes are averaged about the images' centres. Returns (M, N, D) network pixels. Each landmark
    is averaged over the labels that have it; one that no label has is put at the mean of the others. Raises UserError
    if no label has any landmark.
    """
    centred = np.asarray(train_points, dtype=np.float64) - (np.asarray(train_sizes)[:, None] - 1) / 2
    present = ~np.isnan(centred).any(axis=-1)
    counts = present.sum(axis=0)
    if not counts.any():
        raise UserError("the mean shape needs at least one labelled landmark in the training subset")
    sums = np.where(present[..., None], centred, 0.0).sum(axis=0)
    mean = sums / np.maximum(counts, 1)[:, None]
    mean[counts == 0] = mean[counts > 0].mean(axis=0)
    return mean[None] + (np.asarray(sizes)[:, None] - 1) / 2
