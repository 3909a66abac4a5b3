"""Images that are in memory: an array -> a record like those of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from core.data.records import Record
from core.errors import UserError
from core.formats.colour import luminance
from core.formats.geometry import Geometry
from core.formats.images import check_finite

TAKEN = {2: "(height, width), or (height, width, 3) of red, green and blue", 3: "(depth, height, width)"}


def array_record(array: np.ndarray, dims: int, name: str, spacing: tuple[float, ...] | None = None) -> Record:
    """An unlabelled record of `array`, raw intensities in tensor-axis order; `spacing` is mm along the same axes.

    Of `dims` 2 the last of three axes may hold colours, of which an alpha is ignored, as of files. UserError, which
    calls it `name`, for another shape, no numbers, and pixels that are not finite.
    """
    if array.dtype.kind not in "buif":
        raise UserError(f"{name} holds {array.dtype}, no real numbers")
    colours = dims == 2 and array.ndim == 3 and array.shape[2] in (3, 4)
    if (array.ndim != dims and not colours) or array.size == 0:
        raise UserError(f"{name} has shape {array.shape}; this detector takes {TAKEN[dims]}")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is reported as such
        pixels = luminance(array[..., :3])[None] if colours else np.array(array[None], dtype=np.float32)
    check_finite(pixels, name)
    return Record(name, Path(name), None, spacing, geometry=Geometry(pixels.shape[1:], spacing), pixels=pixels)
