"""Which run of a study to use: chosen by errors on validation images, never by those that the report shows."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import UserError
from core.runs.inputs import INPUTS, read_record
from landmarks_finetuning.report.collect import CELL_FOLDER
from landmarks_finetuning.report.findings import STUDIED, display_name, shots_text
from landmarks_finetuning.report.provenance import starting_point

WEIGHTS = "best.safetensors"
Method = tuple[str, str, int]  # backbone, variant, number of labels


@dataclass(frozen=True)
class Best:
    """The best run of an experiment, and in words what it was chosen by."""

    folder: Path
    reason: str


def best_run(experiment_dir: Path, left_out: Collection[Path] = ()) -> Best | None:
    """The best of the evaluated runs that have weights, but for those `left_out`; None where there is none.

    The start, variant and number of labels with the lowest mean validation error over its draws and seeds, then the
    lowest of its runs: one lucky draw does not choose a start; of equals the most labels. Where no run held images
    back for validation, the most labels, the diffusion model before others, the first draw and seed.
    """
    runs = {}
    for path in sorted(experiment_dir.glob(f"landmarks/*/*/shots*/{WEIGHTS}")):
        folder = path.parent
        whole = CELL_FOLDER.fullmatch(folder.name) and folder not in left_out  # no fold of a cross-validation
        metrics = _metrics(folder) if whole and (folder / "metrics.json").is_file() else None
        if metrics is not None:
            runs[folder] = metrics
    if not runs:
        return None
    validated = {folder: metrics for folder, metrics in runs.items() if metrics["validation_mre"] is not None}
    if not validated:
        return _without_validation(runs)
    methods: dict[Method, list[float]] = {}
    for metrics in validated.values():
        methods.setdefault(_method(metrics), []).append(metrics["validation_mre"])
    chosen = min(methods, key=lambda method: (float(np.mean(methods[method])), -method[2], method))
    own = {folder: metrics for folder, metrics in validated.items() if _method(metrics) == chosen}
    folder = min(own, key=lambda folder: (own[folder]["validation_mre"], folder))
    return Best(folder, _reason(own, validated, folder, float(np.mean(methods[chosen]))))


def _metrics(folder: Path) -> dict[str, Any] | None:
    """What of a run's metrics.json chooses; None for a damaged one, which the report names by itself."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf8"))
        known = {key: metrics[key] for key in ("backbone", "variant", "shots", "draw", "seed", "unit")}
    except (ValueError, KeyError, TypeError):
        return None
    error = metrics.get("validation_mre")
    if error is None:  # of runs scored before there was one, what training logged
        error = starting_point(folder, known["backbone"])["validation_mre"]
    return {**known, "validation_mre": error}


def _method(metrics: dict[str, Any]) -> Method:
    return metrics["backbone"], metrics["variant"], metrics["shots"]


def _named(metrics: dict[str, Any]) -> str:
    variant = "" if metrics["variant"] == "default" else f", {metrics['variant']}"
    return f"{display_name(metrics['backbone'])}{variant}, {shots_text(metrics['shots'])}"


def _without_validation(runs: dict[Path, dict[str, Any]]) -> Best:
    def rank(folder: Path) -> tuple[Any, ...]:
        run = runs[folder]
        return (-run["shots"], run["backbone"] != STUDIED, run["backbone"], run["variant"] != "default",
                run["variant"], run["draw"], run["seed"], folder)

    folder = min(runs, key=rank)
    return Best(folder, f"{_named(runs[folder])}: the most labels, and no error chose it, as no run held images back "
                        "for validation")


def _reason(own: dict[Path, dict[str, Any]], validated: dict[Path, dict[str, Any]], folder: Path, mean: float) -> str:
    run = own[folder]
    others = f"; mean of the {len(own)} runs alike {mean:.2f}" if len(own) > 1 else ""
    images = _validation_images(validated)
    where = "its own validation images, which differ between runs" if images is None else (
        "the validation images" if not images else f"the {images} validation images" if images > 1 else
        "the one validation image")
    return (f"{_named(run)}: lowest of {len(validated)} by the error on {where}, not on test images: "
            f"{run['validation_mre']:.2f} {run['unit']}{others}")


def _validation_images(runs: dict[Path, dict[str, Any]]) -> int | None:
    """How many images all the runs were validated on; 0 where no run records it, None where they differ."""
    seen = set()
    for folder in runs:
        try:
            record = read_record(folder / INPUTS)
        except UserError:  # a damaged record, which the report names
            continue
        if record is not None:
            seen.add(frozenset(record["images"].get("validation", {})))
    if len(seen) > 1:
        return None
    return len(next(iter(seen))) if seen else 0
