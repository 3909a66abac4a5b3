"""One image upright and resampled: from a pack, from the cache keyed by content, or decoded."""

from __future__ import annotations

import io
import math
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from core.config.dataset import Dataset as DatasetConfig
from core.data.packs import Loaded, open_pack
from core.data.records import Record
from core.data.resize import resize
from core.errors import UserError
from core.files import content_digest, write_atomically
from core.formats.series import dicom_files
from core.formats.geometry import Geometry, compose, resampling_map, upright, upright_axes, upright_map
from core.formats.images import image_suffix, read_image

PARSING = Lock()  # of .npy headers: CPython 3.11 counts the depth of its parser for all threads together
CACHE_VERSION = "2"  # of decoding and resizing together
WHOLE_NUMBERS = (".png", ".jpg", ".jpeg", ".bmp")  # formats without fractions


def load_one(record: Record, config: DatasetConfig) -> Loaded:
    """One image upright and resampled, from pack, cache or the file itself."""
    if is_packed(record, config):
        pack = open_pack(Path(config.root))
        if pack.size != config.whole_size:
            raise UserError(f"{config.root} holds images of {list(pack.size)}, and {list(config.whole_size)} are asked "
                            "for (dataset.image_size, or the finer ones of finetune.refine)")
        return pack.images[record.id]
    grid = _grid_of(record, config)
    shape = "_".join("x".join(f"{value:g}" for value in values) for values in (grid.size, grid.ratio))
    digest = image_digest(record, config)
    cached = Path(config.cache_dir) / f"{digest}_{shape}_v{CACHE_VERSION}.npy"
    if cached.is_file():
        with PARSING:
            stored = np.load(cached, mmap_mode="r")
        pixels = np.array(stored)
    else:
        pixels = resize(upright(read_image(record.image), grid.geometry), grid.size, grid.ratio)
        buffer = io.BytesIO()
        np.save(buffer, pixels)
        write_atomically(cached, buffer.getvalue())
    return Loaded(pixels, grid.geometry.size, grid.map, digest)


def decode(record: Record, config: DatasetConfig) -> tuple[Loaded, np.dtype]:
    """One image upright and resampled from the file itself, without its digest, and the depth of what was read."""
    grid = _grid_of(record, config)
    pixels = read_image(record.image)
    depth = own_depth(pixels, record.image)
    resampled = resize(upright(pixels, grid.geometry), grid.size, grid.ratio)
    return Loaded(resampled, grid.geometry.size, grid.map, None), depth


def decoded_size(record: Record, config: DatasetConfig) -> tuple[int, ...]:
    """The size that `load_one` gives an image, from its header."""
    return _grid_of(record, config).size


def own_depth(pixels: np.ndarray, path: Path) -> np.dtype:
    """What holds `pixels`, as read from `path`, without loss: uint8, uint16 or int16 for whole numbers, else float32.

    The luminance of a colour image is no whole number, but no finer than its colours.
    """
    low, high = float(pixels.min()), float(pixels.max())
    colours = image_suffix(path.name.lower()) in WHOLE_NUMBERS and high > 1
    for kind in (np.uint8, np.uint16, np.int16):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return np.dtype(kind if colours or bool((pixels == np.rint(pixels)).all()) else np.float32)
    return np.dtype(np.float32)


class _Grid(NamedTuple):
    """How an image is resampled: network pixels and stored pixels per network pixel along the upright axes."""

    geometry: Geometry
    size: tuple[int, ...]
    ratio: tuple[float, ...]
    map: np.ndarray  # (D, D + 1), stored -> network pixels


def _grid_of(record: Record, config: DatasetConfig) -> _Grid:
    geometry = record.file_geometry()
    if len(geometry.size) != len(config.image_size):
        raise UserError(f"{record.image} has {len(geometry.size)} axes, dataset.image_size has "
                        f"{len(config.image_size)} numbers")
    order, _ = upright_axes(geometry)
    turned = tuple(geometry.size[axis] for axis in order)
    size, ratio = _grid(turned, order, record, geometry, config)
    return _Grid(geometry, size, ratio, compose(resampling_map(turned, size, ratio), upright_map(geometry)))


def _grid(turned: tuple[int, ...], order: tuple[int, ...], record: Record, geometry: Geometry,
          config: DatasetConfig) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Size in network pixels and stored pixels per network pixel, along the upright axes."""
    if config.resample_mm is None:
        size = config.whole_size
        return size, tuple(old / new for old, new in zip(turned, size, strict=True))
    own = None if config.spacing_mm is None else (config.spacing_mm,) * len(turned)
    spacing = record.spacing or geometry.spacing_mm or own
    if spacing is None:
        raise UserError(f"{record.image} has no spacing, so dataset.resample_mm cannot be applied: give spacing_mm, or "
                        "set dataset.resample_mm to null")
    ratio = tuple(config.resample_mm / spacing[axis] for axis in order)
    return tuple(max(1, math.ceil(old / step - 1e-6)) for old, step in zip(turned, ratio, strict=True)), ratio


def is_packed(record: Record, config: DatasetConfig) -> bool:
    """Whether the image lies in the pack that is dataset.root."""
    return Path(config.root).suffix == ".npz" and record.image == Path(config.root)


def image_digest(record: Record, config: DatasetConfig) -> str | None:
    """Of the content of the image's file, or of all slices of its series; None in a pack made without."""
    if is_packed(record, config):
        return open_pack(Path(config.root)).images[record.id].digest
    if not record.image.exists():
        raise UserError(f"image {record.image} does not exist")
    return content_digest(*(dicom_files(record.image) if record.image.is_dir() else [record.image]))[:32]
