"""One reader (and writer, where useful) per landmark file format.

Inside the program: float64 (N, 2) in (y, x) order or (N, 3) in (z, y, x) order, pixels of the original image, pixel
centre at integers, NaN = not annotated. Files hold (x, y) or (x, y, z).
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
from core.formats.cells import harmless, meant

CEPHALO_POINTS, CHEST_POINTS, HAND_POINTS = 19, 6, 37


@dataclass(frozen=True, eq=False)
class FolderRow:
    """The landmarks of one image, such as a row of `landmarks.csv`, in tensor-axis order.

    points (N, D) and spacing (D) in mm or None. Files of labelling tools also tell the image's `size` (D), and which
    landmarks are `hidden` (N) bool: annotated where they must be, though not seen. None = the file does not say.
    """

    image: str
    points: np.ndarray
    spacing: tuple[float, ...] | None = None
    patient: str | None = None
    size: tuple[int, ...] | None = None
    hidden: np.ndarray | None = None


def read_cephalo(path: Path) -> np.ndarray:
    """ISBI 2015 label file -> (19, 2): lines `x,y` in pixels; lines after the 19 points (classes) are ignored.

    UserError: file missing, fewer points, a line that is not two numbers.
    """
    lines = _lines(path)[:CEPHALO_POINTS]
    points = [_pair(line.split(","), f"{path}, line {number}", "x,y") for number, line in enumerate(lines, 1)]
    return _complete(points, CEPHALO_POINTS, path)


def read_chest(path: Path, size: tuple[int, ...]) -> np.ndarray:
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

    UserError: file missing, wrong number of columns, not a finite number, half a point, an id twice.
    """
    points: dict[str, np.ndarray] = {}
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}, line {number}"
        name, *cells = _cells(line, where)
        while len(cells) > 2 * HAND_POINTS and not cells[-1]:  # a spreadsheet's empty columns
            cells.pop()
        if len(cells) != 2 * HAND_POINTS:
            raise UserError(f"{where}: has {len(cells) + 1} columns, not {2 * HAND_POINTS + 1} (id,x1,y1,...,x37,y37)")
        if name in points:
            raise UserError(f'{where}: id "{name}" appears twice')
        points[name] = np.array([_pair(pair, where, "x,y") for pair in zip(cells[::2], cells[1::2], strict=True)])
    return points


def read_folder_csv(path: Path, names: Sequence[str], dims: int = 2) -> list[FolderRow]:
    """Folder layout's `landmarks.csv` -> rows in file order, points (len(names), dims): the file's numbers, reversed.

    Columns: `image`, optional `patient`, optional `spacing_x` and `spacing_y` in mm, `<name>_x` and `<name>_y` for
    each of `names`; where dims is 3 also `spacing_z` and `<name>_z`. Empty cells = not annotated. A table with a
    column `landmark` has a row a landmark, as `predict` writes it.
    UserError: file missing, wrong columns, not a finite number, half a point.
    """
    try:
        header, *rows = list(csv.reader(io.StringIO(read_text(path)), skipinitialspace=True)) or [[]]
    except csv.Error as error:
        raise UserError(f"{path} is not a readable CSV file: {error}") from None
    header = [meant(column.strip()) for column in header]
    while header and not header[-1] and all(not any(cell.strip() for cell in row[len(header) - 1 :]) for row in rows):
        header.pop()  # a spreadsheet's empty columns
    if "landmark" in header:
        return _long_rows(header, rows, names, dims, path)
    _check_columns(header, names, dims, path)
    read = []
    for number, cells in enumerate(rows, 2):
        if not any(cell.strip() for cell in cells):
            continue
        row = _by_column(header, cells, f"{path}, row {number}")
        read.append(_folder_row(row, names, dims, f"{path}, row {number}"))
    return read


def _by_column(header: list[str], cells: list[str], where: str) -> dict[str, str]:
    if len(cells) < len(header) or any(cell.strip() for cell in cells[len(header) :]):
        raise UserError(f"{where}: has {len(cells)} cells, but the header has {len(header)} columns")
    return {column: meant(cell.strip()) for column, cell in zip(header, cells, strict=False)}


def _long_rows(header: list[str], rows: list[list[str]], names: Sequence[str], dims: int, path: Path
               ) -> list[FolderRow]:
    """Rows of one landmark each (image, landmark, x, y[, z]), as `predict` and `evaluate` write them, by image.

    Other columns, what is known of each prediction, are passed over; `patient` counts.
    """
    axes = "xyz"[:dims]
    missing = [column for column in ("image", "landmark", *axes) if header.count(column) != 1]
    if missing:
        raise UserError(f'{path}: a table with a row a landmark needs the column "{missing[0]}" once; its columns are '
                        f"{', '.join(header)}")
    points: dict[str, dict[str, str]] = {}
    for number, cells in enumerate(rows, 2):
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{path}, row {number}"
        row = _by_column(header, cells, where)
        if row["landmark"] not in names:
            raise UserError(f'{where}: "{row["landmark"]}" is not one of the data set\'s {len(names)} landmarks'
                            f"{did_you_mean(row['landmark'], names)}")
        wide = points.setdefault(row["image"], {"image": row["image"], "patient": row.get("patient", "")})
        if f"{row['landmark']}_x" in wide:
            raise UserError(f'{where}: landmark "{row["landmark"]}" of image "{row["image"]}" appears twice')
        wide |= {f"{row['landmark']}_{axis}": row[axis] for axis in axes}
    return [_folder_row(wide, names, dims, f'{path}, image "{image}"') for image, wide in points.items()]


