"""Two tables against each other: by hand, and against the report's own comparison of two runs."""

import csv
import json
import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import permutation_test

from landmarks_finetuning.report.collect import compare, read_experiment, select
from tests.landmarks_finetuning.report.test_report import digested, write_run

COMPARE = "study.compare"


def wide(path, rows, spacing=None):
    """landmarks.csv of {image: [(x, y) or None, ...]} of sella and nasion."""
    head = "image,patient,sella_x,sella_y,nasion_x,nasion_y" + (",spacing_x,spacing_y" if spacing else "")
    lines = [head]
    for image, points in rows.items():
        cells = [image, image[0], *(str(c) for p in points for c in (p or ("", "")))]
        lines.append(",".join([*cells, *map(str, spacing or ())]))
    path.write_text("\n".join(lines) + "\n")
    return path


def long(path, rows):
    table = [{"image": image, "landmark": name, "x": point[0], "y": point[1]} for image, points in rows.items()
             for name, point in zip(("sella", "nasion"), points, strict=True)]
    pd.DataFrame(table).to_csv(path, index=False)
    return path


def test_tables_of_predict_and_of_evaluate(tmp_path, run_main):
    """One names files, the other ids: the same images. Two files of one id stay two, and one image twice is refused."""
    one = long(tmp_path / "a.csv", {"p1.png": [(0, 0), (5, 5)], "p2.nii.gz": [(1, 1), (6, 6)]})
    other = long(tmp_path / "b.csv", {"p1": [(3, 4), (5, 5)], "p2": [(1, 1), (6, 6)]})
    status, out, _ = run_main(COMPARE, one, other, "--spacing", "1")
    assert status == 0 and "2 images" in out
    both = long(tmp_path / "c.csv", {"p1.png": [(0, 0), (5, 5)], "p1.tif": [(1, 1), (6, 6)]})
    assert "no image in common" in run_main(COMPARE, both, other)[2]
    path = wide(tmp_path / "d.csv", {"p1": [(0, 0), (5, 5)]})
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    status, _, said = run_main(COMPARE, path, other)
    assert status == 2 and f'{path}: image "p1" is there twice' in said


def test_a_folder_stands_for_its_predictions(tmp_path, run_main):
    (tmp_path / "run").mkdir()
    long(tmp_path / "run/predictions.csv", {"p1": [(0, 0), (5, 5)]})
    other = long(tmp_path / "b.csv", {"p1": [(3, 4), (5, 5)]})
    assert "A and B: 2.500 mm" in run_main(COMPARE, tmp_path / "run", other, "--spacing", "1")[1]
    status, _, said = run_main(COMPARE, tmp_path, other)
    assert (status, said) == (2, f"error: landmark file {tmp_path}/predictions.csv does not exist\n")


