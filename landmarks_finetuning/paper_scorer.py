"""The published code's scorer, quirks and all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from core.errors import UserError
from landmarks_finetuning.heatmaps import contour_centroid, draw_target
from landmarks_finetuning.metrics import radial_errors

CEPHALO_SIZE = (2400, 1935)  # height, width
CEPHALO_SPACING_MM = 0.1
EXTENT_TOLERANCE = 0.01
PAPER_SIGMA = 5.0  # pixels of a 256-pixel image
WRIST_MM = 50.0
WRIST_POINTS = (0, 4)
SMALLEST_SIGMA_PX = (2 * np.log(2)) ** -0.5  # 0.85: at or below, the half-maximum disk is one pixel, without an area


def why_undefined(rule: str, image_size: Sequence[int], windows: bool, extents_mm: np.ndarray | None
                  ) -> str | None:
    """Why the published scorer cannot score a study's images by `rule`, in words for people; None where it can.

    It knows one network input, the whole image squeezed to a square, and for cephalograms one size in mm: `extents_mm`
    (M, 2) are those of the images (height, width), None where unknown.
    """
    if len(image_size) != 2 or len(set(image_size)) != 1:
        size = " x ".join(map(str, image_size))
        return f"it is defined for a square network input of two axes, dataset.image_size is {size}"
    if windows:
        return "it is defined for whole images resized to a square, dataset.resample_mm or canvas_size crops them"
    if paper_sigma(image_size[0]) <= SMALLEST_SIGMA_PX:
        return f"its disk is a single pixel, without an area, at dataset.image_size {image_size[0]}"
    return why_other_extents(extents_mm) if rule == "cephalo" else None


def why_other_extents(extents_mm: np.ndarray | None) -> str | None:
    """Why images of these extents (M, 2), None = unknown, are not scored as the published cephalograms; or None."""
    published = np.array(CEPHALO_SIZE) * CEPHALO_SPACING_MM
    if extents_mm is None or (np.abs(extents_mm / published - 1) > EXTENT_TOLERANCE).any():
        return "it takes every image to be {:g} x {:g} mm (height x width), and these are not".format(*published)
    return None


def paper_sigma(side: int) -> float:
    """Sigma of the published scorer's disk, whatever finetune.sigma is, in pixels of an input of `side` x `side`."""
    return PAPER_SIGMA * side / 256


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
    return radial_errors((predictions - truth) * PAPER_RULES[rule](truth, side), predictions, truth)


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
        size = " x ".join(map(str, np.atleast_1d(input_size).tolist()))
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
