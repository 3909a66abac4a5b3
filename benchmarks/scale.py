"""How CPU time and memory of each part grow with the number of images: each size in a process of its own.

Parts: `build` a set of images, `predict` a folder, `evaluate` a data set. What grows as the data do takes the same
milliseconds an image at every size.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import multiprocessing
import pstats
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.predict_suite import write_detector
from core.config.dataset import Dataset
from core.data.dataset import load_images
from core.data.records import Record
from core.errors import CommandParser, run_command
from core.files import write_json
from landmarks_finetuning.evaluate import evaluate
from landmarks_finetuning.predict import predict

UNLIKE, SHOWN = 50, 25  # files that differ, lines of a profile
MIB = 1024


def draw(folder: Path, side: int) -> None:
    """Pictures of noise, side x side pixels."""
    for n in range(UNLIKE):
        pixels = np.random.default_rng(n).integers(0, 255, (side, side), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")


def build(folder: Path, options: argparse.Namespace) -> None:
    """A set of images in memory."""
    side = options.side
    records = [Record(str(n), folder / f"{n % UNLIKE}.png", None, None) for n in range(options.count)]
    load_images(records, Dataset(image_size=(side, side), cache_dir=None))


def predicted(folder: Path, options: argparse.Namespace) -> None:
    """landmarks_finetuning.predict on a folder."""
    images = _linked(folder, folder / "images", options.count)
    run = write_detector(folder / "run", options, None)
    predict(run, [images], folder / "out", overlays=options.overlays, formats=("coco", "cvat"))


def evaluated(folder: Path, options: argparse.Namespace) -> None:
    """landmarks_finetuning.evaluate on a data set of nothing but labels."""
    _linked(folder, folder / "data/images", options.count)
    names = [f"L{n}" for n in range(options.landmarks)]
    points = np.random.default_rng(0).uniform(1, options.side - 2, (options.count, 2 * options.landmarks)).round(1)
    header = ",".join(["image", *(f"{name}_{axis}" for name in names for axis in "xy")])
    rows = [",".join([f"{n:05d}", *map(str, row)]) for n, row in enumerate(points.tolist())]
    (folder / "data/landmarks.csv").write_text("\n".join([header, *rows]) + "\n")
    write_json(folder / "data/dataset.json", {"landmarks": names})
    run = write_detector(folder / "run", options, None, names)
    evaluate(run, data=folder / "data", overrides=("evaluation.overlays=4",))


def _linked(folder: Path, images: Path, count: int) -> Path:
    images.mkdir(parents=True)
    for n in range(count):
        (images / f"{n:05d}.png").hardlink_to(folder / f"{n % UNLIKE}.png")
    return images


PARTS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "build": build, "predict": predicted, "evaluate": evaluated}


def measure(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of a part, and the peak of memory beyond what the process had before, in MiB."""
    with tempfile.TemporaryDirectory() as name:
        draw(Path(name), options.side)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        profile = cProfile.Profile(time.process_time)
        begun = time.process_time()
        if options.profile:
            profile.enable()
        PARTS[part](Path(name), options)
        profile.disable()
        seconds = time.process_time() - begun
    if options.profile:
        pstats.Stats(profile).sort_stats("cumtime").print_stats(SHOWN)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / MIB
    return {"part": part, "images": options.count, "landmarks": options.landmarks, "cpu_seconds": round(seconds, 2),
            "ms_an_image": round(1000 * seconds / options.count, 2), "mib": round(taken)}


def main() -> None:
    """Command line."""
    parser = CommandParser(prog="python -m benchmarks.scale", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter,
                           epilog="example: python -m benchmarks.scale evaluate --counts 250 500 1000 --landmarks 200")
    parser.add_argument("parts", nargs="*", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--counts", type=int, nargs="+", default=[250, 500, 1000], help="images")
    parser.add_argument("--landmarks", type=int, default=50, help="of evaluate")
    parser.add_argument("--side", type=int, default=64, help="pixels along either axis")
    parser.add_argument("--base", type=int, default=8, help="base channels of the network")
    parser.add_argument("--overlays", action="store_true", help="predict draws pictures, too")
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    options = parser.parse_args()
    options.device = "cpu"
    spawning = multiprocessing.get_context("spawn")
    for part in options.parts:
        for count in options.counts:
            options.count = count
            with spawning.Pool(1) as pool:
                print(json.dumps(pool.apply(measure, (part, options))), flush=True)


if __name__ == "__main__":
    run_command(main)
