"""Label Studio's JSON (one .json for all images), read and written: tasks with annotations of keypoint labels.

https://labelstud.io/guide/export.html. Positions are percent of the image's width and height, from its corner: x % of a
width W is pixel x / 100 * W - 0.5 with the first pixel's centre at 0. A file is imported into a project whose labelling
interface knows the names; `write_label_studio` writes that interface beside it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree as Xml

from core.errors import UserError
from core.files import write_atomically, write_json
from core.formats.images import image_suffix
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
    size_needed,
    size_of_entry,
    text_of,
)

LOCAL_FILES = "/data/local-files/?d="  # how Label Studio names a file of its local storage
UPLOADS = "/data/upload/"
UPLOAD_MARK = re.compile(r"^[0-9a-f]{8}-")  # before the name of a file that was uploaded
CONTROL, OBJECT, KIND = "landmarks", "image", "keypointlabels"
DOT_PERCENT = 0.5  # a point's width on the screen, in percent of the image's


def is_label_studio(content: Any) -> bool:
    """Whether the content of a JSON file is a list of Label Studio's tasks."""
    return isinstance(content, list) and bool(content) and all(
        isinstance(task, dict) and isinstance(task.get("data"), dict) for task in content)


def read_label_studio(path: Path, names: Sequence[str] | None = None) -> LabelSet:
    """Landmarks of the tasks that were annotated; predictions, which nobody accepted, are no labels.

    UserError: not Label Studio's JSON export, two annotations of a task, a turned image, only predictions.
    """
    content = read_json(path)
    if not is_label_studio(content):
        raise UserError(f'{path} is no file of Label Studio: export the project as "JSON", not as "JSON-MIN"')
    sheets, others = [], list[str]()
    for number, task in enumerate(content, 1):
        where = f"{path}, task {number}"
        annotations = [each for each in entries(task, "annotations", where) if not each.get("was_cancelled")]
        if len(annotations) > 1:
            raise UserError(f"{where} has {len(annotations)} annotations; keep the one that counts")
        for annotation in annotations:
            sheets.append(_sheet(task, annotation, where, others))
    if not sheets and any(task.get("predictions") for task in content):
        raise UserError(f"{path} holds predictions only; accept them in Label Studio (Submit), then export")
    return gather(sheets, path, names, passed_over=counted(others))


def write_label_studio(path: Path, labels: LabelSet) -> None:
    """Write tasks with annotations, or with predictions where the landmarks are `proposed`, and the interface beside.

    <name>_interface.xml is the labelling interface to paste into the project. UserError: a size that is not known.
    """
    kind = "predictions" if labels.proposed else "annotations"
    tasks = []
    for row in labels.rows:
        height, width = size_needed(row, path)
        result = [{
            "id": f"point{number}", "type": KIND, "from_name": CONTROL, "to_name": OBJECT, "image_rotation": 0,
            "original_width": width, "original_height": height,
            "value": {"x": (mark.x + CORNER) / width * 100, "y": (mark.y + CORNER) / height * 100,
                      "width": DOT_PERCENT, KIND: [mark.label], **({"hidden": True} if mark.hidden else {})},
        } for number, mark in enumerate(annotated(row, labels.names))]
        tasks.append({"data": {OBJECT: LOCAL_FILES + quote(row.image)}, kind: [{"result": result}]})
    view = Xml.Element("View")
    Xml.SubElement(view, "Image", name=OBJECT, value=f"${OBJECT}", zoomControl="true")
    control = Xml.SubElement(view, "KeyPointLabels", name=CONTROL, toName=OBJECT)
    for name in labels.names:
        Xml.SubElement(control, "Label", value=name)
    Xml.indent(view)
    write_atomically(path.with_name(f"{path.stem}_interface.xml"), Xml.tostring(view, encoding="utf-8") + b"\n")
    write_json(path, tasks)  # last: where it is, all is written


def _sheet(task: dict[str, Any], annotation: dict[str, Any], where: str, others: list[str]) -> Sheet:
    marks, sizes = list[Mark](), set[tuple[int, int]]()
    target = OBJECT
    for item in entries(annotation, "result", where):
        if item.get("type") != KIND:
            others.append(str(item.get("type")))
            continue
        if item.get("image_rotation"):
            raise UserError(f"{where}: its image was turned in Label Studio; turn it back, then export")
        size = size_of_entry(item.get("original_height"), item.get("original_width"), where)
        if size is None:
            raise UserError(f"{where}: a point without original_width and original_height")
        sizes.add(size)
        marks.append(_mark(item.get("value"), size, where))
        target = str(item.get("to_name", OBJECT))
    if len(sizes) > 1:
        raise UserError(f"{where}: its points tell different sizes of one image")
    return Sheet(_image_name(task["data"], target, where), sizes.pop() if sizes else None, marks)


def _mark(value: Any, size: tuple[int, int], where: str) -> Mark:
    chosen = value.get(KIND) if isinstance(value, dict) else None
    if not isinstance(chosen, list) or len(chosen) != 1:
        raise UserError(f"{where}: a point must have one label, not {chosen!r}")
    label = text_of(chosen[0], f"{where}: a label")
    x, y = (finite(value.get(axis), f'{where}, "{label}"') / 100 * length - CORNER
            for axis, length in zip("xy", size[::-1], strict=True))
    return Mark(label, x, y, value.get("hidden") is True)


def _image_name(data: dict[str, Any], target: str, where: str) -> str:
    """The image's name from the address that the task has for it; the mark of an uploaded file is taken off."""
    addresses = [value for value in (data.get(OBJECT), data.get(target), *data.values()) if isinstance(value, str)]
    if not addresses:
        raise UserError(f"{where} names no image")
    address = next((each for each in addresses if image_suffix(each)), addresses[0])
    if address.startswith(LOCAL_FILES):
        return parse_qs(urlsplit(address).query).get("d", [""])[0].lstrip("/")
    name = unquote(urlsplit(address).path)
    if name.startswith(UPLOADS):
        return UPLOAD_MARK.sub("", name.rpartition("/")[2])
    return name.rpartition("/")[2] if "://" in address else name
