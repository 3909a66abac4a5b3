"""COCO keypoints (one .json for all images), read and written.

https://cocodataset.org/#format-data: a category lists the names `keypoints`; an annotation of an image has three
numbers each: x, y and v, 0 = not annotated, 1 = annotated but not visible, 2 = visible. COCO's numbers are 0-indexed
pixels, the first pixel's centre at (0, 0), as in this program. One animal, head or hand an image.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import UserError
from core.files import write_json
from core.formats.labels import (
    LabelSet,
    Mark,
    Sheet,
    annotated,
    counted,
    entries,
    finite,
    gather,
    read_json,
    size_needed,
    size_of_entry,
    text_of,
)

ABSENT, HIDDEN, VISIBLE = 0, 1, 2


def is_coco(content: Any) -> bool:
    """Whether the content of a JSON file is COCO's."""
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= set(content)


def read_coco(path: Path, names: Sequence[str] | None = None) -> LabelSet:
    """Landmarks of the images that have an annotation with keypoints; those of several categories are joined.

    UserError: not COCO's, references to nothing, two annotations that give an image the same landmark.
    """
    content = read_json(path)
    if not is_coco(content):
        raise UserError(f"{path} is no COCO file: it must have images, annotations and categories")
    categories, sheets = dict[Any, list[str]](), dict[Any, Sheet]()
    for number, entry in enumerate(entries(content, "categories", str(path)), 1):
        categories[_new_id(entry, categories, f"{path}, category {number}")] = _names(entry, path)
    for number, entry in enumerate(entries(content, "images", str(path)), 1):
        where = f"{path}, image {number}"
        size = size_of_entry(entry.get("height"), entry.get("width"), where)
        sheets[_new_id(entry, sheets, where)] = Sheet(text_of(entry.get("file_name"), f"{where}: file_name"), size)
    labelled, others = dict[Any, Sheet](), list[str]()
    for number, entry in enumerate(entries(content, "annotations", str(path)), 1):
        where = f"{path}, annotation {number}"
        if not entry.get("keypoints"):
            others.append("annotation without keypoints")
            continue
        image, category = _id(entry, "image_id", where), _id(entry, "category_id", where)
        if image not in sheets or category not in categories:
            raise UserError(f"{where}: its image_id or category_id is not in the file")
        sheet = labelled.setdefault(image, sheets[image])
        sheet.marks.extend(_marks(entry["keypoints"], categories[category], where))
    known = [name for some in categories.values() for name in some]
    return gather(labelled.values(), path, names, known, counted(others))


def write_coco(path: Path, labels: LabelSet) -> None:
    """Write the landmarks of flat images, one category and one annotation an image. UserError: a size not known."""
    images, annotations = [], []
    for number, row in enumerate(labels.rows, 1):
        height, width = size_needed(row, path)
        images.append({"id": number, "file_name": row.image, "width": width, "height": height})
        marks = {mark.label: mark for mark in annotated(row, labels.names)}
        triples = [_triple(marks.get(name)) for name in labels.names]
        places = np.array([(mark.x, mark.y) for mark in marks.values()]).reshape(-1, 2)
        low, extent = (places.min(axis=0), np.ptp(places, axis=0)) if marks else (np.zeros(2), np.zeros(2))
        annotations.append({
            "id": number, "image_id": number, "category_id": 1, "iscrowd": 0, "segmentation": [],
            "keypoints": [value for triple in triples for value in triple], "num_keypoints": len(marks),
            "bbox": [*low.tolist(), *extent.tolist()], "area": float(extent.prod()),
        })
    category = {"id": 1, "name": "landmarks", "supercategory": "landmarks", "keypoints": list(labels.names),
                "skeleton": []}
    write_json(path, {"images": images, "annotations": annotations, "categories": [category]})


def _id(entry: dict[str, Any], key: str, where: str) -> int | float | str:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UserError(f"{where}: its {key} must be a number or a text, not {json.dumps(value)[:50]}")
    return value


def _new_id(entry: dict[str, Any], known: Collection[Any], where: str) -> int | float | str:
    value = _id(entry, "id", where)
    if value in known:
        raise UserError(f"{where}: its id {json.dumps(value)} is there twice")
    return value


def _triple(mark: Mark | None) -> tuple[float, float, int]:
    return (0, 0, ABSENT) if mark is None else (mark.x, mark.y, HIDDEN if mark.hidden else VISIBLE)


def _names(category: dict[str, Any], path: Path) -> list[str]:
    names = category.get("keypoints", [])
    where = f'{path}, category "{category.get("name")}"'
    if not isinstance(names, list):
        raise UserError(f"{where}: keypoints must be a list of names")
    words = [text_of(name, f"{where}: a keypoint's name") for name in names]
    if len(set(words)) < len(words):
        raise UserError(f"{where}: its keypoints must have different names")
    return words


def _marks(values: Any, names: Sequence[str], where: str) -> list[Mark]:
    if not isinstance(values, list) or len(values) != 3 * len(names):
        raise UserError(f"{where}: its keypoints must be {len(names)} times x, y, v, as its category has names")
    marks = []
    for name, x, y, seen in zip(names, values[::3], values[1::3], values[2::3], strict=True):
        if seen not in (ABSENT, HIDDEN, VISIBLE):
            raise UserError(f'{where}: visibility of "{name}" must be 0, 1 or 2, not {seen!r}')
        if seen != ABSENT:
            marks.append(Mark(name, finite(x, where), finite(y, where), seen == HIDDEN))
    return marks
