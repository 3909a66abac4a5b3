"""Metrics against hand-computed millimetres, a plain-Python copy of the published arithmetic and known statistics."""

import json
import math
import re

import cv2
import numpy as np
import pytest

from core.errors import UserError
from landmarks_finetuning.metrics import physical_errors, summarise
from landmarks_finetuning.paper_scorer import paper_errors, paper_sigma, round_original, why_undefined
from landmarks_finetuning.shape import mean_shape_prediction
from landmarks_finetuning.statistics import bootstrap_interval, studentised_interval

dims = pytest.mark.parametrize("dimension", [2, 3], ids=["2d", "3d"])


# ---- physical


@dims
def test_physical_errors_scale_each_axis_by_its_own_spacing(dimension):
    truth = np.full((2, 1, dimension), 50.0)
    pred = truth.copy()
    pred[:, 0, :2] += (3.0, -4.0)
    spacing = np.array([[0.5, 2.0, 9.0], [4.0, 3.0, 9.0]])[:, :dimension]
    # (3 * 0.5, 4 * 2) and (3 * 4, 4 * 3) mm
    np.testing.assert_allclose(physical_errors(pred, truth, spacing), [[math.sqrt(66.25)], [math.sqrt(288)]])
    np.testing.assert_allclose(physical_errors(pred, truth), [[5.0], [5.0]])


def test_physical_errors_use_the_third_axis():
    assert physical_errors(np.zeros((1, 1, 3)), np.array([[[1.0, 2.0, 2.0]]]), np.ones((1, 3))) == pytest.approx(3.0)
    assert physical_errors(np.zeros((1, 1, 3)), np.array([[[0.0, 0.0, 2.0]]]), np.array([[1, 1, 2.5]])) == 5.0


@dims
def test_a_missing_truth_is_not_scored_but_a_missing_prediction_is_refused(dimension):
    truth, pred = np.zeros((2, 3, dimension)), np.ones((2, 3, dimension))
    truth[0, 1] = np.nan
    pred[0, 1] = np.nan
    errors = physical_errors(pred, truth)
    assert np.isnan(errors).tolist() == [[False, True, False], [False] * 3]
    truth[0, 1] = 4
    truth[0, 1, 0] = np.nan  # half a position is none
    assert np.isnan(physical_errors(pred, truth)).tolist() == [[False, True, False], [False] * 3]
    pred[1, 2, 0] = np.nan
    with pytest.raises(UserError, match="landmark 3 in image 2"):
        physical_errors(pred, truth)


# ---- the published scorer


def published_truth(x, y, width, height, side, sigma):
    """(x, y) of the re-extracted truth, written as a loop over pixels around the rounded position."""
    cx, cy = round(x * side / width), round(y * side / height)
    mask = np.zeros((side, side), np.uint8)
    for row in range(side):
        for column in range(side):
            mask[row, column] = math.exp(-((row - cy) ** 2 + (column - cx) ** 2) / (2 * sigma**2)) > 0.5
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    moments = cv2.moments(max(contours, key=cv2.contourArea))
    return round(moments["m10"] / moments["m00"]), round(moments["m01"] / moments["m00"])


def published_error(rule, prediction, truth, side, wrist):
    (px, py), (tx, ty) = prediction, truth
    factor_x, factor_y = {"cephalo": (2400 / side * 0.1, 1935 / side * 0.1), "chest": (1, 1),
                          "hand": (50 / wrist, 50 / wrist)}[rule]
    return math.hypot((px - tx) * factor_x, (py - ty) * factor_y)


@pytest.mark.parametrize("rule", ["cephalo", "hand", "chest"])
def test_paper_errors_equal_the_published_arithmetic_pixel_by_pixel(rule):
    side, sigma, count = 64, 2.5, 6
    rng = np.random.default_rng(0)
    sizes = np.array([[2400, 1935], [1777, 1200]])
    truth = rng.random((2, count, 2)) * sizes[:, None]
    truth[0, 5] = (5.0, 1930.0)  # a corner: the disk is cut and its centroid moves
    predictions = rng.random((2, count, 2)) * side
    errors = paper_errors(rule, predictions, truth, sizes, side, sigma)
    for image, (height, width) in enumerate(sizes.tolist()):
        points = [published_truth(x, y, width, height, side, sigma) for y, x in truth[image].tolist()]
        wrist = math.dist(points[0], points[4])
        for n, (py, px) in enumerate(predictions[image].tolist()):
            expected = published_error(rule, (round(px), round(py)), points[n], side, wrist)
            assert errors[image, n] == pytest.approx(expected, rel=1e-9)


