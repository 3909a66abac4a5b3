"""An unlabelled set that outgrows memory: filling the packed files, starting again, gathering batches, leaks, the plan.

Synthetic 8-bit PNGs are written to a temporary folder and deleted afterwards; each part runs in a process of its own,
which reports its seconds and the memory it took. Figures are also given for a million images, by calculation.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measuring import peak_mib, table
from core.config.config import Config
from core.config.load import parse_config
from core.data.dataset import PackedSet, load_unlabelled
from core.data.digests import data_digests
from core.data.leaks import find_leaks
from core.data.source import load_source
from core.errors import CommandParser, UserError, run_command
from core.files import write_json
from core.runs.record import environment
from core.training.batches import BatchPlan
from ddpm_pretraining.train import pretrain

MILLION, SMALL_BYTES = 1_000_000, 40 << 10  # of a PNG, for what must fit on the disk
BATCH, BATCHES = 32, 200
PATTERNS = (101, 97)  # without a common divisor
NETWORK = {"base_channels": 8, "channel_multipliers": [1, 2], "attention_heads": 1, "attention_head_channels": 8}
PARTS = ("digests", "fill", "start", "gather", "leaks", "plan", "train")


def draw_images(folder: Path, count: int, side: int) -> None:
    """`count` grey PNGs, each another: the mean of two of some hundred smooth patterns, shifted."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[:side, :side] / side
    waves = np.stack([np.cos(2 * np.pi * (a * y + b * x) + c) for a in range(5) for b in range(5) for c in (0, 1.57)])
    patterns = np.tensordot(np.random.default_rng(0).normal(size=(PATTERNS[0], len(waves))), waves, 1)
    patterns -= patterns.min(axis=(1, 2), keepdims=True)
    patterns = (patterns * (127 / patterns.max(axis=(1, 2), keepdims=True))).astype(np.uint8)
    for index in range(count):
        first, second = (patterns[index % number] for number in PATTERNS)
        pixels = first + np.roll(second, index // (PATTERNS[0] * PATTERNS[1]), axis=0)
        Image.fromarray(pixels).save(folder / f"{index:07d}.png", compress_level=1)


def configure(folder: Path, side: int) -> Config:
    """A phantom study with the drawn images for pre-training and a network that takes no time."""
    dataset = {"layout": "cephalo", "phantom": {}, "root": str(folder / "phantom"), "name": "large",
               "cache_dir": str(folder / "cache"), "unlabelled_dirs": [str(folder / "images")],
               "image_size": [side, side]}
    ddpm = {"iterations": 1, "checkpoint_iterations": [1], "batch_size": 2, "sample_every": 1, "sample_count": 1,
            "sampling_steps": 1, "validate_every": 100}
    return parse_config({"dataset": dataset, "ddpm": ddpm, "unet": NETWORK,
                         "experiment": {"output_dir": str(folder / "runs"), "name": "large"}}, "benchmarks.large_set")


def measure_part(part: str, folder: Path, side: int) -> dict[str, Any]:
    """Seconds of one part in this process, and what else it has to say."""
    config = configure(folder, side)
    started = time.perf_counter()
    if part == "train":
        pretrain(config)
        return {"seconds": time.perf_counter() - started}
    source = load_source(config.dataset)
    records = source.pretraining_records()
    reading = time.perf_counter()
    ways: dict[str, Callable[[], Any]] = {
        "digests": lambda: data_digests(records, source.landmark_names, config.dataset),
        "plan": lambda: data_digests(records, source.landmark_names, config.dataset),
        "fill": lambda: load_unlabelled(records, config.dataset),
        "start": lambda: load_unlabelled(records, config.dataset),
        "gather": lambda: load_unlabelled(records, config.dataset),
        "leaks": lambda: find_leaks(source, config.dataset)}
    made = ways[part]()
    done = time.perf_counter()
    figures = {"images": len(records), "seconds": done - reading, "reading_source": reading - started}
    return {**figures, **gather_ms(made)} if part == "gather" else figures


def gather_ms(images: Any) -> dict[str, float]:
    """Medians of reading a batch and of normalising it."""
    if not isinstance(images, PackedSet):
        raise UserError("--count is too small: these images fit into memory")
    plan, read, normalised = BatchPlan(len(images.records), BATCH, 1, "stream", True, 0), [], []
    for step in range(BATCHES):
        indices = plan.groups(step)[0]
        started = time.perf_counter()
        raw = images.read(indices)
        between = time.perf_counter()
        images.normalised(raw, torch.from_numpy(indices))
        read.append(between - started)
        normalised.append(time.perf_counter() - between)
    return {"read_ms": 1000 * statistics.median(read), "normalise_ms": 1000 * statistics.median(normalised)}


def run_part(part: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """`measure_part` in a process of its own, or why it failed."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.large_set", "--part", part, "--folder", str(folder), "--side",
               str(options.side)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * options.minutes)
    except subprocess.TimeoutExpired:
        return {"part": part, "failed": f"not done after {options.minutes:g} minutes"}
    if done.returncode:
        return {"part": part, "failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return {"part": part, "process_seconds": time.perf_counter() - started,
            **json.loads(done.stdout.strip().splitlines()[-1])}


def show(rows: list[dict[str, Any]], count: int) -> str:
    """The parts as a table."""
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["part"], row["failed"], "", "", "", ""])
            continue
        more = f"read {row['read_ms']:.2f} ms, normalise {row['normalise_ms']:.2f} ms" if "read_ms" in row else ""
        lines.append([row["part"], f"{row['seconds']:.1f}", f"{row['process_seconds']:.1f}",
                      f"{row['seconds'] * MILLION / count / 60:.1f}", f"{row['peak_mib']:.0f}", more])
    return table(["part", "s", "with imports and reading the folder, s", "a million, min", "peak MiB", ""], lines)


def main() -> None:
    """Command line."""
    parser = CommandParser(prog="python -m benchmarks.large_set", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="images (100,000 take 4 GB of disk and a while)")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=10, help="at most, for each part")
    parser.add_argument("--folder", type=Path, help="where images and files go for the time of the measurement")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        figures = measure_part(options.part, options.folder, options.side)
        print(json.dumps({**figures, "peak_mib": peak_mib(torch.device("cpu"))}))
        return
    needed = options.count * (SMALL_BYTES + options.side**2)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        if shutil.disk_usage(scratch).free < 2 * needed:
            raise UserError(f"{options.count} images need {needed / 1e9:.0f} GB, and as much left free")
        folder = Path(scratch)
        draw_images(folder / "images", options.count, options.side)
        rows = [run_part(part, folder, options) for part in PARTS]
    machine = environment()
    print(f"{machine['cpu']}, {machine['cores']} cores, load {os.getloadavg()[0]:.1f}; {options.count} images of "
          f"{options.side}x{options.side}\n{show(rows, options.count)}")
    write_json(options.out / "large_set.json", {"machine": machine, "count": options.count, "rows": rows})


if __name__ == "__main__":
    run_command(main)
