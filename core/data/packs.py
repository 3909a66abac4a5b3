"""Reading portable packs: a data set, resized, in one .npz that dataset.root accepts; core.data.make_pack writes."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.bounds import require_memory
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
    """A whole data set, resized, as `python -m core.data.make_pack --pack` leaves it: `rows` by id, arrays by row."""

    size: tuple[int, ...]
    rows: dict[str, int]
    levels: np.ndarray  # (M, C, *size), whole numbers
    ranges: np.ndarray  # (M, 2), the intensities of the first and the last level
    original_sizes: list[tuple[int, ...]]
    maps: np.ndarray  # (M, D, D + 1)
    digests: list[str]
    description: dict

    def load(self, name: str) -> Loaded:
        """One image; KeyError where there is none of this name."""
        row = self.rows[name]
        low, high = self.ranges[row].tolist()
        step = np.float32((high - low) / np.iinfo(self.levels.dtype).max)
        return Loaded(self.levels[row] * step + np.float32(low), self.original_sizes[row], self.maps[row],
                      self.digest(name))

    def digest(self, name: str) -> str | None:
        """Of the file's content."""
        return self.digests[self.rows[name]] or None


@lru_cache(maxsize=4)
def open_pack(path: Path) -> Pack:
    """Read a pack, once per process. UserError for a missing, a damaged, or one that is larger than the memory."""
    if not path.is_file():
        raise UserError(f"dataset.root {path} does not exist")
    try:
        shape, bytes_ = _announced(path)
        require_memory(f"dataset.root {path}, a pack of {shape[0]} images,", bytes_,
                       "make dataset.root the folder itself, or a pack of fewer images (dataset.exclude)")
        with np.load(path) as file:
            ids, levels, size = file["ids"].tolist(), file["pixels"], tuple(file["size"].tolist())
            sizes = [tuple(size) for size in file["original_sizes"].tolist()]
            digests = file["digests"].tolist() if "digests" in file else [""] * len(ids)
            ranges = file["ranges"] if "ranges" in file else np.array([(0.0, float(file["peak"]))] * len(ids))
            rows, maps = {name: row for row, name in enumerate(ids)}, file["maps"]
            if (levels.shape[2:] != size or maps.shape[1:] != (len(size), len(size) + 1) or len(rows) < len(ids)
                    or ranges.shape[1:] != (2,) or not np.isfinite(ranges).all() or levels.dtype.kind != "u"
                    or {len(each) for each in (levels, ranges, sizes, maps, digests)} != {len(ids)}):
                raise ValueError("its arrays do not fit each other")
            return Pack(size, rows, levels, ranges, sizes, maps, digests, parse_json(str(file["description"])))
    except PACK_DAMAGE as error:
        raise _damaged(path, error) from None


def _announced(path: Path) -> tuple[tuple[int, ...], int]:
    """Shape of a pack's pixels and their bytes, as its header has them, before they are read."""
    with zipfile.ZipFile(path) as pack, pack.open("pixels.npy") as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError("its pixels are no array of version 1.0")
        shape, _, kind = np.lib.format.read_array_header_1_0(member)
    return shape, math.prod(shape) * kind.itemsize


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
        if each.id not in pack.rows:
            raise ValueError(f"it has no pixels of image {each.id}")
    if not all(name.isprintable() for name in description["landmark_names"]):
        raise ValueError("a landmark's name cannot be shown")
    whole = DataSource(description["layout"], tuple(description["landmark_names"]),
                       {name: groups[name] for name in SPLITS}, groups["unlabelled"], description["unit"],
                       tuple(description["sdr_thresholds"]), description["paper_rule"], Path(config.root),
                       description.get("nothing_held_back", False),
                       spacing_mm=None if (told := description.get("spacing_mm")) is None else tuple(told))
    return whole.without(name for name in config.exclude if name not in description.get("excluded", ()))
