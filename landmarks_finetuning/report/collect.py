"""Run folders -> pandas frames: one row per run, aggregates over draws and seeds, per-landmark errors, comparisons.

Methods are a backbone and a variant; what is compared was scored on the same images, and errors are in the data
set's unit (mm or px). Only numbers are made here, no pictures and no sentences.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from core.config.finetune import LossSettings
from core.config.settings import all_settings
from core.config.starts import MEAN_SHAPE
from core.errors import UserError
from core.runs.inputs import SCORED
from core.training.run_log import read_metrics
from landmarks_finetuning.metrics import macro_mean, within
from landmarks_finetuning.report.alike import Apart, set_apart
from landmarks_finetuning.report.frames import grouped, named_rows
from landmarks_finetuning.report.provenance import config_of, starting_point
from landmarks_finetuning.report.run_files import AGAIN, check_run, error_matrix, has_columns, read_metrics_json
from landmarks_finetuning.statistics import bootstrap_interval, patient_sums, rate_interval, sign_flip_p

CELL = ["experiment", "dataset", "split", "backbone", "variant", "shots"]
SLUGS = {key: each.slug for key, each in all_settings().items() if each.slug is not None}
SLUG_PARTS = re.compile(f"_(?=(?:{'|'.join(SLUGS.values())})-)")
LOSS_SLUGS = {SLUGS[f"finetune.{key}"] for key in LossSettings.model_fields}
CELL_FOLDER = re.compile(r"shots(\d+)_draw(\d+)_seed(\d+)")


@dataclass
class Experiment:
    """What one runs/<experiment> folder holds."""

    path: Path
    runs: pd.DataFrame  # one row per scored run
    unfinished: pd.DataFrame  # one row per run without metrics.json
    config: dict[str, Any]
    pretraining: list[dict[str, Any]] = field(default_factory=list)
    apart: list[Apart] = field(default_factory=list)  # scored runs of other data, which no figure has
    damaged: list[Apart] = field(default_factory=list)  # nor those with a damaged file
    unscored: pd.DataFrame = field(default_factory=pd.DataFrame)  # one row per run trained on every label there is

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name


def read_experiment(path: Path) -> Experiment:
    """Read runs/<experiment>. Raises UserError for a folder that does not exist or holds no run at all."""
    if not path.is_dir():
        raise UserError(f"experiment folder {path} does not exist")
    path = path.resolve()
    folders = [p for p in sorted(path.glob("landmarks/*/*/*")) if p.is_dir() and CELL_FOLDER.fullmatch(p.name)]
    pretraining = read_metrics(path / "ddpm" / "metrics.jsonl")
    if not folders and not pretraining:
        raise UserError(f"{path} holds no runs: expected landmarks/<backbone>/<variant>/shots010_draw0_seed0 or "
                        "ddpm/metrics.jsonl in it; name a folder such as runs/<experiment>")
    scored = [folder for folder in folders if (folder / "metrics.json").is_file()]
    lost = [folder for folder in folders if folder not in scored and _was_scored(folder)]
    damaged = [Apart(folder, f"{folder / 'metrics.json'} is gone, and it was scored; {AGAIN}") for folder in lost]
    whole = [folder for folder in scored if _is_whole(folder, damaged)]
    apart = set_apart(whole)
    others = {run.folder for run in apart}
    without = {folder for folder in whole if read_metrics_json(folder).get("physical", {}) is None}
    runs = pd.DataFrame([_run_row(path.name, folder) for folder in whole if folder not in others | without])
    unscored = pd.DataFrame([_unscored_row(folder) for folder in whole if folder in without - others])
    unfinished = pd.DataFrame([_unfinished_row(path.name, folder) for folder in folders
                               if folder not in scored + lost])
    configs = [path / "ddpm" / "config.json", *(folder / "config.json" for folder in reversed(folders))]
    config = next((values for file in configs if (values := config_of(file))), {})
    if not runs.empty:
        runs = runs.sort_values([*CELL[2:], "draw", "seed"], ignore_index=True)
    return Experiment(path, runs, unfinished, config, pretraining, apart, damaged, unscored)


def _was_scored(folder: Path) -> bool:
    """Whether a run without metrics.json had one: what is written just before it is there, or a link to nowhere."""
    return (folder / SCORED).is_file() or (folder / "metrics.json").is_symlink()


def _is_whole(folder: Path, damaged: list[Apart]) -> bool:
    """Whether the files of a scored run are what its scoring wrote; where not, `damaged` gets it with the reason."""
    try:
        if read_metrics_json(folder).get("physical", {}) is None:
            _unscored_row(folder)
        else:
            check_run(folder)
            _run_row("", folder)
    except UserError as error:
        damaged.append(Apart(folder, str(error)))
        return False
    return True


def _run_row(experiment: str, folder: Path) -> dict[str, Any]:
    metrics = read_metrics_json(folder)
    try:
        row = {key: metrics[key] for key in ("dataset", "split", "backbone", "variant", "shots", "draw", "seed",
                                             "unit", "images", "validation_labels")}
        if not all(isinstance(row[key], str) for key in ("dataset", "split", "backbone", "variant", "unit")):
            raise TypeError("a name is no text")
        row |= {"layout": metrics.get("layout"), "paper_rule": metrics.get("paper_rule"),
                "phantom": bool(metrics.get("phantom", False)), "decoder": metrics.get("decoder"),
                "scorer_left_out": metrics.get("paper_left_out"),
                "volumes": len(metrics.get("image_size") or ()) == 3,
                "stored_mre": metrics.get("stored_pixels", {}).get("mre", np.nan),
                "seconds": metrics.get("seconds"),
                "labelled": len(metrics.get("training_images") or []) or row["shots"]}
        low, high = metrics["physical"].get("interval") or (np.nan, np.nan)
        row |= _figures(metrics["physical"], "") | {"interval_low": low, "interval_high": high}
        row["macro_mre"] = macro_mean(metrics["physical"]["per_landmark"]["mre"])
    except KeyError as error:
        raise UserError(f"{folder / 'metrics.json'} lacks {error}; {AGAIN}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'metrics.json'} is damaged ({error!r:.80}); {AGAIN}") from error
    if metrics.get("paper"):
        row |= _figures(metrics["paper"], "paper_")
    if metrics.get("release"):
        row |= _figures(metrics["release"], "release_")
    if metrics.get("human"):
        row |= _figures(metrics["human"], "human_") | {"human_within": metrics["human"]["within"]}
    if metrics.get("without_leaks"):
        rest = metrics["without_leaks"]
        row |= {"leaked": metrics["leaked"], "leaked_images": len(rest["left_out"]),
                "without_leaks_mre": np.nan if rest["mre"] is None else rest["mre"]}
    calibration = metrics.get("calibration") or {"landmarks": 0, "of_scored": False}
    row |= {"calibration_landmarks": calibration["landmarks"], "calibrated_on_scored": calibration["of_scored"]}
    start = starting_point(folder, row["backbone"])
    if metrics.get("validation_mre") is not None:  # of runs scored before there was one, what training logged
        start["validation_mre"] = metrics["validation_mre"]
    return {"experiment": experiment, **row, **start, "path": folder}


def _unscored_row(folder: Path) -> dict[str, Any]:
    metrics = read_metrics_json(folder)
    row = {key: metrics[key] for key in ("dataset", "backbone", "variant", "shots", "draw", "seed", "unit", "images")}
    return {**row, "volumes": len(metrics["image_size"]) == 3, "path": folder,
            "expected_error": metrics.get("expected_error") or np.nan}


def _figures(summary: dict[str, Any], prefix: str) -> dict[str, float]:
    values = {f"{prefix}{key}": summary[key] for key in ("mre", "std", "median", "p95")}
    return values | {f"{prefix}sdr_{float(limit):g}": rate for limit, rate in summary["sdr"].items()}


def _unfinished_row(experiment: str, folder: Path) -> dict[str, Any]:
    shots, draw, seed = map(int, re.findall(r"\d+", folder.name))
    lines = read_metrics(folder / "metrics.jsonl")
    return {"experiment": experiment, "backbone": folder.parts[-3], "variant": folder.parts[-2], "shots": shots,
            "draw": draw, "seed": seed, "last_step": lines[-1].get("step") if lines else None}


def sdr_columns(runs: pd.DataFrame, prefix: str = "") -> list[str]:
    """The names of the SDR columns in the order of their thresholds, without those empty for every row."""
    columns = [c for c in runs.columns if c.startswith(f"{prefix}sdr_") and runs[c].notna().any()]
    return sorted(columns, key=lambda c: float(c.rsplit("_", 1)[1]))


def aggregate(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per method and number of shots: means over draws (each draw the mean of its seeds).

    mre_spread is the standard deviation (n - 1) between draws, NaN with one draw; runs, draws and seeds count.
    interval_low/high is the 95 % interval of mre over patients, all draws pooled; low_x and high_x are that of column x
    (an SDR, or what the paper's scorer gives).
    """
    if runs.empty:
        return pd.DataFrame(columns=[*CELL, "mre"])
    of_paper = [column for column in runs.columns if column.startswith("paper_") and column != "paper_rule"]
    optional = [column for column in ("human_within", "without_leaks_mre", "release_mre") if column in runs]
    values = ["mre", "macro_mre", "stored_mre", "std", "median", "p95", *sdr_columns(runs), *of_paper, *optional,
              *sdr_columns(runs, "release_")]
    rows = []
    for key, group in grouped(runs, CELL, sort=True):
        by_draw = group.groupby("draw")[values].mean()
        row: dict[str, Any] = dict(zip(CELL, key, strict=True))
        row |= {str(column): mean for column, mean in by_draw.mean().to_dict().items()}
        row |= {"mre_spread": by_draw["mre"].std(ddof=1), "runs": len(group), "draws": len(by_draw),
                "seeds": group["seed"].nunique(), "unit": group["unit"].iloc[0], "images": group["images"].iloc[0],
                "labelled": group["labelled"].max(), "validation_labels": group["validation_labels"].max(),
                **{key: group[key].iloc[0] for key in ("paper_rule", "phantom", "pretraining_dataset")}}
        rows.append({**row, **_intervals(group)})
    return pd.DataFrame(rows)


