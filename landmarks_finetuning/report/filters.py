"""What the page's filters choose from, and which rows of the paper's tables each choice leaves."""

from __future__ import annotations

from typing import Any

import pandas as pd

from landmarks_finetuning.report.findings import NAMES, PAPER_METHODS, STUDIED, display_name
from landmarks_finetuning.report.frames import grouped


def page_filters(pages: list[dict[str, Any]]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """The page's filters, (name, title, [(value, text)]), of what the results have; those with a choice."""
    sections = [section for page in pages for section in page["sections"]]
    rows = [row for section in sections for row in section["rows"]]
    starts, labels = {row["backbone"] for row in rows}, sorted({row["shots"] for row in rows})
    filters = [("data", "Data set", [(name, name) for name in sorted({section["dataset"] for section in sections})]),
             ("start", "Start", sorted(((key, display_name(key)) for key in starts), key=lambda pair: pair[1])),
             ("labels", "Labels", [(str(count), str(count)) for count in labels])]
    return [(name, title, values) for name, title, values in filters if len(values) > 1]


def row_keys(row: dict[str, Any], published: dict[str, list[str]]) -> dict[str, Any]:
    """{"data": [data sets], "start": backbone, "" for a method that we do not have} of a row of `tables.wide_rows`.

    `published` leads from a published data set to ours that stand in its table.
    """
    starts = {name: key for key, name in NAMES.items()} | {name: key for key, name in PAPER_METHODS.items()}
    if row["method"] is not None:
        return {"data": [row["dataset"]], "start": starts.get(row["method"], row["method"])}
    name = row["paper_method"] or ""
    start = STUDIED if name.startswith("DDPM") else starts.get(name, "")
    return {"data": published.get(row["dataset"], []), "start": start}


def published_names(summary: pd.DataFrame) -> dict[str, list[str]]:
    """{published data set: our names of it} of a summary's runs (see `collect.aggregate`)."""
    published = summary.dropna(subset=["paper_rule"])
    return {rule: sorted(rows["dataset"].unique()) for rule, rows in grouped(published, "paper_rule")}
