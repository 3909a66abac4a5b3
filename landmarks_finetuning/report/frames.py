"""Rows and groups of tables for those who know their columns, which pandas' types do not."""

from __future__ import annotations

from typing import Any

import pandas as pd


def named_rows(table: pd.DataFrame) -> list[Any]:
    """The rows as named tuples: `row.shots`."""
    return list(table.itertuples())


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dicts: `row["shots"]`."""
    return [{str(column): value for column, value in row.items()} for row in table.to_dict("records")]


def grouped(table: pd.DataFrame, by: str | list[str], **options: Any) -> list[tuple[Any, pd.DataFrame]]:
    """(value, or tuple of values, of the columns `by`; its rows), with `options` of groupby."""
    return list(table.groupby(by, **options))
