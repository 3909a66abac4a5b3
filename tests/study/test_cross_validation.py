"""A study that cross-validates: against folds made by hand, what is pooled, what is done again, what is refused."""

import csv
import json
import re

import numpy as np
import pytest

from core.config.config import Config
from core.config.load import load_config
from core.data.folds import folds_of
from core.data.source import load_source
from core.runs.places import Cell, cell_dir
from landmarks_finetuning.cross_validation import pooled_figures
from tests.study.test_identity import LAUNCH, write_config, write_images, write_labels

NAMES = ["left", "right", "top"]
FOLDED = {"finetune": {"shots": [8], "backbones": ["scratch"]}, "evaluation": {"folds": 5}}


@pytest.fixture(scope="module")
def validated(tmp_path_factory, make_values):
    """A finished cross-validation in five folds of ten labels among twelve images."""
    from study.run import run_study

    home = tmp_path_factory.mktemp("folds")
    points = write_images(home / "data", range(12))
    write_labels(home / "data", {name: points[name] for name in sorted(points)[:10]})
    (home / "data/dataset.json").write_text(json.dumps({"landmarks": NAMES}))
    run_study(load_config(write_config(home, make_values, **FOLDED)), ("finetune", "report"))
    return home


def folder(home, cell, pattern="folds-5"):
    [found] = home.glob(f"runs/tiny/landmarks/scratch/*{pattern}*/{cell}")
    return found


