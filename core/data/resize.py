"""Antialiased resampling and normalisation of pixels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from core.config.dataset import Dataset as DatasetConfig


def normalise(pixels: np.ndarray, config: DatasetConfig) -> np.ndarray:
    """Raw intensities (C, *size) -> [0, 1] by per-image min-max, percentiles or a fixed window; flat images give 0.

    Where both percentiles are one value, as of an image that is nearly all background, it is min-max.
    """
    low, high = intensity_range(pixels, config)
    return ((pixels - low) / max(high - low, 1e-12)).clip(0, 1).astype(np.float32)


def intensity_range(pixels: np.ndarray, config: DatasetConfig) -> tuple[Any, Any]:
    """The raw intensities of an image that become 0 and 1."""
    if config.intensity == "window" and config.window is not None:  # the config sees to it
        return config.window
    if config.intensity == "percentile":
        low, high = np.percentile(pixels, config.percentiles)
        if high > low:  # else nearly all pixels are alike, such as an empty background, and the rest counts
            return low, high
    return pixels.min(), pixels.max()


def resize(pixels: np.ndarray, size: tuple[int, ...], ratio: tuple[float, ...] | None = None) -> np.ndarray:
    """Antialiased linear resampling of (C, *old) to (C, *size), one triangle filter per axis; half-pixel exact.

    `ratio` is old pixels per new one on each axis, about the centre; without it the whole image fills `size`.
    """
    for axis, new in enumerate(size, start=1):
        old = pixels.shape[axis]
        step = old / new if ratio is None else ratio[axis - 1]
        if (old, step) != (new, 1.0):
            moved = np.moveaxis(pixels, axis, -1) @ _resize_weights(old, new, step).T
            pixels = np.moveaxis(moved, -1, axis)
    return np.ascontiguousarray(pixels, dtype=np.float32)


@lru_cache(maxsize=64)
def _resize_weights(old: int, new: int, ratio: float) -> np.ndarray:
    """(new, old) rows of a triangle filter whose support widens when shrinking; each row sums to 1."""
    centres = (np.arange(new) + 0.5 - new / 2) * ratio + old / 2 - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(old) - centres[:, None]) / max(ratio, 1.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
