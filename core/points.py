"""One reader (and writer, where useful) per landmark file format.

Inside the program: float64 (N, 2) in (y, x) order, pixels of the original image, pixel centre at integers, NaN = not
annotated. Files hold (x, y).
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.errors import UserError, did_you_mean

CEPHALO_POINTS, CHEST_POINTS, HAND_POINTS = 19, 6, 37


@dataclass(frozen=True, eq=False)
class FolderRow:
    """One row of a folder layout's `landmarks.csv`: points (N, 2) in (y, x), spacing (y, x) in mm or None."""

    image: str
    points: np.ndarray
    spacing: tuple[float, float] | None = None
    patient: str | None = None


def read_cephalo(path: Path) -> np.ndarray:
    """ISBI 2015 label file -> (19, 2): lines `x,y` in pixels; lines after the 19 points (classes) are ignored.

    UserError: file missing, fewer points, a line that is not two numbers.
    """
    lines = _lines(path)[:CEPHALO_POINTS]
    points = [_pair(line.split(","), f"{path}, line {number}", "x,y") for number, line in enumerate(lines, 1)]
    return _complete(points, CEPHALO_POINTS, path)


def read_chest(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Chest label file -> (6, 2): a count, then lines `x y` as fractions of the image's (H, W) = `size`.

    A fraction f of a width W lies at f * W - 0.5, since pixel 0 spans [-0.5, 0.5].
    UserError: file missing, another count, a line that is not two numbers.
    """
    first, *lines = _lines(path) or [""]
    if first != str(CHEST_POINTS):
        raise UserError(f'{path}, line 1: the number of points must be {CHEST_POINTS}, not "{first}"')
    points = [_pair(line.split(), f"{path}, line {number}", "x y") for number, line in enumerate(lines, 2)]
    return _complete(points, CHEST_POINTS, path) * np.asarray(size, dtype=np.float64) - 0.5


def read_hand(path: Path) -> dict[str, np.ndarray]:
    """Hand `all.csv` (no header; rows `id,x1,y1,...,x37,y37` in pixels) -> points (37, 2) by image id.

    UserError: file missing, wrong number of columns, not a number, an id twice.
    """
    points: dict[str, np.ndarray] = {}
    for number, line in enumerate(_lines(path), 1):
        name, *cells = (cell.strip() for cell in line.split(","))
        where = f"{path}, line {number}"
        if len(cells) != 2 * HAND_POINTS:
            raise UserError(f"{where}: has {len(cells) + 1} columns, not {2 * HAND_POINTS + 1} (id,x1,y1,...,x37,y37)")
        if name in points:
            raise UserError(f'{where}: id "{name}" appears twice')
        points[name] = np.array([_number(cell, where) for cell in cells]).reshape(HAND_POINTS, 2)[:, ::-1].copy()
    return points


def read_folder_csv(path: Path, names: Sequence[str]) -> list[FolderRow]:
    """Folder layout's `landmarks.csv` -> rows in file order, points (len(names), 2).

    Columns: `image`, optional `patient`, optional `spacing_x` and `spacing_y` in mm, `<name>_x` and `<name>_y` for
    each of `names`. Empty cells = not annotated. UserError: file missing, wrong columns, not a number, half a point.
    """
    try:
        header, *rows = list(csv.reader(io.StringIO(_text(path)), skipinitialspace=True)) or [[]]
    except csv.Error as error:
        raise UserError(f"{path} is not a readable CSV file: {error}") from None
    header = [column.strip() for column in header]
    _check_columns(header, names, path)
    read = []
    for number, cells in enumerate(rows, 2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise UserError(f"{path}, row {number}: has {len(cells)} cells, but the header has {len(header)} columns")
        read.append(_folder_row(dict(zip(header, map(str.strip, cells), strict=True)), names, f"{path}, row {number}"))
    return read


def write_folder_csv(path: Path, names: Sequence[str], rows: Iterable[FolderRow]) -> None:
    """Write rows so that `read_folder_csv` gives them back exactly; NaN becomes an empty cell. The write is atomic."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "patient", "spacing_x", "spacing_y", *_point_columns(names)])
    for row in rows:
        values = [*(row.spacing or (math.nan, math.nan))[::-1], *row.points[:, ::-1].ravel()]
        cells = ["" if math.isnan(value) else repr(float(value)) for value in values]
        writer.writerow([row.image, row.patient or "", *cells])
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _point_columns(names: Sequence[str]) -> list[str]:
    return [f"{name}_{axis}" for name in names for axis in "xy"]


def _check_columns(header: list[str], names: Sequence[str], path: Path) -> None:
    required = ["image", *_point_columns(names)]
    allowed = [*required, "patient", "spacing_x", "spacing_y"]
    missing = [column for column in required if column not in header]
    for column in header:
        if column not in allowed:
            hint = did_you_mean(column, missing or allowed)
            raise UserError(f'{path}: unknown column "{column}"{hint}; columns are {", ".join(allowed)}')
        if header.count(column) > 1:
            raise UserError(f'{path}: column "{column}" appears twice')
    if missing:
        raise UserError(f'{path}: column "{missing[0]}" is missing; columns are {", ".join(allowed)}')
    if ("spacing_x" in header) != ("spacing_y" in header):
        raise UserError(f"{path}: spacing_x and spacing_y must be given together")


def _folder_row(cells: dict[str, str], names: Sequence[str], where: str) -> FolderRow:
    if not cells["image"]:
        raise UserError(f"{where}: column image is empty")
    points = np.array([_optional_pair(cells, name, where) for name in names], dtype=np.float64).reshape(-1, 2)
    spacing = _optional_pair(cells, "spacing", where)
    if any(value <= 0 or math.isinf(value) for value in spacing):
        raise UserError(f"{where}: spacing_x and spacing_y must be above 0 mm")
    known = None if math.isnan(spacing[0]) else spacing
    return FolderRow(cells["image"], points, known, cells.get("patient") or None)


def _optional_pair(cells: dict[str, str], name: str, where: str) -> tuple[float, float]:
    """(y, x) from the columns <name>_x and <name>_y; (NaN, NaN) where both are empty or absent."""
    x, y = (
        _number(cells[column], f"{where}, column {column}") if cells.get(column) else math.nan
        for column in (f"{name}_x", f"{name}_y")
    )
    if math.isnan(x) != math.isnan(y):
        raise UserError(f"{where}: {name} has only one of {name}_x and {name}_y; give both or leave both empty")
    return y, x


def _complete(points: list[tuple[float, float]], count: int, path: Path) -> np.ndarray:
    if len(points) != count:
        raise UserError(f"{path} has {len(points)} of {count} points")
    return np.array(points, dtype=np.float64)


def _pair(cells: list[str], where: str, form: str) -> tuple[float, float]:
    """Two cells x, y -> (y, x)."""
    if len(cells) != 2:
        raise UserError(f'{where}: expected "{form}"')
    x, y = (_number(cell, where) for cell in cells)
    return y, x


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f'{where}: "{text.strip()}" is not a number') from None


def _lines(path: Path) -> list[str]:
    """Lines without the blanks around them; trailing empty lines are dropped."""
    return [line.strip() for line in _text(path).rstrip().splitlines()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"landmark file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"landmark file {path} cannot be read as UTF-8 text: {error}") from None
