"""Tables of landmarks whose names are not known beforehand: wide (`landmarks.csv`) and long (a row a landmark).

`core.formats.points` reads both where the names are known; here they are taken from the table. The numbers are pixels,
the first pixel's centre at 0.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.files import write_atomically
from core.formats.labels import LabelSet
from core.formats.points import read_folder_csv, read_text, write_folder_csv

KNOWN = ("image", "patient", "landmark", "x", "y", "z")  # columns of a long table that are landmarks and whose


def read_table(path: Path, names: Sequence[str] | None = None) -> LabelSet:
    """A wide or a long table of images or volumes -> landmarks `names`, or all that it has, in its order.

    Other columns of a long table, what is known of each prediction, are passed over. UserError: as `read_folder_csv`.
    """
    cells = _cells(path)
    header = [column.strip() for column in cells[0]] if cells else []
    long = "landmark" in header
    if long:
        place = header.index("landmark")
        own = list(dict.fromkeys(row[place].strip() for row in cells[1:] if len(row) > place and row[place].strip()))
        dims = 3 if "z" in header else 2
    else:
        own = [column[:-2] for column in header if column.endswith("_x") and column != "spacing_x"]
        dims = 3 if own and f"{own[0]}_z" in header else 2
    if not own:
        raise UserError(f"{path} holds no landmarks: a wide table has columns image, <name>_x, <name>_y, a long one "
                        "image, landmark, x, y")
    chosen = tuple(names or own)
    strange = [column for column in header if long and column and column not in KNOWN]
    rows = read_folder_csv(path, chosen, dims)
    if not rows:
        raise UserError(f"{path} holds no landmarks: there is no row below its header")
    return LabelSet(chosen, tuple(rows), tuple(f'column "{name}"' for name in strange))


def is_long(path: Path) -> bool:
    """Whether a table has a row a landmark."""
    cells = _cells(path)
    return bool(cells) and "landmark" in [column.strip() for column in cells[0]]


def write_wide(path: Path, labels: LabelSet) -> None:
    """Write a valid `landmarks.csv`; UserError where flat images and volumes are mixed."""
    write_folder_csv(path, labels.names, labels.rows, dims_of(labels, path))


def write_long(path: Path, labels: LabelSet) -> None:
    """Write a row a landmark: image, patient, landmark, x, y[, z]; empty = not annotated. UserError: as above."""
    dims = dims_of(labels, path)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "patient", "landmark", *"xyz"[:dims]])
    for row in labels.rows:
        for name, point in zip(labels.names, np.asarray(row.points)[:, ::-1].tolist(), strict=True):
            values = ["" if math.isnan(value) else repr(value) for value in point]
            writer.writerow([row.image, row.patient or "", name, *values])
    write_atomically(path, text.getvalue().encode())


def dims_of(labels: LabelSet, path: Path) -> int:
    """2 or 3, of all rows. UserError where they differ, or where there is none."""
    dims = {row.points.shape[1] for row in labels.rows}
    if len(dims) != 1:
        raise UserError(f"{path} is for images or for volumes, but there are {'both' if dims else 'none'}")
    return dims.pop()


def _cells(path: Path) -> list[list[str]]:
    try:
        return list(csv.reader(io.StringIO(read_text(path)), skipinitialspace=True))
    except csv.Error as error:
        raise UserError(f"{path} is not a readable CSV file: {error}") from None
