"""TPS files of tpsDig and MorphoJ (one .tps for all images), read and written.

F. J. Rohlf, The tps series of software, Hystrix 26 (2015). An image is a block: LM=<count>, a line `x y` each, IMAGE=,
ID=, SCALE= (of a unit that is named nowhere: mm a pixel are written, and none is read). The origin is the image's lower
left corner: a point (x, y) of a file about an image of height H is pixel (x - 0.5, H - 0.5 - y) with the first pixel's
centre at 0 and y downwards. Landmarks have no names, only an order; missing ones are negative or NA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from core.errors import UserError
from core.files import write_atomically
from core.formats.labels import CORNER, LabelSet, Mark, Sheet, SizeOf, annotated, counted, gather, size_needed
from core.formats.points import read_text, to_number

MISSING = "-1 -1"
Line = tuple[int, str]


def read_tps(path: Path, names: Sequence[str] | None = None, size_of: SizeOf | None = None) -> LabelSet:
    """Landmarks of all images, in the order of `names`; None calls them "1", "2", and so on.

    `size_of` tells the height that y is counted from. Curves are passed over. UserError: not TPS, three axes, another
    number of landmarks than names, an image without a name or of unknown size.
    """
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    sheets, others, width = list[Sheet](), list[str](), 0
    ahead = iter(lines)
    for sheet, count, rest in _blocks(ahead, path, names, size_of):
        sheets.append(sheet)
        others += rest
        width = max(width, count)
    own = names or [str(number) for number in range(1, width + 1)]
    return gather(sheets, path, own, passed_over=counted(others))


def write_tps(path: Path, labels: LabelSet) -> None:
    """Write flat images; not annotated is -1 -1. UserError: a size not known, a point beside the image."""
    blocks = []
    for number, row in enumerate(labels.rows):
        height, _ = size_needed(row, path)
        marks = {mark.label: (mark.x + CORNER, height - CORNER - mark.y) for mark in annotated(row, labels.names)}
        for label, place in marks.items():
            if min(place) < 0:
                raise UserError(f'{path}: landmark "{label}" of image "{row.image}" lies outside the image, and '
                                "negative numbers mean missing in a TPS file")
        points = [" ".join(map(repr, marks[name])) if name in marks else MISSING for name in labels.names]
        scale = [] if row.spacing is None else [f"SCALE={row.spacing[-1]!r}"]
        blocks += [f"LM={len(points)}", *points, f"IMAGE={row.image}", f"ID={number}", *scale]
    write_atomically(path, ("\n".join(blocks) + "\n").encode())


def _blocks(ahead: Iterator[Line], path: Path, names: Sequence[str] | None, size_of: SizeOf | None
            ) -> Iterator[tuple[Sheet, int, list[str]]]:
    """Each image's sheet, its number of landmarks, and what else it has."""
    line = next(ahead, None)
    while line is not None:
        number, text = line
        key, _, value = text.partition("=")
        if key.upper() != "LM":
            kind = "3D landmarks, which count in no image's pixels" if key.upper() == "LM3" else f'"{text[:40]}"'
            raise UserError(f'{path}, line {number}: expected "LM=<number of landmarks>", found {kind}')
        points = [_point(ahead, path) for _ in range(_count(value, path, number))]
        facts, others = dict[str, str](), list[str]()
        line = next(ahead, None)
        while line is not None and not line[1].upper().startswith(("LM=", "LM3=")):
            key, _, value = line[1].partition("=")
            facts[key.strip().upper()] = value.strip()
            if key.strip().upper() == "POINTS":
                others.append("curve")
                for _ in range(_count(value, path, line[0])):
                    _point(ahead, path)
            line = next(ahead, None)
        others += ["SCALE of an unknown unit"] if "SCALE" in facts else []
        yield _sheet(points, facts, f"{path}, line {number}", names, size_of), len(points), others


def _sheet(points: list[tuple[float, float] | None], facts: dict[str, str], where: str, names: Sequence[str] | None,
           size_of: SizeOf | None) -> Sheet:
    image = facts.get("IMAGE", "").replace("\\", "/")
    if not image:
        raise UserError(f"{where}: the image has no line IMAGE=")
    if names is not None and len(points) != len(names):
        raise UserError(f"{where}: image {image} has {len(points)} landmarks, not {len(names)}: {', '.join(names)}")
    if size_of is None:
        raise UserError(f"{where}: y counts from the lower edge of {image}: name the folder of images, --images")
    try:
        height, width = size_of(image)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    marks = [Mark(name, float("nan"), float("nan")) if point is None else
             Mark(name, point[0] - CORNER, height - CORNER - point[1])
             for name, point in zip(names or map(str, range(1, len(points) + 1)), points, strict=True)]
    return Sheet(image, (height, width), marks)


def _count(text: str, path: Path, number: int) -> int:
    if not text.strip().isdecimal():
        raise UserError(f'{path}, line {number}: "{text.strip()}" is not a number of points')
    return int(text)


def _point(ahead: Iterator[Line], path: Path) -> tuple[float, float] | None:
    """(x, y) as the file has it, None where it is missing."""
    number, text = next(ahead, (0, ""))
    cells = text.split()
    if len(cells) != 2:
        where = f"line {number}" if number else "its end"
        raise UserError(f'{path}, {where}: expected "x y", found "{text[:40]}"')
    if {cell.upper() for cell in cells} == {"NA"}:
        return None
    x, y = (to_number(cell, f"{path}, line {number}") for cell in cells)
    return None if x < 0 and y < 0 else (x, y)
