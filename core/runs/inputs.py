"""What a run was made from, in its folder: digests of its images and labels, and of the weights that it started from.

A finished run stands for what is asked for now only where these are the same; where they are not, the difference is
said in words. Places do not count: the same data elsewhere are the same inputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import content_digest, parse_json, write_json

INPUTS = "inputs.json"  # of training: images by their use, and the start weights
SCORED = "scored.json"  # of scoring: test images and the settings that decide a score
CROSS_VALIDATION, CROSS_VALIDATED = "cross-validation", "cross-validated"  # uses of the pooled folds' images
SHOWN = 3  # images that a reason names

ImageDigests = Mapping[str, Sequence[str | None]]  # image id -> [of its pixels, of its labels], see core.data.digests
GroupedImages = Mapping[str, ImageDigests]  # by use: training, validation, pretraining, test


@dataclass(frozen=True)
class StartWeights:
    """The file that a run started from; size and time spare reading it again."""

    file: str
    sha256: str
    size: int
    mtime_ns: int


def start_weights(path: Path) -> StartWeights:
    """What a run records of the weights file `path`."""
    status = path.stat()
    return StartWeights(str(path), content_digest(path), status.st_size, status.st_mtime_ns)


def write_inputs(run_dir: Path, images: GroupedImages, start: Path | None = None, chosen_by: Path | None = None
                 ) -> None:
    """Leave inputs.json in `run_dir`; `chosen_by` are the weights whose features chose the images, if any did."""
    weights = None if start is None else asdict(start_weights(start))
    chooser = {} if chosen_by is None else {"chosen_by": asdict(start_weights(chosen_by))}
    write_json(run_dir / INPUTS, {"images": images, "start": weights, **chooser})


def read_record(path: Path) -> dict[str, Any] | None:
    """A run's inputs.json or scored.json, not to be changed; None where there is none. UserError for a damaged one."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return _parsed(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _parsed(path: Path, _size: int, _mtime_ns: int) -> dict[str, Any]:
    try:
        record = parse_json(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete its folder to make that run again") from None
    if not isinstance(record, dict) or "images" not in record:
        raise UserError(f"{path} is damaged (it lists no images); delete its folder to make that run again")
    return record


def input_changes(run_dir: Path, images: GroupedImages | None, start: Path | None = None,
                  may_grow: bool = False, chosen_by: Path | None = None) -> str | None:
    """Why the run in `run_dir` is stale: how `images` or the weights in `start` differ from those it was made from.

    None where nothing differs, or the folder records nothing. `images` None: they are known to be the same, unless the
    weights in `chosen_by` that choose them are others; with `may_grow` images that were added since do not count. A
    weights file that is not there (yet) says nothing.
    """
    record = read_record(run_dir / INPUTS)
    if record is None:
        return None
    changes = [] if images is None else image_changes(record["images"], images, may_grow)
    if start is not None and start_changed(record["start"], start):
        changes.append(f"the weights in {start} are others than those it started from")
    if images is None and chosen_by is not None and start_changed(record.get("chosen_by"), chosen_by):
        changes.append(f"the weights in {chosen_by} are others than those that chose its images")
    return "; ".join(changes) or None


def start_changed(record: Mapping[str, Any] | None, path: Path) -> bool:
    """Whether the file is there and holds other weights than those recorded, if any are."""
    if record is None or not path.is_file():
        return False
    status = path.stat()
    if (status.st_size, status.st_mtime_ns) == (record["size"], record["mtime_ns"]):
        return False
    return content_digest(path) != record["sha256"]


def check_inputs(run_dir: Path, images: GroupedImages, start: Path | None = None, may_grow: bool = False) -> None:
    """UserError where `run_dir` was made from other images, labels or weights than these: see `input_changes`."""
    reason = input_changes(run_dir, images, start, may_grow)
    if reason is not None:
        raise UserError(f"{run_dir} was made from other inputs: {reason}; choose another experiment.name, or delete "
                        "that folder to start over")


def image_changes(before: GroupedImages, now: GroupedImages, may_grow: bool = False) -> list[str]:
    """In words, use by use: images added (unless the set may grow) and gone, and those with other pixels or labels."""
    changes = []
    for use in dict.fromkeys((*before, *now)):
        old, new = before.get(use, {}), now.get(use, {})
        if old == new:
            continue
        both = sorted(old.keys() & new.keys())
        pixels = [name for name in both if None not in (old[name][0], new[name][0]) and old[name][0] != new[name][0]]
        labels = [name for name in both if old[name][1] != new[name][1]]
        added, gone = [] if may_grow else sorted(new.keys() - old.keys()), sorted(old.keys() - new.keys())
        for names, what in ((added, "added to"), (gone, "gone from"), (pixels, "with other pixels in"),
                            (labels, "with other labels in")):
            if names:
                changes.append(f"{counted(names)} {what} {use}")
    return changes


def counted(names: Sequence[str]) -> str:
    """"1 image (a)", "5 images (a, b, c, ...)"."""
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} image{'s' if len(names) > 1 else ''} ({', '.join(names[:SHOWN])}{more})"


def images_digest(images: GroupedImages) -> str:
    """Of images and labels together: only scores on test images of one digest may be compared."""
    return hashlib.sha256(json.dumps(images, sort_keys=True).encode()).hexdigest()[:16]
