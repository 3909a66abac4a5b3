"""What every layout yields: records of images, and data sets of records by split."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.errors import UserError, did_you_mean
from core.formats.geometry import Geometry
from core.formats.images import image_id, read_geometry

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Record:
    """One image or volume: `landmarks` (N, D) float64, axis order (y, x) or (z, y, x), pixels of the stored image.

    NaN = not annotated, landmarks None = no labels. `spacing` is reporting units per stored pixel along each tensor
    axis: mm, for chest 256 / size (pixels of a 256x256 frame); None = unknown, errors are then in pixels. `geometry`
    is the file's own (None in a pack), `labels` the file of its landmarks. `annotators`
    (2, N, D) are the points of two people who marked the image on their own, where that is known. `pixels` (C, *size)
    are those of an image in memory, which lies in no file: `image` is then but its name.
    """

    id: str
    image: Path
    landmarks: np.ndarray | None
    spacing: tuple[float, ...] | None
    patient: str | None = None
    geometry: Geometry | None = None
    labels: Path | None = None
    annotators: np.ndarray | None = None
    pixels: np.ndarray | None = None

    @property
    def truth(self) -> np.ndarray:
        """The landmarks of a labelled record; ValueError for one without labels."""
        if self.landmarks is None:
            raise ValueError(f"image {self.image} has no labels")
        return self.landmarks

    def file_geometry(self) -> Geometry:
        """`geometry`, read from the file's header where it is not known yet. UserError: as `read_geometry`."""
        return self.geometry or read_geometry(self.image)


class Draw(NamedTuple):
    """Splits that were drawn from fractions just now, as an `entry` of the file that keeps them."""

    path: Path
    entry: dict[str, Any]


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
    nothing_held_back: bool = False  # by the data set's own splits: every label is for training, none to validate on
    draw: Draw | None = None  # of these splits, where it is not written down yet
    spacing_mm: tuple[float, ...] | None = None  # of every image that no row of a table gives another: the config's
    # or dataset.json's; None = each file's own, or the layout's

    @property
    def unscored(self) -> bool:
        """Whether every label is for training, so that there is no score."""
        return self.nothing_held_back and not self.splits["test"]

    @property
    def labelled(self) -> tuple[Record, ...]:
        """The records of all splits."""
        return tuple(record for split in SPLITS for record in self.splits[split])

    @property
    def records(self) -> tuple[Record, ...]:
        """Every record, the unlabelled ones last."""
        return (*self.labelled, *self.unlabelled)

    def pretraining_records(self) -> tuple[Record, ...]:
        """Images for pre-training, labels removed: train + validation + unlabelled, never test."""
        images = (*self.splits["train"], *self.splits["validation"], *self.unlabelled)
        return tuple(replace(record, landmarks=None, annotators=None) for record in images)

    def ordered(self, names: Sequence[str]) -> DataSource:
        """The data set with its landmarks in the order of `names`: a detector's, which it was trained with.

        UserError, naming them, where a name is in one of the two only.
        """
        if tuple(names) == self.landmark_names:
            return self
        own = set(self.landmark_names)
        if own != set(names) or len(names) != len(own):
            parts = [f"{what} {', '.join(some)}" for what, some in (
                ("the detector alone knows", [name for name in names if name not in own]),
                ("the data set alone has", [name for name in self.landmark_names if name not in names])) if some]
            raise UserError(f"the landmarks of {self.root} are not the detector's: {'; '.join(parts)}")
        order = [self.landmark_names.index(name) for name in names]

        def turned(record: Record) -> Record:
            landmarks, annotators = record.landmarks, record.annotators
            return replace(record, landmarks=None if landmarks is None else landmarks[order],
                           annotators=None if annotators is None else annotators[:, order])

        splits = {split: tuple(map(turned, records)) for split, records in self.splits.items()}
        return replace(self, landmark_names=tuple(names), splits=splits)

    def require(self, split: str) -> tuple[Record, ...]:
        """The records of `split`; UserError when it is empty or unknown."""
        if split not in SPLITS:
            raise UserError(f'split "{split}" does not exist; choose from {", ".join(SPLITS)}')
        if not self.labelled:
            raise UserError(f"{self.layout} data set at {self.root} has no labelled image: add labels, such as "
                            "landmarks.csv (datasets/README.md says where), or pre-train alone: --stages pretrain")
        if not self.splits[split]:
            counts = ", ".join(f"{len(self.splits[name])} {name}" for name in SPLITS)
            raise UserError(
                f"{split} split of {self.layout} at {self.root} is empty: its labelled images make {counts} "
                "(datasets/README.md says how the splits are made)"
            )
        return self.splits[split]

    def without(self, exclude: Iterable[str], elsewhere: Iterable[Record] = ()) -> DataSource:
        """The data set less the images with these ids (or file names). UserError for one that it does not have.

        Of the unlabelled records from `elsewhere`, whose ids are whole paths, the end of the path is enough.
        """
        unwanted = {image_id(str(name)) for name in exclude}
        known = [record.id for record in self.records]
        there = {record.id for record in elsewhere
                 if any(f"/{record.id}".endswith(f"/{name}") for name in unwanted)}
        named = {name for name in unwanted if any(f"/{each}".endswith(f"/{name}") for each in there)}
        unwanted |= there
        for name in sorted(unwanted.difference(known, named)):
            raise UserError(f'exclude: "{name}" is no image of {self.layout} at {self.root}{did_you_mean(name, known)}')
        kept = {name: tuple(r for r in records if r.id not in unwanted) for name, records in self.splits.items()}
        return replace(self, splits=kept, unlabelled=tuple(r for r in self.unlabelled if r.id not in unwanted))


