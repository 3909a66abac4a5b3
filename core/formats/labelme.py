"""LabelMe's .json, a file for each image, read and written: shapes of the type "point" with the landmark's name.

LabelMe counts from the image's corner: the first pixel's centre is (0.5, 0.5).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from core.errors import UserError
from core.files import write_json
from core.formats.images import image_id
from core.formats.labels import (
    CORNER,
    LabelSet,
    Mark,
    Sheet,
    annotated,
    counted,
    entries,
    finite,
    gather,
    read_json,
    size_of_entry,
    text_of,
)

VERSION = "5.0.0"  # of the format; every later LabelMe reads it
SNIFFED_BYTES = 1 << 16  # LabelMe writes the pixels, which make a file large, after its shapes


def is_labelme(path: Path) -> bool:
    """Whether a .json file means to be LabelMe's, from its beginning."""
    try:
        with path.open("rb") as file:
            start = file.read(SNIFFED_BYTES)
    except OSError as error:
        raise UserError(f"landmark file {path} cannot be read: {error}") from None
    return b'"shapes"' in start and (b'"flags"' in start or b'"imagePath"' in start)


def labelme_files(folder: Path) -> list[Path]:
    """LabelMe's files below `folder`, sorted; hidden ones and other .json files are none."""
    return [path for path in _json_files(folder) if is_labelme(path)]


def _json_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.json"))
            if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def read_labelme(path: Path, names: Sequence[str] | None = None) -> LabelSet:
    """Landmarks of one file, or of all below a folder; an image's name is its path below the folder.

    Shapes of other types are passed over, and in a folder other .json files. UserError: not LabelMe's, no file, a
    point that is not two numbers, a .json file in a folder that is none.
    """
    files = labelme_files(path) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .json file of LabelMe")
    strange = sorted({file.relative_to(path).as_posix() for file in _json_files(path)}
                     - {file.relative_to(path).as_posix() for file in files}) if path.is_dir() else []
    for name in strange:
        read_json(path / name)  # what is damaged may have been LabelMe's
    sheets, others = [], list[str]()
    for file in files:
        sheet, passed = _sheet(file, file.parent.relative_to(path).as_posix() if path.is_dir() else ".")
        sheets.append(sheet)
        others += passed
    strangers = [f"{len(strange)} files not of LabelMe, such as {strange[0]}"] if strange else []
    return gather(sheets, path, names, passed_over=(*counted(others), *strangers))


def write_labelme(path: Path, labels: LabelSet, images: dict[str, Path] | None = None) -> None:
    """Write folder `path`/<image>.json for every row. `images` are the files by name, which LabelMe opens with them."""
    for row in labels.rows:
        file = path / f"{image_id(row.image)}.json"
        image = (images or {}).get(row.image)
        place = PurePosixPath(row.image).name if image is None else _beside(image, file.parent)
        shapes = [_shape(mark) for mark in annotated(row, labels.names)]
        height, width = row.size or (None, None)
        write_json(file, {"version": VERSION, "flags": {}, "shapes": shapes, "imagePath": place, "imageData": None,
                          "imageHeight": height, "imageWidth": width})


def _beside(image: Path, folder: Path) -> str:
    """Where `image` lies as seen from `folder`, with forward slashes."""
    return Path(os.path.relpath(image.resolve(), folder.resolve())).as_posix()


def _shape(mark: Mark) -> dict[str, Any]:
    return {"label": mark.label, "points": [[mark.x + CORNER, mark.y + CORNER]], "group_id": None, "description": "",
            "shape_type": "point", "flags": {}}


def _sheet(path: Path, folder: str) -> tuple[Sheet, list[str]]:
    content = read_json(path)
    if not isinstance(content, dict) or "shapes" not in content:
        raise UserError(f"{path} is no file of LabelMe: it has no shapes")
    named = text_of(content.get("imagePath"), f"{path}: imagePath").replace("\\", "/")
    marks, others = list[Mark](), list[str]()
    for number, shape in enumerate(entries(content, "shapes", str(path)), 1):
        where = f"{path}, shape {number}"
        if shape.get("shape_type", "polygon") != "point":
            others.append(str(shape.get("shape_type", "polygon")))
            continue
        marks.append(Mark(text_of(shape.get("label"), f"{where}: label"), *_point(shape.get("points"), where)))
    size = size_of_entry(content.get("imageHeight"), content.get("imageWidth"), str(path))
    return Sheet((PurePosixPath(folder) / PurePosixPath(named).name).as_posix(), size, marks), others


def _point(points: Any, where: str) -> tuple[float, float]:
    if not isinstance(points, list) or len(points) != 1 or not isinstance(points[0], list) or len(points[0]) != 2:
        raise UserError(f"{where}: a point must be [[x, y]]")
    x, y = (finite(value, where) - CORNER for value in points[0])
    return x, y
