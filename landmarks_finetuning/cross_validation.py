"""The runs of a cross-validation as one: every label's prediction by the run that did not see it, and their errors."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from core.config.config import Config
from core.config.starts import MEAN_SHAPE
from core.data.digests import data_digests
from core.data.records import patient_group
from core.data.source import load_source
from core.errors import UserError
from core.files import content_digest, write_atomically, write_json
from core.runs.identity import scoring_settings
from core.runs.inputs import CROSS_VALIDATED, CROSS_VALIDATION, SCORED, GroupedImages, images_digest, write_inputs
from core.runs.places import Cell, cell_dir, start_path
from core.runs.record import write_run_config
from landmarks_finetuning.metrics import share_within, summarise
from landmarks_finetuning.pictures.cases import pictured_image
from landmarks_finetuning.statistics import bootstrap_interval

Rows = dict[str, list[dict[str, str]]]  # of predictions.csv by image


def pool(config: Config, cell: Cell) -> Path:
    """Join the scores of a cell's folds: predictions.csv, overlays/ and a metrics.json with intervals over patients.

    UserError where a fold is not scored, or the folds together do not have each label once.
    """
    folds = [cell_dir(config, replace(cell, fold=number + 1)) for number in range(config.evaluation.folds or 0)]
    scores = [_read_json(folder / "metrics.json") for folder in folds]
    source, run_dir = load_source(config.dataset), cell_dir(config, cell)
    records = source.require("train")
    rows, header = _joined(folds)
    unknown = rows.keys() - {record.id for record in records}
    if unknown or len(rows) != sum(score["images"] for score in scores):
        raise UserError(f"{run_dir}: the folds are not of the data set's labels as they are now; launch again")
    first = scores[0]
    images: GroupedImages = {CROSS_VALIDATION: data_digests(records, source.landmark_names, config.dataset,
                                                            scoring=True)}
    metrics = {**first, **_of_all(scores), **pooled_figures(rows, scores, config.experiment.seed),
               "split": CROSS_VALIDATION, "folds": len(folds), "images": len(rows), "scored_on": images_digest(images),
               "seconds": sum(score["seconds"] or 0.0 for score in scores) or None,
               "training_images": sorted({name for score in scores for name in score["training_images"]})}
    write_run_config(run_dir, config.plain(), {"stage": "pool"})
    start = None if cell.backbone == MEAN_SHAPE else start_path(config, cell.backbone)
    inputs = {CROSS_VALIDATED: data_digests(records, source.landmark_names, config.dataset)}
    write_inputs(run_dir, inputs, start if start is not None and start.is_file() else None)
    lines = [",".join(header), *(line for name in sorted(rows) for line in map(_line, rows[name]))]
    write_atomically(run_dir / "predictions.csv", ("\n".join(lines) + "\n").encode())
    _copy_overlays(run_dir / "overlays", folds, rows, config.evaluation.overlays)
    settings = scoring_settings(config, cell.backbone, first["decoder"])
    write_json(run_dir / SCORED, {"images": images, "settings": settings})
    write_json(run_dir / "metrics.json", metrics | {"predictions_sha256": content_digest(run_dir / "predictions.csv")})
    return run_dir


def pooled_figures(rows: Rows, scores: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """What of metrics.json is about errors, of all folds' rows together, an image's patient counted once.

    `scores` are the folds' metrics.json.
    """
    first, names = scores[0], list(rows)
    thresholds = [float(limit) for limit in first["physical"]["sdr"]]
    errors = _column(rows, "error")
    patients = [patient_group(name, rows[name][0]["patient"] or None) for name in names]
    interval = bootstrap_interval(errors, patients, seed)
    figures: dict[str, Any] = {"physical": {**summarise(errors, thresholds),
                                            "interval": None if np.isnan(interval).any() else interval}}
    stored = [score["stored_pixels"] for score in scores]
    weights = [score["physical"]["count"] for score in scores]
    figures["stored_pixels"] = {"mre": float(np.average([each["mre"] for each in stored], weights=weights)),
                                "median": float(np.median([each["median"] for each in stored]))}
    if all(score["paper"] is not None for score in scores):
        figures["paper"] = summarise(_column(rows, "paper_error"), thresholds)
    if all(score["human"] is not None for score in scores):
        human = _column(rows, "human_distance")
        figures["human"] = {**summarise(human, thresholds), "within": share_within(errors, human)}
    leaked = sorted({name for score in scores for name in (score["without_leaks"] or {"left_out": ()})["left_out"]})
    kept = [index for index, name in enumerate(names) if name not in leaked]
    rest = summarise(errors[kept], thresholds) if kept else dict.fromkeys(("mre", "median", "sdr"))
    figures["without_leaks"] = {"left_out": leaked, "images": len(kept), **{
        key: rest[key] for key in ("mre", "median", "sdr")}} if leaked else None
    return figures


def _of_all(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """What else of metrics.json differs from fold to fold: a mean, the least, or nothing where neither makes sense."""
    validated = [score["validation_mre"] for score in scores if score.get("validation_mre") is not None]
    calibrations = [score["calibration"] for score in scores if score["calibration"] is not None]
    least = {key: min(each[key] for each in calibrations) for key in ("images", "landmarks")} if calibrations else {}
    alone = any(score.get("release") for score in scores)
    return {"validation_mre": float(np.mean(validated)) if validated else None, "rounds": [], "release": None,
            "release_left_out": "it is given for each fold alone" if alone else None,
            "calibration": {**least, "of_scored": False} if len(calibrations) == len(scores) else None}


def _joined(folds: list[Path]) -> tuple[Rows, list[str]]:
    """The rows of all folds' predictions.csv by image, and the header; UserError for an image in two of them."""
    rows: Rows = {}
    header: list[str] = []
    for folder in folds:
        own: Rows = {}
        with (folder / "predictions.csv").open(newline="", encoding="utf8") as file:
            table = csv.DictReader(file)
            for row in table:
                own.setdefault(row["image"], []).append(row)
            header = list(table.fieldnames or ())
        if twice := sorted(rows.keys() & own.keys()):
            raise UserError(f"{folder}: image {twice[0]} is in two folds; delete the folders of this cell's folds")
        rows |= own
    return rows, header


def _column(rows: Rows, key: str) -> np.ndarray:
    """(images, landmarks) of a column; NaN where the cell is empty."""
    return np.array([[float(row[key] or "nan") for row in some] for some in rows.values()])


def _line(row: dict[str, str]) -> str:
    """A row of a CSV as it was read."""
    quoted = ('"' + value.replace('"', '""') + '"' if set(value) & set(',"\n') else value for value in row.values())
    return ",".join(quoted)


def _copy_overlays(folder: Path, folds: list[Path], rows: Rows, count: int) -> None:
    """The worst `count` images of all folds, each of which has its own worst ones, with their ranks among all."""
    shutil.rmtree(folder, ignore_errors=True)
    errors = dict(zip(rows, np.nanmean(_column(rows, "error"), axis=1), strict=True))
    pictures = {pictured_image(path): path for fold in folds for path in sorted(fold.glob("overlays/rank*.png"))}
    for rank, name in enumerate(sorted(pictures, key=lambda name: -errors[name])[:count], start=1):
        picture = pictures[name]
        write_atomically(folder / f"rank{rank:03d}_{picture.name.partition('_')[2]}", picture.read_bytes())


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing: this fold is not scored yet")
    return json.loads(path.read_text(encoding="utf8"))
