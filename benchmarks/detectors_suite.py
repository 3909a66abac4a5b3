"""Our detector and the earlier systems, as the registry makes them: a training step and an answer of each."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import median_ms, parameters, table, time_interleaved
from core.config.config import Config
from core.config.load import parse_config
from core.config.recipes import recipe
from core.config.second_stage import second_of
from core.networks.unet import UNet
from core.training.device import autocast, memory_format, resolve_precision
from landmarks_finetuning.detectors.registry import DETECTORS, kind_of

REFERENCE = "U-Net"
LANDMARKS = 19
PIXEL = {"target": "pixel", "decoder": "argmax", "shape_prior": None}
COMPARED: dict[str, tuple[str, dict[str, Any]]] = {  # name: start, settings of finetune
    REFERENCE: ("scratch", {}), "U-Net, contour-hugging": ("scratch", PIXEL), "GU2Net": ("gu2net", {}),
    "global-to-local, first step": ("global_to_local", {})}
SECOND = "global-to-local, second step"


class Work(NamedTuple):
    """A detector's training step on a batch, the batch's answers, and how many parameters it has."""

    step: Callable[[], None]
    answer: Callable[[], None]
    parameters: int


def study(options: argparse.Namespace, backbone: str, settings: dict[str, Any]) -> Config:
    """The config of a study of one start, of the sizes in `options`."""
    return parse_config({
        "is_3d": options.dims == 3,
        "dataset": {"layout": "folder", "image_size": [options.side] * options.dims},
        "unet": {"base_channels": options.base, "linear_attention": options.linear_attention},
        "finetune": {"backbones": [backbone], **settings}}, "the benchmark")


def work(config: Config, backbone: str, images: Tensor, points: Tensor, network: str | None = None) -> Work:
    """That of the detector of `backbone`, or of its second stage's `network`, which `config` is then of."""
    kind, device = kind_of(backbone) if network is None else DETECTORS[network], images.device
    config = recipe(config, backbone)
    torch.manual_seed(0)
    channels = images.shape[1] // (LANDMARKS if network is not None else 1)
    model = kind.start(config, backbone, channels, LANDMARKS)
    layout = memory_format(images.ndim, device) if isinstance(model, UNet) else torch.contiguous_format
    model = model.to(device).to(memory_format=layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    precision, dims = resolve_precision("auto", device), images.ndim - 2
    maps = np.tile(np.eye(dims, dims + 1), (len(images), *(() if network is None else (LANDMARKS,)), 1, 1))

    def step() -> None:
        model.train()
        with autocast(device, precision):
            outputs = model(images)
        kind.loss(outputs.float(), points, config).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def answer() -> None:
        model.eval()
        with torch.inference_mode(), autocast(device, precision):
            outputs = model(images)
        kind.locate(outputs.float(), maps, config)

    return Work(step, answer, parameters(model))


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Rows of every detector, all interleaved in this process."""
    size = (options.side,) * options.dims
    draw = torch.Generator().manual_seed(0)
    images = torch.rand((options.batch, 1, *size), generator=draw).to(device)
    points = (torch.rand((options.batch, LANDMARKS, options.dims), generator=draw) * (options.side - 1)).to(device)
    works = {name: work(study(options, start, settings), start, images, points)
             for name, (start, settings) in COMPARED.items()}
    second = second_of(study(options, "global_to_local", {}), "global_to_local")
    if second is None:
        raise ValueError("global-to-local has two steps")
    window = second.dataset.image_size
    windows = torch.rand((options.batch, LANDMARKS, *window), generator=draw).to(device)
    inside = (torch.rand(points.shape, generator=draw) * (window[0] - 1)).to(device)
    works[SECOND] = work(second, "global_to_local", windows, inside, "local_networks")
    functions = {(name, use): function for name, each in works.items()
                 for use, function in (("step", each.step), ("answer", each.answer))}
    seconds = time_interleaved({"/".join(key): function for key, function in functions.items()}, options.rounds, device)
    rows = [{"detector": name, "parameters": each.parameters, "step_ms": median_ms(seconds[f"{name}/step"]),
             "step_images_per_second": options.batch / statistics.median(seconds[f"{name}/step"]),
             "answer_ms": median_ms(seconds[f"{name}/answer"]),
             "answer_images_per_second": options.batch / statistics.median(seconds[f"{name}/answer"])}
            for name, each in works.items()]
    return {"rows": rows, "base": options.base, "size": size, "batch": options.batch,
            "precision": resolve_precision("auto", device)}


def show(result: dict[str, Any]) -> str:
    """The rows as a table, with how many times as long each takes as the reference."""
    reference = next(row for row in result["rows"] if row["detector"] == REFERENCE)
    lines = [[row["detector"], f"{row['parameters']:,}", f"{row['step_ms']:.0f}",
              f"{row['step_images_per_second']:.1f}", f"{row['step_ms'] / reference['step_ms']:.2f} x",
              f"{row['answer_ms']:.0f}", f"{row['answer_images_per_second']:.1f}",
              f"{row['answer_ms'] / reference['answer_ms']:.2f} x"] for row in result["rows"]]
    headings = ["detector", "parameters", "ms a step", "images/s", f"of {REFERENCE}'s", "ms an answer", "images/s",
                f"of {REFERENCE}'s"]
    return (f"{LANDMARKS} landmarks, base {result['base']}, {'x'.join(map(str, result['size']))}, batch "
            f"{result['batch']}, {result['precision']}\n{table(headings, lines)}")


def bars(result: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """What the plot shows."""
    return "images/s in training", {row["detector"]: row["step_images_per_second"] for row in result["rows"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options beside the shared ones."""
