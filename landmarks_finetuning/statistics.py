"""How sure a figure is: intervals of means, rates and ROC areas, a paired test, Holm's correction for several of them.

What is resampled, flipped and counted is the patient: the landmarks and images of one patient go together. P patients,
K figures side by side.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit, stdtrit
from scipy.stats import rankdata

from core.errors import UserError

FEWEST_PATIENTS = 4  # for an interval: of fewer, too many resamples hold one patient alone and have no spread
RESAMPLES = 2000
SIGNIFICANCE = 0.05
EXACT_PATIENTS = 14  # up to here all 2 ** P sign patterns are counted
SIGN_PATTERNS = 9999  # drawn ones, above


# ---- intervals


def patient_sums(values: np.ndarray, groups: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(P,) sums and (P,) counts of the scored values (M, N) of each patient (`groups`, (M,)) who has any.

    Raises UserError when nothing can be scored.
    """
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(index, weights=np.nansum(values, axis=1))
    counts = np.bincount(index, weights=(~np.isnan(values)).sum(axis=1))
    if not counts.any():
        raise UserError("nothing can be scored: no landmark of these images is annotated")
    return sums[counts > 0], counts[counts > 0]


def bootstrap_interval(errors: np.ndarray, groups: ArrayLike, seed: int) -> tuple[float, float]:
    """95 % interval of the mean of all scored errors (M, N), resampling patients (`groups`, (M,)).

    Images of one patient are drawn together (cluster bootstrap); see `studentised_interval`. (NaN, NaN) for fewer than
    FEWEST_PATIENTS. Raises UserError when nothing can be scored.
    """
    sums, counts = patient_sums(errors, groups)
    low, high = studentised_interval(sums[:, None], counts[:, None], seed)
    return float(low[0]), float(high[0])


def studentised_interval(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap-t intervals (K,), (K,) of the K means sums.sum(0) / counts.sum(0), resampling the P patients.

    `sums` and `counts` are (P, K). Each resample's deviation from the mean is divided by the resample's own standard
    error (of a ratio, linearised); the quantiles of that ratio take the place of Student's (Efron and Tibshirani 1993,
    An Introduction to the Bootstrap, section 12.5). Resamples without a spread do not count.
    Percentiles are too narrow on skewed errors: in 1000 simulated data sets of 6, 12, 24, 50, 150 patients they covered
    the truth in 82, 88, 91, 92, 93 %, these intervals in 93, 94, 94, 94, 94 % (python -m benchmarks.coverage).
    """
    if len(sums) < FEWEST_PATIENTS:
        return np.full(sums.shape[1], np.nan), np.full(sums.shape[1], np.nan)
    mean = sums.sum(axis=0) / counts.sum(axis=0)
    centred = sums - mean * counts
    _, error = _deviation(np.ones((1, len(sums))), centred, counts)
    deviation, spread = _deviation(_resamples(len(sums), seed), centred, counts)
    ratio = np.divide(deviation, spread, out=np.full_like(spread, np.nan), where=spread > 1e-6 * error)
    ratio[:, error[0] <= 1e-12 * np.abs(mean)] = 0.0  # all patients are alike
    high, low = np.nanpercentile(ratio, (2.5, 97.5), axis=0)
    return mean - low * error[0], mean - high * error[0]


@lru_cache(maxsize=2)
def _resamples(patients: int, seed: int) -> np.ndarray:
    """(RESAMPLES, patients): how often each is drawn. Not to be changed: a report asks hundreds of times."""
    equal = np.full(patients, 1 / patients)
    return np.random.default_rng(seed).multinomial(patients, equal, size=RESAMPLES).astype(np.float64)


def _deviation(weights: np.ndarray, centred: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of the resamples (rows of `weights`, (B, P)) about the sample's mean, and their standard errors; (B, K)."""
    totals = weights @ counts
    mean = weights @ centred / totals
    squares = weights @ centred**2 - 2 * mean * (weights @ (centred * counts)) + mean**2 * (weights @ counts**2)
    return mean, np.sqrt(np.maximum(squares, 0.0)) / totals


def rate_interval(hits: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals (K,), (K,) in percent of the rates hits.sum(0) / counts.sum(0); `hits`, `counts` are (P, K).

    Wilson's score interval (1927) at the effective number of landmarks p (1 - p) / variance, where the variance is
    that of the rate over patients (linearised), with Student's quantile for P - 1 degrees of freedom (Korn and
    Graubard 1998; Dean and Pagano 2015). The effective number is kept between the number of patients and that of
    landmarks, so a rate of 0 or 100 % has an interval, too. NaN for one patient. A bootstrap over patients breaks down
    near 100 %: at a true rate of 99.2 % its percentiles cover the truth in 49, 75, 82, 90, 93 % of 1000 simulated data
    sets of 6, 12, 24, 50, 150 patients, these intervals in 98, 97, 95, 95, 95 % (python -m benchmarks.coverage).
    """
    patients, total = len(hits), counts.sum(axis=0)
    if patients < 2:
        return np.full(total.shape, np.nan), np.full(total.shape, np.nan)
    rate = hits.sum(axis=0) / total
    variance = np.square(hits - rate * counts).sum(axis=0) / total**2 * patients / (patients - 1)
    effective = np.divide(rate * (1 - rate), variance, out=np.full_like(rate, patients), where=variance > 0)
    effective = np.clip(effective, patients, total)
    square = stdtrit(patients - 1, 0.975) ** 2 / effective
    half = np.sqrt(square * (rate * (1 - rate) + square / 4))
    middle = rate + square / 2
    return 100 * (middle - half) / (1 + square), 100 * (middle + half) / (1 + square)


# ---- ranking


def roc_curve(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates, (K,) and (K,) from 0 to 1, of calling those with the highest of `scores` positive.

    `scores` and `positive` (bool) are (L,); equal scores are called together. ValueError without both kinds.
    """
    if positive.all() or not positive.any():
        raise ValueError("a ROC curve needs positives and negatives")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)
    hits = [np.append(0, np.cumsum(kind[order])[last]) / kind.sum() for kind in (~positive, positive)]
    return hits[0], hits[1]


