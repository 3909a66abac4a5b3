"""On-disk dataset layouts -> records, landmark names, splits, units and SDR thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from core.data.folder_layout import MM_THRESHOLDS, PX_THRESHOLDS, read_folder
from core.data.label_sources import has_labels
from core.data.pairing import Case, check_against_others
from core.data.pairing import check_inside as check_volume
from core.data.records import (
    SPLITS,
    DataSource,
    Record,
    check_unique,
    files_by_id,
    image_id,
    own_spacing,
    parse_spacing,
)
from core.errors import UserError, did_you_mean, note_once
from core.formats.geometry import Geometry
from core.formats.images import find_images, is_picture, read_geometry
from core.formats.points import read_cephalo, read_chest, read_hand

CEPHALO_NAMES = (
    "sella", "nasion", "orbitale", "porion", "subspinale", "supramentale", "pogonion", "menton", "gnathion", "gonion",
    "lower incisor", "upper incisor", "upper lip", "lower lip", "subnasale", "soft tissue pogonion",
    "posterior nasal spine", "anterior nasal spine", "articulare",
)  # fmt: skip
CHEST_NAMES = tuple(f"point {number}" for number in range(1, 7))
HAND_NAMES = tuple(f"point {number:02d}" for number in range(1, 38))
CHEST_EXCLUDED = ("0059", "0178", "0228", "0267", "0276", "0285", "0295", "0303", "0310")
CHEST_FRAME_PX = 256  # chest errors are pixels of a 256x256 frame
HAND_WRIST_MM = 50.0  # between wrist points 1 and 5
STRUCTURE = {  # what a data set's root must hold
    "cephalo": ("jpg", "400_junior", "400_senior"),
    "chest": ("pngs", "labels"),
    "hand": ("jpg", "labels/all.csv"),
    "folder": ("images",),  # and, for labels, landmarks.csv or landmarks/ and dataset.json
}


def read_layout(
    layout: str,
    root: str | Path,
    *,
    unlabelled_dirs: Iterable[str | Path] = (),
    spacing_mm: float | Sequence[float] | None = None,
    exclude: Iterable[str] = (),
    description: str | Path | None = None,
    dims: int = 2,
    check_geometry: bool = True,
) -> DataSource:
    """Read the data set of kind `layout` at `root`; every landmark is checked to lie inside its image.

    `spacing_mm` (a number or [x, y[, z]]) replaces the data set's own for cephalo and folder. `exclude` names image
    ids to leave out; the others keep their split. Every image below `unlabelled_dirs` that is not yet part of the
    data set joins the pre-training images, so pointing there cannot leak a test image. `description` is a
    dataset.json in another place than `root`. Volumes (`dims` 3) are also compared with each other (core.data.pairing),
    unless `check_geometry` is false.
    UserError: unknown layout, missing or inconsistent files, ids that are not unique, landmarks outside their image.
    """
    root = Path(root)
    if layout not in LAYOUTS:
        hint = did_you_mean(layout, list(LAYOUTS))
        raise UserError(f'layout "{layout}" does not exist{hint}; choose from {", ".join(LAYOUTS)}')
    described = Path(description) if description else root / "dataset.json"
    needed = {name: root / name for name in STRUCTURE[layout]}
    if layout == "folder" and (description or has_labels(root) or not needed["images"].exists()):
        needed["dataset.json"] = described
    missing = [name for name, path in needed.items() if not path.exists()]
    if missing:
        raise UserError(f"no {layout} data set at {root}: {missing[0]} is missing; expected {', '.join(needed)} there, "
                        "see datasets/README.md")
    unwanted = tuple(exclude)
    complete = LAYOUTS[layout](root, spacing_mm, described, {image_id(name) for name in unwanted})
    known = {record.image.resolve() for record in complete.records}
    given = parse_spacing(spacing_mm, dims, "dataset.spacing_mm")
    more = tuple(replace(record, spacing=given) for folder in unlabelled_dirs
                 for record in _unlabelled(Path(folder), known))
    source = replace(complete, unlabelled=complete.unlabelled + more).without(unwanted, more)
    check_unique(source.records)
    source = _with_geometry(source, dims, {record.id for record in more})
    if dims == 3:
        _check_volumes(source, check_geometry)
    else:
        for record in source.labelled:
            _check_inside(record, source.landmark_names)
    return source


def _with_geometry(source: DataSource, dims: int, elsewhere: Collection[str]) -> DataSource:
    """Every record with its file's geometry; UserError for an image of another number of axes than the config's.

    Unlabelled pictures are as flat as the config's images and have no spacing: their headers are read with the pixels.
    Of images from `elsewhere` the spacing is the config's, where it has one, as that of the data set's own.
    """
    def complete(record: Record) -> Record:
        if dims == 2 and record.landmarks is None and is_picture(record.image):
            return record
        geometry = record.file_geometry()
        if len(geometry.size) != dims:
            raise UserError(f"{record.image} has {len(geometry.size)} axes, dataset.image_size has {dims} numbers; set "
                            f"is_3d to {str(len(geometry.size) == 3).lower()} and dataset.image_size to match")
        spacing = record.spacing or geometry.spacing_mm
        if record.id in elsewhere:
            spacing = own_spacing(geometry, record.spacing, record.image)
        return replace(record, geometry=geometry, spacing=spacing)

    splits = {name: tuple(map(complete, records)) for name, records in source.splits.items()}
    return replace(source, splits=splits, unlabelled=tuple(map(complete, source.unlabelled)))


def _check_volumes(source: DataSource, check_geometry: bool) -> None:
    def geometry(record: Record) -> Geometry:
        """With the spacing that counts: a bare array's is told elsewhere."""
        return replace(record.file_geometry(), spacing_mm=record.spacing)

    cases = [Case(r.id, r.image, r.labels or source.root, geometry(r), r.truth) for r in source.labelled]
    for case in cases:
        check_volume(case, source.landmark_names)
    if check_geometry:
        check_against_others(cases, [(r.image, geometry(r)) for r in source.unlabelled], source.landmark_names)


