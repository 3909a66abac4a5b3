"""Which pre-training iteration counts: each is fine-tuned, and the validation error chooses, never the test error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from landmarks_finetuning.report.collect import loss_setting, main_variants, slug_parts
from landmarks_finetuning.report.compute import finetuning_flops, pretraining_flops
from landmarks_finetuning.report.findings import STUDIED, shots_text
from landmarks_finetuning.report.frames import grouped, named_rows

BEST = "iter-best"  # stands in a variant's name for the chosen iteration
OF_A_FILE = re.compile(r"from-(.*)iter\d+")


def family(variant: str) -> str:
    """The name that variants which differ in the pre-training iteration alone share: "default", "iter-8000" -> BEST."""
    parts = [part for part in slug_parts(variant) if not part.startswith("iter-") and part != "default"]
    parts = [OF_A_FILE.sub(rf"from-\1{BEST}", part) for part in parts]
    return "_".join(parts if any(BEST in part for part in parts) else [*parts, BEST])


def iteration_means(runs: pd.DataFrame) -> pd.DataFrame:
    """Errors by number of labels and pre-training iteration, 0 being the run from scratch, and which one is chosen.

    Columns variant (the family), pretraining_dataset, away (that is another data set), shots, iteration, validation_mre
    (of the step that was kept) and mre (of the scored split), both means over draws, each the mean of its seeds, paths
    and number of the runs, chosen. The diffusion model's variants that differ in the iteration alone make one family,
    beside the main from-scratch variant of the same loss; families of one iteration are left out. Chosen is, at each
    number of labels, the iteration with the lowest validation error, of equals the earliest, of those with most runs:
    one whose runs are not all there is not compared.
    """
    validated = runs[runs["pretraining_iteration"].notna() & runs["validation_mre"].notna()]
    validated = validated.assign(iteration=validated["pretraining_iteration"].astype(int),
                                 validation_mre=validated["validation_mre"].astype(float))
    studied = validated[validated["backbone"] == STUDIED]
    studied = studied.assign(variant=studied["variant"].map(family))
    studied = studied.drop_duplicates(["variant", "pretraining_dataset", "shots", "draw", "seed", "iteration"])
    parts = []
    for (variant, start), group in grouped(studied, ["variant", "pretraining_dataset"]):
        if group["iteration"].nunique() > 1:
            rivals = validated[(validated["backbone"] == "scratch")
                           & (validated["variant"].map(loss_setting) == loss_setting(variant))]
            scratch = rivals[rivals["variant"] == main_variants(rivals).get("scratch")]
            means = _means(pd.concat([scratch, group]))
            away = start != group["dataset"].iloc[0]
            parts.append(means.assign(variant=variant, pretraining_dataset=start, away=away))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _means(group: pd.DataFrame) -> pd.DataFrame:
    keys = ["shots", "iteration"]
    by_draw = group.groupby([*keys, "draw"])[["validation_mre", "mre"]].mean()
    runs = group.groupby(keys)["path"].agg(list).rename("paths")
    means = by_draw.groupby(keys).mean().join(runs).reset_index()
    means["runs"] = means["paths"].map(len)
    trained = means[means["iteration"] > 0]
    complete = trained[trained["runs"] == trained.groupby("shots")["runs"].transform("max")]
    best = complete.sort_values(["validation_mre", "iteration"]).drop_duplicates("shots").index
    return means.assign(chosen=means.index.isin(best))


def with_chosen(runs: pd.DataFrame, means: pd.DataFrame) -> pd.DataFrame:
    """`runs` with, of each family of `iteration_means`, those of the chosen iterations alone, under the family's name.

    So the diffusion model is one method, whose iteration may differ from one number of labels to the next.
    """
    rows = runs.assign(family=runs["variant"].map(family))
    chosen = means[means["chosen"]] if not means.empty else means
    for best in named_rows(chosen):
        member = ((rows["backbone"] == STUDIED) & (rows["family"] == best.variant) & (rows["shots"] == best.shots)
                  & (rows["pretraining_dataset"] == best.pretraining_dataset))
        shown = rows[member & (rows["pretraining_iteration"] == best.iteration)].drop_duplicates(["draw", "seed"]).index
        rows = rows[~member | rows.index.isin(shown)]
        rows.loc[rows.index.isin(shown), "variant"] = best.variant
    return rows.drop(columns="family").reset_index(drop=True)


def main_family(runs: pd.DataFrame, means: pd.DataFrame) -> pd.DataFrame:
    """The rows of `means` about the method that is compared with the others; `runs` as `with_chosen` left them."""
    if means.empty:
        return means
    return means[means["variant"] == main_variants(runs).get(STUDIED)]


def training_petaflop(row: Any, ddpm_dir: Path) -> float:
    """Training operations, in 1e15, behind a row of `iteration_means`: of pre-training in `ddpm_dir` and fine-tuning.

    Pre-training up to the row's iteration (from scratch: none), fine-tuning over all steps, the mean of its runs. NaN
    where logs do not say it, or where the pre-training is another study's.
    """
    if row.away:
        return np.nan
    before = pretraining_flops(ddpm_dir, row.iteration) if row.iteration else 0.0
    return (before + float(np.mean([finetuning_flops(path) for path in row.paths]))) / 1e15


def choice_sentence(means: pd.DataFrame, unit: str) -> str:
    """Which iteration is shown at each number of labels, by which errors; empty where there was none to choose."""
    if means.empty:
        return ""
    parts = []
    for shots, group in grouped(means[means["iteration"] > 0], "shots"):
        best, others = group[group["chosen"]].iloc[0], group[~group["chosen"]]
        tried = ", ".join(f"{row.iteration}: {row.validation_mre:.2f}{_missing(row.runs, best['runs'])}"
                          for row in named_rows(others))
        parts.append(f"{shots_text(shots)} {best['iteration']} ({best['validation_mre']:.2f} {unit}"
                     f"{f'; {tried}' if tried else ''})")
    return ("The diffusion model is shown at the pre-training iteration whose mean error on the validation images, "
            f"over draws and seeds, is the lowest; the images scored here had no say. {'; '.join(parts)}.")


def _missing(runs: int, most: int) -> str:
    return f" over {runs} of {most} runs, so not compared" if runs < most else ""
