"""Cross-validation: the labels for training in folds, each of which is predicted by runs that did not see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from core.config.config import Config
from core.data.records import DataSource, Record, patient_group
from core.data.source import load_source
from core.errors import UserError


def folds_of(records: Sequence[Record], folds: int, draw: int) -> list[tuple[Record, ...]]:
    """The records in `folds` parts of nearly as many patients each, by draw number `draw` of a seeded shuffle.

    A patient's images are in one part; an image without a named patient is one by itself. As many folds as patients is
    leave-one-out. UserError for fewer patients than folds.
    """
    patients = sorted({patient_group(record.id, record.patient) for record in records})
    if folds > len(patients):
        raise UserError(f"evaluation.folds {folds} is above the {len(patients)} patients with labels for training; "
                        f"{len(patients)} leaves out one at a time")
    order = np.random.default_rng([draw, 2]).permutation(len(patients))
    part = {patients[index]: place % folds for place, index in enumerate(order.tolist())}
    return [tuple(r for r in records if part[patient_group(r.id, r.patient)] == fold) for fold in range(folds)]


def fold_source(source: DataSource, folds: int, fold: int, draw: int) -> DataSource:
    """The data set of one run: fold number `fold`, from 1, is its test split, the other folds are for training.

    The data set's own test images take no part, and its unlabelled images of the fold's patients none either.
    """
    held = folds_of(source.require("train"), folds, draw)[fold - 1]
    ids, patients = {record.id for record in held}, {record.patient for record in held} - {None}
    splits = {**source.splits, "train": tuple(r for r in source.splits["train"] if r.id not in ids), "test": held}
    return replace(source, splits=splits, unlabelled=tuple(r for r in source.unlabelled if r.patient not in patients))


def cell_source(config: Config, draw: int, fold: int | None, keep_draws: bool = True) -> DataSource:
    """The data set of a run: the config's (`load_source`), or its part where the run is one of a cross-validation."""
    source = load_source(config.dataset, keep_draws)
    if fold is None:
        return source
    if config.evaluation.folds is None or not 1 <= fold <= config.evaluation.folds:
        raise UserError(f"fold {fold} does not exist: evaluation.folds is {config.evaluation.folds}, and they count "
                        "from 1")
    return fold_source(source, config.evaluation.folds, fold, draw)


def fewest_outside(source: DataSource, folds: int, draws: Sequence[int]) -> int:
    """Labels that every run of a cross-validation can be trained on: all less those of the largest fold."""
    records = source.require("train")
    return len(records) - max(len(part) for draw in draws for part in folds_of(records, folds, draw))
