"""Whether bf16 trains as well as float32: the whole study in both precisions, the same seeds, paired.

For each seed the network is pre-trained and fine-tuned (first shots of the config, draw 0) in bf16 and in float32; only
the precision differs. The difference counts against the spread over seeds within one precision.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.measuring import PRECISIONS, table
from core.config.load import add_config_arguments, load_config
from core.errors import CommandParser, run_command
from core.files import write_json
from core.runs.places import Cell
from core.runs.record import environment
from core.training.run_log import read_metrics
from ddpm_pretraining.train import pretrain
from landmarks_finetuning.evaluate import evaluate
from landmarks_finetuning.train import finetune_cell


def run_one(options: argparse.Namespace, precision: str, seed: int) -> dict[str, float | str | int]:
    """Last denoising loss on the validation images and test error of one seed in one precision."""
    config = load_config(options.config, [
        *options.set, f"experiment.output_dir={options.out}", f"experiment.name={precision}_seed{seed}",
        f"experiment.precision={precision}", f"experiment.seed={seed}"])
    lines = read_metrics(pretrain(config) / "metrics.jsonl")
    denoising = [line["validation_loss"] for line in lines if "validation_loss" in line][-1]
    run_dir = finetune_cell(config, Cell("ddpm", options.shots, 0, seed))
    scored = evaluate(run_dir)[1]["physical"]
    return {"precision": precision, "seed": seed, "denoising_loss": denoising, "mre": scored["mre"]}


def show(rows: list[dict]) -> str:
    """Mean and standard deviation over seeds in each precision, and the mean of the paired differences."""
    lines = []
    for figure in ("denoising_loss", "mre"):
        by = {name: [row[figure] for row in rows if row["precision"] == name] for name in PRECISIONS}
        differences = [first - second for first, second in zip(*by.values(), strict=True)]
        lines.append([figure, *(f"{statistics.mean(values):.4f} +- {statistics.stdev(values):.4f}"
                                for values in by.values()),
                      f"{statistics.mean(differences):+.4f} +- {statistics.stdev(differences):.4f}"])
    return table(["figure", *PRECISIONS, "bf16 - float32, paired"], lines)


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m benchmarks.precision", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.precision --set ddpm.iterations=400 ddpm.checkpoint_iterations=[400]")
    add_config_arguments(parser)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="two at least")
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    options = parser.parse_args()
    rows = [run_one(options, precision, seed) for seed in options.seeds for precision in PRECISIONS]
    print(show(rows))
    write_json(options.out / "precision.json", {"machine": environment(), "rows": rows})


if __name__ == "__main__":
    run_command(main)
