"""The paper's tables 1 to 5 with our runs in them: long frames for CSV, wide rows for the page, LaTeX tabulars.

Every cell is our mean over draws, its 95 % interval over patients, the published number and the difference (ours minus
theirs). Test split only. Where the paper's scorer ran on real data its figures stand here, else the physical ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from landmarks_finetuning.report.findings import EARLIER, PAPER_METHODS, STUDIED, UNTRAINED, display_name
from landmarks_finetuning.report.frames import grouped, named_rows, records

PAPER_RESULTS = Path(__file__).with_name("paper_results.csv")
NUMBERS = {"chest": 1, "cephalo": 2, "hand": 3}  # the paper's table of each published data set
GAUSSIAN, CONTOUR, GU2NET = "DDPM (Gaussian heatmaps)", "DDPM (contour-hugging)", "GU2Net (mixed datasets)"
GU2NET_RUN, RIVALS = "gu2net", (STUDIED, "scratch", *EARLIER)
KEYS = ["dataset", "experiment", "shots", "method", "variant", "pretraining_dataset", "scorer", "paper_method"]
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "−": "$-$",
         "[": "{[}", "<": "$<$", ">": "$>$"} | {character: f"\\{character}" for character in "_%&#${}"}
SCALES = {"cephalo": "Every image counts as 240 x 193.5 mm, with the scales of height and width exchanged.",
          "hand": "The wrist (landmarks 1 to 5) counts as 50 mm wide.", "chest": "Errors are in pixels of that input."}


@dataclass(frozen=True)
class PaperTable:
    """One table: its file name, what it is, and a long frame with a row per cell (KEYS, metric, unit, ours ...)."""

    name: str
    title: str
    cells: pd.DataFrame

    @property
    def columns(self) -> list[str]:
        """The keys to show beside labels and methods: those in which our rows differ."""
        several = [key for key in ("dataset", "experiment", "variant") if self.cells[key].nunique() > 1]
        return [*several, "pretraining_dataset"] if self.name == "table5" else several


def paper_tables(summary: pd.DataFrame) -> list[PaperTable]:
    """The tables that the runs of `summary` (of one or more experiments, see `aggregate`) can fill.

    One of methods by labels for each data set (tables 1 to 3; other data sets have no number), table 4 where a
    published data set was tested by the studied start or an earlier system, table 5 where a diffusion model was
    pre-trained on another data set. The published rows that no run fills are there, too, and so is a from-scratch row,
    whose published cells are empty.
    """
    tested = summary[(summary["split"] == "test") & (summary["backbone"] != UNTRAINED)]
    if tested.empty:
        return []
    real = tested["paper_rule"].isin(list(NUMBERS)) & ~tested["phantom"].astype(bool)
    tested = tested.assign(published=tested["paper_rule"].where(real, None))
    start = tested["pretraining_dataset"]
    foreign = start.notna() & (start != tested["dataset"]) & (start != tested["published"])
    tables = [_methods_table(rows, key) for key, rows in _by_data_set(tested[~foreign])]
    rivals = tested[real & ~foreign & tested["backbone"].isin(RIVALS)]
    if not rivals.empty:
        cells = [_cells(rows, 4, _of_table_4(rows)) for _, rows in _by_data_set(rivals)]
        tables.append(PaperTable("table4", "Table 4: against earlier systems (the paper’s GU2Net learned from three "
                                 "data sets)", _joined(cells)))
    if foreign.any():
        homes = tested.loc[foreign, "dataset"].unique()
        rows = tested[foreign | ((tested["backbone"] == "scratch") & tested["dataset"].isin(homes))]
        cells = [_cells(rows, 5, {STUDIED: GAUSSIAN}) for _, rows in _by_data_set(rows)]
        tables.append(PaperTable("table5", "Table 5: pre-trained on another data set", _joined(cells)))
    return tables


def _of_table_4(rows: pd.DataFrame) -> dict[str, str]:
    """Each stands beside its own published row; where GU2Net was not run here, the studied start beside GU2Net's."""
    if GU2NET_RUN in set(rows["backbone"]):
        return {GU2NET_RUN: GU2NET, STUDIED: GAUSSIAN}
    return {STUDIED: GU2NET}


