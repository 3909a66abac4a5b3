"""Whether expected errors come true: reliability, the circles' coverage and the ROC, by method and number of labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from landmarks_finetuning.metrics import ROUNDING_NOISE, within
from landmarks_finetuning.report.collect import sdr_columns, select
from landmarks_finetuning.report.findings import UNTRAINED
from landmarks_finetuning.report.frames import named_rows
from landmarks_finetuning.report.order import best_first
from landmarks_finetuning.report.run_files import error_matrix, has_columns
from landmarks_finetuning.statistics import patient_sums, rate_interval, roc_area, roc_curve

COLUMNS = ("error", "expected_error", "radius90")
MOST_BINS = 8
FEWEST_IN_BIN = 20


@dataclass(frozen=True, eq=False)
class Confidence:
    """Of one method at one number of labels, all its runs pooled.

    row: the table's, plain numbers; bins (K, 2): mean expected error and mean error of landmarks of like expected
    error; roc: false and true positive rates of errors above row["threshold"], None without such errors.
    """

    row: dict[str, Any]
    bins: np.ndarray
    roc: tuple[np.ndarray, np.ndarray] | None


def confidences(runs: pd.DataFrame) -> list[Confidence]:
    """Of the main variants, fewest labels first, the best method first; those whose runs have expected errors."""
    threshold = max((float(c.rsplit("_", 1)[1]) for c in sdr_columns(runs)), default=np.nan)
    found = []
    for shots in sorted(runs["shots"].unique()):
        for backbone, variant in best_first(runs).items():
            group = select(runs, backbone, variant, shots)
            values, patients = _values(group) if backbone != UNTRAINED else (None, None)
            if values is not None and patients is not None:
                identity = {"backbone": backbone, "variant": variant, "shots": int(shots),
                            "calibration_landmarks": int(group["calibration_landmarks"].min()),
                            "calibrated_on_scored": bool(group["calibrated_on_scored"].any())}
                found.append(_confidence(identity, values, patients, threshold))
    return found


def _values(group: pd.DataFrame) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """(3, images, landmarks of all runs) of COLUMNS and the images' patients; NaN where one of the three is missing.

    Runs of versions that had no expected errors do not count; None where no run has any.
    """
    pooled, images, patients = [], None, None
    for run in named_rows(group):
        if not has_columns(run.path, COLUMNS):
            continue
        matrices = [error_matrix(run.path, column) for column in COLUMNS]
        images, patients = (matrices[0][0].index, matrices[0][1]) if images is None else (images, patients)
        pooled.append(np.stack([matrix.reindex(images).to_numpy(dtype=float) for matrix, _ in matrices]))
    if not pooled or patients is None:
        return None, None
    values = np.concatenate(pooled, axis=2)
    values = np.where(np.isnan(values).any(axis=0), np.nan, values)
    return (None, None) if np.isnan(values).all() else (values, patients.to_numpy())


def _confidence(identity: dict[str, Any], values: np.ndarray, patients: np.ndarray, threshold: float) -> Confidence:
    errors, expected, radii = values
    held = np.where(np.isnan(errors), np.nan, errors <= radii + ROUNDING_NOISE)
    sums = patient_sums(held, patients)
    low, high = rate_interval(*(part[:, None] for part in sums))
    seen = ~np.isnan(errors)
    whose = np.broadcast_to(patients[:, None], errors.shape)[seen]
    missed = within(errors, threshold)[seen] == 0
    area, area_low, area_high = roc_area(expected[seen], missed, whose)
    row = {**identity, "expected": expected[seen].mean(), "error": errors[seen].mean(),
           "coverage": 100 * sums[0].sum() / sums[1].sum(), "coverage_low": low[0], "coverage_high": high[0],
           "threshold": threshold, "missed": int(missed.sum()), "landmarks": int(seen.sum()),
           "area": area, "area_low": area_low, "area_high": area_high}
    order = np.argsort(expected[seen], kind="stable")
    parts = np.array_split(order, max(1, min(MOST_BINS, len(order) // FEWEST_IN_BIN)))
    bins = np.array([(expected[seen][part].mean(), errors[seen][part].mean()) for part in parts])
    return Confidence(row, bins, None if np.isnan(area) else roc_curve(expected[seen], missed))
