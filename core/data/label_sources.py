"""Where the landmarks of a folder data set lie: a table, one file of a labelling tool, or a file for each image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.data.records import Record, files_by_id
from core.errors import UserError, did_you_mean, note_once
from core.formats.geometry import RAS_TO_LPS, world_to_index
from core.formats.images import image_id
from core.formats.label_files import Images, check_size, match_image, read_label_file
from core.formats.labelme import is_labelme, labelme_files
from core.formats.markups import MARKUP_SUFFIXES, PLAIN_JSON, is_markup, read_markups
from core.formats.points import FolderRow, read_folder_csv

COORDINATES = {"pixel": None, "RAS": np.ones(3), "LPS": RAS_TO_LPS}  # of landmarks.csv; world numbers x these = RAS
TABLE, FOLDER = "landmarks.csv", "landmarks"
TOOL_FILES = ("landmarks.json", "landmarks.xml", "landmarks.tps")  # COCO or Label Studio, CVAT, tpsDig


class Labels(NamedTuple):
    """Landmarks as they lie on disk; `path` is what messages name, `files` those of single images by id."""

    rows: dict[str, FolderRow]
    path: Path
    files: dict[str, Path]


def find_labels(root: Path, names: tuple[str, ...], images: Sequence[Record], settings: dict[str, Any],
                dims: int, description: Path) -> Labels:
    """The landmarks `names` of a folder data set in pixels of the stored images, by image id.

    UserError: no labels or labels in two places, a file that is read for volumes or for pictures only, labels of an
    image that is not there, or of a copy of another size.
    """
    if not has_labels(root):
        return Labels({}, root / f"{TABLE} or {FOLDER}", {})
    path = _source(root, dims)
    by_id = {record.id: record for record in images}
    system = settings.get("coordinates", "pixel")
    if system != "pixel" and (dims == 2 or path.name != TABLE):
        why = "images are flat" if dims == 2 else "files in landmarks/ name their system themselves"
        raise UserError(f'{description}: coordinates "{system}" is for a landmarks.csv of volumes, but the {why}; '
                        "remove this key")
    if path.name == TABLE:
        rows = _rows_by_id(read_folder_csv(path, names, dims), set(by_id), path)
        if system != "pixel":
            rows = {key: replace(row, points=_to_pixels(row.points[:, ::-1] * COORDINATES[system], by_id[key], path))
                    for key, row in rows.items()}
        return Labels(rows, path, {})
    if dims == 2:
        return _of_pictures(path, names, by_id)
    if path.name in TOOL_FILES:
        raise UserError(f"{path} holds landmarks of flat images, but the images are volumes; give landmarks/ or "
                        "landmarks.csv instead")
    files = _markup_files(path, by_id)
    rows = {key: FolderRow(key, _to_pixels(read_markups(file, names), by_id[key], file)) for key, file in files.items()}
    return Labels(rows, path, files)


def has_labels(root: Path) -> bool:
    """Whether there is a table, a folder or a file of landmarks, or LabelMe's beside the pictures."""
    return bool(_of_root(root)) or bool(labelme_files(root / "images"))


def _of_root(root: Path) -> list[Path]:
    """The tables, files and folders of labels that are there; UserError for a link to one that is not."""
    every = [root / name for name in (TABLE, FOLDER, *TOOL_FILES)]
    for path in every:
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path} is a link to {path.readlink()}, which is not there")
    return [path for path in every if path.exists()]


def _source(root: Path, dims: int) -> Path:
    """The one place that holds labels; LabelMe's files beside the pictures count as well."""
    there = _of_root(root)
    if dims == 2 and labelme_files(root / "images"):
        there.append(root / "images")
    if len(there) == 1:
        return there[0]
    if not there:
        raise UserError(f"folder data set at {root} has neither landmarks.csv nor landmarks/; give one of them, "
                        f"{' or '.join(TOOL_FILES)}, see datasets/README.md")
    named = " and ".join("LabelMe's files in images/" if path.name == "images" else path.name + "/" * path.is_dir()
                         for path in there)
    raise UserError(f"folder data set at {root} has both {named}; give one of them, see datasets/README.md")


def _of_pictures(path: Path, names: Sequence[str], by_id: Mapping[str, Record]) -> Labels:
    """Landmarks of flat images from a labelling tool's file, or LabelMe's folder."""
    if path.name == FOLDER and not labelme_files(path):
        raise UserError(f"{path} holds landmarks of volumes, but the images are flat; give landmarks.csv instead, or "
                        "LabelMe's files")
    found = read_label_file(path, names, Images(paths={key: record.image for key, record in by_id.items()}),
                            "labelme" if path.is_dir() else None)
    if found.passed_over:
        note_once(str(path), f"note: {path} also has {', '.join(found.passed_over)}, passed over")
    rows: dict[str, FolderRow] = {}
    for row in found.rows:
        key = match_image(row.image, by_id, "images/")
        if key in rows:
            raise UserError(f'{path}: image "{row.image}" is there twice; keep one set of landmarks an image')
        geometry = by_id[key].geometry
        if geometry is not None:  # excluded: that there are landmarks is enough
            check_size(row, geometry.size, path)
        rows[key] = row
    return Labels(rows, path, {})


def _markup_files(folder: Path, images: Mapping[str, Record]) -> dict[str, Path]:
    """The landmark file of each image that has one, c0.mrk.json or, of `--format slicer`, c0.nii.gz.mrk.json.

    UserError for a file of no image, or of LabelMe; a .json that holds no markups is passed over there.
    """
    found = files_by_id(folder, (*MARKUP_SUFFIXES, PLAIN_JSON))
    for name, file in found.items():
        plain = not file.name.lower().endswith(tuple(MARKUP_SUFFIXES))
        if plain and is_labelme(file):
            raise UserError(f"{file} is LabelMe's, of a flat image, but the images are volumes; give 3D Slicer's files")
        if name not in images and (not plain or is_markup(file)):
            raise UserError(f'{file} belongs to no image: "{name}" is not in images/{did_you_mean(name, list(images))}')
    return {name: found[name] for name in images if name in found}


def _to_pixels(world: np.ndarray, record: Record, path: Path) -> np.ndarray:
    if record.geometry is None:  # excluded: that there are landmarks is enough
        return world
    affine = record.geometry.affine
    if affine is None:
        raise UserError(f"{path} counts in mm of the patient, but {record.image} does not say where its voxels lie; "
                        "give landmarks.csv in pixels, or save the volume as NIfTI")
    return world_to_index(world, affine)


def _rows_by_id(rows: Iterable[FolderRow], images: set[str], table: Path) -> dict[str, FolderRow]:
    rows_by_id: dict[str, FolderRow] = {}
    for row in rows:
        name = row.image if row.image in images else image_id(row.image)
        if name not in images:
            raise UserError(f'{table}: image "{row.image}" is not in images/{did_you_mean(name, sorted(images))}')
        if name in rows_by_id:
            raise UserError(f'{table}: image "{row.image}" has two rows')
        rows_by_id[name] = row
    return rows_by_id
