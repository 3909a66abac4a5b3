"""Score two tables of points against each other: two detectors against the truth, or two doctors.

A table is predictions.csv (a row a landmark), or landmarks.csv (a row an image); a run's folder stands for its
predictions.csv. With a truth (--truth, --config, or what a scored run's table carries) the errors of A and B are
compared on the same landmarks; without one the distance between A and B is told. Statistics are the report's: pairs,
pooled by patient, 95 % intervals.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from core.config.load import load_config
from core.data.records import DataSource, patient_group
from core.errors import CommandParser, UserError, run_command
from core.files import write_atomically
from core.formats.cells import meant
from core.formats.images import image_id
from core.formats.points import FolderRow, read_folder_csv, read_text
from landmarks_finetuning.metrics import physical_errors, within
from landmarks_finetuning.report.run_files import check_table
from landmarks_finetuning.statistics import (
    SIGNIFICANCE,
    bootstrap_interval,
    holm,
    patient_sums,
    rate_interval,
    sign_flip_p,
)

THRESHOLDS = (2.0, 2.5, 3.0, 4.0)
SHOWN_LANDMARKS = 60
EMPTY = float("nan")
T = TypeVar("T")
SAME_PIXELS = 1e-3  # by which the truth of two tables may differ: they are rounded to 1e-4


@dataclass(frozen=True, eq=False)
class Points:
    """Points (N, D) of the landmarks `names` by image, in the order of tensor axes and pixels; NaN = none."""

    names: tuple[str, ...]
    rows: dict[str, FolderRow]
    errors: dict[str, np.ndarray] | None = None  # (N, 1) of each image, in `unit`, where it is a scored run's table
    truth: Points | None = None
    unit: str = ""

    def of(self, images: Sequence[str], names: Sequence[str]) -> np.ndarray:
        """(M, N, D) of these images and landmarks."""
        chosen = [self.names.index(name) for name in names]
        return np.stack([self.rows[image].points[chosen] for image in images])


@dataclass(frozen=True, eq=False)
class Compared:
    """What is compared: `first` and `second` (M, N) errors of A and B, or `second` None and `first` their distance.

    `offset` (D) is the mean of B minus A in the order of tensor axes, in `offset_unit`; all else is in `unit`.
    """

    names: tuple[str, ...]
    patients: tuple[str, ...]
    unit: str
    first: np.ndarray
    second: np.ndarray | None
    offset: np.ndarray
    offset_unit: str
    left_out: str


def read_points(path: Path) -> Points:
    """The points of a table, and the errors and the truth of a scored run's one; UserError for another table.

    A folder stands for the predictions.csv in it.
    """
    path = path / "predictions.csv" if path.is_dir() else path
    header = [column.strip() for column in next(csv.reader(io.StringIO(read_text(path))), [])]
    if "landmark" in header:
        table = list(csv.DictReader(io.StringIO(read_text(path)), skipinitialspace=True))
        names = tuple(dict.fromkeys(meant((row["landmark"] or "").strip()) for row in table))
        dims = 3 if "z" in header else 2
    else:
        names = tuple(column[:-2] for column in header if column.endswith("_x") and column != "spacing_x")
        dims = 3 if any(f"{name}_z" in header for name in names) else 2
    if not names:
        raise UserError(f'{path} is no table of points: it needs the columns image, landmark, x, y, or image and '
                        f"<landmark>_x, <landmark>_y; its columns are {', '.join(header) or 'none'}")
    every = read_folder_csv(path, names, dims)
    rows = {row.image: row for row in every}
    if len(rows) < len(every):
        twice = next(row.image for row in every if rows[row.image] is not row)
        raise UserError(f'{path}: image "{twice}" is there twice; keep one set of landmarks an image')
    axes = [f"truth_{axis}" for axis in "xyz"[:dims][::-1]]
    if "landmark" not in header or not {"error", *axes} <= set(header):
        return Points(names, by_id(rows))
    errors = {image: np.full((len(names), 1), EMPTY) for image in rows}
    truth = {image: FolderRow(image, np.full((len(names), dims), EMPTY), None, row.patient)
             for image, row in rows.items()}
    for number, line in enumerate(table, 2):
        index, image = names.index(meant(line["landmark"].strip())), meant(line["image"].strip())
        try:
            errors[image][index] = float(line["error"] or EMPTY)
            truth[image].points[index] = [float(line[axis] or EMPTY) for axis in axes]
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}, row {number}: error and truth are no numbers ({error})") from None
    return Points(names, by_id(rows), by_id(errors), Points(names, by_id(truth)), unit_beside(path))


def by_id(table: dict[str, T]) -> dict[str, T]:
    """By the images' ids, without the suffix of their files, which the tables of predict have and evaluate's have not.

    As it is where two images would be one.
    """
    named = {image_id(image): value for image, value in table.items()}
    return named if len(named) == len(table) else table


def unit_beside(path: Path) -> str:
    """The unit of a scored run's errors, by its metrics.json; "units" where that is not there.

    UserError where the table is no longer the one that was scored.
    """
    metrics = path.parent / "metrics.json"
    if not metrics.is_file():
        return "units"
    try:
        scored = json.loads(metrics.read_text(encoding="utf8"))
        written, unit = scored.get("predictions_sha256"), str(scored["unit"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{metrics} is damaged ({error!r}); evaluate that run again") from None
    if path.name == "predictions.csv":
        check_table(path, written)
    return unit


def of_source(source: DataSource) -> Points:
    """The labels of a data set, with spacings and patients."""
    rows = {record.id: FolderRow(record.id, record.truth, record.spacing, record.patient)
            for record in source.labelled}
    return Points(tuple(source.landmark_names), rows)


def compared(first: Points, second: Points, truth: Points | None, spacing: Sequence[float] | None = None) -> Compared:
    """Errors, or distances, on what all have. `spacing` (x, y[, z]) mm a pixel goes before that of the tables.

    UserError where nothing is in all of them, or only some images have a spacing.
    """
    if truth is None and spacing is None and first.errors is not None and second.errors is not None:
        return scored(first, second)
    truth = truth or first.truth or second.truth
    tables = [first, second, *([] if truth is None else [truth])]
    images = [image for image in first.rows if all(image in table.rows for table in tables)]
    names = tuple(name for name in first.names if all(name in table.names for table in tables))
    if not images or not names:
        what = "image" if not images else "landmark"
        shown = [next(iter(table.rows if not images else table.names), "none") for table in tables]
        raise UserError(f"the tables have no {what} in common: they begin with {', '.join(shown)}")
    points = [table.of(images, names) for table in tables]
    if len({each.shape for each in points}) > 1:
        raise UserError("the tables have points of two and of three axes; only points of one kind can be compared")
    missing = np.any([np.isnan(each).any(axis=-1) for each in points], axis=0)
    for each in points:
        each[missing] = EMPTY
    mm = _spacings(tables, images, spacing, points[0].shape[-1])
    patients = tuple(patient_group(image, next((table.rows[image].patient for table in reversed(tables)
                                                if table.rows[image].patient), None)) for image in images)
    difference = (points[1] - points[0]) * (1.0 if mm is None else mm[:, None, :])
    if missing.all():
        raise UserError("nothing can be compared: no landmark is set in all tables for any image")
    offset = np.nanmean(difference, axis=(0, 1))
    every = len(set().union(*(table.rows for table in tables)))
    left_out = "; ".join(([f"{every - len(images)} images are not in all tables"] if every > len(images) else [])
                         + ([f"{int(missing.sum())} landmarks are not set in all of them"] if missing.any() else []))
    unit = "px" if mm is None else "mm"
    if truth is None:
        return Compared(names, patients, unit, physical_errors(points[1], points[0], mm), None, offset, unit, left_out)
    errors = [physical_errors(each, points[2], mm) for each in points[:2]]
    return Compared(names, patients, unit, errors[0], errors[1], offset, unit, left_out)


def scored(first: Points, second: Points) -> Compared:
    """The errors that two scored runs' tables carry. UserError where they were scored on other labels."""
    if first.truth is None or second.truth is None or first.errors is None or second.errors is None:
        raise ValueError("not the tables of scored runs")
    shared = compared(first.truth, second.truth, None)  # no distance: the same truth
    if np.nanmax(shared.first) > SAME_PIXELS:
        raise UserError(f"the tables were scored on other labels, up to {np.nanmax(shared.first):.2f} px apart; say "
                        "which are true by --config or --truth")
    if first.unit != second.unit:
        raise UserError(f"the errors of the tables are in {first.unit} and in {second.unit}; give --config, or --truth "
                        "and --spacing")
    moved = compared(Points(first.names, first.rows), Points(second.names, second.rows), None)
    images = [image for image in first.rows if image in second.rows]
    errors = [np.stack([table.errors[image][[table.names.index(name) for name in moved.names], 0] for image in images])
              for table in (first, second) if table.errors is not None]
    lost = np.isnan(errors[0]) | np.isnan(errors[1])
    for each in errors:
        each[lost] = EMPTY
    return replace(moved, unit=first.unit, first=errors[0], second=errors[1])


