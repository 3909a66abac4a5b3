"""What a scored run left for the report, read with care: a file that is cut or changed takes its run out of it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from core.data.records import patient_group
from core.errors import UserError
from core.files import content_digest, stamp
from core.formats.cells import meant
from core.formats.json_files import read_object
from core.runs.inputs import INPUTS, read_record

AGAIN = "evaluate that run again"
NUMBERS = ("x", "y", "z", "truth_x", "truth_y", "truth_z", "error", "paper_error", "human_distance",
           "expected_error", "radius90", "confidence")  # the last one of earlier versions
COLUMNS = ("error", "paper_error", "expected_error", "radius90", "human_distance")  # what is asked for again and again
IDENTITY = ("dataset", "backbone", "shots", "draw", "seed")  # what metrics.json and config.json both say
ROUNDING = 1e-4  # of errors in the table


def read_metrics_json(folder: Path) -> dict[str, Any]:
    """A scored run's metrics.json; UserError where it is damaged."""
    return read_object(folder / "metrics.json", AGAIN)


def read_predictions(folder: Path) -> pd.DataFrame:
    """predictions.csv with text as text and numbers as numbers (NaN where empty).

    Raises UserError where it is missing, or not whole: a row for each of the images and landmarks of metrics.json.
    """
    path = folder / "predictions.csv"
    if not path.is_file():
        raise UserError(f"{path} is missing though metrics.json is there; {AGAIN}")
    try:
        text = path.read_text(encoding="utf8")
        lines = csv.reader(io.StringIO(text, newline=""))
        header = next(lines, [])
        rows = [line for line in lines if line]
        complete = text.endswith("\n") and {len(row) for row in rows} == {len(header)}
        table = pd.DataFrame(rows if complete else [], columns=header)
        for column in table.columns.intersection(["image", "patient", "landmark"]):
            table[column] = table[column].map({text: meant(text) for text in table[column].unique()})
        for column in table.columns.intersection(list(NUMBERS)):
            table[column] = pd.to_numeric(table[column])
        table["error"].mean(), table["patient"]  # both are asked for
        found = set(zip(table["image"], table["landmark"], strict=True))
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is not a table of predictions ({' '.join(str(error).split())}); {AGAIN}") from None
    metrics = read_metrics_json(folder)
    images, landmarks = metrics["images"], metrics["landmark_names"]
    expected = set(product(table["image"].unique(), landmarks))
    if not complete or found != expected or not len(rows) == len(expected) == images * len(landmarks):
        raise UserError(f"{path} is cut or damaged: it has {len(rows)} rows, not one for each of {len(landmarks)} "
                        f"landmarks in each of {images} images, as metrics.json says; {AGAIN}")
    return table


def error_matrix(folder: Path, column: str = "error") -> tuple[pd.DataFrame, pd.Series]:
    """A run's errors, images x landmarks in the order of the file, and the images' patients (`patient_group`).

    `column` is another one of COLUMNS. Not to be changed: a report of hundreds of runs asks for each tens of times.
    Raises UserError where the file has no such column, or is damaged.
    """
    matrices, patients = _matrices(folder)
    if column not in matrices:
        raise UserError(f"{folder / 'predictions.csv'} has no column {column}; {AGAIN}")
    return matrices[column], patients


def has_columns(folder: Path, columns: Sequence[str]) -> bool:
    """Whether `error_matrix` has them all: runs of earlier versions may not."""
    return set(columns) <= set(_matrices(folder)[0])


def _matrices(folder: Path) -> tuple[dict[str, pd.DataFrame], pd.Series]:
    return _stored_matrices(folder, stamp(folder / "predictions.csv") + stamp(folder / "metrics.json"))


@lru_cache(maxsize=2048)
def _stored_matrices(folder: Path, _files: tuple[tuple[str, int, int], ...]
                     ) -> tuple[dict[str, pd.DataFrame], pd.Series]:
    """All columns that are asked for: a file is read, and found whole, once."""
    table = read_predictions(folder)
    rows, images = pd.factorize(table["image"])
    columns, landmarks = pd.factorize(table["landmark"])
    matrices = {}
    for column in table.columns.intersection(list(COLUMNS)):
        values = np.empty((len(images), len(landmarks)))
        values[rows, columns] = table[column]
        matrices[column] = pd.DataFrame(values, pd.Index(images, name="image"), pd.Index(landmarks, name="landmark"))
    first = table.drop_duplicates("image")
    patients: dict[str, str] = {image: patient_group(image, patient)
                                for image, patient in zip(first["image"], first["patient"], strict=True)}
    return matrices, pd.Series(patients)


def check_table(path: Path, written: object) -> None:
    """UserError where `path` is no longer the table whose digest metrics.json has; older ones have none (None)."""
    if written not in (None, content_digest(path)):
        raise UserError(f"{path} was changed since it was scored: it is not the table that metrics.json was written "
                        f"with; {AGAIN}")


def check_run(folder: Path) -> None:
    """UserError where a file that the report reads of a scored run is damaged, or does not fit metrics.json."""
    metrics = read_metrics_json(folder)
    path, config = folder / "predictions.csv", folder / "config.json"
    try:
        errors = error_matrix(folder)[0].to_numpy()
        errors = errors[~np.isnan(errors)]
        scored, mean = int(metrics["physical"].get("count", len(errors))), float(metrics["physical"]["mre"])
        written = metrics.get("predictions_sha256")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'metrics.json'} is damaged: it lacks what a score has ({error!r:.80}); {AGAIN}"
                        ) from None
    now = float(errors.mean()) if len(errors) else np.nan
    if len(errors) != scored or abs(now - mean) > ROUNDING:
        raise UserError(f"{path} was changed since it was scored: the mean of its {len(errors)} errors is {now:.4f}, "
                        f"that of metrics.json, of {scored}, is {mean:.4f}; {AGAIN}")
    check_table(path, written)
    if read_record(folder / INPUTS) is not None or config.is_file():
        run = read_object(config, "delete its folder to make that run again").get("run")
        made = run if isinstance(run, dict) else {}
        for key in IDENTITY:
            if key in made and metrics.get(key) != made[key]:
                raise UserError(f"{folder / 'metrics.json'} is damaged: its {key} is {json.dumps(metrics.get(key))}, "
                                f"that of config.json {json.dumps(made[key])}; {AGAIN}")
