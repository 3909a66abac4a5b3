"""The folder layout: your own images or volumes in images/, their landmarks, and dataset.json."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from core.data.label_sources import COORDINATES, find_labels, has_labels
from core.data.records import (
    SPLITS,
    DataSource,
    Record,
    check_unique,
    image_id,
    is_number,
    own_spacing,
    parse_spacing,
)
from core.data.splits import check_keys, check_patients, new_draw, read_splits
from core.errors import UserError, did_you_mean
from core.files import parse_json
from core.formats.images import IMAGE_SUFFIXES, find_images, read_geometry

MM_THRESHOLDS, PX_THRESHOLDS = (2.0, 2.5, 3.0, 4.0), (3.0, 6.0, 9.0)
KEYS = ("landmarks", "coordinates", "spacing_mm", "patients", "splits", "sdr_thresholds")


def read_folder(root: Path, spacing_mm: Any, description: Path, excluded: Collection[str]) -> DataSource:
    """Your own images: images/, their landmarks (`core.data.label_sources`), and `description`.

    Landmarks become pixels of the stored image whatever they were; volumes may be .nii, .nii.gz, .npy, .npz or DICOM
    series. Of `excluded` images, which may be damaged, nothing is read: they only keep their place in the splits.
    Without any label (neither landmarks.csv nor landmarks/) there may be no description either.
    UserError: files missing or contradicting each other, images of different dimensions.
    """
    described = description.exists() or description.is_symlink() or has_labels(root)
    settings = read_description(description) if described else {"landmarks": []}
    names = tuple(settings["landmarks"])
    images = [Record(image_id(path.relative_to(root / "images")), path, None, None)
              for path in find_images(root / "images", recursive=True)]
    check_unique(images)
    images = [record if record.id in excluded else replace(record, geometry=read_geometry(record.image))
              for record in images]
    dims = common_dims([record for record in images if record.geometry is not None], root / "images")
    common = parse_spacing(settings.get("spacing_mm") if spacing_mm is None else spacing_mm, dims, str(description))
    labels = find_labels(root, names, images, settings, dims, description)
    patients = _patients(settings.get("patients", {}), {record.id for record in images}, description)
    records = {}
    for record in images:
        row = labels.rows.get(record.id)
        records[record.id] = replace(
            record, landmarks=None if row is None else row.points,
            labels=None if row is None else labels.files.get(record.id, labels.path),
            patient=(row and row.patient) or patients.get(record.id),
            spacing=None if record.geometry is None else
            own_spacing(record.geometry, (row and row.spacing) or common, record.image))
    labelled = {key: r for key, r in records.items() if r.landmarks is not None and not np.isnan(r.landmarks).all()}
    wanted = settings.get("splits")
    ids = read_splits(wanted, {key: r.patient for key, r in labelled.items()}, records, description, labels.path)
    splits = {split: tuple(labelled[key] for key in ids[split]) for split in SPLITS}
    check_patients(splits, description)
    tested = {record.patient for record in splits["test"]} - {None}
    rest = [replace(r, landmarks=None) for key, r in records.items() if key not in labelled and r.patient not in tested]
    unit = _common_unit([r for split in SPLITS for r in splits[split] if r.geometry is not None])
    default = MM_THRESHOLDS if unit == "mm" else PX_THRESHOLDS
    thresholds = tuple(map(float, settings.get("sdr_thresholds") or default))
    held_back = splits["validation"] or splits["test"]
    return DataSource("folder", names, splits, tuple(rest), unit, thresholds, None, root, not held_back,
                      new_draw(wanted, ids, description), common)


def read_description(path: Path) -> dict[str, Any]:
    """Read dataset.json; UserError unless its keys and their types are right (`splits` is checked with the ids)."""
    try:
        settings = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable JSON file: {error}") from None
    check_keys(settings, KEYS, ("landmarks",), str(path))
    names, thresholds = settings["landmarks"], settings.get("sdr_thresholds")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(f"{path}: landmarks must be a list of one or more names")
    strange = next((name for name in names if not name.isprintable()), None)
    if strange is not None:
        raise UserError(f"{path}: landmark {strange!r} holds a line break or another character that cannot be shown")
    if len(set(names)) < len(names) or "spacing" in names:
        raise UserError(f'{path}: landmarks must be different names, and none of them "spacing"')
    if thresholds is not None and not (
        isinstance(thresholds, list) and thresholds and all(is_number(t) and 0 < t < math.inf for t in thresholds)
    ):
        raise UserError(f"{path}: sdr_thresholds must be a list of numbers above 0")
    if settings.get("coordinates", "pixel") not in tuple(COORDINATES):
        raise UserError(f'{path}: coordinates must be one of {", ".join(COORDINATES)}, not "{settings["coordinates"]}"')
    patients = settings.get("patients", {})
    if not isinstance(patients, dict) or not all(isinstance(value, str) for value in patients.values()):
        raise UserError(f"{path}: patients must be an object of image id and patient id")
    return settings


def _patients(given: dict[str, str], images: set[str], description: Path) -> dict[str, str]:
    """`patients` of dataset.json by image id; UserError for an image that is not there."""
    patients = {}
    for entry, patient in given.items():
        name = entry if entry in images else image_id(entry)
        if name not in images:
            hint = did_you_mean(name, sorted(images))
            raise UserError(f'{description}, patients: image "{entry}" is not in images/{hint}')
        patients[name] = patient
    return patients


def common_dims(images: Sequence[Record], folder: Path) -> int:
    """The number of axes that all images of `folder` have; UserError where there is none, or they differ."""
    if not images:
        raise UserError(f"{folder} holds no image or volume; supported: {', '.join(IMAGE_SUFFIXES)}, DICOM series")
    dims = [len(record.file_geometry().size) for record in images]
    for record, axes in zip(images, dims, strict=True):
        if axes != dims[0]:
            raise UserError(f"{record.image} has {axes} axes, but {images[0].image} has {dims[0]}; keep images and "
                            "volumes in data sets of their own")
    return dims[0]


def _common_unit(records: Sequence[Record]) -> str:
    """mm where every record has a spacing, px where none has; UserError for a mixture."""
    without = [record for record in records if record.spacing is None]
    if without and len(without) < len(records):
        raise UserError(f"image {without[0].image} has no spacing, but others have; give it for all images or for none")
    return "px" if without else "mm"
