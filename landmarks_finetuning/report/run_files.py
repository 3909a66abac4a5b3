"""What a scored run left for the report, read with care: a file that is cut or changed takes its run out of it."""

from __future__ import annotations

import csv
import hashlib
import io
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from core.errors import UserError
from core.formats.cells import meant
from core.formats.json_files import read_object
from core.runs.inputs import INPUTS, read_record

AGAIN = "evaluate that run again"
NUMBERS = ("x", "y", "z", "truth_x", "truth_y", "truth_z", "error", "paper_error", "human_distance",
           "expected_error", "radius90", "confidence")  # the last one of earlier versions
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
        table = pd.DataFrame(csv.DictReader(io.StringIO(text, newline="")))
        for column in table.columns.intersection(["image", "patient", "landmark"]):
            table[column] = table[column].map(meant, na_action="ignore")
        rows = set(zip(table["image"], table["landmark"], strict=True))
        complete = text.endswith("\n") and not table.isna().any(axis=None)  # NaN: of a row with fewer cells, or more
        for column in table.columns.intersection(list(NUMBERS)):
            table[column] = pd.to_numeric(table[column])
        table["error"].mean()
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is not a table of predictions ({' '.join(str(error).split())}); {AGAIN}") from None
    metrics = read_metrics_json(folder)
    images, landmarks = metrics["images"], metrics["landmark_names"]
    expected = set(product(table["image"].unique(), landmarks))
    if not complete or rows != expected or not len(table) == len(expected) == images * len(landmarks):
        raise UserError(f"{path} is cut or damaged: it has {len(table)} rows, not one for each of {len(landmarks)} "
                        f"landmarks in each of {images} images, as metrics.json says; {AGAIN}")
    return table


def check_run(folder: Path) -> None:
    """UserError where a file that the report reads of a scored run is damaged, or does not fit metrics.json."""
    metrics = read_metrics_json(folder)
    path, config = folder / "predictions.csv", folder / "config.json"
    try:
        table = read_predictions(folder)
        errors = table["error"].dropna().to_numpy(dtype=float)
        scored, mean = int(metrics["physical"].get("count", len(errors))), float(metrics["physical"]["mre"])
        written = metrics.get("predictions_sha256")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'metrics.json'} is damaged: it lacks what a score has ({error!r:.80}); {AGAIN}"
                        ) from None
    now = float(errors.mean()) if len(errors) else np.nan
    if len(errors) != scored or abs(now - mean) > ROUNDING:
        raise UserError(f"{path} was changed since it was scored: the mean of its {len(errors)} errors is {now:.4f}, "
                        f"that of metrics.json, of {scored}, is {mean:.4f}; {AGAIN}")
    if written is not None and written != hashlib.sha256(path.read_bytes()).hexdigest():
        raise UserError(f"{path} was changed since it was scored: it is not the table that metrics.json was written "
                        f"with; {AGAIN}")
    if read_record(folder / INPUTS) is not None or config.is_file():
        read_object(config, "delete its folder to make that run again")
