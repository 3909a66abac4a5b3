"""What the numbers say, in plain words: who wins, by how much, how sure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from landmarks_finetuning.report.collect import compare, loss_setting, main_variants, select
from landmarks_finetuning.report.frames import grouped, named_rows
from landmarks_finetuning.statistics import SIGNIFICANCE, holm

PAPER_METHODS = {"imagenet": "ImageNet", "mocov3": "MoCoV3", "simclrv2": "SimCLRv2", "dino": "DINO"}
NAMES = {"ddpm": "Diffusion pre-training", "scratch": "From scratch", "random": "Untrained encoder",
         "mean_shape": "Mean shape", **PAPER_METHODS}
HUMAN = "Two doctors"  # the distance between them
UNTRAINED = "mean_shape"
STUDIED = "ddpm"
MIN_PATIENTS = 6  # tested ones, to name a winner: the paired test of 5 cannot give less than 0.0625


def display_name(backbone: str) -> str:
    """A backbone's name for people."""
    return NAMES.get(backbone, backbone)


def _inline_name(backbone: str) -> str:
    """The name within a sentence: proper names keep their capitals."""
    return backbone if backbone not in NAMES else PAPER_METHODS.get(backbone, NAMES[backbone].lower())


def comparisons(runs: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """One row per rival and number of shots: the studied backbone (else the best trained one) against every other.

    Only each backbone's main variant takes part. best_rival marks the best of the others, the untrained mean shape only
    where nothing else is. p is the paired test's, p_holm Holm's correction of it over all rows: all comparisons of one
    data set are one family, so that the best rival may be chosen by looking.
    """
    variants = main_variants(runs)
    main = summary[[variants.get(b) == v for b, v in zip(summary["backbone"], summary["variant"], strict=True)]]
    rows = []
    for shots, group in grouped(main, "shots"):
        means = group.set_index("backbone")["mre"].sort_values()
        trained = means.drop(UNTRAINED, errors="ignore")
        method = STUDIED if STUDIED in means else next(iter(trained.index), None)
        if method is None:
            continue
        ranked = [*trained.drop(method).index, *means.index.intersection([UNTRAINED])]
        for rank, rival in enumerate(ranked):
            result = compare(select(runs, method, variants[method], shots), select(runs, rival, variants[rival], shots))
            if result is not None:
                rows.append({"shots": shots, "method": method, "rival": rival, "best_rival": rank == 0,
                             "mean_shape_mre": means.get(UNTRAINED, np.nan), **result})
    found = pd.DataFrame(rows)
    if found.empty:
        return found
    found["p_holm"] = holm(found["p"])
    return found.assign(verdict=[verdict(row) for row in found.to_dict("records")])


def verdict(result: dict) -> str:
    """"better", "worse" or "open".

    A difference counts when there are MIN_PATIENTS test patients or more, its interval over them excludes 0, the
    corrected p-value is below SIGNIFICANCE and, with several draws, every draw agrees on the sign and the mean
    difference exceeds the spread (standard deviation) of the draws' differences.
    """
    excludes_zero = (result["low"] > 0 or result["high"] < 0) and result["patients"] >= MIN_PATIENTS
    significant = result["p_holm"] < SIGNIFICANCE
    agree = result["draws_won"] in (0, result["draws"])
    beyond_spread = result["draws"] == 1 or abs(result["difference"]) > result["spread"]
    if not (excludes_zero and significant and agree and beyond_spread):
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
    for row in named_rows(summary.sort_values(["shots", "mre"])):
        if variants[row.backbone] == row.variant and pd.notna(row.without_leaks_mre):
            parts.append(f"{_inline_name(row.backbone)} at {shots_text(row.shots)} {row.without_leaks_mre:.2f} "
                         f"(with them {row.mre:.2f})")
    rest = f"; without {'it' if count == 1 else 'them'} the mean errors in {unit} are: {', '.join(parts)}"
    return f"{opening}{rest if parts else ''}."


def setting_sentence(runs: pd.DataFrame) -> str:
    """Which of several losses what is said here is about; empty where there is one."""
    trained = runs[runs["backbone"] != UNTRAINED]
    found = {setting: setting or "the default" for setting in sorted(set(trained["variant"].map(loss_setting)))}
    if len(found) < 2:
        return ""
    shown = [found[loss_setting(variant)] for backbone, variant in main_variants(runs).items() if backbone != UNTRAINED]
    return (f"{len(found)} settings of the loss were run ({', '.join(found.values())}). Verdicts, bars and the curves "
            f"by distance are about {_list(list(dict.fromkeys(shown)))}; the table of results and the paper's tables "
            "have all of them.")


def headline(found: pd.DataFrame, unit: str) -> tuple[str, str]:
    """The page's first sentence, and the numbers behind it: of the comparisons with the best rivals."""
    if found.empty:
        return "There is no second method to compare with yet.", ""
    found = found[found["best_rival"]]
    parts = []
    for key, text in (("better", "is clearly better"), ("worse", "is clearly worse"), ("open", "is within the spread")):
        shots = found.loc[found["verdict"] == key, "shots"].tolist()
        if shots:
            parts.append(f"{text} at {_list(shots)} {'label' if shots == [1] else 'labels'}")
    single = " (with one draw of the labels)" if found["draws"].max() == 1 else ""
    sentence = f"{display_name(found['method'].iloc[0])} {_list(parts)}, measured against its best rival{single}."
    return sentence, "; ".join(f"{shots_text(row.shots)}: {_against(row, unit)}" for row in named_rows(found)) + "."


def _list(items: list) -> str:
    """'1, 5 and 10'."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def shots_text(shots: int) -> str:
    """'1 label', '10 labels'."""
    return f"{shots} label" if shots == 1 else f"{shots} labels"


def _against(row: Any, unit: str) -> str:
    return f"{row.method_mre:.2f} against {row.rival_mre:.2f} {unit} ({_inline_name(row.rival)})"


def sentences(found: pd.DataFrame, unit: str) -> list[dict[str, str]]:
    """One plain paragraph per number of shots, about the best rival: {"shots", "verdict", "text"}."""
    return [{"shots": shots_text(row.shots), "verdict": row.verdict, "text": _sentence(row, unit)}
            for row in named_rows(found) if row.best_rival]


def _sentence(row: Any, unit: str) -> str:
    method, rival = display_name(row.method), _inline_name(row.rival)
    size = f"{abs(row.difference):.2f} {unit} ({abs(row.difference) / row.rival_mre:.0%})"
    opening = f"{method} misses by {row.method_mre:.2f} {unit} on average, {rival} by {row.rival_mre:.2f} {unit}"
    direction = "better" if row.difference > 0 else "worse"
    judgement = {"better": f"{method} wins by {size}.", "worse": f"{method} does not win: it is {size} worse.",
                 "open": f"It is {size} {direction}, which is within the spread: no winner."}[row.verdict]
    sure = (f"95 % interval of the gain over patients: {_signed(row.low)} to {_signed(row.high)} {unit}, paired test "
            f"p: {p_text(row.p)}, corrected {p_text(row.p_holm)}")
    if np.isnan(row.low):
        sure = "There is no interval over so few patients"
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


def p_text(p_value: float) -> str:
    """'0.031', '< 0.001'."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
