"""Reading portable packs: a data set, resized, in one .npz that dataset.root accepts; core.data.make_pack writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from core.config.dataset import Dataset as DatasetConfig
from core.data.records import SPLITS, DataSource, Record
from core.errors import UserError


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
            ids, pixels, peak = file["ids"].tolist(), file["pixels"], float(file["peak"])
            sizes = [tuple(size) for size in file["original_sizes"].tolist()]
            level = np.float32(peak / np.iinfo(pixels.dtype).max)
            digests = file["digests"].tolist() if "digests" in file else [""] * len(ids)
            images = {name: Loaded(image * level, size, map_, digest or None) for name, image, size, map_, digest
                      in zip(ids, pixels, sizes, file["maps"], digests, strict=True)}
            return Pack(tuple(file["size"].tolist()), images, json.loads(str(file["description"])))
    except (KeyError, ValueError, OSError, EOFError, BadZipFile) as error:
        raise UserError(f"dataset.root {path} is damaged or not a pack of python -m core.data.make_pack --pack "
                        f"({error})") from None


def read_pack(config: DatasetConfig) -> DataSource:
    """The data set in the pack that is dataset.root, less dataset.exclude.

    UserError when it was packed from another layout, or when an excluded image neither is nor was in it.
    """
    description = open_pack(Path(config.root)).description
    if description["layout"] != config.layout:
        raise UserError(f'{config.root} was packed from layout "{description["layout"]}", dataset.layout is '
                        f'"{config.layout}"')

    def record(entry: dict) -> Record:
        landmarks, annotators = (None if entry.get(key) is None else np.array(entry[key], dtype=np.float64)
                                 for key in ("landmarks", "annotators"))
        spacing = None if entry["spacing"] is None else tuple(entry["spacing"])
        return Record(entry["id"], Path(config.root), landmarks, spacing, entry["patient"], annotators=annotators)

    groups = {name: tuple(record(e) for e in entries) for name, entries in description["groups"].items()}
    whole = DataSource(description["layout"], tuple(description["landmark_names"]),
                       {name: groups[name] for name in SPLITS}, groups["unlabelled"], description["unit"],
                       tuple(description["sdr_thresholds"]), description["paper_rule"], Path(config.root))
    return whole.without(name for name in config.exclude if name not in description.get("excluded", ()))
