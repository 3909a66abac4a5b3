"""What the numbers say, in plain words: who wins, by how much, how sure."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from landmarks_finetuning.report.collect import (
    compare,
    loss_setting,
    main_variants,
    of_variants,
    sdr_columns,
    select,
    slug_parts,
)
from landmarks_finetuning.report.frames import grouped, named_rows
from landmarks_finetuning.statistics import SIGNIFICANCE, holm, patients_needed

PAPER_METHODS = {"imagenet": "ImageNet", "mocov3": "MoCoV3", "simclrv2": "SimCLRv2", "dino": "DINO"}
NAMES = {"ddpm": "Diffusion pre-training", "scratch": "From scratch", "random": "Untrained encoder",
         "mean_shape": "Mean shape", "gu2net": "GU2Net", "global_to_local": "Global-to-local", **PAPER_METHODS}
EARLIER = {"gu2net": "GU2Net", "global_to_local": "global-to-local"}
HUMAN = "Two doctors"  # the distance between them
UNTRAINED = "mean_shape"
STUDIED = "ddpm"
VERDICTS = {"better": "clear gain", "worse": "clear loss", "open": "within the spread",
            "few": "too few test images to tell"}
CLEAR = ("better", "worse")
COVERAGE = "pick-coverage"  # of a variant's name, see core.runs.places.variant


def display_name(backbone: str) -> str:
    """A backbone's name for people."""
    return NAMES.get(backbone, backbone)


def _inline_name(backbone: str) -> str:
    """The name within a sentence: proper names keep their capitals."""
    return backbone if backbone not in NAMES else {**PAPER_METHODS, **EARLIER}.get(backbone, NAMES[backbone].lower())


