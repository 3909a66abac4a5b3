"""Pack a data set, resized, into one file that dataset.root accepts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.config.dataset import Dataset as DatasetConfig
from core.config.load import add_config_arguments, load_config
from core.data.cache import WHOLE_NUMBERS, load_one
from core.data.packs import Loaded
from core.data.records import Record
from core.data.source import load_source
from core.errors import CommandParser, UserError, run_command
from core.files import write_atomically
from core.formats.images import image_suffix


def write_pack(config: DatasetConfig, path: Path) -> int:
    """Write the whole data set, resized, with landmarks and splits into one .npz that can stand as dataset.root.

    For a GPU machine that should not hold the full-size images. Returns the number of images.
    """
    if config.resample_mm is not None or config.canvas_size is not None:
        raise UserError("--pack holds images of one size: set dataset.resample_mm and canvas_size to null")
    source = load_source(config)
    groups = {**source.splits, "unlabelled": source.unlabelled}
    records = [record for group in groups.values() for record in group]
    loaded = [load_one(record, config) for record in tqdm(records, desc="packing")]
    description = {
        "layout": source.layout, "landmark_names": source.landmark_names, "unit": source.unit,
        "sdr_thresholds": source.sdr_thresholds, "paper_rule": source.paper_rule, "excluded": config.exclude,
        "nothing_held_back": source.nothing_held_back,
        "groups": {name: [_describe(record) for record in group] for name, group in groups.items()},
    }
    buffer = io.BytesIO()
    kind: type[np.uint8 | np.uint16] = np.uint8 if all(map(_has_8_bits, records, loaded)) else np.uint16
    ranges = np.array([(0, 255) if kind == np.uint8 else (image.pixels.min(), image.pixels.max()) for image in loaded])
    levels = np.stack([_levels(image.pixels, low, high, kind)
                       for image, (low, high) in zip(loaded, ranges.tolist(), strict=True)])
    np.savez_compressed(buffer, pixels=levels, ranges=ranges,
                        ids=np.array([record.id for record in records]), size=np.array(config.image_size),
                        original_sizes=np.array([image.original_size for image in loaded]),
                        maps=np.stack([image.map for image in loaded]),
                        digests=np.array([image.digest or "" for image in loaded]),
                        description=np.array(json.dumps(description)))
    write_atomically(path, buffer.getvalue())
    return len(records)


def _has_8_bits(record: Record, image: Loaded) -> bool:
    """Whether it was read from a file of whole numbers up to 255: no more of them are worth keeping."""
    whole = (image_suffix(record.image) or "").lower() in WHOLE_NUMBERS
    return whole and image.pixels.min() >= 0 and image.pixels.max() < 255.5


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