def read(folder):
    with (folder / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


def test_no_label_is_predicted_by_a_run_that_saw_it(validated):
    """By what each run recorded that it was made from, images' content and labels; every label is predicted once."""
    names, digests = [], {}
    for number in range(1, 6):
        run = folder(validated, f"shots008_draw0_seed0_fold{number:02d}")
        inputs = json.loads((run / "inputs.json").read_text())["images"]
        scored = json.loads((run / "scored.json").read_text())["images"]["test"]
        seen = {pixels for images in inputs.values() for pixels, _ in images.values()}
        assert len(inputs["training"]) == 8 and inputs["validation"] == {}
        assert seen.isdisjoint(pixels for pixels, _ in scored.values())
        assert {row["image"] for row in read(run)} == scored.keys()
        names += scored
        digests |= scored
    assert sorted(names) == [f"{number:02d}" for number in range(10)]
    pooled = json.loads((folder(validated, "shots008_draw0_seed0") / "scored.json").read_text())["images"]
    assert pooled == {"cross-validation": digests}


def test_a_fold_is_the_run_on_that_split_made_by_hand(validated, tmp_path, make_values, run_main):
    """dataset.json lists fold 2 as test and the rest as train: the same weights, the same predictions to the digit."""
    config = load_config(validated / "study.json")
    part = folds_of(load_source(config.dataset).splits["train"], 5, 0)[1]
    held = [record.id for record in part]
    points = write_images(tmp_path / "data", range(12))
    write_labels(tmp_path / "data", {name: points[name] for name in sorted(points)[:10]})
    (tmp_path / "data/dataset.json").write_text(json.dumps({"landmarks": NAMES, "splits": {
        "train": [name for name in sorted(points)[:10] if name not in held], "test": held}}))
    path = write_config(tmp_path, make_values, finetune={**FOLDED["finetune"], "validation": "none",
                                                         "validate_every": None})
    status, _, err = run_main(LAUNCH, "--config", path, "--stages", "finetune")
    assert status == 0, err
    by_hand = read(folder(tmp_path, "shots008_draw0_seed0", "val-none"))
    assert by_hand == read(folder(validated, "shots008_draw0_seed0_fold02")) and len(by_hand) == 6


def test_pooled_errors_are_those_of_all_folds(validated):
    """Mean, count, intervals over ten patients and the table, against the folds' own tables; shown in the report."""
    run = folder(validated, "shots008_draw0_seed0")
    metrics, rows = json.loads((run / "metrics.json").read_text()), read(run)
    parts = [row for number in range(1, 6) for row in read(folder(validated, f"shots008_draw0_seed0_fold{number:02d}"))]
    assert rows == sorted(parts, key=lambda row: row["image"]) and len(rows) == 30
    errors = np.array([float(row["error"]) for row in parts])
    assert metrics["physical"]["mre"] == pytest.approx(errors.mean()) and metrics["physical"]["count"] == 30
    low, high = metrics["physical"]["interval"]
    assert low < errors.mean() < high
    assert (metrics["images"], metrics["folds"], metrics["split"]) == (10, 5, "cross-validation")
    worst = max({row["image"] for row in rows}, key=lambda name: np.mean(
        [float(row["error"]) for row in rows if row["image"] == name]))
    assert sorted(path.name for path in (run / "overlays").iterdir())[0] == f"rank001_{worst}.png"
    page = (validated / "runs/tiny/report/index.html").read_text()
    assert "10 cross-validation images" in page and "saw neither its label nor another label of its patient" in page


def test_what_is_done_stays_and_what_changed_is_done_again(validated, make_values, run_main):
    """Pooled again after a fold was scored again, without any training."""
    path = write_config(validated, make_values, **FOLDED)
    status, out, _ = run_main(LAUNCH, "--config", path, "--stages", "finetune", "--dry-run")
    assert status == 0 and "12 runs, 12 done" in out
    status, out, err = run_main("landmarks_finetuning.evaluate", folder(validated, "shots008_draw0_seed0_fold03"))
    assert status == 0 and "2 test images" in out, err
    status, out, _ = run_main(LAUNCH, "--config", path, "--stages", "finetune")
    assert status == 0 and "a fold was scored since" in out and "12 runs, 11 done, 1 left (0 steps at most)" in out
    assert "cross-validation: 10 labels in 5 folds" in out


def test_mistakes(validated, make_values, run_main):
    for changes, told in (
            ({"finetune": {"shots": [10]}}, "finetune.shots 10 is above the 8 labelled images that 5 folds leave to "
                                            "train on; set finetune.shots to [8]"),
            ({"evaluation": {"folds": 12}}, "evaluation.folds 12 is above the 10 patients with labels for training; 10 "
                                            "leaves out one at a time"),
            ({"evaluation": {"folds": 5, "split": "validation"}}, "evaluation.split"),
            ({"finetune": {"selection": "coverage"}}, 'finetune.selection "coverage" chooses one set of images')):
        path = write_config(validated, make_values, **{**FOLDED, **changes, "evaluation": {
            "folds": 5, **changes.get("evaluation", {})}})
        status, _, err = run_main(LAUNCH, "--config", path, "--dry-run")
        assert status == 2 and err.count("\n") == 1 and told in err
    run, other = (folder(validated, f"shots008_draw0_seed0_fold0{number}") for number in (1, 2))
    for arguments, told in ((("--with", other), "is not of fold 1 of 5"),
                            (("--set", "evaluation.folds=2"), "this run is of one of 5 folds")):
        status, _, err = run_main("landmarks_finetuning.evaluate", run, *arguments)
        assert status == 2 and err.count("\n") == 1 and told in err
    path = write_config(validated, make_values, **FOLDED)
    status, _, err = run_main("landmarks_finetuning.train", "--config", path, "--backbone", "scratch", "--shots", 8)
    assert status == 2 and re.search("--fold None: evaluation.folds is 5", err)


def test_runs_of_folds_lie_beside_what_joins_them():
    config = Config.model_validate({"evaluation": {"folds": 3}})
    assert cell_dir(config, Cell("scratch", 8, 0, 0, 2)).parts[-2:] == ("folds-3", "shots008_draw0_seed0_fold02")
    assert cell_dir(config, Cell("mean_shape", 8, 0, 0)).parts[-2:] == ("folds-3", "shots008_draw0_seed0")


def simulated(rng, patients, folds):
    """(covers, error): a learner that guesses the mean of its labels, cross-validated on a drawn data set.

    Points are standard normal in the plane, so that the guess from n of them misses a new one by sqrt(1 + 1 / n) times
    a Rayleigh variable, sqrt(pi / 2) on average. Whether the pooled interval holds that.
    """
    points = rng.standard_normal((patients, 2))
    parts = np.array_split(np.arange(patients), folds)
    trained = patients - len(parts[0])
    rows, scores = {}, []
    for part in parts:
        rest = np.setdiff1d(np.arange(patients), part)[:trained]
        errors = np.linalg.norm(points[part] - points[rest].mean(axis=0), axis=1)
        rows |= {f"{index}": [{"patient": "", "error": f"{error:.4f}"}]
                 for index, error in zip(part, errors, strict=True)}
        scores.append({"physical": {"sdr": {"2": 0}, "count": len(part)}, "stored_pixels": {"mre": 0.0, "median": 0.0},
                       "paper": None, "human": None, "without_leaks": None})
    low, high = pooled_figures(rows, scores, seed=0)["physical"]["interval"]
    return low <= np.sqrt(np.pi / 2 * (1 + 1 / trained)) <= high


@pytest.mark.parametrize("patients, folds", [(10, 10), (10, 5), (30, 5)])
def test_pooled_intervals_cover_the_error_of_a_new_image(patients, folds):
    """Of 95 % intervals at least nine in ten, although the folds' runs share labels."""
    rng = np.random.default_rng(patients + folds)
    covered = np.mean([simulated(rng, patients, folds) for _ in range(200)])
    assert 0.89 <= covered <= 0.99