def _unlabelled(folder: Path, known: set[Path]) -> list[Record]:
    """Records of the images below `folder` that are not `known`; the id is the path with the folder's own in front."""
    if not folder.is_dir():
        raise UserError(f"folder {folder} of unlabelled images does not exist")
    resolved = lru_cache(Path.resolve)  # of the few folders, which saves a question for each part of each path
    images = [image for image in find_images(folder, recursive=True)
              if (image.resolve() if image.is_symlink() else resolved(image.parent) / image.name) not in known]
    return [Record(image_id(image), image, None, None) for image in images]


def _check_inside(record: Record, names: Sequence[str]) -> None:
    """Every annotated landmark within [-0.5, size - 0.5] on each axis."""
    size, points = record.file_geometry().size, record.truth
    outside = ~np.isnan(points) & ~((points >= -0.5) & (points <= np.array(size) - 0.5))
    for index in np.flatnonzero(outside.any(axis=1)).tolist():
        place = ", ".join(f"{value:g}" for value in points[index, ::-1])
        shape = " x ".join(map(str, size[::-1]))
        raise UserError(f'{record.labels}: landmark "{names[index]}" of image {record.image} lies outside: ({place}) '
                        f"in {shape} pixels (x, y order)")


def _by_position(records: Sequence[Record], train: int, validation: int) -> dict[str, tuple[Record, ...]]:
    """Official splits: the first `train`, the next `validation`, the rest."""
    ends = train, train + validation
    return dict(zip(SPLITS, map(tuple, (records[: ends[0]], records[slice(*ends)], records[ends[1] :])), strict=True))


def _no_spacing(spacing_mm: Any, layout: str, scale: str) -> None:
    if spacing_mm is not None:
        raise UserError(f"spacing_mm cannot be set for layout {layout}, whose scale is {scale}; set it to null")


