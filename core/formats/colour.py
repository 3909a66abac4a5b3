"""Colours -> grey."""

from __future__ import annotations

import numpy as np

LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, weights of R, G, B
AT_A_TIME = 1 << 20  # pixels: products are in float64


def luminance(colours: np.ndarray) -> np.ndarray:
    """(H, W, 3) R, G, B of any type -> (H, W) float32, unrounded; a few rows at a time, for scans are large."""
    height, width = colours.shape[:2]
    grey = np.empty((height, width), dtype=np.float32)
    rows = max(1, AT_A_TIME // max(width, 1))
    with np.errstate(over="ignore"):  # beyond float32 is infinite and reported as such
        for first in range(0, height, rows):
            grey[first : first + rows] = colours[first : first + rows] @ LUMINANCE
    return grey
