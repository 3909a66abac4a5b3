"""Landmark files of 3D Slicer, read and written: markups (.mrk.json) and legacy point lists (.fcsv).

A file holds labelled points in millimetres of the patient's space, LPS or RAS; inside the program world points are
float64 (N, 3), RAS mm in (x, y, z) order (see core/formats/geometry.py), and NaN = not annotated.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.errors import UserError, did_you_mean
from core.files import parse_json, write_atomically
from core.formats.geometry import RAS_TO_LPS
from core.formats.points import read_text, to_number

SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    "markups-schema-v1.0.3.json#"
)
SYSTEMS = {"LPS": RAS_TO_LPS, "RAS": np.ones(3)}  # a file's numbers times these are RAS, and the other way round
LEGACY_SYSTEMS = {"0": "RAS", "1": "LPS"}
MM_PER_UNIT = {"nm": 1e-6, "um": 1e-3, "µm": 1e-3, "mm": 1.0, "cm": 10.0, "dm": 100.0, "m": 1000.0}
POSITION_STATUSES = ("undefined", "preview", "defined", "missing")  # .fcsv files write the index
FCSV_COLUMNS = "id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"  # ow to oz: a quaternion
NOT_ANNOTATED = np.full(3, np.nan)


class ControlPoint(NamedTuple):
    """A labelled point; world (3,) in RAS mm, NaN where the file holds no defined position."""

    label: str
    world: np.ndarray


def read_markups(path: Path, names: Sequence[str]) -> np.ndarray:
    """Landmarks of a .mrk.json or .fcsv file -> (len(names), 3) RAS mm, rows in the order of `names`.

    NaN where a label is absent or its position is not defined. UserError: an unreadable file, a label that is unknown
    or there twice, none of the names, an unknown coordinate system or unit, a position that is not three numbers.
    """
    points = _control_points(path)
    rows = {name: row for row, name in enumerate(names)}
    if not any(point.label in rows for point in points):
        seen = _some([point.label for point in points])
        raise UserError(f"{path} has none of the {len(names)} landmarks {_some(names)}; its labels are {seen}")
    world = np.full((len(names), 3), np.nan)
    for label, position in points:
        if label not in rows:
            hint = did_you_mean(label, names)
            raise UserError(f'{path}: label "{label}" is not one of the data set\'s {len(names)} landmarks{hint}')
        world[rows[label]] = position
    return world


def read_labels(path: Path) -> list[str]:
    """The labels of a .mrk.json or .fcsv file in file order, those without a position too. UserError: as above."""
    return [point.label for point in _control_points(path)]


def is_markup(path: Path) -> bool:
    """Whether a .json file is one of 3D Slicer's markups, or means to be."""
    return path.name.lower().endswith(".mrk.json") or '"markups"' in read_text(path)


