"""What training costs, in floating-point operations: machine-free, counted on the network that was trained."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from core.config.unet import UNet as UNetConfig
from core.training.run_log import read_metrics
from landmarks_finetuning.report.provenance import config_of
from landmarks_finetuning.report.run_files import read_metrics_json


@lru_cache
def training_flops(unet: UNetConfig, out_channels: int, size: tuple[int, ...], timed: bool) -> int:
    """Operations (an addition and a multiplication are two) of one image's forward and backward pass through a U-Net.

    Of grey images of `size`; `timed`: with a time embedding. Counted by torch's FlopCounterMode (convolutions, matrix
    products, attention; no element-wise operation) without computing anything.
    """
    import torch  # imports for seconds, which only this figure should cost
    from torch.utils.flop_counter import FlopCounterMode

    from core.networks.unet import UNet

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = UNet(unet, 1, out_channels, size)
        timesteps = torch.zeros(1, dtype=torch.long) if timed else None
        model(torch.empty(1, 1, *size), timesteps).sum().backward()
    return counter.get_total_flops()


def training_images(lines: list[dict[str, Any]], last_step: float = np.inf) -> float:
    """Images that the training steps up to `last_step` saw, by the rates in a metrics.jsonl."""
    return sum(line["images_per_second"] * line["seconds"] for line in lines
               if "images_per_second" in line and line["step"] <= last_step)


def finetuning_flops(folder: Path) -> float:
    """Training operations of a fine-tuned U-Net, whether its last step was kept or not; NaN where not known."""
    landmarks, total = len(read_metrics_json(folder)["landmark_names"]), 0.0
    for path in sorted(folder.rglob("metrics.jsonl")):  # of both stages, where there are two
        config = config_of(path.parent / "config.json")
        timed = config.get("finetune", {}).get("timestep") is not None
        total += _flops(config, read_metrics(path), np.inf, landmarks, timed)
    return total or np.nan


def pretraining_flops(folder: Path, iteration: int) -> float:
    """Training operations of the diffusion pre-training in `folder` up to `iteration`; NaN where not known."""
    return _flops(config_of(folder / "config.json"), read_metrics(folder / "metrics.jsonl"), iteration, 1, True)


def _flops(config: dict[str, Any], lines: list[dict[str, Any]], last_step: float, outputs: int, timed: bool) -> float:
    images, size = training_images(lines, last_step), config.get("dataset", {}).get("image_size")
    if not images or not size or "unet" not in config:
        return np.nan
    unet = UNetConfig.model_validate_json(json.dumps(config["unet"]), strict=True)
    return images * training_flops(unet, outputs, tuple(size), timed)
