"""CVAT's XML "CVAT for images 1.1", read and written: <points> of one point each, labelled with the landmark's name.

https://docs.cvat.ai/docs/manual/advanced/xml_format/. CVAT counts from the image's corner: the first pixel's centre is
(0.5, 0.5). It writes two decimals itself; the file written here has all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as Xml

from core.errors import UserError
from core.files import write_atomically
from core.formats.labels import CORNER, LabelSet, Mark, Sheet, annotated, counted, gather, size_needed
from core.formats.points import read_text, to_number

ROOT = "annotations"


def is_cvat(path: Path) -> bool:
    """Whether an .xml file means to be CVAT's."""
    return f"<{ROOT}" in read_text(path)


def read_cvat(path: Path, names: Sequence[str] | None = None) -> LabelSet:
    """Landmarks of the images that have one; the points of a skeleton count as points, those outside as absent.

    Boxes and other shapes are passed over. UserError: not CVAT's, tracks of a video, several points under one label.
    """
    root = _root(path)
    if root.find("track") is not None:
        raise UserError(f'{path} has the tracks of a video; export the task as "CVAT for images 1.1"')
    sheets, others = [], list[str]()
    for image in root.iter("image"):
        name = image.get("name", "")
        where = f'{path}, image "{name}"'
        shapes = [shape for child in image for shape in (child if child.tag == "skeleton" else [child])]
        marks = [_mark(shape, where) for shape in shapes if shape.tag == "points"]
        others += [shape.tag for shape in shapes if shape.tag not in ("points", "attribute")]
        if marks:
            size = (_length(image, "height", where), _length(image, "width", where)) if image.get("width") else None
            sheets.append(Sheet(name, size, marks))
    return gather(sheets, path, names, _listed_names(root) if names is None else (), counted(others))


def write_cvat(path: Path, labels: LabelSet) -> None:
    """Write the landmarks of flat images for CVAT's "Upload annotations". UserError: a size that is not known."""
    root = Xml.Element(ROOT)
    Xml.SubElement(root, "version").text = "1.1"
    task = Xml.SubElement(Xml.SubElement(root, "meta"), "task")
    Xml.SubElement(task, "size").text = str(len(labels.rows))
    Xml.SubElement(task, "mode").text = "annotation"
    listed = Xml.SubElement(task, "labels")
    for name in labels.names:
        label = Xml.SubElement(listed, "label")
        Xml.SubElement(label, "name").text = name
        Xml.SubElement(label, "type").text = "points"
        Xml.SubElement(label, "attributes")
    for number, row in enumerate(labels.rows):
        height, width = size_needed(row, path)
        image = Xml.SubElement(root, "image", id=str(number), name=row.image, width=str(width), height=str(height))
        for mark in annotated(row, labels.names):
            Xml.SubElement(image, "points", label=mark.label, source="manual", occluded=str(int(mark.hidden)),
                           points=f"{mark.x + CORNER!r},{mark.y + CORNER!r}", z_order="0")
    Xml.indent(root)
    write_atomically(path, Xml.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")


def _root(path: Path) -> Xml.Element:
    text = read_text(path)
    if "<!DOCTYPE" in text:  # entities, of which none is needed and some fill the memory
        raise UserError(f"{path} has a document type; CVAT writes none")
    try:
        root = Xml.fromstring(text)
    except (Xml.ParseError, ValueError) as error:
        raise UserError(f"{path} is not a readable XML file: {error}") from None
    if root.tag != ROOT:
        raise UserError(f"{path} is no file of CVAT: its root is <{root.tag}>, not <{ROOT}>")
    return root


def _listed_names(root: Xml.Element) -> list[str]:
    """The labels that the task lists, but those of other shapes and of whole skeletons."""
    return [label.findtext("name", "") for label in root.iter("label")
            if label.findtext("type", "points") in ("points", "any") and label.findtext("name")]


def _mark(shape: Xml.Element, where: str) -> Mark:
    label = shape.get("label", "")
    if not label:
        raise UserError(f"{where}: points without a label")
    pairs = shape.get("points", "").split(";")
    if len(pairs) != 1 or pairs[0].count(",") != 1:
        raise UserError(f'{where}: "{label}" has {len(pairs)} points; give every landmark a label of its own')
    x, y = (to_number(cell, f'{where}, "{label}"') - CORNER for cell in pairs[0].split(","))
    if shape.get("outside") == "1":
        return Mark(label, float("nan"), float("nan"))
    return Mark(label, x, y, shape.get("occluded") == "1")


def _length(image: Xml.Element, axis: str, where: str) -> int:
    text = image.get(axis, "")
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f'{where}: {axis} must be a whole number above 0, not "{text}"')
    return int(text)
