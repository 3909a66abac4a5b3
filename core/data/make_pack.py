"""Pack a data set, resized, into one file that dataset.root accepts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.config.dataset import Dataset as DatasetConfig
from core.config.load import add_config_arguments, load_config
from core.data.cache import load_one
from core.data.records import Record
from core.data.source import load_source
from core.errors import CommandParser, UserError
from core.files import write_atomically


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
