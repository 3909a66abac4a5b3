"""What a detector that was trained on every label there is says of unlabelled images: pictures in place of a score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from core.config.config import Config
from core.data.digests import data_digests
from core.data.records import DataSource, Record
from core.files import write_json
from core.runs.identity import scoring_settings
from core.runs.inputs import SCORED, GroupedImages, images_digest
from landmarks_finetuning.pictures.cases import draw_ranked
from landmarks_finetuning.predictions import Predictions, table_rows, write_slicer_files, write_table


def write_answers(folder: Path, config: Config, source: DataSource, use: str, records: tuple[Record, ...],
                  predictions: Predictions | None, identity: dict[str, Any]) -> dict[str, Any]:
    """Leave predictions.csv, markups of volumes, overlays/ and a metrics.json without a score; returns what that holds.

    The pictures are of the images with the largest expected error, on the mean of their landmarks. `use` is what the
    `records` are to the data set; `predictions` None: there are none.
    """
    images: GroupedImages = {use: data_digests(records, source.landmark_names, config.dataset, scoring=True)}
    metrics: dict[str, Any] = {
        **identity, "dataset": config.dataset.name, "layout": source.layout, "split": use, "unit": source.unit,
        "phantom": config.dataset.phantom is not None, "images": 0 if predictions is None else len(records),
        "physical": None,
        "landmark_names": list(source.landmark_names), "image_size": list(config.dataset.image_size),
        "scored_on": images_digest(images)}
    if predictions is not None:
        write_table(folder / "predictions.csv", table_rows(predictions))
        write_slicer_files(folder / "markups", predictions)
        doubt = _means(predictions.expected_error)
        titles = [f"{record.id}: largest {text}" if (text := _most(predictions, index)) else record.id
                  for index, record in enumerate(records)]
        draw_ranked(folder / "overlays", config.evaluation.overlays, predictions, doubt, titles)
        known = doubt[~np.isnan(doubt)]
        metrics["expected_error"] = float(known.mean()) if len(known) else None
    settings = scoring_settings(config, identity["backbone"], identity["decoder"])
    write_json(folder / SCORED, {"images": images, "settings": settings})
    write_json(folder / "metrics.json", metrics)
    return metrics


def _means(values: np.ndarray) -> np.ndarray:
    """Means of the rows (M, N) over what is known; NaN where nothing is."""
    known = ~np.isnan(values)
    sums, counts = np.where(known, values, 0.0).sum(axis=1), known.sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _most(predictions: Predictions, index: int) -> str:
    """"expected error 4.2 mm (Gonion)" of the most doubtful landmark; empty where nothing is expected."""
    expected = predictions.expected_error[index]
    if np.isnan(expected).all():
        return ""
    most = int(np.nanargmax(expected))
    return f"{predictions.expected_text(index, most)} ({predictions.names[most]})"
