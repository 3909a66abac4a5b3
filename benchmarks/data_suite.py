"""A second epoch of training batches: our cache and batched augmentation, against albumentations in a DataLoader.

The ordinary way decodes every image again, resizes and augments it by itself and collates; ours decoded them once.
Both give float32 batches (B, 1, side, side) with the same kinds of change: rotation, scale and shift; contrast and
brightness.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import albumentations
import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.measuring import median_ms, table, time_interleaved
from core.config.dataset import Dataset as DatasetConfig
from core.config.finetune import StrongAugmentation
from core.data.augment import augment
from core.data.dataset import load_images
from core.data.records import Record
from core.errors import UserError
from core.formats.images import find_images, read_image
from core.phantoms.radiographs import write_phantom_radiographs
from core.training.batches import BatchPlan, step_generator

FULL_SIZE = (2400, 1935)  # of a cephalogram


class OrdinaryImages(Dataset):
    """The images as albumentations' and torch's examples read them."""

    def __init__(self, files: list[Path], side: int) -> None:
        like = StrongAugmentation()
        turn = float(np.max(like.rotation_degrees))
        self.files = files
        self.change = albumentations.Compose([
            albumentations.Resize(side, side, interpolation=cv2.INTER_AREA),
            albumentations.Affine(rotate=(-turn, turn),
                                  scale=(1 - like.scale, 1 + like.scale), p=like.probability,
                                  translate_percent=(-like.translation, like.translation),
                                  border_mode=cv2.BORDER_REPLICATE),
            albumentations.RandomBrightnessContrast(like.intensity, like.intensity, p=1),
        ])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        pixels = cv2.imread(str(self.files[index]), cv2.IMREAD_GRAYSCALE)
        changed = self.change(image=pixels)["image"].astype(np.float32)
        return torch.from_numpy((changed - changed.min()) / max(float(np.ptp(changed)), 1e-12))[None]


def radiographs(folder: Path | None, count: int, made: Path) -> list[Path]:
    """The first `count` images below `folder`; without one, phantoms of a cephalogram's size, written as JPEG."""
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"--images {folder} is not a folder")
        paths = find_images(folder, recursive=True)[:count]
        if not paths:
            raise UserError(f"--images {folder} holds no image")
        return paths
    write_phantom_radiographs(made / "phantom", min(count, 8), FULL_SIZE, 0)
    originals = [read_image(path)[0] for path in find_images(made / "phantom", recursive=True)]
    files = [made / "full" / f"{index:04d}.jpg" for index in range(count)]
    files[0].parent.mkdir()
    for index, file in enumerate(files):
        Image.fromarray(originals[index % len(originals)].astype(np.uint8)).save(file, quality=95)
    return files


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of an epoch both ways, after a first one that fills the cache."""
    with tempfile.TemporaryDirectory() as scratch:
        files = radiographs(options.images, options.count, Path(scratch))
        config = DatasetConfig(image_size=(options.side, options.side), cache_dir=f"{scratch}/cache")
        records = [Record(file.name, file, None, None) for file in files]
        started = time.perf_counter()
        first = load_images(records, config)
        decoding = time.perf_counter() - started
        again = [replace(record) for record in records]  # other objects: a set of the same ones is still in memory
        started = time.perf_counter()
        images = load_images(again, config).to(device)
        warm = time.perf_counter() - started
        plan = BatchPlan(len(files), options.batch, 1, "epoch", False, 0)
        loaders = {f"ordinary, {workers} workers": DataLoader(
            OrdinaryImages(files, options.side), options.batch, shuffle=True, num_workers=workers)
            for workers in options.workers}

        def epoch() -> None:
            for step in range(plan.steps_per_epoch):
                generator = step_generator(0, step, 0, device)
                for indices in plan.groups(step):
                    batch = images.images[torch.from_numpy(indices)].to(device)
                    augment(batch, None, StrongAugmentation(), generator)

        def ordinary(loader: DataLoader) -> Callable[[], None]:
            def epoch() -> None:
                for batch in loader:
                    batch.to(device)

            return epoch

        ways = {"ours": epoch, **{name: ordinary(loader) for name, loader in loaders.items()}}
        seconds = time_interleaved(ways, options.epochs, device)
    rows = [{"way": name, "seconds": values, "ms": median_ms(values)} for name, values in seconds.items()]
    return {"rows": rows, "images": len(files), "stored": list(first.original_sizes[0].tolist()), "side": options.side,
            "batch": options.batch, "first_loading_seconds": decoding, "warm_loading_seconds": warm,
            "source": str(options.images or "phantom, JPEG")}


def show(result: dict[str, Any]) -> str:
    """The ways as a table, and what the first epoch cost."""
    ours = result["rows"][0]["ms"]
    lines = [[row["way"], f"{row['ms']:.1f}", f"{1000 * result['images'] / row['ms']:.0f}", f"{row['ms'] / ours:.0f} x"]
             for row in result["rows"]]
    return (f"an epoch of {result['images']} images stored at {'x'.join(map(str, result['stored']))}, to "
            f"{result['side']}x{result['side']}, batch {result['batch']}\n"
            f"{table(['way', 'ms', 'images/s', 'this / ours'], lines)}\n"
            f"before the first epoch, once: decoding and resizing into the cache "
            f"{result['first_loading_seconds']:.2f} s; a later run reads the cache in "
            f"{result['warm_loading_seconds']:.3f} s")


def bars(result: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """What the plot shows."""
    return "images/s", {row["way"]: 1000 * result["images"] / row["ms"] for row in result["rows"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite and of `predict`."""
    parser.add_argument("--images", type=Path, help="folder of radiographs; without it phantoms of 2400x1935 are made")
    parser.add_argument("--count", type=int, default=150, help="images at most (data, predict)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2], help="processes of the DataLoader")
