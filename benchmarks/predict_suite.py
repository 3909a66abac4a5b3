"""Landmarks in a folder of full-size radiographs, start to end, and what each part of it takes.

The whole `landmarks_finetuning.predict` without pictures is timed once on an empty and once on a filled cache; its
parts are timed by themselves, file by file and batch by batch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from benchmarks.data_suite import radiographs
from benchmarks.measuring import table, wait_for
from core.config.load import CONFIG_DIR, load_config
from core.data.dataset import load_images
from core.data.resize import resize
from core.files import write_json
from core.formats.images import read_image
from core.networks.weights import save_weights
from landmarks_finetuning.decoding import locate
from landmarks_finetuning.detectors.heatmap_unet import HeatmapUNet
from landmarks_finetuning.inference import TrainedDetector
from landmarks_finetuning.predict import collect_images, predict
from landmarks_finetuning.predictions import Predictions, append_rows, table_rows

LANDMARKS = 19  # of a cephalogram
NAMES = tuple(f"L{n}" for n in range(LANDMARKS))
PARTS = ("decode files", "resize", "hash, read cache", "network", "decode heatmaps", "write")


def write_detector(folder: Path, options: argparse.Namespace, cache: Path | None, names: Sequence[str] = NAMES) -> Path:
    """An untrained detector of landmarks `names`; returns its run's folder."""
    config = load_config(CONFIG_DIR / "config.json", [
        f"dataset.image_size=[{options.side},{options.side}]", f"unet.base_channels={options.base}",
        f"dataset.cache_dir={'null' if cache is None else cache}", f"experiment.device={options.device}",
        "finetune.shape_prior=null", "finetune.refine.zoom=null"])
    torch.manual_seed(0)
    model = HeatmapUNet(config.unet, 1, len(names), config.dataset.image_size)
    save_weights(folder / "best.safetensors", model, config.plain(), {
        "kind": "detector", "landmark_names": list(names), "dataset": "benchmark", "iteration": 0,
        "backbone": "scratch", "shots": 1, "draw": 0, "seed": 0, "training_images": [], "validation_labels": 0,
        **model.identity})
    write_json(folder / "config.json", config.plain())
    return folder


def append_predictions(table: BinaryIO, predictions: Predictions) -> None:
    """The rows of a batch, behind those that are in the table."""
    append_rows(table, table_rows(predictions))


def parts(run_dir: Path, files: list[Path], folder: Path, device: torch.device) -> dict[str, float]:
    """Seconds of each part over all files."""
    detector = TrainedDetector(run_dir / "best.safetensors")
    config, seconds = detector.config, dict.fromkeys(PARTS, 0.0)

    def timed(part: str, function: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = function()
        wait_for(device)
        seconds[part] += time.perf_counter() - started
        return result

    for file in files:
        pixels = timed("decode files", partial(read_image, file))
        timed("resize", partial(resize, pixels, config.dataset.image_size))
    records, some = collect_images(files, folder), config.evaluation.batch_size
    for first in range(0, len(records), some):
        chosen = records[first : first + some]
        images = timed("hash, read cache", partial(load_images, chosen, config.dataset))
        for _, outputs, maps in timed("network", partial(list, detector.outputs(images))):
            located = timed("decode heatmaps", partial(
                locate, outputs, maps, config.finetune, detector.sigma))
        predictions = Predictions(images, detector.landmark_names, *located)
        with (folder / "parts.csv").open("ab") as table:
            timed("write", partial(append_predictions, table, predictions))
    return seconds


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The whole and its parts."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = radiographs(options.images, options.count, folder)
        run_dir = write_detector(folder / "run", options, folder / "cache")
        whole = {}
        for cache in ("empty", "filled"):
            started = time.perf_counter()
            predict(run_dir, files, folder / cache, overlays=False)
            whole[cache] = time.perf_counter() - started
        rows = parts(run_dir, files, folder, device)
    return {"rows": [{"part": name, "seconds": value} for name, value in rows.items()], "whole": whole,
            "images": len(files), "base": options.base, "side": options.side, "landmarks": LANDMARKS,
            "source": str(options.images or "phantom, 2400x1935 JPEG")}


def show(result: dict[str, Any]) -> str:
    """The parts as a table with their shares."""
    total, count = sum(row["seconds"] for row in result["rows"]), result["images"]
    lines = [[row["part"], f"{row['seconds']:.2f}", f"{1000 * row['seconds'] / count:.1f}",
              f"{100 * row['seconds'] / total:.0f} %"] for row in result["rows"]]
    return (f"{count} images ({result['source']}), {result['landmarks']} landmarks, base {result['base']}, "
            f"{result['side']}x{result['side']}: {result['whole']['empty']:.1f} s "
            f"({count / result['whole']['empty']:.1f} images/s) on an empty cache, {result['whole']['filled']:.1f} s "
            f"on a filled one\n{table(['part', 's', 'ms an image', 'share'], lines)}")


def bars(result: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """What the plot shows."""
    return "ms an image", {row["part"]: 1000 * row["seconds"] / result["images"] for row in result["rows"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""
