"""How time and memory of building a set of images grow with their number: ratios, each size in a process of its own."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from core.config.dataset import Dataset
from core.data.dataset import load_images
from core.data.records import Record
from core.errors import run_command


def build(folder: Path, count: int, side: int) -> dict[str, float]:
    """Seconds, and bytes of memory at the most for each byte of the tensor, of `count` images of side x side pixels."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    records = [Record(str(n), folder / f"{n % 50}.png", None, None) for n in range(count)]
    begun = time.perf_counter()
    images = load_images(records, Dataset(image_size=(side, side), cache_dir=None))
    seconds = time.perf_counter() - begun
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"images": count, "seconds": seconds, "memory_per_tensor": taken / images.images.nbytes}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[500, 1000])
    parser.add_argument("--side", type=int, default=256, help="pixels along either axis")
    arguments = parser.parse_args()
    spawning = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        for n in range(50):
            pixels = np.random.default_rng(n).integers(0, 255, (arguments.side, arguments.side), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(name) / f"{n}.png")
        for count in arguments.counts:
            with spawning.Pool(1) as pool:
                print(json.dumps(pool.apply(build, (Path(name), count, arguments.side))))


if __name__ == "__main__":
    run_command(main)