def _spacings(tables: Sequence[Points], images: Sequence[str], given: Sequence[float] | None, dims: int
              ) -> np.ndarray | None:
    """(M, D) mm a pixel, in the order of tensor axes; None where nobody says it."""
    if given is not None:
        if len(given) not in (1, dims) or min(given) <= 0:
            raise UserError(f"--spacing takes one number of mm above 0, or one for each of the axes {'xyz'[:dims]}")
        return np.tile(np.array(given, dtype=float)[::-1] * np.ones(dims), (len(images), 1))
    own = [next((table.rows[image].spacing for table in reversed(tables) if table.rows[image].spacing), None)
           for image in images]
    known = [each for each in own if each is not None]
    if not known:
        return None
    if len(known) < len(images):
        raise UserError(f"the spacing of image {images[own.index(None)]} is not known, of others it is; give --spacing")
    return np.array(known)


def figures(values: np.ndarray, patients: Sequence[str]) -> tuple[float, float, float]:
    """Mean of (M, N) and its 95 % interval over patients."""
    return (float(np.nanmean(values)), *bootstrap_interval(values, patients, seed=0))


def rows_of(result: Compared) -> list[dict[str, str | float]]:
    """A row for all landmarks, then one for each: means, difference (A minus B: above 0, B is better), p, Holm's p.

    The p-values of the landmarks are one family; that of all landmarks stands for itself. Without a truth: distance.
    """
    parts = [("all", slice(None)), *((name, slice(index, index + 1)) for index, name in enumerate(result.names))]
    parts = [(name, part) for name, part in parts if not np.isnan(result.first[:, part]).all()]
    rows: list[dict[str, str | float]] = []
    for name, part in parts:
        values = result.first[:, part]
        if result.second is None:
            mean, low, high = figures(values, result.patients)
            rows.append({"landmark": name, "distance": mean, "low": low, "high": high})
            continue
        gains = values - result.second[:, part]
        mean, low, high = figures(gains, result.patients)
        p_value = float(sign_flip_p(patient_sums(gains, result.patients)[0][:, None])[0])
        rows.append({"landmark": name, "a": float(np.nanmean(values)), "b": float(np.nanmean(result.second[:, part])),
                     "difference": mean, "low": low, "high": high, "p": p_value, "p_holm": p_value})
    if result.second is not None and len(rows) > 1:
        for row, p_value in zip(rows[1:], holm([float(row["p"]) for row in rows[1:]]), strict=True):
            row["p_holm"] = float(p_value)
    return rows