def _cephalo(root: Path, spacing_mm: Any, _description: Path, _excluded: Collection[str]) -> DataSource:
    """ISBI 2015: truth = mean of junior and senior; positions 1-130 train, 131-150 validation, rest test; 0.1 mm."""
    spacing = parse_spacing(0.1 if spacing_mm is None else spacing_mm, 2, "cephalo")
    records = []
    files = [(folder, files_by_id(root / folder, (".txt",))) for folder in ("400_junior", "400_senior")]
    for image in find_images(root / "jpg"):
        name = image_id(image.name)
        for folder, labels in files:
            if name not in labels:
                raise UserError(f"image {image} has no label file {root / folder / name}.txt")
        both = np.stack([read_cephalo(labels[name]) for _, labels in files])
        annotators = None if np.array_equal(*both) else both  # a phantom's two files are one truth
        records.append(Record(name, image, both.mean(axis=0), spacing, labels=files[0][1][name], annotators=annotators))
    splits = _by_position(records, 130, 20)
    return DataSource("cephalo", CEPHALO_NAMES, splits, (), "mm", MM_THRESHOLDS, "cephalo", root)


def _chest(root: Path, spacing_mm: Any, _description: Path, excluded: Collection[str]) -> DataSource:
    """Shenzhen: labelled images less nine, by position 195 train, 34 validation, rest test; 256-frame pixels."""
    _no_spacing(spacing_mm, "chest", "a 256x256 frame")
    records = []
    labels = files_by_id(root / "labels", (".txt",))
    for image in find_images(root / "pngs"):
        name = image_id(image.name)
        label = labels.get(name)
        if name in excluded and label is not None:  # it only keeps its place
            records.append(Record(name, image, np.zeros((len(CHEST_NAMES), 2)), None))
        elif label is not None and not name.startswith(tuple(f"CHNCXR_{number}_" for number in CHEST_EXCLUDED)):
            geometry = read_geometry(image)
            spacing = tuple(CHEST_FRAME_PX / length for length in geometry.size)
            points = read_chest(label, geometry.size)
            records.append(Record(name, image, points, spacing, geometry=geometry, labels=label))
    splits = _by_position(records, 195, 34)
    return DataSource("chest", CHEST_NAMES, splits, (), "px", PX_THRESHOLDS, "chest", root)


def _hand(root: Path, spacing_mm: Any, _description: Path, _excluded: Collection[str]) -> DataSource:
    """Digital Hand Atlas: images with a row, by position 550 train, 59 validation, rest test; wrist = 50 mm."""
    _no_spacing(spacing_mm, "hand", "the wrist's width of 50 mm")
    table = root / "labels" / "all.csv"
    points = {image_id(name): each for name, each in read_hand(table).items()}
    if not points:
        raise UserError(f"{table} has no row: it needs one of each labelled image of jpg/ (id,x1,y1,...)")
    records = []
    for image in find_images(root / "jpg"):
        name = image_id(image.name)
        if name in points:
            wrist_px = float(np.linalg.norm(points[name][0] - points[name][4]))
            if not 0 < wrist_px < math.inf:
                raise UserError(f'{table}: wrist points 1 and 5 of image "{name}" give no scale')
            records.append(Record(name, image, points[name], (HAND_WRIST_MM / wrist_px,) * 2, labels=table))
    idle = sorted(points.keys() - {record.id for record in records})
    if idle:
        note_once(str(table), f'note: {len(idle)} rows of {table} belong to no image of jpg/, such as "{idle[0]}"')
    splits = _by_position(records, 550, 59)
    return DataSource("hand", HAND_NAMES, splits, (), "mm", (2.0, 4.0, 10.0), "hand", root)


LAYOUTS: dict[str, Callable[[Path, Any, Path, Collection[str]], DataSource]] = {
    "cephalo": _cephalo,
    "chest": _chest,
    "hand": _hand,
    "folder": read_folder,
}