def write_markups(
    path: Path,
    names: Sequence[str],
    world: np.ndarray,
    descriptions: Sequence[str] | None = None,
    coordinates: str = "LPS",
) -> None:
    """Write world (len(names), 3), RAS mm, as a .mrk.json or .fcsv point list that 3D Slicer opens; atomic.

    `coordinates` ("LPS" or "RAS") is what the file counts in. A point with NaN stays in a .mrk.json as "undefined"; a
    .fcsv leaves it out, since programs that read no status would place it at the origin. The numbers are exact.
    UserError: another suffix or coordinate system, a name that no .fcsv holds. ValueError: shapes that differ, infinite
    numbers.
    """
    if not path.name.lower().endswith(tuple(MARKUP_SUFFIXES)):
        raise UserError(f"{path}: 3D Slicer's landmark files are written as {' or '.join(MARKUP_SUFFIXES)}")
    if coordinates not in SYSTEMS:
        raise UserError(f'{path}: coordinates must be {" or ".join(SYSTEMS)}, not "{coordinates}"')
    if np.shape(world) != (len(names), 3) or np.isinf(world).any():
        raise ValueError(f"expected {len(names)} points (x, y, z) that are finite or NaN, got shape {np.shape(world)}")
    stored = np.asarray(world, dtype=np.float64) * SYSTEMS[coordinates]
    rows = list(zip(names, stored.tolist(), descriptions or [""] * len(names), strict=True))
    if path.name.lower().endswith(".fcsv"):
        write_atomically(path, _fcsv_text(path, rows, coordinates).encode())
        return
    orientation = np.diag(SYSTEMS[coordinates]).ravel().tolist()
    markup = {
        "type": "Fiducial",
        "coordinateSystem": coordinates,
        "coordinateUnits": "mm",
        "locked": False,
        "fixedNumberOfControlPoints": False,
        "labelFormat": "%N-%d",
        "lastUsedControlPointNumber": len(names),
        "controlPoints": [_control_point(number, *row, orientation) for number, row in enumerate(rows, 1)],
        "measurements": [],
    }
    text = json.dumps({"@schema": SCHEMA, "markups": [markup]}, indent=1, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def _fcsv_text(path: Path, rows: Sequence[tuple[str, list[float], str]], coordinates: str) -> str:
    """The lines of a .fcsv as 3D Slicer 4.11 wrote them, in mm; `rows` are label, position (NaN: none), description."""
    broken = [label for label, _, description in rows if len(f"{label}{description}x".splitlines()) > 1]
    if broken:
        raise UserError(f"{path}: a .fcsv holds no name with a line break: {_some(broken)}; write .mrk.json")
    text = io.StringIO()
    text.write("# Markups fiducial file version = 4.11\n"
               f"# CoordinateSystem = {coordinates}\n# columns = {FCSV_COLUMNS}\n")
    lines = csv.writer(text, lineterminator="\n")
    for number, (label, position, description) in enumerate(rows, 1):
        if not np.isnan(position).any():
            lines.writerow([number, *position, 0, 0, 0, 1, 1, 1, 0, label, description, ""])
    return text.getvalue()


def _control_point(
    number: int, label: str, position: list[float], description: str, orientation: list[float]
) -> dict[str, Any]:
    """One entry of controlPoints; the schema wants `position` to be three numbers, so an undefined one has none."""
    defined = not np.isnan(position).any()
    return {
        "id": str(number),
        "label": label,
        "description": description,
        "associatedNodeID": "",
        **({"position": position} if defined else {}),
        "orientation": orientation,
        "selected": True,
        "locked": False,
        "visibility": True,
        "positionStatus": "defined" if defined else "undefined",
    }


def _control_points(path: Path) -> list[ControlPoint]:
    """All points of a file, one or more, with different labels."""
    reader = next((read for suffix, read in {**MARKUP_SUFFIXES, PLAIN_JSON: _read_json}.items()
                   if path.name.lower().endswith(suffix)), None)
    if reader is None:
        raise UserError(f"{path} is not a landmark file of 3D Slicer: those end in {' or '.join(MARKUP_SUFFIXES)}")
    points = reader(path)
    if not points:
        raise UserError(f"{path} has no control points")
    seen: set[str] = set()
    for label, _ in points:
        if label in seen:
            raise UserError(f'{path}: label "{label}" appears twice; give every control point a label of its own')
        seen.add(label)
    return points


def _read_json(path: Path) -> list[ControlPoint]:
    try:
        content = parse_json(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a readable JSON file: {error}") from None
    markup = _point_list(content, path)
    to_ras = _to_ras(markup.get("coordinateSystem", "LPS"), path)
    scale = to_ras * _mm_per_unit(markup.get("coordinateUnits", "mm"), path)
    entries = markup.get("controlPoints", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: controlPoints must be a list of objects")
    return [_json_point(entry, scale, f"{path}, control point {number}") for number, entry in enumerate(entries, 1)]


def _point_list(content: Any, path: Path) -> dict[str, Any]:
    """The file's one markups node of type Fiducial (a point list); lines, curves and the like beside it are let be."""
    nodes = content.get("markups") if isinstance(content, dict) else None
    if not isinstance(nodes, list) or not nodes or not all(isinstance(node, dict) for node in nodes):
        raise UserError(f'{path} has no markups: expected 3D Slicer\'s {{"markups": [{{"type": "Fiducial", ..}}]}}')
    lists = [node for node in nodes if node.get("type") == "Fiducial"]
    if len(lists) != 1:
        types = ", ".join(str(node.get("type")) for node in nodes)
        raise UserError(f"{path} has {len(lists)} point lists (type Fiducial) instead of one; its markups are: {types}")
    return lists[0]


def _json_point(entry: dict[str, Any], scale: np.ndarray, where: str) -> ControlPoint:
    label = _label(entry.get("label"), where)
    status = entry.get("positionStatus", "defined")
    if status not in POSITION_STATUSES:
        raise UserError(f"{where}: positionStatus {_shown(status)} is not one of {', '.join(POSITION_STATUSES)}")
    if status != "defined":
        return ControlPoint(label, NOT_ANNOTATED)
    return ControlPoint(label, _position(entry.get("position"), f'{where} ("{label}")') * scale)


def _read_fcsv(path: Path) -> list[ControlPoint]:
    header: dict[str, str] = {}
    rows: list[tuple[int, str]] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.startswith("#"):
            key, _, value = line[1:].partition("=")
            header[key.strip()] = value.strip()
        elif line.strip():
            rows.append((number, line))
    columns = [column.strip() for column in header.get("columns", "").split(",")]
    for column in ("label", "x", "y", "z"):
        if columns.count(column) != 1:
            raise UserError(f'{path}: its line "# columns = id,x,y,z,..,label,.." must name the column {column} once')
    to_ras = _to_ras(header.get("CoordinateSystem", "RAS"), path)
    return [_fcsv_point(line, columns, to_ras, f"{path}, line {number}") for number, line in rows]


def _fcsv_point(line: str, columns: list[str], to_ras: np.ndarray, where: str) -> ControlPoint:
    """A row; 3D Slicer 5 adds two cells that its header does not name: the position's status, and a flag."""
    try:
        cells = next(csv.reader([line]))
    except csv.Error as error:
        raise UserError(f"{where} is not readable: {error}") from None
    extra = cells[len(columns) :]
    statuses = {str(index): status for index, status in enumerate(POSITION_STATUSES)}
    place = {column: columns.index(column) for column in ("x", "y", "z", "label")}
    if len(cells) <= max(place.values()) or (extra and (len(extra) != 2 or extra[0] not in statuses)):
        fault = f"its {len(cells)} cells do not fit the {len(columns)} columns"
        raise UserError(f"{where}: {fault}; a label with commas needs quotes")
    label = _label(cells[place["label"]], where)
    if extra and statuses[extra[0]] != "defined":
        return ControlPoint(label, NOT_ANNOTATED)
    return ControlPoint(label, _position([to_number(cells[place[axis]], where) for axis in "xyz"], where) * to_ras)


def _to_ras(system: Any, path: Path) -> np.ndarray:
    """The three signs that turn a file's (x, y, z) into RAS."""
    name = LEGACY_SYSTEMS.get(str(system), str(system))
    if name not in SYSTEMS:
        raise UserError(f"{path}: coordinate system {_shown(system)} is not one of LPS, RAS, 0 (RAS) and 1 (LPS)")
    return SYSTEMS[name]


def _mm_per_unit(units: Any, path: Path) -> float:
    """`units` is a UCUM code, or the triple of a code, the scheme UCUM and a meaning."""
    code = units[0] if isinstance(units, list) and len(units) == 3 and units[1] == "UCUM" else units
    if not isinstance(code, str) or code not in MM_PER_UNIT:
        raise UserError(f"{path}: coordinateUnits {_shown(units)} is not one of {', '.join(MM_PER_UNIT)}")
    return MM_PER_UNIT[code]


def _label(label: Any, where: str) -> str:
    if not isinstance(label, str) or not label.strip():
        raise UserError(f"{where}: its label must be the landmark's name, not {_shown(label)}")
    return label


def _position(values: Any, where: str) -> np.ndarray:
    if not isinstance(values, list) or len(values) != 3 or not all(map(_is_finite, values)):
        raise UserError(f"{where}: its position must be three finite numbers, not {_shown(values)}")
    return np.array(values, dtype=np.float64)


def _is_finite(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + ".."


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:5]) + (", .." if len(labels) > 5 else "")


MARKUP_SUFFIXES: dict[str, Callable[[Path], list[ControlPoint]]] = {".mrk.json": _read_json, ".fcsv": _read_fcsv}
PLAIN_JSON = ".json"  # how markups are also saved