def _intervals(group: pd.DataFrame) -> dict[str, float]:
    """95 % intervals over patients, all draws pooled, of each mean and rate of one method at one number of shots."""
    limits: dict[str, float] = {}
    for prefix, column in (("", "error"), ("paper_", "paper_error")):
        if f"{prefix}mre" not in group or group[f"{prefix}mre"].isna().any():
            continue
        matrices, patients = _matrices_by_draw(group, column)
        low, high = bootstrap_interval(_pooled(matrices), patients, seed=0)
        limits |= {f"low_{prefix}mre" if prefix else "interval_low": low,
                   f"high_{prefix}mre" if prefix else "interval_high": high}
        for rate in sdr_columns(group, prefix):
            limit = float(rate.rsplit("_", 1)[1])
            rates = {draw: [within(errors, limit) for errors in seeds] for draw, seeds in matrices.items()}
            rate_low, rate_high = rate_interval(*(part[:, None] for part in patient_sums(_pooled(rates), patients)))
            limits |= {f"low_{rate}": rate_low[0], f"high_{rate}": rate_high[0]}
    return limits


def _pooled(by_draw: dict[int, list[np.ndarray]]) -> np.ndarray:
    """(images, landmarks of all draws): each draw the mean of its seeds."""
    return np.concatenate([np.mean(seeds, axis=0) for seeds in by_draw.values()], axis=1)


