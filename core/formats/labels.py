"""What every landmark file of a labelling tool yields: names, and the landmarks of each image.

Inside the program: float64 (N, 2) in (y, x) order, pixels of the stored image, pixel centre at integers, NaN = not
annotated. Tools that draw on a canvas (LabelMe, CVAT, Label Studio, tpsDig) count from the image's corner instead, so
that the first pixel's centre is at (0.5, 0.5): CORNER is what their numbers are larger by.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.errors import UserError, did_you_mean
from core.formats.points import FolderRow, read_text

CORNER = 0.5
SizeOf = Callable[[str], tuple[int, ...]]  # of an image by its name in the file; UserError where it is not known


@dataclass(frozen=True, eq=False)
class LabelSet:
    """The landmarks `names` of images, points of each row (len(names), D).

    `passed_over` says in words what else a file held. `proposed` landmarks are a detector's, seen by nobody yet.
    """

    names: tuple[str, ...]
    rows: tuple[FolderRow, ...]
    passed_over: tuple[str, ...] = ()
    proposed: bool = False


class Mark(NamedTuple):
    """A landmark as a file has it: (x, y) in pixels with the first pixel's centre at 0, NaN = not annotated."""

    label: str
    x: float
    y: float
    hidden: bool = False


@dataclass(frozen=True, eq=False)
class Sheet:
    """What a file says of one image; `size` (H, W) where it tells."""

    image: str
    size: tuple[int, int] | None = None
    marks: list[Mark] = field(default_factory=list)


def gather(sheets: Iterable[Sheet], path: Path, names: Sequence[str] | None, own_names: Iterable[str] = (),
           passed_over: Iterable[str] = ()) -> LabelSet:
    """Sheets -> LabelSet with the landmarks `names`, or, for None, those that the file has, `own_names` first.

    UserError: a label that is not one of `names` or that an image has twice, an image that is there twice, no
    landmark at all, numbers that are not finite.
    """
    sheets = list(sheets)
    seen = dict.fromkeys((*own_names, *(mark.label for sheet in sheets for mark in sheet.marks)))
    if names is None:
        names = tuple(seen)
    if not names or not sheets:
        raise UserError(f"{path} holds no landmarks")
    strange = [label for label in seen if label not in names]
    if strange:
        raise UserError(f'{path}: "{strange[0]}" is not one of the {len(names)} landmarks'
                        f"{did_you_mean(strange[0], names)}; they are {', '.join(names)}")
    rows: dict[str, FolderRow] = {}
    for sheet in sheets:
        if sheet.image in rows:
            raise UserError(f'{path}: image "{sheet.image}" is there twice; keep one set of landmarks an image')
        rows[sheet.image] = _row(sheet, names, path)
    return LabelSet(tuple(names), tuple(rows.values()), tuple(passed_over))


def _row(sheet: Sheet, names: Sequence[str], path: Path) -> FolderRow:
    points, hidden = np.full((len(names), 2), np.nan), np.zeros(len(names), dtype=bool)
    placed: set[str] = set()
    for mark in sheet.marks:
        if mark.label in placed:
            raise UserError(f'{path}: landmark "{mark.label}" of image "{sheet.image}" is there twice; keep one')
        placed.add(mark.label)
        if np.isinf([mark.x, mark.y]).any() or np.isnan(mark.x) != np.isnan(mark.y):
            raise UserError(f'{path}: landmark "{mark.label}" of image "{sheet.image}" is not two finite numbers')
        index = names.index(mark.label)
        points[index], hidden[index] = (mark.y, mark.x), mark.hidden
    return FolderRow(sheet.image, points, size=sheet.size, hidden=hidden)


def annotated(row: FolderRow, names: Sequence[str]) -> list[Mark]:
    """The landmarks of a flat image that are annotated, in the order of `names`."""
    hidden = np.zeros(len(names), dtype=bool) if row.hidden is None else row.hidden
    each = zip(names, row.points.tolist(), hidden.tolist(), strict=True)
    return [Mark(name, x, y, unseen) for name, (y, x), unseen in each if not np.isnan(x)]


def size_needed(row: FolderRow, path: Path) -> tuple[int, int]:
    """(H, W) of a flat image; UserError where it is not known."""
    if row.size is None or len(row.size) != 2:
        raise UserError(f'{path} needs the size of image "{row.image}"; name the folder of the images with --images')
    return row.size[0], row.size[1]


def read_json(path: Path) -> Any:
    """The content of a JSON file; UserError unless it is one."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a readable JSON file: {error}") from None


def entries(content: Any, key: str, where: str) -> list[dict[str, Any]]:
    """The list of objects `key` of a JSON object; UserError where it is something else. Absent = empty."""
    values = content.get(key, []) if isinstance(content, dict) else None
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise UserError(f"{where}: {key} must be a list of objects")
    return values


def finite(value: Any, where: str) -> float:
    """A JSON value as a float; UserError unless it is a number that is finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise UserError(f"{where}: {json.dumps(value)} is not a finite number")
    return float(value)


def text_of(value: Any, where: str) -> str:
    """A JSON value that must be a word; UserError where it is none."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where} must be a text, not {json.dumps(value)[:60]}")
    return value


def size_of_entry(height: Any, width: Any, where: str) -> tuple[int, int] | None:
    """(H, W) as a file tells it, None where it does not; UserError for something that is no size."""
    if height is None and width is None:
        return None
    size = finite(height, where), finite(width, where)
    if not all(length >= 1 and length == int(length) for length in size):
        raise UserError(f"{where}: height and width must be whole numbers above 0, not {size[0]:g} and {size[1]:g}")
    return int(size[0]), int(size[1])


def counted(kinds: Iterable[str]) -> tuple[str, ...]:
    """["box", "box", "mask"] -> ("2 box", "1 mask"), for what is passed over."""
    every = list(kinds)
    return tuple(f"{every.count(kind)} {kind}" for kind in dict.fromkeys(every))
