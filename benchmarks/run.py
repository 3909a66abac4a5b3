"""Benchmarks of the framework against its peers, as ratios within one run on one machine.

train    one optimiser step of our network and of three libraries', with as many parameters
data     an epoch of batches from our data path, against albumentations and torch's DataLoader
detectors  a training step and an answer of our detector and of the earlier systems
predict  landmarks in a folder of full-size radiographs: decode, resize, network, heatmaps, write
memory   peak memory by size, base channels and activation checkpointing, measured and accounted

Prints a table, writes OUT/<suite>.json and OUT/<suite>.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import data_suite, detectors_suite, memory_suite, predict_suite, train_suite
from benchmarks.drawing import draw
from benchmarks.measuring import machine
from core.errors import CommandParser, run_command
from core.files import write_json
from core.training.device import resolve_device

SUITES: dict[str, ModuleType] = {"train": train_suite, "data": data_suite, "predict": predict_suite,
                                 "memory": memory_suite,
                                 "detectors": detectors_suite}


def run_suite(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and keep one suite."""
    suite, device = SUITES[name], resolve_device(options.device)
    result = {"suite": name, "machine": machine(device), **suite.measure(options, device)}
    host = result["machine"]
    where = (f"{host['cpu']} ({', '.join(host['cpu_flags'])}), {host['cores']} cores, {host['threads']} threads, "
             f"GPU {host['gpu']}, on {host['device']}, torch {host['packages']['torch']}, {host['date']}")
    print(f"{where}\n{suite.show(result)}", flush=True)
    write_json(options.out / f"{name}.json", result)
    unit, values = suite.bars(result)
    draw(options.out / f"{name}.png", where, unit, values)
    return result


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.run --suite train --base 32 --side 128 --batch 4 --rounds 7")
    parser.add_argument("--suite", nargs="+", choices=list(SUITES), default=list(SUITES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--base", type=int, default=32, help="base channels of our network")
    parser.add_argument("--side", type=int, default=128, help="pixels along every axis")
    parser.add_argument("--dims", type=int, choices=(2, 3), default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--linear-attention", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    for suite in SUITES.values():
        suite.add_arguments(parser)
    options = parser.parse_args()
    for name in options.suite:
        run_suite(name, options)


if __name__ == "__main__":
    run_command(main)