def test_cephalo_factors_are_swapped_by_hand():
    truth = np.array([[[1200.0, 967.5]]])  # (128, 128) at 256 x 256
    sizes = np.array([[2400, 1935]])
    along_y = paper_errors("cephalo", np.array([[[138.0, 128.0]]]), truth, sizes, 256, 5.0)
    along_x = paper_errors("cephalo", np.array([[[128.0, 138.0]]]), truth, sizes, 256, 5.0)
    assert along_y[0, 0] == pytest.approx(7.55859375)  # 10 px x 1935 / 256 x 0.1, though y spans 2400
    assert along_x[0, 0] == pytest.approx(9.375)


def test_hand_is_scaled_by_the_wrist_of_the_extracted_truth():
    truth = np.array([[[30.0, 20], [10, 10], [20, 20], [30, 30], [30, 45]]]) * 10  # wrist 25 px of 64
    predictions = truth / 10 + [[[0, 3]]]
    errors = paper_errors("hand", predictions, truth, np.array([[640, 640]]), 64, 2.5)
    np.testing.assert_allclose(errors, 6.0)
    several = np.repeat(truth, 4, axis=0)
    several[1, 2], several[2] = np.nan, np.nan  # a landmark, or all of them, without annotation
    sizes = np.full((4, 2), 640)
    errors = paper_errors("hand", np.repeat(predictions, 4, axis=0), several, sizes, 64, 2.5)
    assert np.isnan(errors).tolist() == [[False] * 5, [False, False, True, False, False], [True] * 5, [False] * 5]
    for spoil in (several[3, 0], np.full(2, np.nan)):  # both ends of the wrist at one place, or one of them unknown
        several[3, 4] = spoil
        with pytest.raises(UserError, match="image 4 .*wrist"):
            paper_errors("hand", np.repeat(predictions, 4, axis=0), several, sizes, 64, 2.5)


def test_paper_errors_skip_missing_truth_and_round_predictions_half_to_even():
    truth = np.array([[[100.0, 100.0], [np.nan, np.nan]]])
    errors = paper_errors("chest", np.array([[[30.5, 35.5], [1.0, 1.0]]]), truth, np.array([[200, 200]]), (64, 64), 2.5)
    assert errors[0, 0] == pytest.approx(math.hypot(30 - 32, 36 - 32))
    assert np.isnan(errors[0, 1])


def test_paper_errors_refuse_what_they_are_not_defined_for():
    points, sizes = np.full((1, 1, 2), 10.0), np.array([[64, 64]])
    with pytest.raises(UserError, match="not 64 x 48"):
        paper_errors("chest", points, points, sizes, (64, 48), 2.5)
    with pytest.raises(UserError, match="cephalo, hand, chest"):
        paper_errors("knee", points, points, sizes, 64, 2.5)
    with pytest.raises(UserError, match="single pixel"):
        paper_errors("chest", points, points, sizes, 64, 0.84)
    with pytest.raises(UserError, match="single pixel"):  # where exp(-1 / (2 sigma^2)) is a half
        paper_errors("chest", points, points, sizes, 64, (2 * np.log(2)) ** -0.5)
    assert paper_errors("chest", points, points, sizes, 64, 0.86) == 0


EXTENTS = np.array([[240.0, 193.5], [240.0, 193.5]])


