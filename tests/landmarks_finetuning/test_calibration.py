"""calibration.json of a finished run: what it counts, for what it holds, and what is said without it."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from core.data.dataset import load_images
from core.data.source import load_source
from landmarks_finetuning.calibration import calibrate, read_calibration
from landmarks_finetuning.decoding import locate
from landmarks_finetuning.inference import TrainedDetector
from landmarks_finetuning.metrics import physical_errors
from landmarks_finetuning.predictions import find_landmarks
from tests.conftest import error_of

EVALUATING, PREDICTING = "landmarks_finetuning.evaluate", "landmarks_finetuning.predict"


@pytest.fixture
def cell(tiny_cell, tmp_path):
    """A copy of the finished run that a test may change."""
    shutil.copytree(tiny_cell, tmp_path / "run")
    return tmp_path / "run"


def test_a_scored_run_says_what_calibrated_it(tiny_cell):
    """20 validation images of 19 landmarks; on them the mean expected error is the mean error, 90 % are in circles."""
    stored = json.loads((tiny_cell / "calibration.json").read_text())
    metrics = json.loads((tiny_cell / "metrics.json").read_text())
    assert (stored["validation_images"], stored["validation_landmarks"], len(stored["temperatures"])) == (20, 380, 19)
    assert metrics["calibration"] == {"images": 20, "landmarks": 380, "of_scored": False}
    detector = TrainedDetector(tiny_cell / "best.safetensors")
    images = load_images(load_source(detector.config.dataset).require("validation"), detector.config.dataset)
    found = find_landmarks(detector, images, calibration=read_calibration(tiny_cell, detector))
    errors = physical_errors(found.points, images.original_points(), images.spacings())
    assert found.expected_error.mean() == pytest.approx(errors.mean())
    assert (errors <= found.radius90).sum() == np.ceil(0.9 * 381)
    again, fitted = calibrate(detector, images)
    np.testing.assert_array_equal(again, errors)
    assert fitted.temperatures.tolist() == list(stored["temperatures"].values())


def test_a_calibration_holds_for_its_weights_and_decoding(cell):
    detector = TrainedDetector(cell / "best.safetensors")
    assert read_calibration(cell, detector) is not None
    assert read_calibration(cell, detector, "argmax") is None
    other = TrainedDetector(cell / "best.safetensors", ("finetune.shape_prior=0.1",))
    assert read_calibration(cell, other) is None
    with (cell / "best.safetensors").open("ab") as weights:
        weights.write(b" ")
    assert read_calibration(cell, detector) is None
    for text in ("{", "{}", '{"holds_for": 3', "[]"):
        (cell / "calibration.json").write_text(text)
        assert "calibration.json is damaged" in error_of(read_calibration, cell, detector)
    (cell / "calibration.json").unlink()
    assert read_calibration(cell, detector) is None


def test_another_score_has_a_calibration_of_its_own(cell, run_main):
    """The decoder's goes beside its score; scored on validation, it says that it saw these images before."""
    before = (cell / "calibration.json").read_text()
    assert run_main(EVALUATING, cell, "--decoder", "argmax")[0] == 0
    own = json.loads((cell / "evaluations/decoder-argmax/calibration.json").read_text())
    assert own["holds_for"]["decoder"] == "argmax" and (cell / "calibration.json").read_text() == before
    assert run_main(EVALUATING, cell, "--set", "evaluation.split=validation")[0] == 0
    metrics = json.loads((cell / "evaluations/split-validation/metrics.json").read_text())
    assert metrics["calibration"]["of_scored"]


def test_predict_says_where_nothing_is_calibrated(cell, run_main, tmp_path, phantom):
    image = phantom / "jpg/151.jpg"
    status, _, message = run_main(PREDICTING, cell, image, "--out", tmp_path / "a", "--no-overlays")
    assert status == 0 and "calibrated" not in message
    (cell / "calibration.json").unlink()
    status, _, message = run_main(PREDICTING, cell, image, "--out", tmp_path / "b", "--no-overlays")
    assert status == 0 and "expected errors are not calibrated" in message
    calibrated, raw = (pd.read_csv(tmp_path / f"{name}/predictions.csv") for name in "ab")
    assert (calibrated[["x", "y"]] == raw[["x", "y"]]).all(axis=None)
    assert (calibrated["expected_error"] != raw["expected_error"]).all()


def test_a_softmax_over_landmarks_expects_nothing(tiny_cell):
    detector = TrainedDetector(tiny_cell / "best.safetensors")
    settings = detector.config.finetune.model_copy(update={"loss": "cross_entropy_channels", "shape_prior": None})
    images = load_images(load_source(detector.config.dataset).require("test"), detector.config.dataset)
    [(_, outputs, maps)] = detector.outputs(images)
    located = locate(outputs, maps, settings, detector.sigma)
    assert np.isfinite(located.points).all()
    assert np.isnan(located.expected_error).all() and np.isnan(located.radius90).all()
