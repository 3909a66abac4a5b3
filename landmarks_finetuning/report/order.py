"""The one order of the methods in all legends, bars and pictures: as in the results table, the best first."""

from __future__ import annotations

import pandas as pd

from landmarks_finetuning.report.collect import main_variants, of_variants


def best_first(table: pd.DataFrame) -> dict[str, str]:
    """{backbone: its main variant} of runs or a summary, by the mean error at the largest number of labels.

    A backbone without that number comes after those that have it, by the largest number that it has.
    """
    if table.empty:
        return {}
    variants = main_variants(table)
    means = of_variants(table, variants).groupby(["backbone", "shots"])["mre"].mean().reset_index()
    ordered = means.sort_values(["shots", "mre"], ascending=[False, True]).drop_duplicates("backbone")
    return {backbone: variants[backbone] for backbone in ordered["backbone"]}
