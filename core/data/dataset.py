"""Records -> tensors: decode and resize once into a cache keyed by content, few-shot subsets, portable packs."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from core.config.load.config import Dataset as DatasetConfig
from core.config.load.load import add_config_arguments, load_config
from core.data.layouts import read_layout
from core.data.packs import Loaded, open_pack, read_pack
from core.data.records import DataSource, Record
from core.errors import CommandParser, UserError, run_command
from core.files import write_atomically
from core.formats.geometry import Geometry, apply_maps, compose, resampling_map, upright, upright_axes, upright_map
from core.formats.images import read_geometry, read_image
from core.phantoms.radiographs import write_phantom_radiographs
from core.phantoms.volumes import write_phantom_volumes

CACHE_VERSION = "2"  # of decoding and resizing together
ON_DEVICE_BYTES = 4 << 30  # image sets up to this size live on the GPU
KEPT_SETS, KEPT_BYTES = 3, 1 << 30  # how many image sets stay in memory for the next run, and how large ones at most
DECODERS = min(8, os.cpu_count() or 1)  # images decoded at a time: more would only hold more memory
_kept: dict[tuple, ImageSet] = {}


def load_source(config: DatasetConfig) -> DataSource:
    """The data set that the config names: a folder in one of the layouts, or a pack (.npz). Phantoms are made here.

    The same object again, for all runs of a process, as long as no file of it changes.
    """
    if config.phantom is not None and Path(config.root).suffix != ".npz":
        phantom = config.phantom
        write = {2: write_phantom_radiographs, 3: write_phantom_volumes}[len(phantom.size)]
        write(Path(config.root), phantom.count, phantom.size, phantom.seed)
    places = [config.root, *config.unlabelled_dirs, *([config.description] if config.description else [])]
    return _read_source(config, tuple(stamp(Path(place)) for place in places))


@lru_cache(maxsize=4)
def _read_source(config: DatasetConfig, _stamps: tuple) -> DataSource:
    if Path(config.root).suffix == ".npz":
        return read_pack(config)
    return read_layout(config.layout, config.root, unlabelled_dirs=config.unlabelled_dirs,
                       spacing_mm=config.spacing_mm, exclude=config.exclude, description=config.description,
                       dims=len(config.image_size), check_geometry=config.check_geometry)


def stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Place, size and time of a file, or of all files of a folder: another stamp, another content."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    told = [(file, file.stat()) for file in files if file.is_file()]
    return tuple((str(file.absolute()), status.st_size, status.st_mtime_ns) for file, status in told)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Records as tensors on one canvas.

    images: (M, C, *canvas) float32, intensities as the config asks; points: (M, N, D) float64 in network pixels, NaN =
    not annotated (None for unlabelled sets); maps: (M, D, D + 1) from stored to network pixels; sizes: (M, D) int64,
    what of the canvas each image fills, from `firsts` (M, D) on, the rest being 0; original_sizes: (M, D) int64.
    network_size is what the network takes: the canvas itself, unless images are resampled to a common spacing.
    """

    records: tuple[Record, ...]
    images: Tensor
    points: Tensor | None
    maps: np.ndarray
    firsts: Tensor
    sizes: Tensor
    original_sizes: np.ndarray
    network_size: tuple[int, ...]

    @property
    def fits(self) -> bool:
        """Whether every image has the network's size, so that neither crops nor windows are needed."""
        return tuple(self.images.shape[2:]) == self.network_size

    def seen(self, index: int) -> tuple[slice, ...]:
        """The part of the canvas that image `index` fills, with what it takes about it to reach the network's size."""
        first, size = self.firsts[index].cpu().numpy(), self.sizes[index].cpu().numpy()
        missing = np.maximum(self.network_size - size, 0)
        first = np.minimum(first - missing // 2, self.images.shape[2:] - size - missing).clip(min=0)
        return tuple(map(slice, first.tolist(), (first + size + missing).tolist()))

    def crops(self, chosen: Tensor) -> tuple[tuple[int, ...], Tensor, Tensor] | None:
        """What `augment` needs to cut the network's size out of the `chosen` images, None where they have it."""
        return None if self.fits else (self.network_size, self.firsts[chosen], self.sizes[chosen])

    def to(self, device: torch.device) -> ImageSet:
        """The set on `device`; images stay where they are when they are too many for a GPU."""
        small = self.images.numel() * self.images.element_size() <= ON_DEVICE_BYTES
        return replace(self, images=self.images.to(device) if small else self.images,
                       points=None if self.points is None else self.points.to(device), sizes=self.sizes.to(device),
                       firsts=self.firsts.to(device))

    def original_points(self) -> np.ndarray:
        """Annotations (M, N, D) in stored pixels."""
        return np.stack([record.landmarks for record in self.records])

    def spacings(self) -> np.ndarray | None:
        """(M, D) reporting units per stored pixel, or None where unknown."""
        if any(record.spacing is None for record in self.records):
            return None
        return np.array([record.spacing for record in self.records])


def load_images(records: Sequence[Record], config: DatasetConfig, progress: str | None = None) -> ImageSet:
    """Decode, resample and normalise `records`, through the cache; a bad file raises UserError with its name.

    Without dataset.resample_mm every image gets exactly dataset.image_size; with it the canvas is the smallest that
    holds all of them and image_size, and each lies in its middle. The last few sets stay in memory, so that the runs of
    a study share what they validate and test on; like all sets they must not be written to.
    """
    key = (tuple(records), config, tuple(stamp(record.image) for record in records))
    found = _kept.pop(key, None) or _read_images(key[0], config, progress)
    if found.images.nbytes <= KEPT_BYTES:
        _kept[key] = found  # as the last one
    while len(_kept) > KEPT_SETS:
        del _kept[next(iter(_kept))]
    return found


def _read_images(records: tuple[Record, ...], config: DatasetConfig, progress: str | None) -> ImageSet:
    hidden = None if progress else True  # None: shown on a terminal only, so that a log holds no torn bars
    pool = ThreadPoolExecutor(DECODERS)  # decoders work without the interpreter's lock
    try:
        decoding = pool.map(partial(load_one, config=config), records)
        loaded = list(tqdm(decoding, progress, len(records), leave=False, disable=hidden))
    finally:
        pool.shutdown(cancel_futures=True)  # after a bad file, or Ctrl-C, the rest is not read
    sizes = np.array([image.pixels.shape[1:] for image in loaded])
    canvas = np.maximum(sizes.max(axis=0), config.image_size)
    firsts = (canvas - sizes) // 2
    images = torch.zeros((len(loaded), loaded[0].pixels.shape[0], *canvas.tolist()))
    for place, image, first, size in zip(images, loaded, firsts, sizes, strict=True):
        part = (slice(None), *map(slice, first, first + size))
        place[part] = torch.from_numpy(normalise(image.pixels, config))
    maps = np.stack([image.map for image in loaded])
    maps[:, :, -1] += firsts
    points = None
    if all(record.landmarks is not None for record in records):
        points = torch.from_numpy(apply_maps(np.stack([record.landmarks for record in records]), maps))
    return ImageSet(records, images, points, maps, torch.from_numpy(firsts),
                    torch.from_numpy(sizes), np.array([image.original_size for image in loaded]),
                    tuple(config.image_size))


def normalise(pixels: np.ndarray, config: DatasetConfig) -> np.ndarray:
    """Raw intensities (C, *size) -> [0, 1] by per-image min-max, percentiles or a fixed window; flat images give 0."""
    if config.intensity == "window":
        low, high = config.window
    elif config.intensity == "percentile":
        low, high = np.percentile(pixels, config.percentiles)
    else:
        low, high = pixels.min(), pixels.max()
    return ((pixels - low) / max(high - low, 1e-12)).clip(0, 1).astype(np.float32)


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


def load_one(record: Record, config: DatasetConfig) -> Loaded:
    """One image upright and resampled, from pack, cache or the file itself."""
    if Path(config.root).suffix == ".npz" and record.image == Path(config.root):
        pack = open_pack(Path(config.root))
        if pack.size != config.image_size:
            raise UserError(f"{config.root} holds images of {list(pack.size)}, dataset.image_size asks "
                            f"{list(config.image_size)}")
        return pack.images[record.id]
    geometry = record.geometry or read_geometry(record.image)
    if len(geometry.size) != len(config.image_size):
        raise UserError(f"{record.image} has {len(geometry.size)} axes, dataset.image_size has "
                        f"{len(config.image_size)} numbers")
    order, _ = upright_axes(geometry)
    turned = tuple(geometry.size[axis] for axis in order)
    size, ratio = _grid(turned, order, record, geometry, config)
    shape = "_".join("x".join(f"{value:g}" for value in values) for values in (size, ratio))
    digest = _digest(record.image)
    cached = Path(config.cache_dir) / f"{digest}_{shape}_v{CACHE_VERSION}.npy"
    if cached.is_file():
        pixels = np.load(cached)
    else:
        pixels = resize(upright(read_image(record.image), geometry), size, ratio)
        buffer = io.BytesIO()
        np.save(buffer, pixels)
        write_atomically(cached, buffer.getvalue())
    return Loaded(pixels, geometry.size, compose(resampling_map(turned, size, ratio), upright_map(geometry)), digest)


def _grid(turned: tuple[int, ...], order: tuple[int, ...], record: Record, geometry: Geometry,
          config: DatasetConfig) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Size in network pixels and stored pixels per network pixel, along the upright axes."""
    if config.resample_mm is None:
        return config.image_size, tuple(old / new for old, new in zip(turned, config.image_size, strict=True))
    known = record.spacing or geometry.spacing_mm
    if known is None and config.spacing_mm is None:
        raise UserError(f"{record.image} has no spacing, so dataset.resample_mm cannot be applied: give spacing_mm, or "
                        "set dataset.resample_mm to null")
    spacing = known or (config.spacing_mm,) * len(turned)
    ratio = tuple(config.resample_mm / spacing[axis] for axis in order)
    return tuple(max(1, math.ceil(old / step - 1e-6)) for old, step in zip(turned, ratio, strict=True)), ratio


def _digest(path: Path) -> str:
    """Of the file's content, or of all files of a series."""
    if not path.exists():
        raise UserError(f"image {path} does not exist")
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def select_shots(records: Sequence[Record], shots: int, draw: int, selection: str) -> tuple[Record, ...]:
    """The few labelled images: the first k (the paper) or draw number `draw` of a seeded shuffle.

    Draws are nested: a larger k contains the smaller. UserError when there are fewer records than shots.
    """
    if shots > len(records):
        raise UserError(f"finetune.shots {shots} is above the training split's {len(records)} labelled images")
    if selection == "first":
        return tuple(records[:shots])
    order = np.random.default_rng([draw, len(records)]).permutation(len(records))
    return tuple(records[i] for i in sorted(order[:shots]))


def write_pack(config: DatasetConfig, path: Path) -> int:
    """Write the whole data set, resized, with landmarks and splits into one .npz that can stand as dataset.root.

    For a GPU machine that should not hold the full-size images. Returns the number of images.
    """
    if config.resample_mm is not None:
        raise UserError("--pack holds images of one size: set dataset.resample_mm to null")
    source = load_source(config)
    groups = {**source.splits, "unlabelled": source.unlabelled}
    records = [record for group in groups.values() for record in group]
    loaded = [load_one(record, config) for record in tqdm(records, desc="packing")]
    description = {
        "layout": source.layout, "landmark_names": source.landmark_names, "unit": source.unit,
        "sdr_thresholds": source.sdr_thresholds, "paper_rule": source.paper_rule,
        "groups": {name: [_describe(record) for record in group] for name, group in groups.items()},
    }
    buffer = io.BytesIO()
    pixels = np.stack([image.pixels for image in loaded])
    peak = float(np.abs(pixels).max())
    kind = np.int16 if pixels.min() < 0 else np.uint8 if peak < 255.5 else np.uint16  # as deep as the originals
    levels = np.iinfo(kind).max
    np.savez_compressed(buffer, pixels=np.round(pixels * (levels / max(peak, 1e-12))).astype(kind), peak=np.array(peak),
                        ids=np.array([record.id for record in records]), size=np.array(config.image_size),
                        original_sizes=np.array([image.original_size for image in loaded]),
                        maps=np.stack([image.map for image in loaded]),
                        digests=np.array([image.digest or "" for image in loaded]),
                        description=np.array(json.dumps(description)))
    write_atomically(path, buffer.getvalue())
    return len(records)


def _describe(record: Record) -> dict:
    told = {"id": record.id, "landmarks": None if record.landmarks is None else _plain(record.landmarks),
            "spacing": record.spacing, "patient": record.patient}
    return told if record.annotators is None else {**told, "annotators": [_plain(one) for one in record.annotators]}


def _plain(points: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(value) else value for value in point] for point in points.tolist()]


def main() -> None:
    """Pack a data set into one file."""
    parser = CommandParser(
        prog="python -m core.data.dataset", description="Pack a data set, resized, into one .npz that dataset.root accepts.",
        epilog="example: python -m core.data.dataset --config configs/cephalo.json --pack cephalo_256.npz")
    add_config_arguments(parser)
    parser.add_argument("--pack", required=True, type=Path, metavar="FILE.npz")
    arguments = parser.parse_args()
    if arguments.pack.suffix != ".npz":
        raise UserError(f"--pack {arguments.pack}: must end in .npz")
    config = load_config(arguments.config, arguments.set)
    count = write_pack(config.dataset, arguments.pack)
    print(f"{count} images in {arguments.pack} ({arguments.pack.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    run_command(main)
