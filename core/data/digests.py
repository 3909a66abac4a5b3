"""Digests of images and labels: what a run records of its data, to notice later that they are others now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from core.config.dataset import Dataset as DatasetConfig
from core.data.cache import image_digest, is_packed
from core.data.records import Record
from core.files import parse_json, stamp, write_atomically

MEMO = "digests.json"  # in dataset.cache_dir: digests by place, valid while size and time of the file stay
LENGTH = 16  # hexadecimal digits

ImageDigests = dict[str, list[str | None]]  # image id -> [of its pixels or None where a pack has none, of its labels]


def data_digests(records: Sequence[Record], names: Sequence[str], config: DatasetConfig,
                 scoring: bool = False) -> ImageDigests:
    """{image id: [digest of its file's content, digest of its labels]}; no labels: None.

    Labels go by the landmarks' `names`, so their order does not matter; with `scoring` they include what an error is
    measured by: spacing, patient and annotators. A spacing also counts where it decides how images are resampled.
    """
    pixels = pixel_digests(records, config)
    spaced = scoring or config.resample_mm is not None
    return {record.id: [digest and digest[:LENGTH], _label_digest(record, names, spaced, scoring)]
            for record, digest in zip(records, pixels, strict=True)}


def _label_digest(record: Record, names: Sequence[str], spaced: bool, scoring: bool) -> str | None:
    if record.landmarks is None:
        return None
    labels: list[Any] = [_by_name(names, record.landmarks)]
    labels += [record.spacing] if spaced else []
    if scoring:
        labels += [record.patient, None if record.annotators is None else
                   [_by_name(names, annotator) for annotator in record.annotators]]
    return hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:LENGTH]


def _by_name(names: Sequence[str], points: np.ndarray) -> list[tuple[str, list[str]]]:
    return sorted((name, [repr(float(value)) for value in point]) for name, point in zip(names, points, strict=True))


def pixel_digests(records: Iterable[Record], config: DatasetConfig) -> list[str | None]:
    """Of each record's file; a file whose size and time are as in the memo is not read again."""
    path = None if config.cache_dir is None else Path(config.cache_dir) / MEMO
    memo = {} if path is None else _read_memo(path, stamp(path))
    digests: list[str | None] = []
    changed: dict[str, list[str | None]] = {}
    for record in records:
        if is_packed(record, config):
            digests.append(image_digest(record, config))
            continue
        place = str(record.image.absolute())
        status = hashlib.sha256(json.dumps(stamp(record.image)).encode()).hexdigest()[:LENGTH]
        entry = memo.get(place)
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] == status):
            entry = changed[place] = [status, image_digest(record, config)]
        digests.append(entry[1])
    if changed and path is not None:
        write_atomically(path, json.dumps({**memo, **changed}).encode())
    return digests


@lru_cache(maxsize=1)
def _read_memo(path: Path, _status: tuple) -> dict[str, Any]:
    """The memo as it was at that stamp, for a study asks for the digests of each of its runs; not to be written to."""
    try:
        memo = parse_json(path.read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError):  # not there yet, or cut off: made anew
        return {}
    return memo if isinstance(memo, dict) else {}
