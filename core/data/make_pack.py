"""Pack a data set, resized, into one file that dataset.root accepts."""

from __future__ import annotations

import json
import math
import tempfile
import zipfile
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from tqdm import tqdm

from core.config.dataset import Dataset as DatasetConfig
from core.config.load import add_config_arguments, load_config
from core.data.cache import WHOLE_NUMBERS, load_one
from core.data.packs import Loaded
from core.data.records import Record
from core.data.source import load_source
from core.errors import CommandParser, UserError, run_command
from core.files import atomic_file
from core.formats.images import image_suffix


def write_pack(config: DatasetConfig, path: Path) -> int:
    """Write the whole data set, resized, with landmarks and splits into one .npz that can stand as dataset.root.

    For a GPU machine that should not hold the full-size images. Returns the number of images. One of them is in memory
    at a time; meanwhile their pixels lie beside `path`, 4 bytes each.
    """
    if config.resample_mm is not None or config.canvas_size is not None:
        raise UserError("--pack holds images of one size: set dataset.resample_mm and canvas_size to null")
    source = load_source(config)
    groups = {**source.splits, "unlabelled": source.unlabelled}
    records = [record for group in groups.values() for record in group]
    description = {
        "layout": source.layout, "landmark_names": source.landmark_names, "unit": source.unit,
        "sdr_thresholds": source.sdr_thresholds, "paper_rule": source.paper_rule, "excluded": config.exclude,
        "nothing_held_back": source.nothing_held_back, "spacing_mm": source.spacing_mm,
        "groups": {name: [_describe(record) for record in group] for name, group in groups.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent) as pixels:
        packed = [_spool(record, load_one(record, config), pixels) for record in tqdm(records, desc="packing")]
        kind: type[np.uint8 | np.uint16] = np.uint8 if all(image.has_8_bits for image in packed) else np.uint16
        ranges = np.array([(0, 255) if kind == np.uint8 else image.range for image in packed])
        pixels.seek(0)
        with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as pack:
            _write_levels(pack, pixels, packed, ranges, kind)
            for name, values in {
                    "ranges": ranges, "ids": [record.id for record in records], "size": config.image_size,
                    "original_sizes": [image.original_size for image in packed],
                    "maps": [image.map for image in packed], "digests": [image.digest or "" for image in packed],
                    "description": json.dumps(description)}.items():
                with pack.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, np.array(values), allow_pickle=False)
    return len(records)


class _Packed(NamedTuple):
    """What is kept of an image while its pixels wait on disk."""

    shape: tuple[int, ...]  # (C, *size)
    range: tuple[float, float]  # smallest and largest intensity
    has_8_bits: bool
    original_size: tuple[int, ...]
    map: np.ndarray
    digest: str | None


def _spool(record: Record, image: Loaded, file: IO[bytes]) -> _Packed:
    """Append the pixels to `file` as float32: which levels hold them is known when all images were read."""
    file.write(np.ascontiguousarray(image.pixels, dtype=np.float32).data)
    limits = float(image.pixels.min()), float(image.pixels.max())
    whole = (image_suffix(record.image) or "").lower() in WHOLE_NUMBERS  # a file of whole numbers up to 255 has 8 bits
    return _Packed(image.pixels.shape, limits, whole and limits[0] >= 0 and limits[1] < 255.5, image.original_size,
                   image.map, image.digest)


def _write_levels(pack: zipfile.ZipFile, file: IO[bytes], packed: list[_Packed], ranges: np.ndarray,
                  kind: type[np.uint8 | np.uint16]) -> None:
    """pixels.npy (M, C, *size) from those in `file`, one image in memory at a time."""
    [shape] = {image.shape for image in packed}
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False,
              "shape": (len(packed), *shape)}
    with pack.open("pixels.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for low, high in ranges.tolist():
            pixels = np.frombuffer(file.read(4 * math.prod(shape)), dtype=np.float32).reshape(shape)
            member.write(_levels(pixels, low, high, kind).data)


def _levels(pixels: np.ndarray, low: float, high: float, kind: type[np.uint8 | np.uint16]) -> np.ndarray:
    """Pixels as whole numbers, `low` to 0 and `high` to the largest of `kind`: each image has a range of its own."""
    top = float(np.iinfo(kind).max)
    return np.round((pixels - low) * (top / max(high - low, 1e-30))).astype(kind)


def _describe(record: Record) -> dict:
    entry = {"id": record.id, "landmarks": None if record.landmarks is None else _plain(record.landmarks),
            "spacing": record.spacing, "patient": record.patient}
    return entry if record.annotators is None else {**entry, "annotators": [_plain(one) for one in record.annotators]}


def _plain(points: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(value) else value for value in point] for point in points.tolist()]


def main() -> None:
    """Pack a data set into one file."""
    parser = CommandParser(
        prog="python -m core.data.make_pack", description=__doc__,
        epilog="example: python -m core.data.make_pack --config configs/cephalo.json --pack cephalo_256.npz")
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
