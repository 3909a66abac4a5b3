"""A study with few labels, or none: what it asks for, what it trains on, and what it shows."""

import csv
import json

import numpy as np
import pytest

from core.runs.places import ema_path
from landmarks_finetuning.pictures.cases import pictured_image
from tests.study.test_identity import LAUNCH, write_config, write_images, write_labels


def test_pretraining_needs_no_label(tmp_path, make_values, run_main):
    """Images alone are pre-trained on and reported; what trains a detector ends before anything is run."""
    write_images(tmp_path / "data", range(6))
    path = write_config(tmp_path, make_values)
    status, out, err = run_main(LAUNCH, "--config", path, "--stages", "pretrain", "report")
    assert status == 0, err
    assert "0 train, 0 validation, 0 test; 0 landmarks; 6 images for pre-training" in out
    assert ema_path(tmp_path / "runs/tiny", 6).is_file() and (tmp_path / "runs/tiny/report/index.html").is_file()
    status, out, err = run_main(LAUNCH, "--config", path)
    assert status == 2 and err.count("\n") == 1 and "has no labelled image: add labels" in err


def test_shots_above_the_labels_are_named_once(tmp_path, make_values, run_main):
    """With the numbers that can be had, all labels among them, before anything is run."""
    points = write_images(tmp_path / "data", range(14))
    write_labels(tmp_path / "data", {name: points[name] for name in sorted(points)[:12]})
    (tmp_path / "data/dataset.json").write_text(json.dumps({"landmarks": ["left", "right", "top"]}))
    for shots, told in (([1, 5, 10, 25, 50], "25, 50 are above the training split's 12 labelled images; "
                                             "set finetune.shots to [1, 5, 10, 12]"),
                        ([13], "13 is above the training split's 12 labelled images; set finetune.shots to [12]")):
        path = write_config(tmp_path, make_values, finetune={"shots": shots})
        status, _, err = run_main(LAUNCH, "--config", path)
        assert status == 2 and err.count("\n") == 1 and f"finetune.shots {told}" in err
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """Fourteen images of which ten are labelled, without splits."""
    home = tmp_path_factory.mktemp("ten")
    points = write_images(home / "data", range(14))
    write_labels(home / "data", {name: points[name] for name in sorted(points)[:10]})
    (home / "data/dataset.json").write_text(json.dumps({"landmarks": ["left", "right", "top"]}))
    return home


def test_every_label_trains_and_unlabelled_images_are_answered(ten, make_values, run_main):
    """No label is held back, the last step's weights count, predictions are of the four other images, done is done."""
    path = write_config(ten, make_values, finetune={"shots": [10], "backbones": ["scratch"]})
    status, out, err = run_main(LAUNCH, "--config", path)
    assert status == 0, err
    assert "10 train, 0 validation, 0 test" in out and "note  every label is for training" in out
    assert "labels train, as" not in out
    fewer = run_main(LAUNCH, "--config", path, "--dry-run", "--shots", "2", "7")
    assert "note  7 of the 10 labels train, as finetune.shots says; --shots 10 takes all\n" in fewer[1]
    note = "note  each draw of 10 labels takes all 10: finetune.draws [0] trains on them once\n"
    drawn = "finetune.draws=[0,1]"
    twice = run_main(LAUNCH, "--config", path, "--dry-run", "--shots", "7", "10", "--set", drawn)
    several = run_main(LAUNCH, "--config", path, "--dry-run", "--shots", "7", "--set", drawn)
    assert note not in out and note in twice[1] and "takes all 10" not in several[1]
    run = next(ten.glob("runs/tiny/landmarks/scratch/*/shots010_draw0_seed0"))
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["training_images"] == [f"{number:02d}" for number in range(10)]
    assert (metrics["physical"], metrics["validation_labels"], metrics["images"]) == (None, 0, 4)
    assert metrics["iteration"] == 4  # of 4: nothing chose an earlier one
    with (run / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["image"] for row in rows} == {"10", "11", "12", "13"} and len(rows) == 12
    assert "error" not in rows[0] and "truth_x" not in rows[0]
    doubt = {name: np.mean([float(row["expected_error"]) for row in rows if row["image"] == name])
             for name in ("10", "11", "12", "13")}
    shown = [pictured_image(path) for path in sorted((run / "overlays").iterdir())]
    assert shown == sorted(doubt, key=lambda name: -doubt[name])[:2]
    page = (ten / "runs/tiny/report/index.html").read_text()
    assert "No label is held back" in page and "4 unlabelled images" in page
    assert f"Predictions on image {shown[0]}" in page
    status, out, _ = run_main(LAUNCH, "--config", path, "--dry-run")
    assert status == 0 and "2 runs, 2 done" in out
    status, out, _ = run_main("landmarks_finetuning.evaluate", run)
    assert status == 0 and "no score, but predictions on 4 unlabelled images" in out


def test_a_schedule_that_needs_validation_labels_is_refused(ten, make_values, run_main):
    for finetune, told in (({"scheduler": "plateau"}, 'scheduler "plateau"'),
                           ({"early_stop_patience": 3}, "early_stop_patience"),
                           ({"pretraining_iteration": "best"}, 'pretraining_iteration "best"')):
        path = write_config(ten, make_values, experiment={"name": "other"}, finetune={"shots": [10], **finetune})
        status, _, err = run_main(LAUNCH, "--config", path, "--dry-run")
        assert status == 2 and err.count("\n") == 1 and f"finetune.{told} needs validation labels" in err
    path = write_config(ten, make_values, experiment={"name": "other"}, evaluation={"split": "validation"},
                        finetune={"shots": [10]})
    status, _, err = run_main(LAUNCH, "--config", path, "--dry-run")
    assert status == 2 and "validation split of folder" in err
