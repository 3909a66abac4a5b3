"""On-disk dataset layouts -> records, landmark names, splits, units and SDR thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import UserError, did_you_mean
from core.folder_layout import SPLITS, image_id, is_number, read_description, read_splits
from core.images import find_images, read_size
from core.points import FolderRow, read_cephalo, read_chest, read_folder_csv, read_hand

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
MM_THRESHOLDS, PX_THRESHOLDS = (2.0, 2.5, 3.0, 4.0), (3.0, 6.0, 9.0)
STRUCTURE = {  # what a data set's root must hold
    "cephalo": ("jpg", "400_junior", "400_senior"),
    "chest": ("pngs", "labels"),
    "hand": ("jpg", "labels/all.csv"),
    "folder": ("images", "landmarks.csv", "dataset.json"),
}


@dataclass(frozen=True, eq=False)
class Record:
    """One image: `landmarks` (N, D) float64, axis order (y, x), original pixels, NaN = not annotated, None = no labels.

    `spacing` is reporting units per original pixel along each tensor axis: mm, for chest 256 / size (pixels of a
    256x256 frame); None = unknown, errors are then in pixels.
    """

    id: str
    image: Path
    landmarks: np.ndarray | None
    spacing: tuple[float, ...] | None
    patient: str | None = None


@dataclass(frozen=True, eq=False)
class DataSource:
    """A data set as read from disk: its records by split and how errors on it are reported."""

    layout: str
    landmark_names: tuple[str, ...]
    splits: dict[str, tuple[Record, ...]]
    unlabelled: tuple[Record, ...]
    unit: str
    sdr_thresholds: tuple[float, ...]
    paper_rule: str | None
    root: Path = Path()

    def pretraining_records(self) -> tuple[Record, ...]:
        """Images for pre-training, labels removed: train + validation + unlabelled, never test."""
        images = (*self.splits["train"], *self.splits["validation"], *self.unlabelled)
        return tuple(replace(record, landmarks=None) for record in images)

    def require(self, split: str) -> tuple[Record, ...]:
        """The records of `split`; UserError when it is empty or unknown."""
        if split not in SPLITS:
            raise UserError(f'split "{split}" does not exist; choose from {", ".join(SPLITS)}')
        if not self.splits[split]:
            held = ", ".join(f"{len(self.splits[name])} {name}" for name in SPLITS)
            raise UserError(
                f"{split} split of {self.layout} at {self.root} is empty: its labelled images make {held} "
                "(datasets/README.md says how the splits are made)"
            )
        return self.splits[split]


def read_layout(
    layout: str,
    root: str | Path,
    *,
    unlabelled_dirs: Iterable[str | Path] = (),
    spacing_mm: float | Sequence[float] | None = None,
    exclude: Iterable[str] = (),
) -> DataSource:
    """Read the data set of kind `layout` at `root`; every landmark is checked to lie inside its image.

    `spacing_mm` (a number or [x, y]) replaces the data set's own for cephalo and folder. `exclude` names image ids
    to leave out; the others keep their split. Every image below `unlabelled_dirs` that is not yet part of the data
    set joins the pre-training images, so pointing there cannot leak a test image.
    UserError: unknown layout, missing or inconsistent files, ids that are not unique, landmarks outside their image.
    """
    root = Path(root)
    if layout not in LAYOUTS:
        hint = did_you_mean(layout, list(LAYOUTS))
        raise UserError(f'layout "{layout}" does not exist{hint}; choose from {", ".join(LAYOUTS)}')
    missing = [name for name in STRUCTURE[layout] if not (root / name).exists()]
    if missing:
        raise UserError(
            f"no {layout} data set at {root}: {missing[0]} is missing; expected {', '.join(STRUCTURE[layout])} there, "
            "see datasets/README.md"
        )
    complete = LAYOUTS[layout](root, spacing_mm)
    if not any(complete.splits.values()):
        raise UserError(f"{layout} data set at {root} has no labelled image; see datasets/README.md")
    source = _without(complete, exclude)
    known = {record.image.resolve() for record in _all_records(complete)}
    more = tuple(record for folder in unlabelled_dirs for record in _unlabelled(Path(folder), known))
    source = replace(source, unlabelled=source.unlabelled + more)
    _check_unique(_all_records(source))
    for record in _labelled(source):
        _check_inside(record, source.landmark_names)
    return source


def _labelled(source: DataSource) -> list[Record]:
    return [record for split in SPLITS for record in source.splits[split]]


def _all_records(source: DataSource) -> list[Record]:
    return [*_labelled(source), *source.unlabelled]


def _without(source: DataSource, exclude: Iterable[str]) -> DataSource:
    unwanted = {image_id(str(name)) for name in exclude}
    known = [record.id for record in _all_records(source)]
    for name in sorted(unwanted.difference(known)):
        raise UserError(f'exclude: "{name}" is no image of {source.layout} at {source.root}{did_you_mean(name, known)}')
    kept = {name: tuple(r for r in records if r.id not in unwanted) for name, records in source.splits.items()}
    return replace(source, splits=kept, unlabelled=tuple(r for r in source.unlabelled if r.id not in unwanted))


def _unlabelled(folder: Path, known: set[Path]) -> list[Record]:
    """Records of the images below `folder` that are not `known`; the id is the path with the folder's own in front."""
    if not folder.is_dir():
        raise UserError(f"folder {folder} of unlabelled images does not exist")
    images = [image for image in find_images(folder, recursive=True) if image.resolve() not in known]
    return [Record(image_id(image), image, None, None) for image in images]