def rates(values: np.ndarray, patients: Sequence[str], thresholds: Sequence[float]) -> list[str]:
    """"2 mm 83.1 % (79.0 to 86.6)" for each threshold."""
    texts = []
    for threshold in thresholds:
        hits, counts = patient_sums(within(values, threshold), patients)
        low, high = rate_interval(hits[:, None], counts[:, None])
        texts.append(f"{threshold:g}: {100 * hits.sum() / counts.sum():.1f} % ({low[0]:.1f} to {high[0]:.1f})")
    return texts


def report_lines(result: Compared, thresholds: Sequence[float]) -> list[str]:
    """What the command prints."""
    rows, unit = rows_of(result), result.unit
    counted = int((~np.isnan(result.first)).sum())
    lines = [f"{len(result.patients)} images of {len(set(result.patients))} patients, {len(result.names)} landmarks, "
             f"{counted} pairs" + (f"; left out: {result.left_out}" if result.left_out else "")]
    whole = rows[0]
    if result.second is None:
        lines.append(f"distance between A and B: {whole['distance']:.3f} {unit} "
                     f"(95 % interval {whole['low']:.3f} to {whole['high']:.3f})")
        lines.append(f"within {unit} {', '.join(rates(result.first, result.patients, thresholds))}")
    else:
        for name, values in (("A", result.first), ("B", result.second)):
            mean, low, high = figures(values, result.patients)
            lines.append(f"{name}: mean error {mean:.3f} {unit} (95 % interval {low:.3f} to {high:.3f}); within {unit} "
                         f"{', '.join(rates(values, result.patients, thresholds))}")
        lines.append(f"A minus B: {whole['difference']:+.3f} {unit} (95 % interval {whole['low']:+.3f} to "
                     f"{whole['high']:+.3f}; paired test over patients, p {whole['p']:.4f}): {verdict(whole)}")
    shift = ", ".join(f"{axis} {value:+.3f}" for axis, value in zip("xyz", result.offset[::-1], strict=False))
    lines.append(f"B lies from A by, on the mean: {shift} {result.offset_unit}")
    return lines + landmark_lines(rows[1:])


