"""Peak memory and time of our training step by size and base channels, without and with activation checkpointing.

Every row is measured in a process of its own, less what a step of a tiny network takes (libraries, kernels), and
accounted on fake tensors (`benchmarks.accounting`). `--account` names base channels that are only accounted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.measuring import measure_apart, parameters, peak_mib, table, wait_for
from benchmarks.networks import TrainingStep, ours, placed
from core.errors import UserError
from core.training.device import resolve_precision

STEPS = 3


def measured(base: int, size: list[int], batch: int, linear_attention: bool, precision: str, checkpointing: bool,
             device: str) -> dict[str, float]:
    """Peak MiB, median seconds of a step and the number of parameters, in this process, which must be fresh."""
    place = torch.device(device)

    def train(width: int, shape: tuple[int, ...], count: int) -> tuple[float, int]:
        images = torch.rand((count, 1, *shape), device=place)
        network = ours(width, shape, linear_attention)
        network.activation_checkpointing = checkpointing
        step, seconds = TrainingStep(placed(network, images), images), []
        for _ in range(STEPS):
            started = time.perf_counter()
            step(precision)
            wait_for(place)
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds[1:]), parameters(network)

    train(4, (8,) * len(size), 1)
    before = peak_mib(place)
    seconds, count = train(base, tuple(size), batch)
    return {"mib": peak_mib(place) - before, "seconds": seconds, "parameters": count}


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Rows by size, base channels and checkpointing."""
    sides, bases = options.sides or [options.side], options.bases or [options.base]
    if any(side % 8 for side in sides):
        raise UserError(f"--sides {sides}: must be multiples of 8")
    on_gpu = options.account_gpu or device.type == "cuda"
    precision, rows = resolve_precision("auto", device), []
    for side in sides:
        for base in [*bases, *options.account]:
            for checkpointing in (False, True):
                setting = {"base": base, "size": [side] * options.dims, "batch": options.batch,
                           "linear_attention": options.linear_attention, "precision": precision,
                           "checkpointing": checkpointing}
                row = {**setting, "accounted": measure_apart("accounting.account", {**setting, "gpu": on_gpu})}
                if base in bases:
                    row |= measure_apart("memory_suite.measured", {**setting, "device": str(device)})
                rows.append(row)
                print(show({"rows": [row]}).splitlines()[-1], flush=True)
    return {"rows": rows}


def show(result: dict[str, Any]) -> str:
    """The rows as a table, MiB."""
    lines = []
    for row in result["rows"]:
        accounted = row["accounted"]
        step = [f"{row['mib']:.0f}", f"{row['seconds']:.2f} s"] if "mib" in row else [row.get("failed", ""), ""]
        lines.append(["x".join(map(str, row["size"])), row["base"], row["batch"], row["precision"],
                      "yes" if row["checkpointing"] else "no", *step,
                      *([accounted["failed"]] if "failed" in accounted else
                        [f"{accounted[key]:.0f}"
                         for key in ("peak", "weights", "gradients", "average", "adamw", "rest")])])
    return table(["input", "base", "batch", "precision", "checkpointed", "measured MiB", "step", "accounted MiB",
                  "weights", "gradients", "average", "AdamW", "the rest of the peak"], lines)


def bars(result: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """What the plot shows."""
    return "peak MiB, accounted", {
        f"{row['size'][0]} base {row['base']}{', checkpointed' if row['checkpointing'] else ''}":
        row["accounted"].get("peak", 0.0) for row in result["rows"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite."""
    parser.add_argument("--sides", type=int, nargs="+", help="memory: several in place of --side")
    parser.add_argument("--bases", type=int, nargs="+", help="memory: several in place of --base")
    parser.add_argument("--account-gpu", action="store_true", help="memory: account as on a GPU, also without one")
    parser.add_argument("--account", type=int, nargs="+", default=[], metavar="BASE",
                        help="memory: base channels that are only accounted, not measured")