def _check_unique(records: Iterable[Record]) -> None:
    first: dict[str, Path] = {}
    for record in records:
        if record.id in first:
            raise UserError(f'two images have the id "{record.id}": {first[record.id]} and {record.image}')
        first[record.id] = record.image


def _check_inside(record: Record, names: Sequence[str]) -> None:
    """Every annotated landmark within [-0.5, size - 0.5] on each axis."""
    size = read_size(record.image)
    points = record.landmarks
    outside = ~np.isnan(points) & ~((points >= -0.5) & (points <= np.array(size) - 0.5))
    for index in np.flatnonzero(outside.any(axis=1)):
        place = ", ".join(f"{value:g}" for value in points[index, ::-1])
        shape = " x ".join(map(str, size[::-1]))
        raise UserError(
            f'landmark "{names[index]}" of image {record.image} lies outside: ({place}) in {shape} pixels (x, y order)'
        )


def _by_position(records: Sequence[Record], train: int, validation: int) -> dict[str, tuple[Record, ...]]:
    """Official splits: the first `train`, the next `validation`, the rest."""
    ends = train, train + validation
    return dict(zip(SPLITS, map(tuple, (records[: ends[0]], records[slice(*ends)], records[ends[1] :])), strict=True))


def _spacing(value: Any, where: str) -> tuple[float, float] | None:
    """A number, [x, y] or None as (y, x) in mm."""
    if value is None:
        return None
    pair = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(pair) != 2 or not all(is_number(number) and 0 < number < math.inf for number in pair):
        raise UserError(f"{where}: spacing_mm must be a number above 0, or [x, y] of such, or null, not {value!r}")
    return float(pair[1]), float(pair[0])


def _no_spacing(spacing_mm: Any, layout: str, scale: str) -> None:
    if spacing_mm is not None:
        raise UserError(f"spacing_mm cannot be set for layout {layout}, whose scale is {scale}; set it to null")


def _cephalo(root: Path, spacing_mm: Any) -> DataSource:
    """ISBI 2015: truth = mean of junior and senior; positions 1-130 train, 131-150 validation, rest test; 0.1 mm."""
    spacing = _spacing(0.1 if spacing_mm is None else spacing_mm, "cephalo")
    records = []
    for image in find_images(root / "jpg"):
        labels = [root / folder / f"{image_id(image.name)}.txt" for folder in ("400_junior", "400_senior")]
        for label in labels:
            if not label.is_file():
                raise UserError(f"image {image} has no label file {label}")
        landmarks = np.mean([read_cephalo(label) for label in labels], axis=0)
        records.append(Record(image_id(image.name), image, landmarks, spacing))
    splits = _by_position(records, 130, 20)
    return DataSource("cephalo", CEPHALO_NAMES, splits, (), "mm", MM_THRESHOLDS, "cephalo", root)


def _chest(root: Path, spacing_mm: Any) -> DataSource:
    """Shenzhen: labelled images less nine, by position 195 train, 34 validation, rest test; 256-frame pixels."""
    _no_spacing(spacing_mm, "chest", "a 256x256 frame")
    records = []
    for image in find_images(root / "pngs"):
        name = image_id(image.name)
        label = root / "labels" / f"{name}.txt"
        if label.is_file() and not name.startswith(tuple(f"CHNCXR_{number}_" for number in CHEST_EXCLUDED)):
            size = read_size(image)
            spacing = tuple(CHEST_FRAME_PX / length for length in size)
            records.append(Record(name, image, read_chest(label, size), spacing))
    splits = _by_position(records, 195, 34)
    return DataSource("chest", CHEST_NAMES, splits, (), "px", PX_THRESHOLDS, "chest", root)


