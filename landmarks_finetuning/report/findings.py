"""What the numbers say, in plain words: who wins, by how much, how sure; and the paper's numbers beside ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from landmarks_finetuning.report.collect import compare, main_variants, select

PAPER_RESULTS = Path(__file__).with_name("paper_results.csv")
PAPER_METHODS = {"imagenet": "ImageNet", "mocov3": "MoCoV3", "simclrv2": "SimCLRv2", "dino": "DINO"}
NAMES = {"ddpm": "Diffusion pre-training", "scratch": "From scratch", "random": "Untrained encoder",
         "mean_shape": "Mean shape", **PAPER_METHODS}
HUMAN = "Two doctors"  # the distance between them
UNTRAINED = "mean_shape"
STUDIED = "ddpm"
MIN_PATIENTS = 5  # tested ones, to name a winner: a bootstrap over fewer is blind


def display_name(backbone: str) -> str:
    """A backbone's name for people."""
    return NAMES.get(backbone, backbone)


def _inline_name(backbone: str) -> str:
    """The name within a sentence: proper names keep their capitals."""
    return backbone if backbone not in NAMES else PAPER_METHODS.get(backbone, NAMES[backbone].lower())


def comparisons(runs: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """One row per number of shots: the studied backbone (else the best) against the best of the others.

    Only each backbone's main variant takes part; the untrained mean shape is a rival only when nothing else is.
    """
    variants = main_variants(runs)
    main = summary[[variants.get(b) == v for b, v in zip(summary["backbone"], summary["variant"], strict=True)]]
    rows = []
    for shots, group in main.groupby("shots"):
        means = group.set_index("backbone")["mre"].sort_values()
        trained = means.drop(UNTRAINED, errors="ignore")
        method = STUDIED if STUDIED in means else next(iter(trained.index), None)
        others = trained.drop(method, errors="ignore")
        rival = others.index[0] if len(others) else UNTRAINED
        if method is None or rival not in means:
            continue
        result = compare(select(runs, method, variants[method], shots), select(runs, rival, variants[rival], shots))
        if result is not None:
            floor = means.get(UNTRAINED, np.nan)
            rows.append({"shots": shots, "method": method, "rival": rival, "mean_shape_mre": floor, **result,
                         "verdict": verdict(result)})
    return pd.DataFrame(rows)


def verdict(result: dict) -> str:
    """"better", "worse" or "open".

    A difference counts when there are MIN_PATIENTS test patients or more, its interval over them excludes 0 and, with
    several draws, every draw agrees on the sign and the mean difference exceeds the spread (standard deviation) of the
    draws' differences.
    """
    excludes_zero = (result["low"] > 0 or result["high"] < 0) and result["patients"] >= MIN_PATIENTS
    agree = result["draws_won"] in (0, result["draws"])
    beyond_spread = result["draws"] == 1 or abs(result["difference"]) > result["spread"]
    if not (excludes_zero and agree and beyond_spread):
        return "open"
    return "better" if result["difference"] > 0 else "worse"


def leak_sentence(runs: pd.DataFrame, summary: pd.DataFrame) -> str:
    """How many scored images have a twin on the other side of the split, and the main variants' errors without them.

    Empty where there are none, or where the runs were scored before they were looked for.
    """
    known = runs.dropna(subset=["leaked"]) if "leaked" in runs else runs.iloc[:0]
    if known.empty:
        return ""
    first, unit = known.iloc[0], runs["unit"].iloc[0]
    count = int(first["leaked_images"])
    opening = (f"{count} {first['split']} {'image has' if count == 1 else 'images have'} a twin among the training, "
               "validation or pre-training images")
    if (known["leaked"] == "drop").all():
        return f"{opening} and {'is' if count == 1 else 'are'} left out of all figures."
    variants = main_variants(runs)
    parts = []
    for row in summary.sort_values(["shots", "mre"]).itertuples():
        if variants[row.backbone] == row.variant and pd.notna(row.without_leaks_mre):
            parts.append(f"{_inline_name(row.backbone)} at {shots_text(row.shots)} {row.without_leaks_mre:.2f} "
                         f"(with them {row.mre:.2f})")
    rest = f"; without {'it' if count == 1 else 'them'} the mean errors in {unit} are: {', '.join(parts)}"
    return f"{opening}{rest if parts else ''}."


def headline(found: pd.DataFrame, unit: str) -> tuple[str, str]:
    """The page's first sentence, and the numbers behind it."""
    if found.empty:
        return "There is no second method to compare with yet.", ""
    parts = []
    for key, text in (("better", "is clearly better"), ("worse", "is clearly worse"), ("open", "is within the spread")):
        shots = found.loc[found["verdict"] == key, "shots"].tolist()
        if shots:
            parts.append(f"{text} at {_list(shots)} {'label' if shots == [1] else 'labels'}")
    single = " (with one draw of the labels)" if found["draws"].max() == 1 else ""
    sentence = f"{display_name(found['method'].iloc[0])} {_list(parts)}, measured against its best rival{single}."
    return sentence, "; ".join(f"{shots_text(row.shots)}: {_against(row, unit)}" for row in found.itertuples()) + "."


def _list(items: list) -> str:
    """'1, 5 and 10'."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def shots_text(shots: int) -> str:
    """'1 label', '10 labels'."""
    return f"{shots} label" if shots == 1 else f"{shots} labels"


def _against(row, unit: str) -> str:
    return f"{row.method_mre:.2f} against {row.rival_mre:.2f} {unit} ({_inline_name(row.rival)})"


def sentences(found: pd.DataFrame, unit: str) -> list[dict[str, str]]:
    """One plain paragraph per number of shots: {"shots", "verdict", "text"}."""
    return [{"shots": shots_text(row.shots), "verdict": row.verdict, "text": _sentence(row, unit)}
            for row in found.itertuples()]


def _sentence(row, unit: str) -> str:
    method, rival = display_name(row.method), _inline_name(row.rival)
    size = f"{abs(row.difference):.2f} {unit} ({abs(row.difference) / row.rival_mre:.0%})"
    opening = f"{method} misses by {row.method_mre:.2f} {unit} on average, {rival} by {row.rival_mre:.2f} {unit}"
    direction = "better" if row.difference > 0 else "worse"
    judgement = {"better": f"{method} wins by {size}.", "worse": f"{method} does not win: it is {size} worse.",
                 "open": f"It is {size} {direction}, which is within the spread: no winner."}[row.verdict]
    sure = f"95 % interval of the gain over patients: {_signed(row.low)} to {_signed(row.high)} {unit}"
    if row.draws > 1:
        sure += (f"; better in {row.draws_won} of {row.draws} draws of the labels, the gain varying by "
                 f"{row.spread:.2f} {unit} between draws.")
    else:
        sure += "; one draw of the labels, so how much the choice of labelled images matters is not known."
    if row.patients < MIN_PATIENTS:
        sure += f" {row.patients} test images are too few to name a winner."
    floor = ""
    if UNTRAINED not in (row.method, row.rival) and min(row.method_mre, row.rival_mre) >= row.mean_shape_mre:
        floor = (f" Neither beats the mean of the labelled landmarks ({row.mean_shape_mre:.2f} {unit}), "
                 "which does not look at the image.")
    return f"{opening}. {judgement} {sure}{floor}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def paper_method(backbone: str, variant: str) -> str:
    """The paper's row to put beside a method; what the paper does not have is put beside its diffusion model."""
    if backbone in PAPER_METHODS:
        return PAPER_METHODS[backbone]
    return "DDPM (contour-hugging)" if "target-pixel" in variant else "DDPM (Gaussian heatmaps)"


def paper_comparison(runs: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """Ours (paper scorer where it ran, else physical) beside the published numbers; empty where none apply.

    Only for real data under one of the published rules, on the test split: a phantom has no published numbers.
    """
    rules = runs["paper_rule"].dropna().unique()
    known = pd.read_csv(PAPER_RESULTS)
    known = known[known["table"].isin((1, 2, 3))]
    if len(rules) != 1 or rules[0] not in set(known["dataset"]) or runs["phantom"].any():
        return pd.DataFrame()
    known = known[known["dataset"] == rules[0]]
    rows = []
    for row in summary[(summary["split"] == "test") & (summary["backbone"] != UNTRAINED)].to_dict("records"):
        theirs = known[(known["method"] == paper_method(row["backbone"], row["variant"]))
                       & (known["labeled_images"] == row["shots"])]
        prefix = "paper_" if pd.notna(row.get("paper_mre", np.nan)) else ""
        for published in theirs.itertuples():
            column = published.metric.lower().replace("@", "_")
            value = row.get(prefix + column, np.nan)
            if pd.notna(value):
                rows.append({"shots": row["shots"], "backbone": row["backbone"], "variant": row["variant"],
                             "metric": published.metric, "unit": published.unit, "ours": value,
                             "scorer": "paper" if prefix else "physical", "paper_method": published.method,
                             "paper": published.mean, "difference": value - published.mean})
    return pd.DataFrame(rows)
