"""Images as the page draws them: bytes of 8 or 16 bits, whole or a slice of a volume, and how slices lie to each other.

The browser makes brightness and contrast of the numbers themselves, so nothing is lost on the way: whole numbers of
0..255 go as they are, all else is spread over 0..65535.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.formats.geometry import Geometry, upright_axes
from core.formats.images import read_image

KEPT_BYTES = 512 << 20  # of images that stay in memory, beside the last one
SHOWN = (0.1, 99.9)  # percentiles that are black and white at first, of images of more than 8 bits
SAMPLES = 1 << 18  # of pixels that the percentiles are taken from


@dataclass(frozen=True, eq=False)
class Picture:
    """`pixels` (*size) uint8 or uint16; of these `window` is shown black to white at first."""

    pixels: np.ndarray
    window: tuple[int, int]

    def slice(self, fixed: int | None, at: int) -> np.ndarray:
        """(rows, columns): the whole image, or of a volume the slice number `at` along tensor axis `fixed`."""
        return self.pixels if fixed is None else self.pixels.take(min(max(at, 0), self.pixels.shape[fixed] - 1), fixed)


def picture(path: Path) -> Picture:
    """An image or volume, its values spread over 16 bits unless they are bytes already. UserError: as `read_image`."""
    values = read_image(path)[0]
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 255:
        small = values.astype(np.uint8)
        if np.array_equal(small, values):
            return Picture(small, (0, 255))
    spread = ((values - low) * (65535 / max(high - low, 1e-12))).round().astype(np.uint16)
    some = spread.ravel()[:: max(1, spread.size // SAMPLES)]
    first, last = np.percentile(some, SHOWN)
    return Picture(spread, (int(first), max(int(last), int(first) + 1)))


class Pictures:
    """Pictures by path; the last ones stay in memory. For any thread: two that want one image read it once."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Path, Picture] = OrderedDict()
        self._lock, self._reading = threading.Lock(), dict[Path, threading.Lock]()

    def get(self, path: Path) -> Picture:
        """The picture of an image file. UserError: it cannot be read."""
        with self._lock:
            reading = self._reading.setdefault(path, threading.Lock())
        with reading:
            with self._lock:
                if path in self._kept:
                    self._kept.move_to_end(path)
                    return self._kept[path]
            found = picture(path)
            with self._lock:
                self._kept[path] = found
                while len(self._kept) > 1 and sum(each.pixels.nbytes for each in self._kept.values()) > KEPT_BYTES:
                    self._kept.popitem(last=False)
            return found


def panes(geometry: Geometry) -> list[dict[str, Any]]:
    """The views of an image, in axes of the file (x 0, y 1, z 2): one of a flat image, of a volume one along each axis.

    Each has the axis that is `fixed` (None of a flat image), the axes that run `across` and `down`, and which of these
    are flipped, so that of a volume with a place in the patient up is up, and its left is on the right.
    """
    dims = len(geometry.size)
    order, signs = upright_axes(geometry)  # of tensor axes: what z, y and x are, and which way they run
    found = []
    for through in range(dims) if dims == 3 else (None,):
        down, across = (axis for axis in range(dims) if axis != through)
        found.append({"fixed": None if through is None else dims - 1 - order[through],
                      "across": dims - 1 - order[across], "down": dims - 1 - order[down],
                      "flip_across": signs[across] < 0, "flip_down": (signs[down] < 0) != _is_up(down, dims, geometry),
                      "name": "" if through is None else _name(through, geometry)})
    return found


def _is_up(axis: int, dims: int, geometry: Geometry) -> bool:
    """Whether an upright axis runs from below up, while rows of a picture run down: z of a volume with a place."""
    return dims == 3 and axis == 0 and geometry.affine is not None


def _name(through: int, geometry: Geometry) -> str:
    return ("axial", "coronal", "sagittal")[through] if geometry.affine is not None else f"along {'zyx'[through]}"