def _hand(root: Path, spacing_mm: Any) -> DataSource:
    """Digital Hand Atlas: images with a row, by position 550 train, 59 validation, rest test; wrist = 50 mm."""
    _no_spacing(spacing_mm, "hand", "the wrist's width of 50 mm")
    table = root / "labels" / "all.csv"
    points = read_hand(table)
    records = []
    for image in find_images(root / "jpg"):
        name = image_id(image.name)
        if name in points:
            wrist_px = float(np.linalg.norm(points[name][0] - points[name][4]))
            if not 0 < wrist_px < math.inf:
                raise UserError(f'{table}: wrist points 1 and 5 of image "{name}" give no scale')
            records.append(Record(name, image, points[name], (HAND_WRIST_MM / wrist_px,) * 2))
    splits = _by_position(records, 550, 59)
    return DataSource("hand", HAND_NAMES, splits, (), "mm", (2.0, 4.0, 10.0), "hand", root)


def _folder(root: Path, spacing_mm: Any) -> DataSource:
    """Your own images: images/, landmarks.csv and dataset.json, as datasets/README.md describes them."""
    table, description = root / "landmarks.csv", root / "dataset.json"
    settings = read_description(description)
    names = tuple(settings["landmarks"])
    common = _spacing(settings.get("spacing_mm") if spacing_mm is None else spacing_mm, str(description))
    images = [
        Record(image_id(image.relative_to(root / "images")), image, None, None)
        for image in find_images(root / "images", recursive=True)
    ]
    _check_unique(images)
    rows = _rows_by_id(read_folder_csv(table, names), {record.id for record in images}, table)
    records = {
        image.id: replace(image, landmarks=row.points, spacing=row.spacing or common, patient=row.patient)
        if (row := rows.get(image.id))
        else image
        for image in images
    }
    labelled = {key: r for key, r in records.items() if r.landmarks is not None and not np.isnan(r.landmarks).all()}
    ids = read_splits(settings["splits"], {key: r.patient for key, r in labelled.items()}, records, root)
    splits = {split: tuple(labelled[key] for key in ids[split]) for split in SPLITS}
    _check_patients(splits, description)
    tested = {record.patient for record in splits["test"]} - {None}
    rest = [replace(r, landmarks=None) for key, r in records.items() if key not in labelled and r.patient not in tested]
    unit = _common_unit([record for split in SPLITS for record in splits[split]])
    default = MM_THRESHOLDS if unit == "mm" else PX_THRESHOLDS
    thresholds = tuple(map(float, settings.get("sdr_thresholds") or default))
    return DataSource("folder", names, splits, tuple(rest), unit, thresholds, None, root)


def _rows_by_id(rows: Iterable[FolderRow], images: set[str], table: Path) -> dict[str, FolderRow]:
    found: dict[str, FolderRow] = {}
    for row in rows:
        name = row.image if row.image in images else image_id(row.image)
        if name not in images:
            raise UserError(f'{table}: image "{row.image}" is not in images/{did_you_mean(name, sorted(images))}')
        if name in found:
            raise UserError(f'{table}: image "{row.image}" has two rows')
        found[name] = row
    return found


def _check_patients(splits: dict[str, tuple[Record, ...]], path: Path) -> None:
    split_of: dict[str, str] = {}
    for split, records in splits.items():
        for record in records:
            if record.patient and split_of.setdefault(record.patient, split) != split:
                raise UserError(
                    f'{path}: patient "{record.patient}" is in both {split_of[record.patient]} and {split} '
                    f'(image "{record.id}"); keep each patient in one split'
                )


def _common_unit(records: Sequence[Record]) -> str:
    """mm where every record has a spacing, px where none has; UserError for a mixture."""
    without = [record for record in records if record.spacing is None]
    if without and len(without) < len(records):
        raise UserError(f"image {without[0].image} has no spacing, but others have; give it for all images or for none")
    return "px" if without else "mm"


LAYOUTS: dict[str, Callable[[Path, Any], DataSource]] = {
    "cephalo": _cephalo,
    "chest": _chest,
    "hand": _hand,
    "folder": _folder,
}
