"""Intervals, the paired test and the correction against closed forms, full enumeration by hand and scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks.coverage import coverage, false_positives, simulate, true_mean, true_rate
from landmarks_finetuning import statistics
from landmarks_finetuning.metrics import within
from landmarks_finetuning.report.build import build_report
from landmarks_finetuning.report.collect import aggregate, read_experiment
from landmarks_finetuning.report.findings import comparisons, headline, rule_sentence, sentences, verdict_text
from landmarks_finetuning.statistics import (
    holm,
    patient_sums,
    patients_needed,
    rate_interval,
    roc_area,
    roc_curve,
    sign_flip_p,
    smallest_p,
)
from tests.landmarks_finetuning.report.test_report import NAMES, write_run


def test_the_simulation_has_the_truth_it_claims():
    errors = simulate(2000, 20, seed=3)
    assert errors.mean() == pytest.approx(true_mean(), rel=0.01)
    assert 100 * (errors <= 4).mean() == pytest.approx(true_rate(4), abs=0.3)
    logs = np.log(errors)
    assert np.corrcoef(logs[..., 0].ravel(), logs[..., 1].ravel())[0, 1] > 0.25  # a patient's landmarks go together


def test_intervals_hold_the_truth_in_95_percent_of_1000_data_sets_of_50_patients():
    for name, held in coverage(50, 1000, seed=50).items():
        assert 93 <= held <= 97, name


def test_intervals_of_leave_one_out_hold_the_truth_though_every_patient_has_a_detector_of_his_own():
    errors = simulate(50, 1000, seed=1, folds=50, fold_spread=0.2)
    assert errors.mean() == pytest.approx(true_mean(0.2), rel=0.01)
    assert 100 * within(errors, 2.0).mean() == pytest.approx(true_rate(2.0, 0.2), abs=0.5)
    alone, shared = (coverage(50, 1000, seed=50, folds=folds, fold_spread=0.2) for folds in (50, 5))
    assert 92 <= alone["MRE"] <= 97
    assert shared["MRE"] < 88  # ten patients share a detector: the interval speaks of these five detectors


@pytest.mark.parametrize("patients", [10, 50], ids=["all sign patterns", "drawn ones"])
def test_the_paired_test_finds_nothing_in_95_percent_of_1000_null_data_sets(patients):
    assert 3 <= false_positives(patients, 1000, seed=patients) <= 7


@pytest.mark.parametrize(("differences", "expected"), [
    ([1, 2, 3], 2 / 8),  # 6 and -6 of eight sums
    ([3, -1, 0.5], 6 / 8),  # 4.5, 3.5, 2.5 and their negatives reach 2.5; 1.5 does not
    ([0, 0, 0], 1),
    ([0.1, 0.2, 0.3, -0.6], 1),
    ([2], 1),
])
def test_p_by_full_enumeration_by_hand(differences, expected):
    assert sign_flip_p(np.array(differences, dtype=float)[:, None]) == pytest.approx([expected])


def test_p_equals_scipy_s():
    rng = np.random.default_rng(0)
    first, second = rng.gamma(2.0, size=(2, 10, 3)) + np.array([0.0, 0.4])[:, None, None]
    ours = sign_flip_p(second - first)
    theirs = stats.permutation_test((second, first), lambda a, b, axis: np.mean(a - b, axis=axis), vectorized=True,
                                    permutation_type="samples", n_resamples=np.inf, axis=0).pvalue
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert 0.001 < ours.min() < ours.max() < 1


def test_drawn_sign_patterns_agree_with_all_of_them(monkeypatch):
    assert sign_flip_p(np.full((14, 1), 1.0)) == [2 / 2**14] and smallest_p(14) == 2 / 2**14
    differences = np.random.default_rng(1).normal(0.4, 1.0, size=(15, 4))
    drawn = sign_flip_p(differences)
    monkeypatch.setattr(statistics, "EXACT_PATIENTS", 15)
    exact = sign_flip_p(differences)
    assert np.abs(drawn - exact).max() < 4 * 0.5 / np.sqrt(9999)
    assert sign_flip_p(np.full((60, 1), 1.0)) == [1 / 10000] and smallest_p(60) == 1 / 10000  # never 0


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_figures_of_unlike_size_have_each_its_own_p(scale):
    """Rounding breaks no tie (0.1 + 0.2 + 0.3 - 0.6 is not 0), and a large figure beside a small one makes none."""
    differences = np.array([[0.1, 1], [0.2, 2], [0.3, 3], [-0.6, 0.5]]) * [scale, scale * 1e-12]
    np.testing.assert_array_equal(sign_flip_p(differences), [1, 2 / 16])


def test_holm_by_hand():
    # sorted 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1, never falling
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1.0, 1.0])
    np.testing.assert_allclose(holm([0.02]), [0.02])


def test_rate_interval_of_independent_landmarks_is_wilson_s():
    hits = (np.arange(2000) < 1870).astype(float)
    expected = stats.binomtest(1870, 2000).proportion_ci(0.95, method="wilson")
    low, high = rate_interval(hits[:, None], np.ones((2000, 1)))
    assert (low[0], high[0]) == pytest.approx((100 * expected.low, 100 * expected.high), abs=0.002)


def test_rate_interval_counts_patients_and_not_landmarks():
    hits = np.array([1.0, 1, 0, 1, 1, 0, 1, 1, 1, 1])[:, None]
    np.testing.assert_allclose(rate_interval(8 * hits, np.full((10, 1), 8.0)), rate_interval(hits, np.ones((10, 1))))


def rate_by_hand(hits, counts):
    """Wilson's interval at the effective number of landmarks, one rate with plain numbers."""
    patients, total = len(hits), sum(counts)
    rate = sum(hits) / total
    residuals = sum((hit - rate * count) ** 2 for hit, count in zip(hits, counts, strict=True))
    variance = residuals / total**2 * patients / (patients - 1)
    effective = max(patients, min(total, rate * (1 - rate) / variance)) if variance > 0 else patients
    z = stats.t.ppf(0.975, patients - 1)
    centre = (rate + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * np.sqrt(rate * (1 - rate) / effective + z**2 / (4 * effective**2))
    return 100 * (centre - half), 100 * (centre + half)


def test_rate_intervals_side_by_side_are_those_by_hand():
    """Few hits, many, all; patients that are all right or all wrong (fewest), and hits evenly spread (most)."""
    counts = np.array([[4, 9, 5, 8, 6], [6, 3, 5, 8, 6], [5, 7, 2, 8, 6], [8, 8, 5, 8, 6], [3, 5, 9, 8, 6]])
    hits = np.array([[1, 8, 5, 8, 3], [0, 2, 5, 0, 3], [2, 7, 2, 8, 3], [1, 4, 5, 0, 3], [0, 4, 9, 8, 2]])
    low, high = rate_interval(hits, counts)
    expected = [rate_by_hand(*columns) for columns in zip(hits.T.tolist(), counts.T.tolist(), strict=True)]
    np.testing.assert_allclose(np.stack([low, high], axis=1), expected, rtol=1e-9)
    two = rate_interval(hits[:2], counts[:2])
    np.testing.assert_allclose(np.ravel([two[0][0], two[1][0]]), rate_by_hand([1, 0], [4, 6]), rtol=1e-9)
    assert np.isnan(rate_interval(hits[:1], counts[:1])).all()


def test_rate_interval_of_a_perfect_score_and_of_one_patient():
    low, high = rate_interval(np.full((41, 1), 6.0), np.full((41, 1), 6.0))
    assert (low[0], high[0]) == pytest.approx((100 * 41 / (41 + stats.t.ppf(0.975, 40) ** 2), 100))
    assert np.isnan(rate_interval(np.ones((1, 1)), np.ones((1, 1)))).all()


def test_summary_rates_average_seeds_before_draws(tmp_path):
    """Two seeds of one draw: an error of 1 and one of 9 are one half within 2, not their mean 5 outside."""
    first = write_run(tmp_path / "s", "ddpm", 5, 0, [[1, 1], [1, 9], [1, 1], [9, 1]])
    other = write_run(tmp_path / "other", "ddpm", 5, 0, [[9, 1], [1, 1], [1, 1], [1, 1]], seed=1)
    other.rename(first.with_name("shots005_draw0_seed1"))
    row = aggregate(read_experiment(tmp_path / "s").runs).iloc[0]
    low, high = rate_interval(np.array([[1.5], [1.5], [2], [1.5]]), np.full((4, 1), 2.0))
    assert row["sdr_2"] == pytest.approx(100 * 6.5 / 8)
    assert (row["low_sdr_2"], row["high_sdr_2"]) == pytest.approx((low[0], high[0]))
    assert (row["low_paper_sdr_2"], row["high_paper_sdr_2"]) == pytest.approx((low[0], high[0]))


def test_within_and_patient_sums_by_hand():
    hits = within(np.array([[1.0, 2.0, np.nan], [2.1, 0.3, 2.0]]), 2.0)
    np.testing.assert_array_equal(hits, [[1, 1, np.nan], [0, 1, 1]])
    sums, counts = patient_sums(np.vstack([hits, [[1, np.nan, np.nan]]]), ["b", "a", "b"])
    assert (sums.tolist(), counts.tolist()) == ([2, 3], [3, 3])


def clustered_scores(patients, rng):
    """(4 P,) scores, which of them are positive, and whose: half of the spread is the patient's."""
    whose = np.repeat(np.arange(patients), 4)
    positive = rng.random(4 * patients) < 0.3
    scores = 1.2 * positive + np.sqrt(0.5) * (rng.normal(size=patients)[whose] + rng.normal(size=4 * patients))
    return scores, positive, whose


def test_roc_area_counts_pairs_and_is_under_the_curve():
    rng = np.random.default_rng(0)
    scores, positive, whose = clustered_scores(40, rng)
    scores = scores.round(1)  # with ties
    pairs = np.sign(scores[positive][:, None] - scores[~positive]) / 2 + 0.5
    assert roc_area(scores, positive, whose)[0] == pytest.approx(pairs.mean())
    assert np.trapezoid(*roc_curve(scores, positive)[::-1]) == pytest.approx(pairs.mean())
    assert [rates.tolist() for rates in roc_curve(np.array([3.0, 1, 2, 1]), np.array([True, True, False, False]))] == [
        [0, 0, 0.5, 1], [0, 0.5, 0.5, 1]]


def test_roc_area_of_landmarks_that_are_patients_has_the_variance_of_delong():
    """One landmark a patient: the variances of the shares won, over their numbers (DeLong 1988)."""
    scores, positive, _ = clustered_scores(30, np.random.default_rng(1))
    area, low, high = roc_area(scores, positive, np.arange(len(scores)))
    pairs = (scores[positive][:, None] > scores[~positive]).astype(float)
    counts = pairs.shape
    error = np.sqrt(pairs.mean(axis=1).var(ddof=1) / counts[0] + pairs.mean(axis=0).var(ddof=1) / counts[1])
    # a patient holds one kind alone, so the covariance of both kinds is 0
    half = stats.t(min(counts) - 1).ppf(0.975) * error / (area * (1 - area))
    logits = [np.log(value / (1 - value)) for value in (low, area, high)]
    assert np.diff(logits) == pytest.approx([half, half])


def test_roc_intervals_hold_the_truth():
    """In 93 to 98 % of 600 data sets of 20 patients; the true area is that of normal scores 1.2 apart."""
    rng, truth = np.random.default_rng(2), stats.norm.cdf(1.2 / np.sqrt(2))
    held = [low <= truth <= high for _, low, high in (roc_area(*clustered_scores(20, rng)) for _ in range(600))]
    assert 0.93 < np.mean(held) < 0.98


def test_roc_without_both_kinds_or_without_an_overlap():
    scores, whose = np.array([1.0, 2, 3, 4]), np.array([0, 0, 1, 1])
    assert np.isnan(roc_area(scores, scores > 9, whose)).all() and np.isnan(roc_area(scores, scores > 0, whose)).all()
    assert roc_area(scores, scores > 2, whose)[0] == 1 and np.isnan(roc_area(scores, scores > 2, whose)[1:]).all()
    with pytest.raises(ValueError, match="positives and negatives"):
        roc_curve(scores, scores > 9)


def test_all_comparisons_of_a_data_set_are_one_family(tmp_path):
    """Three rivals and two numbers of labels; six patients that all agree give p = 2 / 64 each, Holm 5 and 4 times."""
    root, patients = tmp_path / "study", np.array([[0.0], [0.1], [0.2], [0.3], [0.4], [0.5]])
    for shots in (1, 5):
        for backbone, error in (("ddpm", 1.0), ("scratch", 2.0), ("mean_shape", 9.0)):
            write_run(root, backbone, shots, 0, (error * (1 + patients) + [0, 0.01]).tolist())
    write_run(root, "dino", 5, 0, [[1 + p, 1 + (5 - k) / 10] for k, p in enumerate(patients[:, 0])])
    html = build_report([root]).read_text(encoding="utf8")
    table = pd.read_csv(root / "report" / "tables" / "comparisons.csv").set_index(["shots", "rival"])
    assert len(table) == 5
    clear = table.drop((5, "dino"))
    assert clear["p"].tolist() == [2 / 64] * 4 and clear["p_holm"].tolist() == [5 * 2 / 64] * 4
    assert set(clear["verdict"]) == {"few"}  # six patients cannot carry five comparisons
    assert set(table["patients_needed"]) == {8} and "6 test images are too few to tell (needed here: 8)." in html
    assert table.index[table["best_rival"]].tolist() == [(1, "scratch"), (5, "dino")]
    assert "one family" in html and "All comparisons (5)" in html and "0.156" in html
    assert NAMES[0] in html


@pytest.mark.parametrize(("comparisons", "needed"), [(1, 6), (2, 7), (3, 7), (4, 8), (6, 8), (7, 9), (499, 15)])
def test_the_fewest_patients_win_when_all_agree_and_one_fewer_cannot(comparisons, needed):
    """By the test and the correction themselves: the best of a family whose other members show nothing."""
    assert patients_needed(comparisons) == needed
    smallest = [holm([*sign_flip_p(np.ones((patients, 1))), *[1.0] * (comparisons - 1)])[0]
                for patients in (needed - 1, needed)]
    assert smallest[0] >= 0.05 > smallest[1]


def test_no_number_of_patients_is_enough_for_500_comparisons():
    assert patients_needed(500) == np.inf
    assert 500 * sign_flip_p(np.ones((1000, 1)))[0] == pytest.approx(0.05)


def compare_agreeing_patients(root, patients, draws):
    """All of `patients` have half the error of the rival's, at three numbers of labels: six comparisons."""
    errors = np.linspace(1, 2, patients)[:, None] + [0, 0.1]
    for draw, shots in itertools.product(range(draws), (1, 5, 10)):
        for backbone, factor in (("ddpm", 1.0), ("scratch", 2.0), ("mean_shape", 9.0)):
            write_run(root, backbone, shots, draw, (factor * errors * (1 + draw / 100)).tolist())
    runs = read_experiment(root).runs
    return comparisons(runs, aggregate(runs))


@pytest.mark.parametrize(("patients", "verdict"), [(7, "few"), (8, "better")])
def test_the_number_of_patients_that_is_asked_for_is_enough(tmp_path, patients, verdict):
    table = compare_agreeing_patients(tmp_path, patients, draws=2)
    assert table["verdict"].tolist() == [verdict] * 6
    assert "(test patients for 6 comparisons, needed here: 8)" in rule_sentence(table)
    text = {"few": "too few test images to tell", "better": "clear gain"}[verdict]
    assert {verdict_text(row) for row in table.to_dict("records")} == {text}


def test_with_one_draw_nothing_is_clear_but_for_this_draw(tmp_path):
    table = compare_agreeing_patients(tmp_path, 8, draws=1)
    assert headline(table, "mm")[0] == ("Diffusion pre-training is clearly better for this draw of the labels at 1, 5 "
                                        "and 10 labels, measured against its best rival.")
    assert {verdict_text(row) for row in table.to_dict("records")} == {"clear gain for this draw"}
    assert all("(50%) for this draw of the labels." in one["text"] for one in sentences(table, "mm"))
