"""Training steps of our network and of three libraries' with as many parameters: time, FLOP/s, memory."""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import torch

from benchmarks.measuring import (
    PRECISIONS,
    measure_apart,
    median_ms,
    parameters,
    peak_functions,
    peak_mib,
    table,
    time_interleaved,
)
from benchmarks.networks import NETWORKS, ONLY_2D, TrainingStep, placed, step_flops
from core.errors import UserError

REFERENCE = "lucidrains"


def peak_memory(name: str, base: int, size: list[int], batch: int, linear_attention: bool, precision: str,
                device: str) -> dict[str, float]:
    """Peak MiB of three steps in this process, which must be fresh, less what a step of a tiny network takes."""
    place = torch.device(device)
    tiny, images = (torch.rand((count, 1, *shape), device=place)
                    for count, shape in ((1, (8,) * len(size)), (batch, size)))
    TrainingStep(placed(NETWORKS[name](8, (8,) * len(size), linear_attention), tiny), tiny)(precision)
    before = peak_mib(place)
    step = TrainingStep(placed(NETWORKS[name](base, tuple(size), linear_attention), images), images)
    for _ in range(3):
        step(precision)
    return {"mib": peak_mib(place) - before}


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Rows of every network in every precision, and the machine's peaks, all interleaved in this process."""
    size = (options.side,) * options.dims
    wanted = options.networks or [name for name in NETWORKS if options.dims == 2 or name not in ONLY_2D]
    flat = [name for name in wanted if name in ONLY_2D]
    if options.dims != 2 and flat:
        raise UserError(f"--networks {' '.join(flat)}: 2D only; with --dims {options.dims} choose from "
                        f"{', '.join(name for name in NETWORKS if name not in ONLY_2D)}")
    images = torch.rand((options.batch, 1, *size), device=device)
    shape = {"base": options.base, "size": size, "linear_attention": options.linear_attention}
    steps, rows = {}, []
    for name in wanted:
        torch.manual_seed(0)
        step = TrainingStep(placed(NETWORKS[name](**shape), images), images)
        flops = step_flops(name, batch=options.batch, **shape)
        for precision in options.precisions:
            steps[f"{name}, {precision}"] = partial(step, precision)
            rows.append({"network": name, "precision": precision, "parameters": parameters(step.network),
                         "flops": flops})
    peaks = peak_functions(device, options.dims)
    seconds = time_interleaved({**steps, **{name: function for name, (function, _) in peaks.items()}},
                               options.rounds, device)
    reached = {name: flops / statistics.median(seconds[name]) for name, (_, flops) in peaks.items()}
    for row, name in zip(rows, steps, strict=True):
        median = statistics.median(seconds[name])
        row |= {"seconds": seconds[name], "ms": median_ms(seconds[name]), "images_per_second": options.batch / median,
                "flops_per_second": row["flops"] / median,
                "share_of_convolution_peak": row["flops"] / median / reached[f"convolution, {row['precision']}"]}
        if options.peak_memory:
            row |= measure_apart("train_suite.peak_memory", {
                "name": row["network"], "batch": options.batch, **shape, "precision": row["precision"],
                "device": str(device)})
    return {"rows": rows, "peaks": reached, "batch": options.batch, **shape}


def show(result: dict[str, Any]) -> str:
    """The rows as a table, with how many times as fast each is as the reference in float32 and in its precision."""
    time_of = {(row["network"], row["precision"]): row["ms"] for row in result["rows"]}

    def times(row: dict[str, Any], precision: str) -> str:
        other = time_of.get((REFERENCE, precision))
        return f"{other / row['ms']:.2f} x" if other else ""

    lines = [[row["network"], row["precision"], f"{row['parameters'] / 1e6:.2f} M", f"{row['flops'] / 1e9:.0f}",
              f"{row['ms']:.0f}", f"{row['images_per_second']:.2f}", f"{row['flops_per_second'] / 1e9:.0f}",
              f"{100 * row['share_of_convolution_peak']:.0f} %",
              row.get("failed") or (f"{row['mib']:.0f}" if "mib" in row else ""),
              times(row, "float32"), times(row, row["precision"])] for row in result["rows"]]
    headings = ["network", "precision", "parameters", "GFLOP a step", "ms a step", "images/s", "GFLOP/s",
                "of the convolution peak", "peak MiB", f"{REFERENCE} float32 / this", f"{REFERENCE} same / this"]
    peaks = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in result["peaks"].items())
    title = (f"one optimiser step, base {result['base']}, {'x'.join(map(str, result['size']))}, batch "
             f"{result['batch']}{'' if result['linear_attention'] else ', no linear attention'}")
    return f"{title}\n{table(headings, lines)}\npeaks, GFLOP/s: {peaks}"


def bars(result: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """What the plot shows."""
    return "images/s", {f"{row['network']}, {row['precision']}": row["images_per_second"] for row in result["rows"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite."""
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--peak-memory", action=argparse.BooleanOptionalAction, default=True,
                        help="measure each row's memory in a process of its own")
