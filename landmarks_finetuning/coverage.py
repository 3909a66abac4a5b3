"""Which images to label: those whose diffusion features cover the images of the pre-training best.

Facility location (Lin & Bilmes 2011): the next image is the one that lowers the mean distance from every image to the
nearest chosen one most. The greedy choice is nested: more labels contain the fewer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from core.config.config import Config
from core.config.settings import all_settings
from core.data.dataset import load_images
from core.data.digests import data_digests
from core.data.records import DataSource, Record
from core.errors import UserError
from core.files import content_digest, write_json
from core.networks.weights import load_weights
from core.runs.inputs import images_digest
from core.runs.places import choosing_path
from core.training.device import autocast, resolve_device, resolve_precision
from landmarks_finetuning.features import decoder_maps, padded
from landmarks_finetuning.starts import check_same_network

TIMESTEP = 50  # of 500: what the network is told of an image that has no noise
PLACES = (0, 1)  # the two coarsest levels of the decoder: what is where, not its edges
GRID = 4  # cells along each axis in which a level's map is averaged
READ = 256  # images in memory at a time
COVERED = 10_000  # images that stand for a larger set, evenly spaced in it


def image_features(config: Config, records: Sequence[Record], path: Path, progress: str | None = None) -> np.ndarray:
    """(M, P) float32: what the U-Net in the weights file `path` sees in each image, coarsely, by place in the image.

    The maps at PLACES, averaged in GRID cells along each axis; each level's part has unit length. UserError for a
    network of another shape than the config's, or an image that cannot be read.
    """
    weights, device = load_weights(path), resolve_device(config.experiment.device)
    model = weights.build(config.dataset.image_size).to(device).eval()
    precision, rows = resolve_precision(config.experiment.precision, device), []
    with tqdm(total=len(records), desc=progress, leave=False, disable=None if progress else True) as bar:
        for first in range(0, len(records), READ):
            images = load_images(records[first : first + READ], config.dataset)
            check_same_network(path, weights, config.unet, images.images.shape[1])
            step = config.evaluation.batch_size if images.fits else 1
            for start in range(0, len(images.records), step):
                some = images.images[start : start + step]
                if not images.fits:
                    some = padded(some[(slice(None), slice(None), *images.seen(start))], len(model.ups))
                with autocast(device, precision):
                    maps = decoder_maps(model, some.to(device), PLACES, (TIMESTEP,))
                rows.append(torch.cat([_pooled(level[0]) for level in maps], dim=1).cpu())
                bar.update(len(some))
    return torch.cat(rows).numpy()


def _pooled(maps: Tensor) -> Tensor:
    """(B, C, *size) -> (B, C * GRID^D) of unit length."""
    pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[maps.ndim - 2]
    return F.normalize(pool(maps, GRID).flatten(1), dim=1)


def distances(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Euclidean distances (M, K) float32 of features (M, P) from others (K, P)."""
    squares = (features**2).sum(axis=1)[:, None] + (others**2).sum(axis=1) - 2 * features @ others.T
    return np.sqrt(squares.clip(min=0), dtype=np.float32)


def facility_location(apart: np.ndarray, count: int, nearest: np.ndarray | None = None) -> list[int]:
    """`count` of K candidates, one after the other, each the one that lowers the mean distance to the nearest most.

    apart: (M, K) distances of the images from the candidates; nearest: (M,) distances to what is chosen already.
    Of equals the first. ValueError for more than there are.
    """
    if count > apart.shape[1]:
        raise ValueError(f"{count} of {apart.shape[1]} candidates")
    best = np.full(len(apart), np.inf) if nearest is None else nearest.astype(np.float64)
    chosen: list[int] = []
    for _ in range(count):
        totals = np.minimum(apart, best[:, None]).sum(axis=0, dtype=np.float64)
        totals[chosen] = np.inf
        chosen.append(int(totals.argmin()))
        best = np.minimum(best, apart[:, chosen[-1]])
    return chosen


def thinned(count: int) -> np.ndarray:
    """Indices of at most COVERED of `count` images, evenly spaced."""
    return np.linspace(0, count - 1, min(count, COVERED)).round().astype(int)


def coverage_order(config: Config, source: DataSource, shots: int) -> tuple[str, ...] | None:
    """Ids of the training split's labelled images, the one to label first first; None under another finetune.selection.

    At least `shots` of them, or all. Written to ddpm/coverage.json in the experiment's folder, and made anew when
    images, weights or settings are others than those it was made from. UserError where there are no weights yet.
    """
    if config.finetune.selection != "coverage":
        return None
    candidates, covered = source.require("train"), source.pretraining_records()
    path, weights = config.experiment_dir / "ddpm" / "coverage.json", require_weights(config)
    made_from = {"weights": content_digest(weights), "features": [TIMESTEP, *PLACES, GRID, COVERED],
                 "images": images_digest({use: data_digests(records, source.landmark_names, config.dataset)
                                          for use, records in (("train", _unlabelled(candidates)),
                                                               ("pretraining", covered))}),
                 "dataset": _image_settings(config)}
    needed = min(len(candidates), shots)
    record = _read(path)
    if record is not None and record["made_from"] == made_from and len(record["order"]) >= needed:
        return tuple(record["order"])
    count = min(len(candidates), max(shots, *config.finetune.shots))
    features = image_features(config, covered, weights, "features of the images")
    place = {record.id: index for index, record in enumerate(covered)}
    apart = distances(features[thinned(len(covered))], features[[place[record.id] for record in candidates]])
    order = [candidates[index].id for index in facility_location(apart, count)]
    write_json(path, {"made_from": made_from, "order": order})
    return tuple(order)