def write_folder_csv(path: Path, names: Sequence[str], rows: Iterable[FolderRow], dims: int = 2) -> None:
    """Write rows so that `read_folder_csv` gives them back exactly; NaN becomes an empty cell. The write is atomic.

    ValueError: points or spacing of another shape than (len(names), dims) and (dims,).
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["image", "patient", *_axis_columns("spacing", dims), *_point_columns(names, dims)]
    writer.writerow(map(harmless, columns))
    for row in rows:
        spacing = row.spacing or (math.nan,) * dims
        if row.points.shape != (len(names), dims) or len(spacing) != dims:
            raise ValueError(f"{row.image}: points {row.points.shape} and spacing {spacing} are not {dims}-dimensional")
        values = [*spacing[::-1], *row.points[:, ::-1].ravel()]
        cells = ["" if math.isnan(value) else repr(float(value)) for value in values]
        writer.writerow([harmless(row.image), harmless(row.patient or ""), *cells])
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _axis_columns(name: str, dims: int) -> list[str]:
    return [f"{name}_{axis}" for axis in "xyz"[:dims]]


def _point_columns(names: Sequence[str], dims: int) -> list[str]:
    return [column for name in names for column in _axis_columns(name, dims)]


def _listed(columns: Sequence[str]) -> str:
    """`a and b`, or `a, b and c`."""
    return f"{', '.join(columns[:-1])} and {columns[-1]}"


def _check_columns(header: list[str], names: Sequence[str], dims: int, path: Path) -> None:
    spacing = _axis_columns("spacing", dims)
    required = ["image", *_point_columns(names, dims)]
    allowed = [*required, "patient", *spacing]
    missing = [column for column in required if column not in header]
    for column in header:
        if column not in allowed:
            hint = did_you_mean(column, missing or allowed)
            if len(header) == 1 and ";" in column:
                hint = " (its columns are parted by semicolons: save the table with commas)"
            raise UserError(f'{path}: unknown column "{column}"{hint}; columns are {", ".join(allowed)}')
        if header.count(column) > 1:
            raise UserError(f'{path}: column "{column}" appears twice')
    if missing:
        raise UserError(f'{path}: column "{missing[0]}" is missing; columns are {", ".join(allowed)}')
    if 0 < len(set(spacing) & set(header)) < dims:
        raise UserError(f"{path}: {_listed(spacing)} must be given together")


def _folder_row(cells: dict[str, str], names: Sequence[str], dims: int, where: str) -> FolderRow:
    if not cells["image"]:
        raise UserError(f"{where}: column image is empty")
    points = np.array([_optional_point(cells, name, dims, where) for name in names], dtype=np.float64)
    spacing = _optional_point(cells, "spacing", dims, where)
    if any(value <= 0 or math.isinf(value) for value in spacing):
        raise UserError(f"{where}: {_listed(_axis_columns('spacing', dims))} must be above 0 mm")
    known = None if math.isnan(spacing[0]) else spacing
    return FolderRow(cells["image"], points.reshape(-1, dims), known, cells.get("patient") or None)


def _optional_point(cells: dict[str, str], name: str, dims: int, where: str) -> tuple[float, ...]:
    """(y, x) or (z, y, x) from the columns <name>_x, <name>_y, ..; all NaN where all are empty or absent."""
    columns = _axis_columns(name, dims)
    values = [
        to_number(cells[column], f"{where}, column {column}") if cells.get(column) else math.nan for column in columns
    ]
    if len({math.isnan(value) for value in values}) > 1:
        part, every = ("one", "both") if dims == 2 else ("some", "all")
        raise UserError(f"{where}: {name} has only {part} of {_listed(columns)}; give {every} or leave {every} empty")
    return tuple(reversed(values))


def _complete(points: list[tuple[float, float]], count: int, path: Path) -> np.ndarray:
    if len(points) != count:
        raise UserError(f"{path} has {len(points)} of {count} points")
    return np.array(points, dtype=np.float64)


def _pair(cells: Sequence[str], where: str, form: str) -> tuple[float, float]:
    """Two cells x, y -> (y, x), both NaN or none."""
    if len(cells) != 2:
        raise UserError(f'{where}: expected "{form}"')
    x, y = (to_number(cell, where) for cell in cells)
    if math.isnan(x) != math.isnan(y):
        raise UserError(f'{where}: "{cells[0]}" and "{cells[1]}" are half a point; give both numbers, or neither')
    return y, x


def to_number(text: str, where: str) -> float:
    """The number a cell holds, NaN where it says so; UserError, which begins with `where`, for anything else.

    Python's 1_000, and what is infinite, as 1e400 is, are no numbers.
    """
    try:
        value = float("" if "_" in text else text)
    except ValueError:
        raise UserError(f'{where}: "{text.strip()}" is not a number') from None
    if math.isinf(value):
        raise UserError(f'{where}: "{text.strip()}" is not a finite number')
    return value


def _cells(line: str, where: str) -> list[str]:
    """The cells of a line of CSV, without blanks and quotes around them."""
    try:
        return [cell.strip() for cell in next(csv.reader([line], skipinitialspace=True), [""])]
    except csv.Error as error:
        raise UserError(f"{where} is not readable: {error}") from None


def _lines(path: Path) -> list[str]:
    """Lines without the blanks around them; trailing empty lines are dropped."""
    return [line.strip() for line in read_text(path).rstrip().splitlines()]


def read_text(path: Path) -> str:
    """The UTF-8 text of a landmark file, without a byte order mark; UserError: missing, unreadable, not text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"landmark file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"landmark file {path} cannot be read as UTF-8 text: {error}") from None
