"""Records -> tensors: decode and resize once into a cache keyed by content, few-shot subsets, portable packs."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from core.checkpoint import write_atomically
from core.config import Dataset as DatasetConfig
from core.config import add_config_arguments, load_config
from core.errors import UserError, run_command
from core.images import read_image
from core.layouts import SPLITS, DataSource, Record, read_layout
from core.phantom import write_phantom_radiographs

CACHE_VERSION = "1"  # of decoding and resizing together
ON_DEVICE_BYTES = 4 << 30  # image sets up to this size live on the GPU


def load_source(config: DatasetConfig) -> DataSource:
    """The data set that the config names: a folder in one of the layouts, or a pack (.npz). Phantoms are made here."""
    if Path(config.root).suffix == ".npz":
        return _read_pack(config)
    if config.phantom is not None:
        write_phantom_radiographs(Path(config.root), config.phantom.count, config.phantom.size, config.phantom.seed)
    return read_layout(config.layout, config.root, unlabelled_dirs=config.unlabelled_dirs,
                       spacing_mm=config.spacing_mm, exclude=config.exclude)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Records as tensors of one size.

    images: (M, C, *size) float32, intensities as the config asks; points: (M, N, D) float64 in network pixels, NaN =
    not annotated (None for unlabelled sets); original_sizes: (M, D) int64.
    """

    records: tuple[Record, ...]
    images: Tensor
    points: Tensor | None
    original_sizes: np.ndarray

    @property
    def size(self) -> tuple[int, ...]:
        """Spatial size of the network's input."""
        return tuple(self.images.shape[2:])

    def to(self, device: torch.device) -> ImageSet:
        """The set on `device`; images stay where they are when they are too many for a GPU."""
        small = self.images.numel() * self.images.element_size() <= ON_DEVICE_BYTES
        points = None if self.points is None else self.points.to(device)
        return ImageSet(self.records, self.images.to(device) if small else self.images, points, self.original_sizes)

    def original_points(self) -> np.ndarray:
        """Annotations (M, N, D) in original pixels."""
        return np.stack([record.landmarks for record in self.records])

    def spacings(self) -> np.ndarray | None:
        """(M, D) reporting units per original pixel, or None where unknown."""
        if any(record.spacing is None for record in self.records):
            return None
        return np.array([record.spacing for record in self.records])


def load_images(records: Sequence[Record], config: DatasetConfig, progress: str | None = None) -> ImageSet:
    """Decode, resize and normalise `records`, through the cache; a bad file raises UserError with its name."""
    size = tuple(config.image_size)
    hidden = None if progress else True  # None: shown on a terminal only, so that a log holds no torn bars
    loaded = [_load_one(record, config, size) for record in tqdm(records, progress, leave=False, disable=hidden)]
    images = torch.stack([torch.from_numpy(normalise(pixels, config)) for pixels, _ in loaded])
    sizes = np.array([original for _, original in loaded], dtype=np.int64)
    points = None
    if all(record.landmarks is not None for record in records):
        originals = np.stack([record.landmarks for record in records])
        points = torch.from_numpy(map_points(originals, sizes[:, None], np.array(size)))
    return ImageSet(tuple(records), images, points, sizes)


def map_points(points: np.ndarray, old_size: np.ndarray, new_size: np.ndarray) -> np.ndarray:
    """Pixel coordinates after a resize: i -> (i + 0.5) * new / old - 0.5 on each axis; broadcasts."""
    return (points + 0.5) * np.asarray(new_size) / np.asarray(old_size) - 0.5


def normalise(pixels: np.ndarray, config: DatasetConfig) -> np.ndarray:
    """Raw intensities (C, *size) -> [0, 1] by per-image min-max, percentiles or a fixed window; flat images give 0."""
    if config.intensity == "window":
        low, high = config.window
    elif config.intensity == "percentile":
        low, high = np.percentile(pixels, config.percentiles)
    else:
        low, high = pixels.min(), pixels.max()
    return ((pixels - low) / max(high - low, 1e-12)).clip(0, 1).astype(np.float32)


