"""Reading portable packs: a data set, resized, in one .npz that dataset.root accepts; core.data.make_pack writes."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.config.dataset import Dataset as DatasetConfig
from core.data.records import SPLITS, DataSource, Record
from core.errors import UserError
from core.files import parse_json

PACK_DAMAGE = (KeyError, ValueError, TypeError, IndexError, AttributeError, OSError, EOFError, NotImplementedError,
               RuntimeError, SyntaxError, OverflowError, MemoryError, struct.error, tokenize.TokenError, zlib.error,
               zipfile.BadZipFile)  # fmt: skip


class Loaded(NamedTuple):
    """One image as `load_one` gives it."""

    pixels: np.ndarray  # (C, *size), raw intensities
    original_size: tuple[int, ...]
    map: np.ndarray  # (D, D + 1), stored -> network pixels
    digest: str | None  # of the file's content; None in a pack made without


@dataclass(frozen=True, eq=False)
class Pack:
    """A whole data set, resized, as `python -m core.data.make_pack --pack` leaves it."""

    size: tuple[int, ...]
    images: dict[str, Loaded]
    description: dict


@lru_cache(maxsize=4)
def open_pack(path: Path) -> Pack:
    """Read a pack, once per process. UserError for a missing or damaged one."""
    if not path.is_file():
        raise UserError(f"dataset.root {path} does not exist")
    try:
        with np.load(path) as file:
            ids, pixels, size = file["ids"].tolist(), file["pixels"], tuple(file["size"].tolist())
            sizes = [tuple(size) for size in file["original_sizes"].tolist()]
            digests = file["digests"].tolist() if "digests" in file else [""] * len(ids)
            ranges = file["ranges"] if "ranges" in file else np.array([(0.0, float(file["peak"]))] * len(ids))
            if pixels.shape[2:] != size or file["maps"].shape[1:] != (len(size), len(size) + 1) or not (
                    np.isfinite(ranges).all() and len(set(ids)) == len(ids)):
                raise ValueError("its arrays do not fit each other")
            top = np.iinfo(pixels.dtype).max
            images = {name: Loaded(image * np.float32((high - low) / top) + np.float32(low), size, map_, digest or None)
                      for name, image, (low, high), size, map_, digest
                      in zip(ids, pixels, ranges, sizes, file["maps"], digests, strict=True)}
            return Pack(size, images, parse_json(str(file["description"])))
    except PACK_DAMAGE as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    said = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"dataset.root {path} is damaged or not a pack of python -m core.data.make_pack --pack ({said})")


def read_pack(config: DatasetConfig) -> DataSource:
    """The data set in the pack that is dataset.root, less dataset.exclude.

    UserError when it was packed from another layout, or when an excluded image neither is nor was in it.
    """
    pack = open_pack(Path(config.root))
    try:
        return _source(pack, config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(Path(config.root), error) from None


def _source(pack: Pack, config: DatasetConfig) -> DataSource:
    description = pack.description
    if description["layout"] != config.layout:
        raise UserError(f'{config.root} was packed from layout "{description["layout"]}", dataset.layout is '
                        f'"{config.layout}"')

    def record(entry: dict) -> Record:
        landmarks, annotators = (None if entry.get(key) is None else np.array(entry[key], dtype=np.float64)
                                 for key in ("landmarks", "annotators"))
        spacing = None if entry["spacing"] is None else tuple(entry["spacing"])
        return Record(entry["id"], Path(config.root), landmarks, spacing, entry["patient"], annotators=annotators)

    groups = {name: tuple(record(e) for e in entries) for name, entries in description["groups"].items()}
    for each in (each for group in groups.values() for each in group):
        if each.id not in pack.images:
            raise ValueError(f"it has no pixels of image {each.id}")
    if not all(name.isprintable() for name in description["landmark_names"]):
        raise ValueError("a landmark's name cannot be shown")
    whole = DataSource(description["layout"], tuple(description["landmark_names"]),
                       {name: groups[name] for name in SPLITS}, groups["unlabelled"], description["unit"],
                       tuple(description["sdr_thresholds"]), description["paper_rule"], Path(config.root),
                       description.get("nothing_held_back", False))
    return whole.without(name for name in config.exclude if name not in description.get("excluded", ()))
