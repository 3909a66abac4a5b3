"""Reliability, coverage and ROC of expected errors in the report, against numbers by hand."""

import numpy as np
import pandas as pd
import pytest

from landmarks_finetuning.report.build import build_report
from landmarks_finetuning.report.collect import read_experiment
from landmarks_finetuning.report.confidence import confidences
from landmarks_finetuning.statistics import rate_interval
from tests.landmarks_finetuning.report.test_report import write_run


def expect(folder, expected, radii):
    """Give a run's table of 4 images x 2 landmarks its figures, in place of an earlier version's confidence."""
    table = pd.read_csv(folder / "predictions.csv", dtype={"image": str}).drop(columns="confidence")
    table["expected_error"], table["radius90"] = np.ravel(expected).astype(float), np.ravel(radii).astype(float)
    table.to_csv(folder / "predictions.csv", index=False)


@pytest.fixture
def study(tmp_path):
    """Two draws of ddpm, the first calibrated; scratch of an earlier version; a scratch run without figures at 5."""
    root = tmp_path / "study"
    known = {"calibration": {"images": 20, "landmarks": 38, "of_scored": False}}
    errors = [[1, 2], [3, 1], [1, 5], [2, np.nan]]
    expect(write_run(root, "ddpm", 10, 0, errors, **known), [[1, 2], [4, 2], [1, 3], [3, 9]], [[2, 3]] * 4)
    expect(write_run(root, "ddpm", 10, 1, errors, **known), [[2, 2], [2, 2], [2, 2], [2, 2]], [[1, 1]] * 4)
    write_run(root, "scratch", 10, 0, errors)
    expect(write_run(root, "scratch", 5, 0, errors), np.full((4, 2), np.nan), np.full((4, 2), np.nan))
    return root


def test_by_hand(study):
    """Errors above 2.5: 3 and 5 of seven in each draw.

    In the first draw they have 4 and 3 against 1, 2, 2, 1 and 3, in the second all have 2. In circles: of 2 and 3 all
    but 3 and 5, of 1 the three of 1.
    """
    [found] = confidences(read_experiment(study).runs)
    row = found.row
    assert (row["backbone"], row["shots"], row["calibration_landmarks"], row["calibrated_on_scored"]) == (
        "ddpm", 10, 38, False)
    assert row["expected"] == pytest.approx((16 + 14) / 14) and row["error"] == pytest.approx(15 / 7)
    assert row["coverage"] == pytest.approx(100 * (5 + 3) / 14)
    low, high = rate_interval(np.array([[3.0], [2], [2], [1]]), np.array([[4.0], [4], [4], [2]]))
    assert (row["coverage_low"], row["coverage_high"]) == (low[0], high[0])
    assert (row["threshold"], row["missed"], row["landmarks"]) == (2.5, 4, 14)
    large, small = np.array([4, 3, 2, 2]), np.array([1, 2, 2, 1, 3, 2, 2, 2, 2, 2])
    assert row["area"] == pytest.approx((np.sign(large[:, None] - small) / 2 + 0.5).mean())
    np.testing.assert_allclose(found.bins, [[30 / 14, 15 / 7]])
    assert [rate.tolist() for rate in found.roc] == [[0, 0, 0.1, 0.8, 1], [0, 0.25, 0.5, 1, 1]]


def test_bins_hold_landmarks_of_like_expected_error(tmp_path):
    """80 images of two landmarks, each error twice what is expected: eight groups of twenty on a line of slope 2."""
    rng = np.random.default_rng(0)
    expected = rng.uniform(0.5, 4, (80, 2))
    folder = write_run(tmp_path / "study", "ddpm", 10, 0, (2 * expected).tolist())
    expect(folder, expected, 2 * expected)
    [found] = confidences(read_experiment(tmp_path / "study").runs)
    np.testing.assert_allclose(found.bins[:, 1], 2 * found.bins[:, 0])
    np.testing.assert_allclose(found.bins[:, 0], np.sort(expected.ravel()).reshape(8, 20).mean(axis=1))
    assert found.row["coverage"] == 100 and found.row["area"] == 1 and found.row["calibration_landmarks"] == 0


def test_the_page_and_its_files(study):
    page = build_report([study]).read_text(encoding="utf8")
    table = pd.read_csv(study / "report/tables/confidence.csv")
    assert table[["experiment", "backbone", "shots", "unit"]].to_numpy().tolist() == [["study", "ddpm", 10, "mm"]]
    assert (study / "report/figures/study_cephalo_test_confidence.png").is_file()
    assert "Expected errors: do they come true?" in page and "4 of 14" in page


def test_a_report_of_earlier_runs_has_no_such_part(tmp_path):
    write_run(tmp_path / "study", "ddpm", 10, 0, [[1, 2], [3, 4]])
    page = build_report([tmp_path / "study"]).read_text(encoding="utf8")
    assert "come true" not in page and not (tmp_path / "study/report/tables/confidence.csv").exists()