def figures(path):
    with path.open(newline="") as file:
        return {row["landmark"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("option, value", [("--spacing", "nan"), ("--spacing", "0"), ("--spacing", "inf"),
                                           ("--thresholds", "-1"), ("--thresholds", "nan")])
def test_spacings_and_thresholds_are_numbers_above_0(tmp_path, run_main, option, value):
    one = long(tmp_path / "a.csv", {"p1.png": [(0, 0), (5, 5)]})
    status, _, said = run_main(COMPARE, one, one, f"{option}={value}")
    assert (status, said) == (2, f"error: {option} must be finite numbers above 0\n")


def test_two_doctors_by_hand(run_main, tmp_path):
    """Distances in mm at 0.1 (x) and 0.2 (y) a pixel: 0.5 (3, 4 -> 0.3, 0.8: sqrt 0.73), 0.4, 0, and one not set."""
    first = wide(tmp_path / "a.csv", {"p1": [(0, 0), (10, 10)], "q1": [(5, 5), (7, 7)], "r9": [(0, 0), (0, 0)]})
    second = long(tmp_path / "b.csv", {"q1": [(5, 5), (np.nan, np.nan)], "p1": [(3, 4), (14, 10)]})
    status, out, error = run_main(COMPARE, first, second, "--spacing", "0.1", "0.2", "--out", tmp_path / "f.csv")
    assert status == 0, error
    mean = (np.sqrt(0.73) + 0.4 + 0) / 3
    assert "2 images of 2 patients, 2 landmarks, 3 pairs; left out: 1 images are not in all tables; 1 landmarks" in out
    assert f"distance between A and B: {mean:.3f} mm (95 % interval nan to nan)" in out  # two patients say nothing
    assert f"B lies from A by, on the mean: x +{(0.3 + 0.4) / 3:.3f}, y +{0.8 / 3:.3f} mm" in out
    assert float(figures(tmp_path / "f.csv")["nasion"]["distance"]) == pytest.approx(0.4)


def test_images_are_the_same_with_and_without_their_suffix(run_main, tmp_path):
    """Predictions name files, labels need not; two files of one name stay apart."""
    first = long(tmp_path / "a.csv", {"b/p1.png": [(0, 0), (1, 1)], "q1.png": [(3, 0), (1, 1)]})
    second = long(tmp_path / "b.csv", {"b/p1.png": [(0, 5), (1, 1)], "q1.png": [(3, 0), (1, 1)]})
    truth = wide(tmp_path / "truth.csv", {"b/p1": [(0, 0), (1, 1)], "q1": [(3, 2), (1, 1)]})
    status, out, error = run_main(COMPARE, first, second, "--truth", truth, "--spacing", "1")
    assert status == 0 and "2 images of 2 patients, 2 landmarks, 4 pairs" in out, error
    fewer = wide(tmp_path / "fewer.csv", {"q1": [(3, 2), (1, 1)]})
    assert "left out: 1 images are not in all tables\n" in run_main(COMPARE, first, second, "--truth", fewer)[1]
    twice = long(tmp_path / "c.csv", {"q1.png": [(0, 0), (1, 1)], "q1.jpg": [(3, 0), (1, 1)]})
    status, _, error = run_main(COMPARE, twice, truth)
    assert status == 2 and "no image in common: they begin with q1.png, b/p1" in error


def test_two_detectors_against_a_truth(run_main, tmp_path):
    """Eight patients: A is always 3 px off, B 1 px, but for one patient of 5 px: the exact test of scipy."""
    images = [f"{letter}1" for letter in "abcdefgh"]
    off = dict.fromkeys(images, 1) | {"h1": 5}
    truth = wide(tmp_path / "t.csv", {i: [(10, 10), (20, 20)] for i in images}, (0.5, 0.5))
    first = long(tmp_path / "a.csv", {i: [(13, 10), (20, 23)] for i in images})
    second = long(tmp_path / "b.csv", {i: [(10 + off[i], 10), (20, 20 - off[i])] for i in images})
    status, out, error = run_main(COMPARE, first, second, "--truth", truth, "--out", tmp_path / "f.csv")
    assert status == 0, error
    row = figures(tmp_path / "f.csv")["all"]
    assert (float(row["a"]), float(row["b"]), float(row["difference"])) == pytest.approx((1.5, 0.75, 0.75))
    gains = np.array([(3 - off[i]) / 2 for i in images])
    expected = permutation_test((gains,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert float(row["p"]) == pytest.approx(expected) and "no clear difference" in out
    assert float(figures(tmp_path / "f.csv")["sella"]["p_holm"]) == pytest.approx(min(1, 2 * expected))
    assert "A: mean error 1.500 mm" in out and "within mm 2: 100.0 % " in out


def test_two_scored_runs_give_the_reports_figures(run_main, tmp_path):
    rng = np.random.default_rng(0)
    errors = rng.gamma(2, 1, (20, 2)), rng.gamma(2, 3, (20, 2))
    errors[0][3, 1] = errors[1][3, 1] = np.nan
    runs = [write_run(tmp_path / "s", name, 10, 0, values) for name, values in zip(("ddpm", "scratch"), errors,
                                                                                  strict=True)]
    status, out, error = run_main(COMPARE, *(run / "predictions.csv" for run in runs), "--out", tmp_path / "f.csv")
    assert status == 0, error
    table = read_experiment(tmp_path / "s").runs
    report = compare(select(table, "scratch", "default", 10), select(table, "ddpm", "default", 10))
    row = figures(tmp_path / "f.csv")["all"]
    for ours, theirs in (("a", "rival_mre"), ("b", "method_mre"), ("low", "low"), ("high", "high"), ("p", "p"),
                         ("difference", "difference")):
        assert float(row[ours]) == pytest.approx(report[theirs], abs=1e-9), ours
    assert row["unit"] == "mm" and "A is better" in out and "20 images of 20 patients, 2 landmarks, 39 pairs" in out


def test_a_scored_table_that_was_changed_is_refused(run_main, tmp_path):
    """A copy in another folder is anybody's table."""
    path = write_run(tmp_path, "ddpm", 10, 0, [[1, 1], [2, 2], [3, 3]]) / "predictions.csv"
    digested(path)
    assert run_main(COMPARE, path, path)[0] == 0
    path.write_text(path.read_text().replace("Sella,1,2", "Sella,1,9", 1))
    status, _, said = run_main(COMPARE, path, path)
    assert status == 2 and f"error: {path} was changed since it was scored" in said and said.count("\n") == 1
    copy = tmp_path / "predictions.csv"
    copy.write_bytes(path.read_bytes())
    assert run_main(COMPARE, copy, copy)[0] == 0


def test_mistakes_are_one_line(run_main, tmp_path):
    first = wide(tmp_path / "a.csv", {"p1": [(0, 0), (10, 10)]})
    other = wide(tmp_path / "b.csv", {"p2": [(0, 0), (10, 10)]})
    (tmp_path / "no.csv").write_text("name,value\na,1\n")
    (tmp_path / "s").mkdir()
    scored = write_run(tmp_path / "s/x", "ddpm", 1, 0, [[1, 1]]) / "predictions.csv"
    moved = write_run(tmp_path / "s/y", "ddpm", 1, 0, [[1, 1]]) / "predictions.csv"
    moved.write_text(moved.read_text().replace(",1,2,1,2,", ",1,2,1,5,"))
    metrics = write_run(tmp_path / "s/z", "ddpm", 1, 0, [[1, 1]]) / "metrics.json"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"unit": "px"}))
    for message, *arguments in (
            ("no image in common: they begin with p1, p2", first, other),
            ("no.csv is no table of points: .* its columns are name, value", first, tmp_path / "no.csv"),
            ("does not exist", first, tmp_path / "none.csv"),
            ("--spacing takes one number", first, first, "--spacing", "1", "2", "3"),
            ("scored on other labels, up to 3.00 px apart", scored, moved),
            ("in mm and in px", scored, metrics.parent / "predictions.csv")):
        status, _, error = run_main(COMPARE, *arguments)
        assert status == 2 and error.count("\n") == 1, error
        assert re.search(message, error), error
