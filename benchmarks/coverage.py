"""How often the report's 95 % intervals hold the truth, and how often its test finds what is not there.

Errors of simulated patients: log-normal, the landmarks of a patient sharing a factor; in three tenths of the
patients 7 % of the landmarks jump to another structure (8 times the error). Mean and rates are known in closed form.
With `--folds` the patients are those of a cross-validation: those of a fold share one detector, whose quality differs
from the other folds' by a factor, so that they are not independent.
"""

from __future__ import annotations

import itertools

import numpy as np
from scipy.stats import norm

from core.errors import CommandParser, run_command
from landmarks_finetuning.metrics import within
from landmarks_finetuning.statistics import rate_interval, sign_flip_p, studentised_interval

LANDMARKS = np.log(np.linspace(1.0, 3.0, 19))  # log of each landmark's median error
PATIENT_SPREAD, LANDMARK_SPREAD = 0.4, 0.5  # standard deviations of the log
JUMPING_PATIENTS, JUMPING_LANDMARKS, JUMP = 0.3, 0.07, 8.0
SPREAD = float(np.hypot(PATIENT_SPREAD, LANDMARK_SPREAD))
THRESHOLDS = (2.0, 4.0, 8.0, 20.0)
FOLD_SPREADS = (0.0, 0.1, 0.2)  # standard deviations of the log of the quality of a fold's detector


def simulate(patients: int, sets: int, seed: int, folds: int = 0, fold_spread: float = 0.0) -> np.ndarray:
    """Errors (patients, sets, 19 landmarks); of `folds` folds the log of a detector's quality has that spread."""
    rng = np.random.default_rng(seed)
    shape = (patients, sets, len(LANDMARKS))
    logs = LANDMARKS + PATIENT_SPREAD * rng.normal(size=(*shape[:2], 1)) + LANDMARK_SPREAD * rng.normal(size=shape)
    if folds:
        logs += fold_spread * rng.normal(size=(folds, sets, 1))[np.arange(patients) % folds]
    jumps = (rng.random((*shape[:2], 1)) < JUMPING_PATIENTS) & (rng.random(shape) < JUMPING_LANDMARKS)
    return np.exp(logs) * np.where(jumps, JUMP, 1.0)


def true_mean(fold_spread: float = 0.0) -> float:
    """The expected error: of a log-normal exp(mu + sigma^2 / 2), times the jumps' mean factor."""
    factor = 1 + (JUMP - 1) * JUMPING_PATIENTS * JUMPING_LANDMARKS
    return float(np.exp(LANDMARKS + (SPREAD**2 + fold_spread**2) / 2).mean() * factor)


def true_rate(threshold: float, fold_spread: float = 0.0) -> float:
    """The expected rate, in percent, of errors within `threshold`."""
    share, spread = JUMPING_PATIENTS * JUMPING_LANDMARKS, np.hypot(SPREAD, fold_spread)
    usual, jumped = (norm.cdf((np.log(threshold / factor) - LANDMARKS) / spread).mean() for factor in (1.0, JUMP))
    return float(100 * ((1 - share) * usual + share * jumped))


def coverage(patients: int, sets: int, seed: int, folds: int = 0, fold_spread: float = 0.0) -> dict[str, float]:
    """Percent of the simulated data sets whose interval holds the truth: {"MRE": 94.9, "SDR 2": ...}."""
    errors = simulate(patients, sets, seed, folds, fold_spread)
    counts = np.full(errors.shape[:2], float(errors.shape[2]))
    interval = studentised_interval(errors.sum(axis=2), counts, seed=0)
    coverages = {"MRE": _held(interval, true_mean(fold_spread))}
    for threshold in THRESHOLDS:
        hits = within(errors, threshold).sum(axis=2)
        coverages[f"SDR {threshold:g}"] = _held(rate_interval(hits, counts), true_rate(threshold, fold_spread))
    return coverages


def percentile_coverage(patients: int, sets: int, seed: int, samples: int = 2000) -> dict[str, float]:
    """The same of percentile bootstrap intervals, which the report does not use."""
    errors = simulate(patients, sets, seed)
    weights = np.random.default_rng(0).multinomial(patients, np.full(patients, 1 / patients), size=samples) / patients
    values = {"MRE": (errors.mean(axis=2), true_mean())}
    values |= {f"SDR {t:g}": (100 * within(errors, t).mean(axis=2), true_rate(t)) for t in THRESHOLDS}
    return {name: _held(np.percentile(weights @ means, (2.5, 97.5), axis=0), truth)
            for name, (means, truth) in values.items()}


def _held(interval: tuple[np.ndarray, np.ndarray], truth: float) -> float:
    return float(100 * ((interval[0] <= truth) & (truth <= interval[1])).mean())


def false_positives(patients: int, sets: int, seed: int) -> float:
    """Percent of data sets in which the test calls two equally good methods different at 5 %."""
    first, second = simulate(patients, 2 * sets, seed).sum(axis=2).reshape(patients, 2, sets).swapaxes(0, 1)
    return float(100 * (sign_flip_p(second - first) <= 0.05).mean())


def main() -> None:
    """Print one row for each number of patients."""
    parser = CommandParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--patients", nargs="+", type=int, default=[6, 12, 24, 50, 150])
    parser.add_argument("--sets", type=int, default=1000, help="simulated data sets (default: %(default)s)")
    parser.add_argument("--folds", nargs="+", type=int, help="of a cross-validation; 0 = one fold for each patient")
    arguments = parser.parse_args()
    if arguments.folds:
        _print_folds(arguments.patients, arguments.folds, arguments.sets)
        return
    rates = ", ".join(f"SDR {t:g} is {true_rate(t):.1f} %" for t in THRESHOLDS)
    print(f"truth: MRE {true_mean():.3f}, {rates}\n")
    print("| patients | intervals | MRE |" + "".join(f" SDR {t:g} |" for t in THRESHOLDS) + " false positives |")
    print("|" + "---|" * (4 + len(THRESHOLDS)))
    for patients in arguments.patients:
        positives = f"{false_positives(patients, arguments.sets, seed=patients):.1f}"
        for name, function, last in (("the report's", coverage, positives), ("percentiles", percentile_coverage, "")):
            cells = " | ".join(f"{value:.1f}" for value in function(patients, arguments.sets, patients).values())
            print(f"| {patients} | {name} | {cells} | {last} |", flush=True)


def _print_folds(patients: list[int], folds: list[int], sets: int) -> None:
    """A row for each number of patients, of folds, and spread between the detectors of the folds."""
    print("| patients | folds | spread of the folds' detectors | MRE |" + "".join(f" SDR {t:g} |" for t in THRESHOLDS))
    print("|" + "---|" * (4 + len(THRESHOLDS)))
    for count, parts, spread in itertools.product(patients, folds, FOLD_SPREADS):
        if parts <= count:
            values = coverage(count, sets, count, parts or count, spread).values()
            cells = " | ".join(f"{value:.1f}" for value in values)
            print(f"| {count} | {parts or count} | {100 * spread:g} % | {cells} |", flush=True)


if __name__ == "__main__":
    run_command(main)
