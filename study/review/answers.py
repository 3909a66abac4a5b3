"""What a detector said of the images that are reviewed, and in which order they are worth looking at."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.data.records import Record, image_id
from core.errors import UserError
from core.files import atomic_file, content_digest, stamp, write_json
from core.formats.points import read_text, to_number


@dataclass(frozen=True, eq=False)
class Answer:
    """A detector's landmarks of one image: `points` (N, D) in tensor-axis order, stored pixels, NaN = none.

    `expected_error` and `radius90` (N,) are in `unit`, NaN = none; `spacing` (D) is units per stored pixel.
    """

    points: np.ndarray
    expected_error: np.ndarray
    radius90: np.ndarray
    unit: str
    spacing: tuple[float, ...]

    @property
    def doubt(self) -> float:
        """The mean expected error of the landmarks, NaN where none has one."""
        known = self.expected_error[~np.isnan(self.expected_error)]
        return float(known.mean()) if len(known) else math.nan


def read_answers(path: Path, records: Mapping[str, Record], names: Sequence[str], told: bool = True
                 ) -> dict[str, Answer]:
    """The rows of a predictions.csv of images in `records`, by image id; others are passed over.

    With `told` distances are in mm where a record has a spacing; else where the image file itself says one.
    UserError: no such table, a column missing, a landmark that is none of `names`, no image of `records` at all.
    """
    rows = list(csv.DictReader(io.StringIO(read_text(path))))
    dims = len(next(iter(records.values())).file_geometry().size)
    columns = ("image", "landmark", *"xyz"[:dims], "expected_error", "radius90")
    missing = [column for column in columns if not rows or column not in rows[0]]
    if missing:
        raise UserError(f'{path} has no column "{missing[0]}", or no row; it must be a predictions.csv of '
                        "landmarks_finetuning.predict")
    cells = {key: np.full((len(names), dims + 2), np.nan) for key in records}
    seen = set()
    for number, row in enumerate(rows, 2):
        key = row["image"] if row["image"] in records else image_id(row["image"])
        if row["landmark"] not in names:
            raise UserError(f'{path}, row {number}: landmark "{row["landmark"]}" is none of the data set\'s: '
                            f"{', '.join(names)}")
        if key in records:
            seen.add(key)
            cells[key][names.index(row["landmark"])] = [
                to_number(row[column], f"{path}, row {number}") if row[column] else math.nan for column in columns[2:]]
    if not seen:
        raise UserError(f'{path} has none of the images, such as "{next(iter(records))}"; it was made for others')
    answers = {}
    for key in seen:
        spacing = records[key].spacing if told else records[key].file_geometry().spacing_mm
        answers[key] = Answer(cells[key][:, dims - 1 :: -1], cells[key][:, dims], cells[key][:, dims + 1],
                              "px" if spacing is None else "mm", spacing or (1.0,) * dims)
    return answers


def find_answers(run_dir: Path, records: Mapping[str, Record], names: Sequence[str], folder: Path,
                 overrides: tuple[str, ...] = ()) -> dict[str, Answer]:
    """The answers of the detector of `run_dir`, asked again only where it or an image has changed since.

    They are kept as folder/predictions.csv. UserError: no detector there, or one of other landmarks.
    """
    from landmarks_finetuning.calibration import read_calibration  # takes seconds, for torch
    from landmarks_finetuning.inference import trained_detector
    from landmarks_finetuning.predict import predictions_of
    from landmarks_finetuning.predictions import append_rows, table_rows

    detector = trained_detector(run_dir, overrides)
    if sorted(detector.landmark_names) != sorted(names):
        raise UserError(f"{run_dir} finds {', '.join(detector.landmark_names)}, the data set's landmarks are "
                        f"{', '.join(names)}; review with a run on this data set")
    table, label = folder / "predictions.csv", folder / "predictions.json"
    weights = [detector.path, *([] if detector.second is None else [detector.second.path])]
    calibration = read_calibration(run_dir, detector)
    made_of: dict[str, Any] = {
        "weights": content_digest(*weights), "settings": list(overrides), "calibrated": calibration is not None,
        "images": [[key, record.spacing, stamp(record.image)] for key, record in records.items()]}
    made_of = json.loads(json.dumps(made_of))
    if not (table.is_file() and label.is_file() and json.loads(label.read_text(encoding="utf8")) == made_of):
        label.unlink(missing_ok=True)
        with atomic_file(table) as file:
            for predictions in predictions_of(detector, list(records.values()), calibration):
                append_rows(file, table_rows(predictions))
        write_json(label, made_of)
    return read_answers(table, records, names)


def are_calibrated(folder: Path) -> bool:
    """Whether the errors of the answers that `find_answers` keeps in `folder` were calibrated on validation labels."""
    return bool(json.loads((folder / "predictions.json").read_text(encoding="utf8"))["calibrated"])


def suggested(run_dir: Path) -> list[str]:
    """The images that `suggest` named, the first one first; empty where the study of `run_dir` has asked for none."""
    folder = next((parent for parent in run_dir.resolve().parents if (parent / "suggest/suggest.csv").is_file()), None)
    if folder is None:
        return []
    return [row["image"] for row in csv.DictReader(io.StringIO(read_text(folder / "suggest/suggest.csv")))]


def order_of_doubt(keys: Sequence[str], answers: Mapping[str, Answer], first: Sequence[str],
                   done: Collection[str]) -> list[str]:
    """`keys` as they are worth looking at: those in `first` in that order, then the largest doubt; `done` ones last."""
    rank = {key: number for number, key in enumerate(first)}

    def worth(key: str) -> tuple[bool, int, bool, float]:
        doubt = answers[key].doubt if key in answers else math.nan
        return key in done, rank.get(key, len(rank)), math.isnan(doubt), 0.0 if math.isnan(doubt) else -doubt

    return sorted(keys, key=worth)