def verdict(row: dict[str, str | float]) -> str:
    """Which of the two is better, as far as the patients tell."""
    low, high = float(row["low"]), float(row["high"])
    if np.isnan(low):
        return "too few patients to tell"
    if float(row["p"]) < SIGNIFICANCE and (low > 0 or high < 0):
        return "B is better" if low > 0 else "A is better"
    return "no clear difference"


def landmark_lines(rows: list[dict[str, str | float]]) -> list[str]:
    """A table of the landmarks, the largest difference, or distance, first."""
    key = "distance" if rows and "distance" in rows[0] else "difference"
    ordered = sorted(rows, key=lambda row: -abs(float(row[key])))[:SHOWN_LANDMARKS]
    columns = list(rows[0]) if rows else []
    cells = [columns, *([str(row[column]) if column == "landmark" else f"{row[column]:.3f}" for column in columns]
                        for row in ordered)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    lines = ["  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells if row]
    left = len(rows) - len(ordered)
    return lines + ([f"  and {left} more: --out FILE.csv has them all"] if left else [])


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m study.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m study.compare runs/a/best/predictions.csv runs/b/best/predictions.csv; two doctors: "
               "python -m study.compare doctor1.csv doctor2.csv --spacing 0.1")
    parser.add_argument("first", type=Path, metavar="A.csv")
    parser.add_argument("second", type=Path, metavar="B.csv")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--truth", type=Path, metavar="TABLE", help="a table with the true points")
    source.add_argument("--config", type=Path, help="a study's config, whose labels are the truth")
    parser.add_argument("--spacing", type=float, nargs="+", metavar="MM", help="mm a pixel: one number, or x y [z]; "
                        "default: that of the tables or the data set, else errors are in pixels")
    parser.add_argument("--thresholds", type=float, nargs="+", default=list(THRESHOLDS), help="largest errors that "
                        "succeed")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write the figures of all and of each landmark")
    arguments = parser.parse_args()
    if not all(0 < threshold < math.inf for threshold in arguments.thresholds):
        raise UserError("--thresholds must be finite numbers above 0")
    if not all(0 < spacing < math.inf for spacing in arguments.spacing or ()):
        raise UserError("--spacing must be finite numbers above 0")
    first, second = read_points(arguments.first), read_points(arguments.second)
    result = compared(first, second, truth_of(arguments), arguments.spacing)
    print("\n".join(report_lines(result, arguments.thresholds)))
    if arguments.out is not None:
        text = io.StringIO()
        rows = rows_of(result)
        writer = csv.DictWriter(text, [*rows[0], "unit"])
        writer.writeheader()
        writer.writerows({**row, "unit": result.unit} for row in rows)
        write_atomically(arguments.out, text.getvalue().encode())
        print(f"figures in {arguments.out}")


def truth_of(arguments: argparse.Namespace) -> Points | None:
    """What the command line says is true: a table or a data set; None where it says nothing."""
    if arguments.truth is not None:
        return read_points(arguments.truth)
    if arguments.config is not None:
        from core.data.source import load_source

        return of_source(load_source(load_config(arguments.config, []).dataset))
    return None


if __name__ == "__main__":
    run_command(main)
