"""The labels of a folder data set, changed one image at a time where they lie: its table, or its markup files."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from core.data.folder_layout import common_dims, read_description
from core.data.label_sources import COORDINATES, FOLDER, TABLE, TOOL_FILES, Labels, find_labels
from core.data.records import SPLITS, Record, check_unique, own_spacing, parse_spacing
from core.data.splits import read_splits
from core.errors import UserError
from core.files import stamp, write_json
from core.formats.geometry import index_to_world
from core.formats.images import find_images, image_id, read_geometry
from core.formats.markups import read_markups, write_markups
from core.formats.points import FolderRow, read_folder_csv, write_folder_csv

MARKUPS = ".mrk.json"  # the one kind of markups that labels are saved in


class FolderLabels:
    """Labels of the data set at `root`: read whole, written image by image. `records` are its images without labels.

    Points are (N, D) float64 in tensor-axis order, pixels of the stored image, NaN = not annotated. What other images
    have stays as it is, number for number. UserError: what `read_folder` refuses, and landmark files of a kind that is
    only read.
    """

    def __init__(self, root: Path, description: Path, excluded: Collection[str] = (), spacing_mm: Any = None) -> None:
        self.root, self.description = root, description
        self.settings = read_description(description)
        self.names = tuple(self.settings["landmarks"])
        images = [Record(image_id(path.relative_to(root / "images")), path, None, None)
                  for path in find_images(root / "images", recursive=True)]
        check_unique(images)
        self._every = [record if record.id in excluded else replace(record, geometry=read_geometry(record.image))
                       for record in images]
        self.dims = common_dims([record for record in self._every if record.geometry is not None], root / "images")
        given = self.settings.get("spacing_mm") if spacing_mm is None else spacing_mm
        common = parse_spacing(given, self.dims, str(description))
        self.records = {record.id: record for record in self._every if record.geometry is not None}
        self.table, self.folder = root / TABLE, root / FOLDER
        if not any((root / name).exists() for name in (TABLE, FOLDER, *TOOL_FILES)):
            write_folder_csv(self.table, self.names, [], self.dims)
        labels = self._labels()
        if labels.path not in (self.table, self.folder) or (labels.path == self.folder and self.dims == 2):
            raise UserError(f"{labels.path} is a labelling tool's and is read but not written; make it {TABLE} by "
                            "python -m core.formats.convert first")
        for key, record in self.records.items():
            row = labels.rows.get(key)
            self.records[key] = replace(record, spacing=own_spacing(
                record.file_geometry(), (row and row.spacing) or common, record.image))
        for key, file in labels.files.items():
            if not file.name.lower().endswith(MARKUPS):
                raise UserError(f"{file} (landmarks of {key}) is of a kind that is read but not written; save it as "
                                f"{MARKUPS} in 3D Slicer first")

    def _labels(self) -> Labels:
        return find_labels(self.root, self.names, self._every, self.settings, self.dims, self.description)

    def stamp(self) -> tuple:
        """What changes whenever the labels on disk do."""
        return stamp(self.table), stamp(self.folder)

    def read(self) -> dict[str, np.ndarray]:
        """The points of every image that has a row or a file, by image id. UserError: damaged labels."""
        return {key: row.points for key, row in self._labels().rows.items() if key in self.records}

    def training(self) -> list[str]:
        """The labelled images that would train now; splits that are not drawn yet are not drawn for good by this."""
        labels = self._labels()
        patients = {image_id(name): patient for name, patient in self.settings.get("patients", {}).items()}
        labelled = {key: row.patient or patients.get(key) for key, row in labels.rows.items()
                    if not np.isnan(row.points).all()}
        splits = read_description(self.description).get("splits")
        return read_splits(splits, labelled, [record.id for record in self._every], self.description,
                           labels.path)["train"]

    def write(self, key: str, points: np.ndarray) -> None:
        """Replace the labels of image `key`, on disk when this returns, and give it its split.

        Splits that are listed in dataset.json take in an image with its first label, into its patient's split or train,
        and leave it out with its last one; the order of the two files is such that each moment's pair can be read.
        """
        labelled = not np.isnan(points).all()
        if not labelled:
            self._list(key, listed=False)
        if self.table.exists():
            self._write_row(key, points)
        else:
            self._write_file(key, points)
        if labelled:
            self._list(key, listed=True)

    def _write_row(self, key: str, points: np.ndarray) -> None:
        """The row of image `key`, in the table's own coordinates; of an image without labels only what else it says."""
        rows = read_folder_csv(self.table, self.names, self.dims)
        known = [row.image if row.image in self.records else image_id(row.image) for row in rows]
        at = known.index(key) if key in known else len(rows)
        old = rows[at] if at < len(rows) else FolderRow(key, points)
        system = self.settings.get("coordinates", "pixel")
        if system != "pixel":
            points = (self._world(key, points) * COORDINATES[system])[:, ::-1]
        empty = np.isnan(points).all() and old.patient is None and old.spacing is None
        rows[at : at + 1] = [] if empty else [replace(old, points=points)]
        write_folder_csv(self.table, self.names, rows, self.dims)

    def _write_file(self, key: str, points: np.ndarray) -> None:
        path = self._labels().files.get(key, self.folder / f"{key}{MARKUPS}")
        if np.isnan(points).all():
            path.unlink(missing_ok=True)
        else:
            before = read_markups(path, self.names) if path.exists() else np.full((len(self.names), 3), np.nan)
            world = self._world(key, points)
            same = np.linalg.norm(world - before, axis=1) < 1e-9  # NaN compares false
            write_markups(path, self.names, np.where(same[:, None], before, world))

    def _world(self, key: str, points: np.ndarray) -> np.ndarray:
        affine = self.records[key].file_geometry().affine
        if affine is None:
            raise UserError(f"{self.records[key].image} does not say where its voxels lie, but its data set's labels "
                            "count in mm of the patient; save it as NIfTI, or give landmarks.csv in pixels")
        return index_to_world(points, affine)

    def _list(self, key: str, listed: bool) -> None:
        """Put image `key` into a listed split of dataset.json, or leave it out; splits of fractions need neither."""
        settings = read_description(self.description)
        splits: dict[str, Any] | None = settings.get("splits")
        if splits is None or not all(isinstance(splits.get(split, []), list) for split in SPLITS):
            return
        split_of = {image_id(str(entry)): split for split in SPLITS for entry in splits.get(split, [])}
        if (key in split_of) == listed:
            return
        if listed:
            named = {name: row.patient for name, row in self._labels().rows.items() if row.patient}
            patients = {image_id(name): patient for name, patient in settings.get("patients", {}).items()} | named
            same = [split for name, split in split_of.items() if key in patients and
                    patients.get(name) == patients[key]]
            chosen = same[0] if same else "train"
            splits[chosen] = [*splits.get(chosen, []), key]
        else:
            for split in SPLITS:
                if split in splits:
                    splits[split] = [entry for entry in splits[split] if image_id(str(entry)) != key]
        write_json(self.description, settings)


def new_data_set(root: Path, images: Path, names: Sequence[str], dims: int) -> None:
    """Make a folder data set of the images in a folder, to which it links: no label yet, splits by fractions.

    UserError where the folder is another data set, or of other images.
    """
    link, description = root / "images", root / "dataset.json"
    if not description.exists():
        if root.exists() and any(root.iterdir()):
            raise UserError(f"{root} is not empty and has no dataset.json; name a new folder, or a data set's")
        root.mkdir(parents=True, exist_ok=True)
        link.symlink_to(images.resolve(), target_is_directory=True)
        write_folder_csv(root / "landmarks.csv", names, [], dims)
        write_json(description, {"landmarks": list(names), "spacing_mm": None,
                                 "splits": {"train": 0.8, "validation": 0.1, "test": 0.1, "seed": 0}})
    if link.resolve() != images.resolve() and link.resolve() not in images.resolve().parents:
        raise UserError(f"{root} is a data set of the images in {link}, not of those in {images}; give --labels "
                        "another folder")