def comparisons(runs: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """One row per rival and number of shots: the studied backbone (else the best trained one) against every other.

    Only each backbone's main variant takes part. best_rival marks the best of the others, the untrained mean shape only
    where nothing else is. p is the paired test's, p_holm Holm's correction of it over all rows: all comparisons of one
    data set are one family, so that the best rival may be chosen by looking. patients_needed is what that family takes.
    """
    variants = main_variants(runs)
    main = of_variants(summary, variants)
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
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    table = table.assign(p_holm=holm(table["p"]), patients_needed=patients_needed(len(table)))
    return table.assign(verdict=[verdict(row) for row in table.to_dict("records")])


def verdict(result: dict) -> str:
    """"better", "worse", "open", or "few": there are not the test patients whom this many comparisons need.

    A difference counts when its interval over test patients excludes 0, the corrected p-value is below SIGNIFICANCE
    and, with several draws, every draw agrees on the sign and the mean difference exceeds the spread (standard
    deviation) of the draws' differences. With one draw it counts for that draw alone (see `verdict_text`).
    """
    excludes_zero = result["low"] > 0 or result["high"] < 0
    significant = result["p_holm"] < SIGNIFICANCE
    agree = result["draws_won"] in (0, result["draws"])
    beyond_spread = result["draws"] == 1 or abs(result["difference"]) > result["spread"]
    if excludes_zero and significant and agree and beyond_spread:
        return "better" if result["difference"] > 0 else "worse"
    return "open" if result["patients"] >= result["patients_needed"] else "few"


def verdict_text(row: dict) -> str:
    """The verdict of a row of `comparisons` in a few words; with one draw of the labels nothing is clear beyond it."""
    return VERDICTS[row["verdict"]] + (" for this draw" if row["verdict"] in CLEAR and row["draws"] == 1 else "")


def release_sentence(summary: pd.DataFrame) -> str:
    """The mean errors by the scorer of a system's own release, beside ours; empty where none ran."""
    if "release_mre" not in summary:
        return ""
    parts, limits = [], sdr_columns(summary, "release_")[:4]
    scored = summary.dropna(subset=["release_mre"]).sort_values(["backbone", "variant", "shots"])
    for row in scored.to_dict("records"):
        rates = ", ".join(f"{row[limit]:.1f} % within {limit.rsplit('_', 1)[1]}" for limit in limits)
        parts.append(f"{display_name(row['backbone'])} at {shots_text(row['shots'])} {row['release_mre']:.2f} "
                     f"{row['unit']} ({rates}; ours {row['mre']:.2f})")
    return f"By the scorer of the system’s own release: {'; '.join(parts)}." if parts else ""


def leak_sentence(runs: pd.DataFrame, summary: pd.DataFrame) -> str:
    """How many scored images have a twin on the other side of the split, and the main variants' errors without them.

    Empty where there are none, or where the runs were scored before they were looked for.
    """
    searched = runs.dropna(subset=["leaked"]) if "leaked" in runs else runs.iloc[:0]
    if searched.empty:
        return ""
    first, unit = searched.iloc[0], runs["unit"].iloc[0]
    count = int(first["leaked_images"])
    opening = (f"{count} {first['split']} {'image has' if count == 1 else 'images have'} a twin among the training, "
               "validation or pre-training images")
    if (searched["leaked"] == "drop").all():
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
    names = {setting: setting or "the default" for setting in sorted(set(trained["variant"].map(loss_setting)))}
    if len(names) < 2:
        return ""
    shown = [names[loss_setting(variant)] for backbone, variant in main_variants(runs).items() if backbone != UNTRAINED]
    return (f"{len(names)} settings of the loss were run ({', '.join(names.values())}). Verdicts, bars and the curves "
            f"by distance are about {_list(list(dict.fromkeys(shown)))}; the table of results and the paper's tables "
            "have all of them.")


def selection_sentence(summary: pd.DataFrame) -> str:
    """Images chosen by coverage beside random draws, for every start that was run with both; empty where none was."""
    trained = summary[summary["backbone"] != UNTRAINED]
    drawn = {(row.backbone, row.variant, row.shots): row for row in named_rows(trained)}
    parts = []
    for (backbone, variant, shots), row in drawn.items():
        others = [part for part in slug_parts(variant) if part != COVERAGE]
        rival = drawn.get((backbone, "_".join(others) or "default", shots))
        if COVERAGE in slug_parts(variant) and rival is not None:
            spread = "" if np.isnan(rival.mre_spread) else f" +- {rival.mre_spread:.2f}"
            parts.append(f"{_inline_name(backbone)} at {shots_text(shots)} {row.mre:.2f} against {rival.mre:.2f}"
                         f"{spread}")
    if not parts:
        return ""
    unit = trained["unit"].iloc[0]
    return (f"Variants named {COVERAGE} were trained on the labelled images whose diffusion features cover the images "
            f"of the pre-training best. Against random draws (mean and spread), {unit}: {'; '.join(parts)}.")


def headline(table: pd.DataFrame, unit: str) -> tuple[str, str]:
    """The page's first sentence, and the numbers behind it: of the `comparisons` with the best rivals."""
    if table.empty:
        return "There is no second method to compare with yet.", ""
    table = table[table["best_rival"]]
    verdicts = {"better": "is clearly better", "worse": "is clearly worse", "open": "is within the spread",
                "few": "cannot be judged on so few test images"}
    parts = []
    for (key, text), single in product(verdicts.items(), (False, True)):
        shots = table.loc[(table["verdict"] == key) & ((table["draws"] == 1) == single), "shots"].tolist()
        if shots:
            draw = " for this draw of the labels" if single and key in CLEAR else ""
            parts.append(f"{text}{draw} at {_list(shots)} {'label' if shots == [1] else 'labels'}")
    sentence = f"{display_name(table['method'].iloc[0])} {_list(parts)}, measured against its best rival."
    return sentence, "; ".join(f"{shots_text(row.shots)}: {_against(row, unit)}" for row in named_rows(table)) + "."


def _list(items: list) -> str:
    """'1, 5 and 10'."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def shots_text(shots: int) -> str:
    """'1 label', '10 labels'."""
    return f"{shots} label" if shots == 1 else f"{shots} labels"


def _against(row: Any, unit: str) -> str:
    return f"{row.method_mre:.2f} against {row.rival_mre:.2f} {unit} ({_inline_name(row.rival)})"


def sentences(table: pd.DataFrame, unit: str) -> list[dict[str, str]]:
    """One plain paragraph per number of shots, about the best rival: {"shots", "verdict", "draws", "text"}."""
    return [{"shots": shots_text(row.shots), "verdict": row.verdict, "draws": row.draws, "text": _sentence(row, unit)}
            for row in named_rows(table) if row.best_rival]


def _sentence(row: Any, unit: str) -> str:
    method, rival = display_name(row.method), _inline_name(row.rival)
    share = f"{abs(row.difference) / row.rival_mre:.0%}" if row.rival_mre > 0 else "ratio not defined"
    size = f"{abs(row.difference):.2f} {unit} ({share})"
    opening = f"{method} misses by {row.method_mre:.2f} {unit} on average, {rival} by {row.rival_mre:.2f} {unit}"
    direction = "better" if row.difference > 0 else "worse"
    draw = " for this draw of the labels" if row.draws == 1 else ""
    judgement = {"better": f"{method} wins by {size}{draw}.",
                 "worse": f"{method} does not win: it is {size} worse{draw}.",
                 "open": f"It is {size} {direction}, which is within the spread: no winner.",
                 "few": f"It is {size} {direction}, on too few test images to tell."}[row.verdict]
    sure = (f"95 % interval of the gain over patients: {_signed(row.low)} to {_signed(row.high)} {unit}, paired test "
            f"p: {p_text(row.p)}, corrected {p_text(row.p_holm)}")
    if np.isnan(row.low):
        sure = "There is no interval over so few patients"
    if row.draws > 1:
        sure += (f"; better in {row.draws_won} of {row.draws} draws of the labels, the gain varying by "
                 f"{row.spread:.2f} {unit} between draws.")
    else:
        sure += "; one draw of the labels, so how much the choice of labelled images matters is not known."
    if row.verdict == "few":
        images = "image is" if row.patients == 1 else "images are"
        sure += f" {row.patients} test {images} too few to tell ({_needed(row.patients_needed)})."
    floor = ""
    if UNTRAINED not in (row.method, row.rival) and min(row.method_mre, row.rival_mre) >= row.mean_shape_mre:
        floor = (f" Neither beats the mean of the labelled landmarks ({row.mean_shape_mre:.2f} {unit}), "
                 "which does not look at the image.")
    return f"{opening}. {judgement} {sure}{floor}"


def _needed(patients: float) -> str:
    return f"needed here: {patients:.0f}" if np.isfinite(patients) else "no number is enough for so many comparisons"


def rule_sentence(table: pd.DataFrame) -> str:
    """When a gain counts as clear, and how many test patients that takes for these `comparisons`; empty for none."""
    if table.empty:
        return ""
    many = "one comparison" if len(table) == 1 else f"{len(table)} comparisons"
    return (f"A gain counts as clear when its 95 % interval over test patients excludes zero, the corrected p-value is "
            f"below {SIGNIFICANCE} (test patients for {many}, {_needed(table['patients_needed'].iloc[0])}) and, with "
            "several draws of the labelled images, every draw agrees and the gain exceeds its standard deviation "
            "between draws. With one draw it is clear for this draw alone. An image without a patient's name counts as "
            "a patient.")


def p_text(p_value: float) -> str:
    """'0.031', '< 0.001'."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