def resize(pixels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Antialiased linear resize of (C, *old) to (C, *size), one triangle filter per axis; half-pixel exact."""
    for axis, new in enumerate(size, start=1):
        old = pixels.shape[axis]
        if old != new:
            moved = np.moveaxis(pixels, axis, -1) @ _resize_weights(old, new).T
            pixels = np.moveaxis(moved, -1, axis)
    return np.ascontiguousarray(pixels, dtype=np.float32)


@lru_cache(maxsize=64)
def _resize_weights(old: int, new: int) -> np.ndarray:
    """(new, old) rows of a triangle filter whose support widens when shrinking; each row sums to 1."""
    ratio = old / new
    centres = (np.arange(new) + 0.5) * ratio - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(old) - centres[:, None]) / max(ratio, 1.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _load_one(record: Record, config: DatasetConfig, size: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Resized raw pixels (C, *size) and the original size, from pack, cache or the file itself."""
    if Path(config.root).suffix == ".npz" and record.image.suffix == ".npz":
        pack = _open_pack(Path(config.root))
        if pack.size != size:
            raise UserError(f"{config.root} holds images of {list(pack.size)}, dataset.image_size asks {list(size)}")
        return pack.images[record.id], pack.original_sizes[record.id]
    if not record.image.is_file():
        raise UserError(f"image {record.image} does not exist")
    digest = hashlib.sha256(record.image.read_bytes()).hexdigest()[:32]
    cached = Path(config.cache_dir) / f"{digest}_{'x'.join(map(str, size))}_v{CACHE_VERSION}.npz"
    if cached.is_file():
        with np.load(cached) as file:
            return file["pixels"], tuple(file["original_size"].tolist())
    pixels = read_image(record.image)
    original = pixels.shape[1:]
    pixels = resize(pixels, size)
    buffer = io.BytesIO()
    np.savez(buffer, pixels=pixels, original_size=np.array(original))
    write_atomically(cached, buffer.getvalue())
    return pixels, original


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


@dataclass(frozen=True, eq=False)
class _Pack:
    size: tuple[int, ...]
    images: dict[str, np.ndarray]
    original_sizes: dict[str, tuple[int, ...]]
    description: dict


def write_pack(config: DatasetConfig, path: Path) -> int:
    """Write the whole data set, resized, with landmarks and splits into one .npz that can stand as dataset.root.

    For a GPU machine that should not hold the full-size images. Returns the number of images.
    """
    source = load_source(config)
    groups = {**source.splits, "unlabelled": source.unlabelled}
    records = [record for group in groups.values() for record in group]
    loaded = [_load_one(record, config, tuple(config.image_size)) for record in tqdm(records, desc="packing")]
    description = {
        "layout": source.layout, "landmark_names": source.landmark_names, "unit": source.unit,
        "sdr_thresholds": source.sdr_thresholds, "paper_rule": source.paper_rule,
        "groups": {name: [_describe(record) for record in group] for name, group in groups.items()},
    }
    buffer = io.BytesIO()
    pixels = np.stack([pixels for pixels, _ in loaded])
    peak = float(np.abs(pixels).max())
    kind = np.int16 if pixels.min() < 0 else np.uint8 if peak < 255.5 else np.uint16  # as deep as the originals
    levels = np.iinfo(kind).max
    np.savez_compressed(buffer, pixels=np.round(pixels * (levels / max(peak, 1e-12))).astype(kind), peak=np.array(peak),
                        ids=np.array([record.id for record in records]), size=np.array(config.image_size),
                        original_sizes=np.array([size for _, size in loaded]),
                        description=np.array(json.dumps(description)))
    write_atomically(path, buffer.getvalue())
    return len(records)


def _describe(record: Record) -> dict:
    points = None if record.landmarks is None else [[None if np.isnan(v) else v for v in p] for p in record.landmarks]
    return {"id": record.id, "landmarks": points, "spacing": record.spacing, "patient": record.patient}


@lru_cache(maxsize=4)
def _open_pack(path: Path) -> _Pack:
    if not path.is_file():
        raise UserError(f"dataset.root {path} does not exist")
    try:
        with np.load(path) as file:
            ids, pixels, peak = file["ids"].tolist(), file["pixels"], float(file["peak"])
            sizes = [tuple(size) for size in file["original_sizes"].tolist()]
            level = np.float32(peak / np.iinfo(pixels.dtype).max)
            images = {name: image * level for name, image in zip(ids, pixels, strict=True)}
            return _Pack(tuple(file["size"].tolist()), images, dict(zip(ids, sizes, strict=True)),
                         json.loads(str(file["description"])))
    except (KeyError, ValueError, OSError, EOFError, BadZipFile) as error:
        raise UserError(f"dataset.root {path} is damaged or not a pack of python -m core.dataset --pack "
                        f"({error})") from None


def _read_pack(config: DatasetConfig) -> DataSource:
    told = _open_pack(Path(config.root)).description
    if told["layout"] != config.layout:
        raise UserError(f'{config.root} was packed from layout "{told["layout"]}", dataset.layout is "{config.layout}"')

    def record(entry: dict) -> Record:
        points = entry["landmarks"]
        spacing = None if entry["spacing"] is None else tuple(entry["spacing"])
        landmarks = None if points is None else np.array(points, dtype=np.float64)
        return Record(entry["id"], Path(config.root), landmarks, spacing, entry["patient"])

    groups = {name: tuple(record(e) for e in entries if e["id"] not in config.exclude)
              for name, entries in told["groups"].items()}
    return DataSource(told["layout"], tuple(told["landmark_names"]), {name: groups[name] for name in SPLITS},
                      groups["unlabelled"], told["unit"], tuple(told["sdr_thresholds"]), told["paper_rule"],
                      Path(config.root))


def main() -> None:
    """Pack a data set into one file."""
    parser = argparse.ArgumentParser(
        prog="python -m core.dataset", description="Pack a data set, resized, into one .npz that dataset.root accepts.",
        epilog="example: python -m core.dataset --config configs/cephalo.json --pack cephalo_256.npz")
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