def roc_area(scores: np.ndarray, positive: np.ndarray, groups: ArrayLike) -> tuple[float, float, float]:
    """How often a positive has a higher score than a negative (ties count half), and its 95 % interval over patients.

    `scores`, `positive` (bool) and the patients `groups` are (L,). The variance is that of clustered data (Obuchowski
    1997, Nonparametric analysis of clustered ROC curve data), the interval symmetric in the logit with Student's
    quantile for the fewer of the patients with a positive and with a negative, less one. NaN where there is none.
    """
    counts = int(positive.sum()), int((~positive).sum())
    if not all(counts):
        return np.nan, np.nan, np.nan
    ranks = rankdata(scores)
    won = np.empty(len(scores))  # share of the other kind that each one is on the right side of
    won[positive] = (ranks[positive] - rankdata(scores[positive])) / counts[1]
    won[~positive] = 1 - (ranks[~positive] - rankdata(scores[~positive])) / counts[0]
    area = float(won[positive].mean())
    _, patient = np.unique(np.asarray(groups), return_inverse=True)
    sums, seen = [], []
    for kind in (positive, ~positive):
        number = np.bincount(patient[kind], minlength=patient.max() + 1)
        sums.append(np.bincount(patient[kind], weights=won[kind], minlength=len(number)) - number * area)
        seen.append(int((number > 0).sum()))
    if min(seen) < 2 or not 0 < area < 1:
        return area, np.nan, np.nan
    variance = sum(each / (each - 1) * np.square(part).sum() / count**2
                   for part, each, count in zip(sums, seen, counts, strict=True))
    both = patient.max() + 1
    variance += 2 * both / (both - 1) * (sums[0] @ sums[1]) / (counts[0] * counts[1])
    half = stdtrit(min(seen) - 1, 0.975) * np.sqrt(max(variance, 0.0)) / (area * (1 - area))
    return area, float(expit(logit(area) - half)), float(expit(logit(area) + half))


# ---- tests


def sign_flip_p(differences: np.ndarray) -> np.ndarray:
    """Two-sided p-values (K,) of the paired permutation test that a mean difference is 0; `differences` is (P, K).

    A patient's difference is the sum over its landmarks. If both methods are alike its sign is a coin's throw, so the
    sum over patients is compared with those under flipped signs (Fisher 1935, The Design of Experiments, section 21):
    all 2 ** P patterns up to EXACT_PATIENTS, above it SIGN_PATTERNS drawn ones and the observed one (Phipson and Smyth
    2010, Permutation p-values should never be zero). No p is below `smallest_p`.
    """
    patients = len(differences)
    observed = np.abs(differences.sum(axis=0)) - 1e-9 * np.abs(differences).sum(axis=0)  # rounding breaks no tie
    if patients <= EXACT_PATIENTS:
        bits = np.arange(2**patients)[:, None] >> np.arange(patients) & 1
        return (np.abs((2.0 * bits - 1) @ differences) >= observed).mean(axis=0)
    signs = 2.0 * np.random.default_rng(0).integers(2, size=(SIGN_PATTERNS, patients)) - 1
    return (1 + (np.abs(signs @ differences) >= observed).sum(axis=0)) / (1 + SIGN_PATTERNS)


def smallest_p(patients: int) -> float:
    """What `sign_flip_p` gives when all patients agree: their pattern and its opposite, of all or of the drawn ones."""
    return 2.0 ** (1 - patients) if patients <= EXACT_PATIENTS else 1 / (1 + SIGN_PATTERNS)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's step-down adjusted p-values, in the order given: the family-wise error stays below the level.

    Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    adjusted = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    result = np.empty_like(values)
    result[order] = np.minimum(adjusted, 1.0)
    return result


def patients_needed(comparisons: int) -> float:
    """The fewest patients with whom one of a family of `comparisons` can be significant after Holm's correction.

    The smallest of the p-values is multiplied by their number. Infinite for 500 comparisons and more, for which the
    test would have to draw more patterns.
    """
    counts = range(1, EXACT_PATIENTS + 2)
    return next((count for count in counts if smallest_p(count) * comparisons < SIGNIFICANCE), np.inf)
