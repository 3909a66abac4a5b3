"""Train many variants of a study's cells and score every decoder on the VALIDATION split: how defaults are chosen.

A plan is a JSON list of rows {"name": ..., "set": ["finetune.loss=...", ...], "cells": [["ddpm", 10, 0], ...]};
several processes may share one plan (--worker I/N). Each finished cell is one line of OUT/cells.jsonl.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from core.config.load import add_config_arguments, load_config
from core.data.dataset import load_images
from core.data.source import load_source
from core.errors import CommandParser, UserError, run_command
from core.runs.places import Cell
from landmarks_finetuning.decoding import locate
from landmarks_finetuning.heatmaps import DECODERS
from landmarks_finetuning.inference import TrainedDetector
from landmarks_finetuning.metrics import physical_errors, summarise
from landmarks_finetuning.train import finetune_cell


def score_decoders(run_dir: Path, split: str) -> dict[str, dict[str, float]]:
    """MRE, median and SDR of one trained detector for every decoder, on `split`."""
    detector = TrainedDetector(run_dir / "best.safetensors")
    source = load_source(detector.config.dataset)
    images = load_images(source.require(split), detector.config.dataset)
    unfit = set() if images.images.ndim == 4 else {"contour_centroid"}
    unfit |= set() if detector.config.finetune.loss == "cross_entropy_pixels" else {"window_mass"}
    decoders = [name for name in DECODERS if name not in unfit]
    points: dict[str, list[np.ndarray]] = {name: [] for name in decoders}
    for _, outputs, maps in detector.outputs(images):
        for name in decoders:
            points[name].append(locate(outputs, maps, detector.config.finetune, detector.sigma, name)[0])
    scores = {}
    for name, predicted in points.items():
        errors = physical_errors(np.concatenate(predicted), images.original_points(), images.spacings())
        summary = summarise(errors, source.sdr_thresholds)
        scores[name] = {key: summary[key] for key in ("mre", "median", "p95", "sdr")}
    return scores


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m benchmarks.ablation", description=__doc__,
        epilog="example: python -m benchmarks.ablation --config configs/cephalo.json --plan plan.json --out ablation")
    add_config_arguments(parser)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worker", default="0/1", help="I/N: this process takes every N-th cell from the I-th")
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    arguments = parser.parse_args()
    if not arguments.plan.is_file():
        raise UserError(f"plan {arguments.plan} does not exist")
    worker, workers = map(int, arguments.worker.split("/"))
    rows = json.loads(arguments.plan.read_text(encoding="utf8"))
    jobs = [(row, Cell(backbone, shots, draw, 0)) for row in rows for backbone, shots, draw in row["cells"]]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for row, cell in jobs[worker::workers]:
        started = time.perf_counter()
        place = [f"experiment.output_dir={arguments.out / 'runs' / row['name']}", f"finetune.shots=[{cell.shots}]"]
        config = load_config(arguments.config, [*arguments.set, *row["set"], *place], [cell.backbone])
        scores = score_decoders(finetune_cell(config, cell), arguments.split)
        line = {"row": row["name"], "set": row["set"], "backbone": cell.backbone, "shots": cell.shots,
                "draw": cell.draw, "seconds": time.perf_counter() - started, "decoders": scores}
        with (arguments.out / "cells.jsonl").open("a", encoding="utf8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    run_command(main)