def human_distances(runs: pd.DataFrame) -> np.ndarray:
    """Distances between the two annotators of the scored images, sorted; empty where no run knows them."""
    for path in runs["path"] if "human_mre" in runs else ():
        if has_columns(path, ["human_distance"]):
            distances = error_matrix(path, "human_distance")[0].to_numpy()
            return np.sort(distances[~np.isnan(distances)])
    return np.empty(0)


def errors_by_draw(group: pd.DataFrame) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """{draw: errors (images, landmarks), mean over its seeds} of one method at one number of shots, and the patients.

    Raises UserError when its runs were scored on different images.
    """
    matrices, patients = _matrices_by_draw(group, "error")
    return {draw: np.mean(seeds, axis=0) for draw, seeds in matrices.items()}, patients


def _matrices_by_draw(group: pd.DataFrame, column: str) -> tuple[dict[int, list[np.ndarray]], np.ndarray]:
    """{draw: one (images, landmarks) for each seed}, and the images' patients; see `error_matrix` and its columns."""
    scored = [error_matrix(path, column) for path in group["path"]]
    (first, _), (_, patients) = scored[0], scored[-1]
    matrices: dict[int, list[np.ndarray]] = {}
    for path, draw, (matrix, _) in zip(group["path"], group["draw"], scored, strict=True):
        if not (matrix.index.equals(first.index) and matrix.columns.equals(first.columns)):
            if set(matrix.index) != set(first.index) or set(matrix.columns) != set(first.columns):
                raise UserError(f"{path} was scored on other images than {group['path'].iloc[0]}; "
                                "evaluate both again with the same data")
            matrix = matrix.reindex_like(first)
        matrices.setdefault(draw, []).append(matrix.to_numpy())
    return matrices, patients.reindex(first.index).to_numpy()


def slug_parts(variant: str) -> list[str]:
    """"target-pixel_iter-8000" -> ["target-pixel", "iter-8000"], see core.runs.cells.variant."""
    return SLUG_PARTS.split(variant)


def loss_setting(variant: str) -> str:
    """What of a variant's name is about the loss and the decoder: the settings of finetune.losses; "" for defaults."""
    return "_".join(part for part in slug_parts(variant) if part.partition("-")[0] in LOSS_SLUGS)