def scorer_sentence(rule: str | None) -> str:
    """What the paper's scorer of `rule` does, see `landmarks_finetuning.paper_scorer`; empty for no such rule."""
    if rule not in SCALES:
        return ""
    return ("Paper’s scorer: the error as the published code counts it, to be compared with published figures alone. "
            "Prediction and truth are rounded to whole pixels of the network’s input, and the truth is the centre of "
            f"the disk that is drawn there. {SCALES[rule]} The physical error rounds nothing.")


def _by_data_set(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Published data sets under the paper's name, others under their own."""
    names = rows["published"].fillna(rows["dataset"])
    return [(name, rows[names == name]) for name in sorted(names.unique())]


def _joined(parts: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(parts, ignore_index=True)


def _methods_table(rows: pd.DataFrame, data_set: str) -> PaperTable:
    number = NUMBERS.get(rows["paper_rule"].iloc[0])
    cells = _cells(rows, number, {STUDIED: GAUSSIAN, **PAPER_METHODS})
    stem = "table" if number is None else f"table{number}"
    form = "Table" if rows["published"].notna().any() else "In the form of table"
    title = data_set if number is None else f"{form} {number}: {data_set}"
    return PaperTable(f"{stem}_{re.sub(r'[^A-Za-z0-9.-]+', '-', data_set)}", title, cells)


def _cells(rows: pd.DataFrame, table: int | None, paper_methods: dict[str, str]) -> pd.DataFrame:
    """The long frame of one data set: our rows beside `paper_methods`' ones of the paper's `table`, then the others."""
    published = _published(table, next(iter(rows["published"].dropna()), None))
    cells, taken = [], set()
    for row in records(rows):
        theirs = _beside(row, paper_methods, published)
        taken |= {(name, row["shots"]) for name in theirs["method"]}
        cells += _our_cells(row, theirs)
    for cell in named_rows(published):
        if (cell.method, cell.labeled_images) not in taken:
            cells.append({"dataset": cell.dataset, "shots": cell.labeled_images, "paper_method": cell.method,
                          "pretraining_dataset": cell.pretraining_dataset, "metric": cell.metric, "unit": cell.unit,
                          "paper": cell.mean})
    if "scratch" not in set(rows["backbone"]):
        first = rows.iloc[0]
        cells += [{"dataset": first["dataset"], "shots": shots, "method": display_name("scratch"), "metric": "MRE",
                   "unit": first["unit"]} for shots in sorted(rows["shots"].unique())]
    columns = [*KEYS, "metric", "unit", "ours", "low", "high", "spread", "draws", "paper", "difference"]
    frame = pd.DataFrame(cells).reindex(columns=columns)
    frame["difference"] = frame["ours"].astype(float) - frame["paper"].astype(float)
    return frame.sort_values("shots", kind="stable", ignore_index=True)


def _published(table: int | None, data_set: str | None) -> pd.DataFrame:
    results = pd.read_csv(PAPER_RESULTS)
    return results[(results["table"] == table) & (results["dataset"] == data_set)]


def _beside(row: dict[str, Any], paper_methods: dict[str, str], published: pd.DataFrame) -> pd.DataFrame:
    """The published cells that stand beside one of our rows; none for a start that the paper does not have."""
    name = paper_methods.get(row["backbone"]) if pd.notna(row["published"]) else None
    if name == GAUSSIAN and "target-pixel" in row["variant"]:
        name = CONTOUR
    cells = published[(published["method"] == name) & (published["labeled_images"] == row["shots"])]
    start = row["pretraining_dataset"]
    at_home = pd.isna(start) or start in (row["dataset"], row["published"])
    return cells if at_home else cells[cells["pretraining_dataset"] == start]


def _our_cells(row: dict[str, Any], theirs: pd.DataFrame) -> list[dict[str, Any]]:
    """A row of the summary as cells: the mean error, then the rates by threshold."""
    prefix = "paper_" if pd.notna(row["published"]) and pd.notna(row.get("paper_mre")) else ""
    rates = [key for key in row if key.startswith(f"{prefix}sdr_") and pd.notna(row[key])]
    rates.sort(key=lambda key: float(key.rsplit("_", 1)[1]))
    numbers = theirs.set_index("metric")["mean"]
    identity = {"dataset": row["dataset"], "experiment": row["experiment"], "shots": row["shots"],
                "method": display_name(row["backbone"]), "variant": row["variant"],
                "pretraining_dataset": row["pretraining_dataset"], "scorer": "paper" if prefix else "physical",
                "paper_method": next(iter(theirs["method"]), None)}
    cells = []
    for key in (f"{prefix}mre", *rates):
        metric = "MRE" if key == f"{prefix}mre" else f"SDR@{key.rsplit('_', 1)[1]}"
        low, high = ("interval_low", "interval_high") if key == "mre" else (f"low_{key}", f"high_{key}")
        cells.append({**identity, "metric": metric, "unit": row["unit"] if metric == "MRE" else "%", "ours": row[key],
                      "low": row.get(low), "high": row.get(high), "draws": row["draws"],
                      "spread": row["mre_spread"] if key == "mre" else np.nan, "paper": numbers.get(metric, np.nan)})
    return cells


def wide_rows(cells: pd.DataFrame) -> tuple[list[str], list[dict[str, Any]]]:
    """(metrics, rows): a dict per method and number of labels with KEYS and "cells", one per metric, None for none."""
    metrics = sorted(cells["metric"].unique(), key=lambda m: (m != "MRE", float(m.partition("@")[2] or 0)))
    rows = []
    for key, group in grouped(cells, KEYS, sort=False, dropna=False):
        by_metric = group.set_index("metric")[["ours", "low", "high", "paper", "difference"]].to_dict("index")
        named = {name: None if pd.isna(value) else value for name, value in zip(KEYS, key, strict=True)}
        rows.append({**named, "cells": [by_metric.get(metric) for metric in metrics]})
    return metrics, rows


def latex_table(table: PaperTable) -> str:
    r"""A tabular with booktabs' rules, to be \input; each metric: ours with its interval, the paper's, difference."""
    cells, shown = table.cells, table.columns
    metrics, rows = wide_rows(cells)
    heads = [*(key.replace("_", " ") for key in shown), "labels", "ours", "paper's"]
    groups = "".join(f" & \\multicolumn{{3}}{{c}}{{{escape(metric_title(m, cells))}}}" for m in metrics)
    lines = [r"% needs \usepackage{booktabs}",
             f"\\begin{{tabular}}{{{'l' * len(shown)}rll{'rrr' * len(metrics)}}}", r"\toprule",
             f"{' & ' * (len(heads) - 1)}{groups} \\\\",
             " & ".join([*map(escape, heads), *["ours & paper & diff."] * len(metrics)]) + r" \\", r"\midrule"]
    for row in rows:
        names = [*(row[key] for key in shown), row["shots"], row["method"], row["paper_method"]]
        texts = [escape("–" if name is None else str(name)) for name in names]
        lines.append(" & ".join([*texts, *(_latex_cell(cell) for cell in row["cells"])]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def metric_title(metric: str, cells: pd.DataFrame) -> str:
    """'MRE (mm)', 'SDR 2 mm (%)'; with several units, without them."""
    units = cells.loc[cells["metric"] == "MRE", "unit"].unique()
    if metric == "MRE":
        return f"MRE ({', '.join(units)})"
    return f"SDR {metric.partition('@')[2]}{f' {units[0]}' if len(units) == 1 else ''} (%)"


def _latex_cell(cell: dict[str, float] | None) -> str:
    if cell is None:
        return "-- & -- & --"
    interval = "" if pd.isna(cell["low"]) else f" [{cell['low']:.2f}, {cell['high']:.2f}]"
    difference = "--" if pd.isna(cell["difference"]) else f"${cell['difference']:+.2f}$"
    ours, paper = ("--" if pd.isna(cell[key]) else f"{cell[key]:.2f}" for key in ("ours", "paper"))
    return f"{ours}{interval} & {paper} & {difference}"


def escape(text: str) -> str:
    """`text` with LaTeX's special characters made harmless."""
    return "".join(LATEX.get(character, character) for character in text)