@pytest.mark.parametrize(("rule", "size", "resample_mm", "extents_mm", "why"), [
    ("cephalo", (64, 64), None, EXTENTS, None),
    ("cephalo", (64, 64), None, EXTENTS * [[1, 1], [1.009, 0.991]], None),
    ("cephalo", (64, 64), None, EXTENTS * [[1, 1], [1.011, 1]], r"240 x 193\.5 mm \(height x width\)"),
    ("cephalo", (64, 64), None, EXTENTS * [[1, 0.989], [1, 1]], "these are not$"),
    ("cephalo", (64, 64), None, EXTENTS[:, ::-1], "these are not$"),
    ("cephalo", (64, 64), None, None, "these are not$"),
    ("chest", (64, 64), None, EXTENTS * 2, None),
    ("hand", (64, 64), None, None, None),
    ("chest", (64, 48), None, None, r"square network input of two axes, dataset\.image_size is 64 x 48$"),
    ("chest", (64, 64, 64), None, None, "image_size is 64 x 64 x 64$"),
    ("chest", (64, 64), 1.0, None, r"dataset\.resample_mm or canvas_size crops them$"),
    ("chest", (44, 44), None, None, None),  # sigma 0.859, just above 0.849
    ("chest", (43, 43), None, None, r"single pixel, without an area, at dataset\.image_size 43$"),  # 0.840
])
def test_why_the_paper_s_scorer_is_undefined(rule, size, resample_mm, extents_mm, why):
    reason = why_undefined(rule, size, resample_mm is not None, extents_mm)
    assert reason is None if why is None else re.search(why, reason)


def test_the_disk_of_the_paper_s_scorer():
    assert (paper_sigma(256), paper_sigma(64)) == (5.0, 1.25)


def test_round_original_scales_without_half_pixel_shift_and_rounds_half_to_even():
    points = np.array([[[5.0, 9.0], [7.0, 1.0]]])
    np.testing.assert_array_equal(round_original(points, np.array([[20, 100]]), 10), [[[2, 1], [4, 0]]])  # 2.5, 3.5


# ---- summaries


def test_summary_by_hand_and_an_error_equal_to_a_threshold_counts():
    errors = np.array([[1.0, 2.0, np.nan], [3.0, 6.0, np.nan]])
    summary = summarise(errors, [2, 2.5, 6])
    assert (summary["mre"], summary["median"], summary["count"]) == (3.0, 2.5, 4)
    assert summary["std"] == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 4))
    assert summary["p95"] == pytest.approx(3 + 0.85 * 3)  # position 0.95 * 3 = 2.85 between 3 and 6
    assert summary["sdr"] == {"2": 50.0, "2.5": 50.0, "6": 100.0}
    assert summary["per_landmark"]["mre"] == [2.0, 4.0, None]
    assert summarise(np.array([[1.0, 6.0], [3.0, np.nan]]), [])["mre"] == pytest.approx(10 / 3)  # micro
    assert summarise(np.array([[1.0, 6.0], [3.0, np.nan]]), [])["macro_mre"] == (2 + 6) / 2
    assert summary["per_landmark"]["std"] == [1.0, 2.0, None]
    assert summary["per_landmark"]["count"] == [2, 2, 0]
    assert summary["per_landmark"]["sdr"] == {"2": [50.0, 50.0, None], "2.5": [50.0, 50.0, None],
                                              "6": [100.0, 100.0, None]}
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_rounding_noise_does_not_push_an_error_over_its_threshold():
    errors = physical_errors(np.array([[[18.0, 24.0]]]), np.zeros((1, 1, 2)), np.array([[0.1, 0.1]]))
    assert errors[0, 0] > 3
    assert summarise(errors, [3])["sdr"]["3"] == 100.0
    assert summarise(errors + 1e-6, [3])["sdr"]["3"] == 0.0


@pytest.mark.parametrize("errors", [np.full((2, 3), np.nan), np.empty((0, 3))], ids=["all missing", "no images"])
def test_nothing_to_score_is_an_error(errors):
    with pytest.raises(UserError, match="nothing can be scored"):
        summarise(errors, [2])
    with pytest.raises(UserError, match="nothing can be scored"):
        bootstrap_interval(errors, np.arange(len(errors)), seed=0)


def test_bootstrap_interval_agrees_with_the_normal_theory_for_independent_patients():
    errors = np.random.default_rng(1).normal(5.0, 2.0, size=(400, 1))
    low, high = bootstrap_interval(errors, np.arange(400), seed=0)
    half = 1.96 * errors.std() / math.sqrt(400)
    assert low == pytest.approx(errors.mean() - half, abs=0.03)
    assert high == pytest.approx(errors.mean() + half, abs=0.03)
    assert (low, high) == bootstrap_interval(errors, np.arange(400), seed=0)
    assert (low, high) != bootstrap_interval(errors, np.arange(400), seed=1)


