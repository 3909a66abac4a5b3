"""Which images to label: those whose diffusion features cover the images of the pre-training best.

Facility location (Lin & Bilmes 2011): the next image is the one that lowers the mean distance from every image to the
nearest chosen one most. The greedy choice is nested: more labels contain the fewer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from core.config.config import Config
from core.data.dataset import load_images
from core.data.digests import data_digests
from core.data.records import DataSource, Record
from core.errors import UserError
from core.files import content_digest, parse_json, write_json
from core.runs.places import choosing_path
from landmarks_finetuning.features import FeatureNetwork

NOISE_LEVEL = 0.2  # the timestep that the network is told, of those of the pre-training
PLACE = 0  # the coarsest level of the decoder: what is where, not its edges
GRIDS = {1: 64, 2: 8, 3: 4}  # cells along each axis in which its map is averaged, by the number of axes
READ = 256  # images in memory at a time
COVERED = 10_000  # images that stand for a larger set, evenly spaced in it
FILE = "coverage.json"


def image_features(config: Config, records: Sequence[Record], path: Path, progress: str | None = None) -> np.ndarray:
    """(M, P) float32: what the U-Net in the weights file `path` sees in each image, coarsely, by place in the image.

    Of unit length: the map at PLACE of the decoder, averaged in the cells of a grid. UserError for a network of another
    shape than the config's, or an image that cannot be read.
    """
    network, rows = None, []
    with tqdm(total=len(records), desc=progress, leave=False, disable=None if progress else True) as bar:
        for first in range(0, len(records), READ):
            images = load_images(records[first : first + READ], config.dataset)
            network = network or FeatureNetwork(config, path, images.images.shape[1])
            for batch in network.batches(images):
                (level,) = network.maps(batch.images, (PLACE,), (NOISE_LEVEL,))
                rows.append(pooled(level).cpu())
                bar.update(len(batch.chosen))
    return torch.cat(rows).numpy()


def pooled(maps: Tensor) -> Tensor:
    """(B, C, *size) -> (B, C * cells) of unit length."""
    dims = maps.ndim - 2
    pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[dims]
    return F.normalize(pool(maps, GRIDS[dims]).flatten(1), dim=1)


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


def require_weights(config: Config, purpose: str) -> Path:
    """The weights file whose features choose images; UserError where it is not there (yet)."""
    path = choosing_path(config)
    if not path.is_file():
        raise UserError(f"{purpose} needs the pre-trained weights {path}, which do not exist; run the stage pretrain "
                        "first, or set finetune.checkpoint")
    return path


def coverage_order(config: Config, source: DataSource, shots: int) -> tuple[str, ...] | None:
    """Ids of the training split's labelled images, the one to label first first; None under another finetune.selection.

    At least `shots` of them, or all. Written to ddpm/coverage.json in the experiment's folder, and made anew where
    images, weights or settings are others than those it was made from. UserError where there are no weights yet.
    """
    if config.finetune.selection != "coverage":
        return None
    weights = require_weights(config, 'finetune.selection "coverage"')
    candidates, covered = source.require("train"), source.pretraining_records()
    path, made_from = config.experiment_dir / "ddpm" / FILE, _made_from(config, source, weights)
    record = _recorded(path)
    if record is not None and record["made_from"] == made_from and len(record["order"]) >= min(len(candidates), shots):
        return tuple(record["order"])
    features = image_features(config, covered, weights, "features of the images")
    place = {record.id: index for index, record in enumerate(covered)}
    apart = distances(features[thinned(len(covered))], features[[place[record.id] for record in candidates]])
    chosen = facility_location(apart, min(len(candidates), max(shots, *config.finetune.shots)))
    order = [candidates[index].id for index in chosen]
    write_json(path, {"made_from": made_from, "order": order})
    return tuple(order)


def _made_from(config: Config, source: DataSource, weights: Path) -> dict[str, Any]:
    """What decides the order: weights, images without their labels, how they are read, and how it is chosen."""
    images = {"candidates": [record.id for record in source.require("train")],
              "covered": data_digests(source.pretraining_records(), source.landmark_names, config.dataset)}
    read = config.dataset.model_dump(mode="json", exclude={"name", "root", "cache_dir", "phantom"})
    values = {"weights": content_digest(weights), "images": images, "read": read,
              "features": [NOISE_LEVEL, PLACE, GRIDS, COVERED]}
    return {key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
            for key, value in values.items()}


def _recorded(path: Path) -> dict[str, Any] | None:
    """The file as it was written, None where it is not there or damaged: it is made anew."""
    try:
        record = parse_json(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"made_from", "order"} <= record.keys() else None
