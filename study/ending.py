"""The last lines of a launch: who came how far, the best run, where the report is, and what to type next.

All is read from the report's tables, so that a launch of a finished study needs no library for it.
"""

from __future__ import annotations

import csv
import shlex
import sys
from pathlib import Path

from core.config.starts import MEAN_SHAPE
from core.errors import UserError
from core.runs.best import point_to_best

MOST_ROWS = 12
HEAD = ("who", "labels", "error", "95 % interval")


def ending(experiment_dir: Path, page: Path, images: Path | None = None) -> list[str]:
    """The lines; experiment_dir/best leads to the best run from now on.

    `images` is a data set whose labels a review of that run can add to.
    """
    summary, best = (read_table(page.parent / "tables" / f"{name}.csv") for name in ("summary", "best"))
    lines = []
    for (dataset, split), rows in by_data_set(summary).items():
        lines += [f"{dataset}, {split} images:", *table_lines(rows)]
    lines.append(f"report: {page}")
    if best:
        try:
            pointer = point_to_best(experiment_dir, experiment_dir / best[0]["run"])
        except (UserError, OSError) as error:
            lines.append(f"note: {error}")
        else:
            lines += [f"best run: {pointer} -> {best[0]['run']}", f"  {best[0]['reason']}"]
            where = shlex.quote(str(experiment_dir))
            lines.append(f"next: {interpreter()} -m landmarks_finetuning.predict {where} NEW_IMAGES --out predictions")
            if images is not None:
                lines.append(f"or look, correct, label: {interpreter()} -m study.review {where} --images "
                             f"{shlex.quote(str(images))}")
    return lines


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a report's table; none where there is no such table."""
    if not path.is_file():
        return []
    with path.open(encoding="utf8", newline="") as file:
        return list(csv.DictReader(file))


def by_data_set(rows: list[dict[str, str]]) -> dict[tuple[str, str], list[dict[str, str]]]:
    """{(data set, split): its rows}."""
    parts: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        parts.setdefault((row["dataset"], row["split"]), []).append(row)
    return parts


def table_lines(rows: list[dict[str, str]]) -> list[str]:
    """By labels, most first, then error; of more than MOST_ROWS the first ones and how many are left."""
    several = len({row["variant"] for row in rows if row["backbone"] != MEAN_SHAPE}) > 1
    ordered = sorted(rows, key=lambda row: (-int(row["shots"]), float(row["mre"])))
    cells = [list(HEAD)]
    for row in ordered[:MOST_ROWS]:
        who = row["backbone"] + (f" {row['variant']}" if several and row["variant"] != "default" else "")
        known = row["interval_low"] and row["interval_high"]
        interval = f"{float(row['interval_low']):.2f} to {float(row['interval_high']):.2f}" if known else "-"
        cells.append([who, row["shots"], f"{float(row['mre']):.2f} {row['unit']}", interval])
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEAD))]
    lines = ["  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    left = len(rows) - MOST_ROWS
    return lines + ([f"  and {left} more: tables/summary.csv beside the report"] if left > 0 else [])


def interpreter() -> str:
    """The Python that runs this, as a command: from here where it lies below, else by its whole path."""
    path = Path(sys.executable)
    try:
        return shlex.quote(str(path.relative_to(Path.cwd())))
    except ValueError:
        return shlex.quote(str(path))
