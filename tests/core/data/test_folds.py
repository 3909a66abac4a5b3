"""Folds of the labels: every label once, patients together, nothing of a fold in what trains for it."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from core.data.folds import fewest_outside, fold_source, folds_of
from core.data.records import DataSource, Record
from tests.conftest import error_of


def record(name, patient=None, labelled=True):
    return Record(name, Path(f"{name}.png"), np.zeros((1, 2)) if labelled else None, None, patient)


def data_set(train, unlabelled=(), test=()):
    splits = {"train": tuple(train), "validation": (), "test": tuple(test)}
    return DataSource("folder", ("tip",), splits, tuple(unlabelled), "px", (3.0,), None, nothing_held_back=not test)


@pytest.mark.parametrize("count, folds, sizes", [(10, 5, [2] * 5), (10, 3, [3, 3, 4]), (10, 10, [1] * 10),
                                                 (11, 4, [2, 3, 3, 3])])
def test_each_label_is_in_one_fold_and_folds_are_alike(count, folds, sizes):
    records = [record(f"{number:02d}") for number in range(count)]
    for draw in range(3):
        parts = folds_of(records, folds, draw)
        assert sorted(map(len, parts)) == sizes
        assert sorted(each.id for part in parts for each in part) == [each.id for each in records]
        assert fewest_outside(data_set(records), folds, [draw]) == count - max(sizes)
    assert folds_of(records, folds, 0) == folds_of(records, folds, 0) != folds_of(records, folds, 1)


def test_a_patient_is_in_one_fold():
    """Five patients of 1 to 5 images; an image without a patient is one by itself, also of a patient's name."""
    records = [record(f"{letter}{number}", letter) for count, letter in enumerate("abcde", 1)
               for number in range(count)]
    parts = folds_of([*records, record("a")], 3, 0)
    homes = Counter((each.patient, index) for index, part in enumerate(parts) for each in part)
    assert len(homes) == 6 and sum(homes.values()) == 16
    assert "evaluation.folds 7 is above the 6 patients" in error_of(folds_of, [*records, record("a")], 7, 0)


def test_what_trains_for_a_fold_has_nothing_of_it():
    """Nor do unlabelled images of its patients; the data set's own test images take no part at all."""
    train = [record(f"{letter}{number}", letter) for letter in "abcd" for number in range(2)]
    more = [record(f"{letter}9", letter, labelled=False) for letter in "abcd"] + [record("z", labelled=False)]
    source = data_set(train, more, test=[record("t")])
    seen = []
    for fold in range(1, 5):
        part = fold_source(source, 4, fold, 0)
        held = {each.patient for each in part.splits["test"]}
        assert len(held) == 1 and {each.id for each in part.splits["test"]} == {f"{p}{n}" for p in held for n in "01"}
        assert held.isdisjoint(each.patient for each in part.pretraining_records())
        assert len(part.splits["train"]) == 6 and len(part.unlabelled) == 4 and not part.unscored
        assert "t" not in {each.id for each in part.records}
        seen += held
    assert sorted(seen) == list("abcd")