def main_variants(runs: pd.DataFrame) -> dict[str, str]:
    """{backbone: the variant that is compared with the other backbones'}.

    Pre-trained on this data set rather than another, with the loss setting that most trained runs have (so that all
    share one), then with most scored runs; of equals the default, then the first by name.
    """
    if runs.empty:
        return {}
    start, settings = runs["pretraining_dataset"], runs["variant"].map(loss_setting)
    away = start.notna() & (start != runs["dataset"])
    counts = settings[~away & (runs["backbone"] != MEAN_SHAPE)].value_counts()
    usual = min(counts.index, key=lambda setting: (-counts[setting], setting), default="")  # "" is the default's
    chosen = {}
    for backbone, group in grouped(runs.assign(away=away, other=settings != usual), "backbone"):
        variants = group.groupby("variant").agg(away=("away", "min"), other=("other", "min"), runs=("variant", "size"))
        ranks = {row.Index: (row.away, row.other, -row.runs, row.Index != "default", row.Index)
                 for row in named_rows(variants)}
        chosen[backbone] = min(ranks, key=lambda variant: ranks[variant])
    return chosen


def of_variants(table: pd.DataFrame, variants: Mapping[str, str]) -> pd.DataFrame:
    """The rows, of runs or a summary, of these {backbone: variant}; none of none."""
    return table[table["variant"] == table["backbone"].map(variants)]


def select(runs: pd.DataFrame, backbone: str, variant: str, shots: int) -> pd.DataFrame:
    """The runs of one method at one number of shots."""
    return runs[(runs["backbone"] == backbone) & (runs["variant"] == variant) & (runs["shots"] == shots)]


def compare(group: pd.DataFrame, rival: pd.DataFrame) -> dict[str, Any] | None:
    """Paired difference of mean errors, rival minus group (positive: `group` is better), over the draws both have.

    Keys: method_mre, rival_mre (over those draws), difference, low, high (95 % interval over patients, the same ones
    for both), p (paired test over patients, see `sign_flip_p`), patients, draws, draws_won, spread (standard deviation
    of the draws' differences, NaN with one). None when they share no draw or no image.
    """
    our_draws, patients = errors_by_draw(group)
    their_draws, _ = errors_by_draw(rival)
    draws = sorted(set(our_draws) & set(their_draws))
    first, second = (error_matrix(g["path"].iloc[0])[0] for g in (group, rival))
    images, names = first.index.intersection(second.index), first.columns.intersection(second.columns)
    if not draws or images.empty or names.empty:
        return None
    rows, columns = first.index.get_indexer(images), first.columns.get_indexer(names)
    rival_rows, rival_columns = second.index.get_indexer(images), second.columns.get_indexer(names)
    ours = [our_draws[d][np.ix_(rows, columns)] for d in draws]
    theirs = [their_draws[d][np.ix_(rival_rows, rival_columns)] for d in draws]
    gains = [their - our for our, their in zip(ours, theirs, strict=True)]
    by_draw = np.array([np.nanmean(gain) for gain in gains])
    pooled = np.concatenate(gains, axis=1)
    low, high = bootstrap_interval(pooled, patients[rows], seed=0)
    p_value = float(sign_flip_p(patient_sums(pooled, patients[rows])[0][:, None])[0])
    spread = float(by_draw.std(ddof=1)) if len(draws) > 1 else np.nan
    return {"method_mre": float(np.mean([np.nanmean(errors) for errors in ours])),
            "rival_mre": float(np.mean([np.nanmean(errors) for errors in theirs])),
            "difference": float(by_draw.mean()), "low": low, "high": high, "p": p_value, "draws": len(draws),
            "patients": len(set(patients[rows])), "draws_won": int((by_draw > 0).sum()), "spread": spread}


def per_landmark(runs: pd.DataFrame, shots: int) -> pd.DataFrame:
    """Landmarks x backbones (main variants), the best first: each landmark's mean error over images and draws."""
    columns = {}
    for backbone, variant in main_variants(runs).items():
        group = select(runs, backbone, variant, shots)
        if not group.empty:
            names = error_matrix(group["path"].iloc[0])[0].columns
            by_draw, _ = errors_by_draw(group)
            columns[backbone] = pd.Series(_column_means(np.concatenate(list(by_draw.values()))), index=names)
    table = pd.DataFrame(columns).rename_axis("landmark")
    return table[table.mean().sort_values().index]


def _column_means(errors: np.ndarray) -> np.ndarray:
    scored = ~np.isnan(errors)
    counts = scored.sum(axis=0)
    return np.where(counts > 0, np.nansum(errors, axis=0) / np.maximum(counts, 1), np.nan)