def test_bootstrap_resamples_patients_not_images():
    once = np.random.default_rng(2).normal(5.0, 2.0, size=(50, 2))
    once[3, 1] = np.nan
    patients = np.array([f"patient{i}" for i in range(50)])
    copies, groups = np.repeat(once, 8, axis=0), np.repeat(patients, 8)
    np.testing.assert_allclose(bootstrap_interval(copies, groups, seed=0), bootstrap_interval(once, patients, seed=0))
    low, high = bootstrap_interval(copies, np.arange(400), seed=0)
    clustered_low, clustered_high = bootstrap_interval(copies, groups, seed=0)
    assert (clustered_high - clustered_low) > 2 * (high - low)


@pytest.mark.parametrize("patients", [4, 6, 15])
def test_bootstrap_t_as_a_loop_over_resamples(patients):
    """Every scored landmark weighs alike, also where patients have different numbers of them."""
    errors = np.random.default_rng(3).gamma(2.0, size=(patients, 4))
    errors[0, 1:] = errors[3, 2] = np.nan
    sums, counts = np.nansum(errors, axis=1), (~np.isnan(errors)).sum(axis=1)

    def mean_and_error(drawn):
        mean = sums[drawn].sum() / counts[drawn].sum()
        return mean, math.sqrt(sum((sums[i] - mean * counts[i]) ** 2 for i in drawn)) / counts[drawn].sum()

    mean, error = mean_and_error(np.arange(patients))
    ratios = []
    shares = np.full(patients, 1 / patients)
    for weights in np.random.default_rng(5).multinomial(patients, shares, size=2000):
        again, spread = mean_and_error(np.repeat(np.arange(patients), weights))
        if spread > 1e-9:
            ratios.append((again - mean) / spread)
    expected = mean - np.percentile(ratios, [97.5, 2.5]) * error
    assert bootstrap_interval(errors, range(patients), seed=5) == pytest.approx(tuple(expected), rel=1e-9)


def test_several_means_have_each_its_own_interval_and_a_patient_without_landmarks_does_not_count():
    values = np.random.default_rng(6).gamma(2.0, size=(9, 3)) * [1, 1000, 0.001]
    counts = np.random.default_rng(7).integers(1, 5, size=(9, 3))
    together = studentised_interval(values * counts, counts, seed=2)
    for column in range(3):
        alone = studentised_interval((values * counts)[:, [column]], counts[:, [column]], seed=2)
        np.testing.assert_allclose([limits[column] for limits in together], np.ravel(alone))
    errors = np.vstack([values, np.full((2, 3), np.nan)])
    assert bootstrap_interval(errors, range(11), seed=2) == bootstrap_interval(values, range(9), seed=2)
    for limits in studentised_interval(values[:3, :2], counts[:3, :2], seed=2):
        assert limits.shape == (2,) and np.isnan(limits).all()


@pytest.mark.parametrize("scale", [1e-7, 1e7])
def test_an_interval_knows_no_unit(scale):
    errors = np.random.default_rng(8).gamma(2.0, size=(5, 3))
    scaled = bootstrap_interval(errors * scale, range(5), seed=1)
    assert scaled == pytest.approx(tuple(scale * limit for limit in bootstrap_interval(errors, range(5), seed=1)))


def test_an_interval_needs_four_patients():
    errors = np.random.default_rng(4).gamma(2.0, size=(4, 3))
    assert np.isnan(bootstrap_interval(np.repeat(errors[:3], 5, axis=0), np.repeat(range(3), 5), seed=0)).all()
    assert np.isfinite(bootstrap_interval(errors, range(4), seed=0)).all()
    assert bootstrap_interval(np.full((5, 2), 3.0), range(5), seed=0) == (3.0, 3.0)


# ---- the baseline


@dims
def test_mean_shape_averages_each_landmark_over_the_labels_that_have_it(dimension):
    points = np.full((2, 3, dimension), 20.0)
    points[1, 0] = 40
    points[0, 1] = np.nan
    points[:, 2] = np.nan
    points[..., 0] += 7
    mean = mean_shape_prediction(points)
    np.testing.assert_allclose(mean[:, 1:], np.array([[30], [20], [25]]) * [[1] * (dimension - 1)])
    assert mean[:, 0].tolist() == [37, 27, 32]
    with pytest.raises(UserError, match="mean shape"):
        mean_shape_prediction(np.full((2, 3, dimension), np.nan))