def patient_group(image: str, patient: str | None) -> str:
    """What is split, resampled and counted together: a patient's images, or an image by itself where none is named."""
    return f"patient {patient}" if patient else f"image {image}"


def check_unique(records: Iterable[Record]) -> None:
    """UserError when two records have the same id."""
    first: dict[str, Path] = {}
    for record in records:
        if record.id in first:
            raise UserError(f'two images have the id "{record.id}": {first[record.id]} and {record.image}')
        first[record.id] = record.image


def files_by_id(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """{image id: file} of all files below `folder` with one of `suffixes`, in either case, hidden ones left out.

    UserError where two belong to the same image.
    """
    files: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        suffix = next((end for end in suffixes if name.lower().endswith(end)), None)
        if suffix is None or any(part.startswith(".") for part in Path(name).parts) or not file.is_file():
            continue
        key = image_id(name[: -len(suffix)])
        if key in files:
            raise UserError(f"{files[key]} and {file.name} are landmarks of the same image; remove one of them")
        files[key] = file
    return files


def own_spacing(geometry: Geometry, given: tuple[float, ...] | None, image: Path) -> tuple[float, ...] | None:
    """The spacing given in words, or the file's own; a volume with an affine takes no other than its own."""
    if given is not None and geometry.affine is not None and geometry.spacing_mm is not None:
        spacing = " x ".join(f"{value:g}" for value in geometry.spacing_mm[::-1])
        raise UserError(f"{image} has a spacing of its own ({spacing} mm): remove spacing_mm from config, "
                        "dataset.json and landmarks.csv, or correct the file's header")
    return given or geometry.spacing_mm


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number (true and false are not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def parse_spacing(value: Any, dims: int, where: str) -> tuple[float, ...] | None:
    """A number, [x, y] or [x, y, z], or None, as mm along the tensor's axes."""
    if value is None:
        return None
    each = list(value) if isinstance(value, (list, tuple)) else [value] * dims
    if len(each) != dims or not all(is_number(number) and 0 < number < math.inf for number in each):
        raise UserError(f"{where}: spacing_mm must be a number above 0, or [{', '.join('xyz'[:dims])}] of such, or "
                        f"null, not {value!r}")
    return tuple(float(number) for number in reversed(each))
