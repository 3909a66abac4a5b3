"""One image upright and resampled: from a pack, from the cache keyed by content, or decoded."""

from __future__ import annotations

import io
import math
import zlib
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from core.bounds import require_memory
from core.config.dataset import Dataset as DatasetConfig
from core.data.packs import Loaded, open_pack
from core.data.records import Record
from core.data.resize import resize
from core.errors import UserError
from core.files import clear_once, content_digest, write_atomically
from core.formats.geometry import Geometry, compose, resampling_map, upright, upright_axes, upright_map
from core.formats.images import image_suffix, read_image
from core.formats.series import dicom_files
from core.formats.volumes import PARSING

ONE_LARGE = Lock()  # for decoders work side by side
LARGE_PIXELS = 50_000_000
CHECKSUM = 4  # bytes at the end of a cache entry
CACHE_VERSION = "3"  # of decoding and resizing together
WHOLE_NUMBERS = (".png", ".jpg", ".jpeg", ".bmp")  # formats without fractions


def load_one(record: Record, config: DatasetConfig) -> Loaded:
    """One image upright and resampled, from pack, cache, the file itself or memory."""
    if record.pixels is not None:
        return decode(record, config)[0]
    if is_packed(record, config):
        pack = open_pack(Path(config.root))
        if pack.size != config.whole_size:
            raise UserError(f"{config.root} holds images of {list(pack.size)}, and {list(config.whole_size)} are asked "
                            "for (dataset.image_size, or the finer ones of finetune.refine)")
        return pack.load(record.id)
    grid = _grid_of(record, config)
    shape = "_".join("x".join(f"{value:g}" for value in values) for values in (grid.size, grid.ratio))
    digest = image_digest(record, config)
    if config.cache_dir is None:
        return Loaded(_decoded(record, grid)[0], grid.geometry.size, grid.map, digest)
    clear_once(Path(config.cache_dir).absolute())
    cached = Path(config.cache_dir) / f"{digest}_{shape}_v{CACHE_VERSION}.npy"
    pixels = _read_entry(cached, grid.size)
    if pixels is None:
        pixels = _decoded(record, grid)[0]
        buffer = io.BytesIO()
        np.save(buffer, pixels)
        content = buffer.getvalue()
        write_atomically(cached, content + zlib.crc32(content).to_bytes(CHECKSUM, "big"))
    return Loaded(pixels, grid.geometry.size, grid.map, digest)


def _read_entry(path: Path, size: tuple[int, ...]) -> np.ndarray | None:
    """The pixels (C, *size) of a cache entry; None where there is none, or it is cut or damaged: it is made anew."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    body, checksum = content[:-CHECKSUM], content[-CHECKSUM:]
    if zlib.crc32(body).to_bytes(CHECKSUM, "big") != checksum:
        return None
    with PARSING:
        pixels = np.load(io.BytesIO(body))
    return pixels if pixels.shape[1:] == size and pixels.dtype == np.float32 else None


def _decoded(record: Record, grid: _Grid) -> tuple[np.ndarray, np.dtype]:
    """The image upright and resampled, and the depth of what was read; of large images one at a time."""
    with ONE_LARGE if math.prod(grid.geometry.size) > LARGE_PIXELS else nullcontext():
        pixels = read_image(record.image) if record.pixels is None else record.pixels
        depth = own_depth(pixels, record.image)
        return resize(upright(pixels, grid.geometry), grid.size, grid.ratio), depth


def decode(record: Record, config: DatasetConfig) -> tuple[Loaded, np.dtype]:
    """One image upright and resampled from file or memory, without its digest, and the depth of what was read."""
    grid = _grid_of(record, config)
    resampled, depth = _decoded(record, grid)
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
            whole = colours or all(bool((plane == np.rint(plane)).all()) for plane in pixels[0])
            return np.dtype(kind if whole else np.float32)
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
    check_size(record.image, geometry.size, config)
    order, _ = upright_axes(geometry)
    turned = tuple(geometry.size[axis] for axis in order)
    size, ratio = _grid(turned, order, record, geometry, config)
    key = f"dataset.resample_mm {config.resample_mm:g}" if config.resample_mm else f"an image size of {list(size)}"
    require_memory(f"{record.image} at {key}, {' x '.join(map(str, size))} pixels,", 4 * math.prod(size),
                   "choose coarser pixels, or a smaller size")
    return _Grid(geometry, size, ratio, compose(resampling_map(turned, size, ratio), upright_map(geometry)))


def check_size(image: Path, size: tuple[int, ...], config: DatasetConfig) -> None:
    """UserError for an image of more pixels than dataset.max_megapixels allows, before they are read."""
    pixels = math.prod(size)
    if pixels > config.largest:
        raise UserError(f"image {image} has {' x '.join(map(str, size[::-1]))} = {pixels / 1e6:.0f} million pixels, "
                        f"more than dataset.max_megapixels {config.largest / 1e6:g}; reading it takes about "
                        f"{pixels * 8 / 2**30:.1f} GiB of memory: raise that setting if there is as much, or save it "
                        "smaller")


def _grid(turned: tuple[int, ...], order: tuple[int, ...], record: Record, geometry: Geometry,
          config: DatasetConfig) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Size in network pixels and stored pixels per network pixel, along the upright axes."""
    if config.resample_mm is None:
        size = config.whole_size
        return size, tuple(old / new for old, new in zip(turned, size, strict=True))
    own = None if config.spacing_mm is None else (config.spacing_mm,) * len(turned)
    spacing = record.spacing or own or geometry.spacing_mm
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
        return open_pack(Path(config.root)).digest(record.id)
    if not record.image.exists():
        raise UserError(f"image {record.image} does not exist")
    return content_digest(*(dicom_files(record.image) if record.image.is_dir() else [record.image]))[:32]
