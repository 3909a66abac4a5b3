"""The second step of global-to-local localisation: windows about the first step's answers, one for each landmark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from core.config.config import Config
from core.config.second_stage import local_step
from core.data.dataset import ImageSet, load_images
from core.data.records import Record
from core.data.windows import cut_windows
from core.formats.geometry import apply_maps
from core.training.batches import on_device
from core.training.device import autocast, resolve_device, resolve_precision
from landmarks_finetuning.decoding import Located
from landmarks_finetuning.detectors.global_to_local import locate_local
from landmarks_finetuning.detectors.interface import Kind
from landmarks_finetuning.metrics import physical_errors
from landmarks_finetuning.refinement import FirstAnswers
from landmarks_finetuning.regression import LandmarkRegression, WeightedImages, cut_about, draw_errors
from landmarks_finetuning.uncertainty import Calibration


class Windows(NamedTuple):
    """Outputs of the local networks for images `chosen`; `maps` (B, N, D, D + 1) from stored to window pixels."""

    chosen: slice
    outputs: Tensor
    maps: np.ndarray


class LocalRegression(LandmarkRegression):
    """Each landmark in a window of its own, as far off its middle as the first step's answers are.

    `config` and image sets are those of the second step of `study`. Preset released: anywhere in the window.
    """

    def __init__(self, config: Config, run_dir: Path, header: dict[str, Any], training: WeightedImages,
                 validation: ImageSet | None, kind: Kind, study: Config, first: FirstAnswers) -> None:
        super().__init__(config, run_dir, header, training, validation, kind)
        self.first, self.evenly = first, study.finetune.global_to_local.preset == "released"
        self.errors = torch.from_numpy(first.errors).to(self.device)

    def draw(self, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Windows (B, N * C, *size) and the landmarks (B, N, D), each in its own."""
        chosen = on_device(self.order[indices], self.device)
        points = self.training.truth[chosen]
        count, landmarks, dims = points.shape
        middles = points.nan_to_num(0.0).flatten(0, 1) + self._offsets(count * landmarks, generator)
        images = chosen.repeat_interleave(landmarks)
        windows, places = cut_about(self.training, images, middles, points.view(-1, 1, dims),
                                    self.config.finetune.augmentation, generator)
        size = windows.shape[2:]
        drawn = windows.reshape(count, -1, *size), places.view(count, landmarks, dims)
        return drawn if self.weights is None else (*drawn, self.weights[chosen])

    def _offsets(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, D) displacements of a window's middle from its landmark."""
        if not self.evenly:
            return draw_errors(self.errors, count, generator)
        size = torch.tensor(self.training.network_size, device=self.device)
        drawn = torch.rand((count, len(size)), generator=generator, device=self.device, dtype=torch.float64)
        return (drawn - 0.5) * size

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Loss, and physical mean radial error of the second step, on the first one's answers in validation images."""
        validation, answers = self.validation, self.first.validation
        if validation is None or answers is None:
            return {}
        truth, found, losses = validation.original_points(), answers.copy(), []
        for chosen, outputs, maps in run_windows(model, validation, answers, self.config):
            own = apply_maps(truth[chosen][:, :, None], maps)[:, :, 0]
            losses.append(self.kind.loss(outputs, torch.from_numpy(own).to(self.device), self.config))
            found[chosen] = self.kind.locate(outputs, maps, self.config, measure=False).points
        found[np.isnan(answers)] = np.nan
        error = physical_errors(found, truth, validation.spacings())
        return {"validation_loss": float(np.mean(torch.stack(losses).tolist())),
                "validation_mre": float(np.nanmean(error))}


@torch.no_grad()
def run_windows(model: nn.Module, images: ImageSet, answers: np.ndarray, config: Config) -> Iterator[Windows]:
    """Yield the local networks' outputs in windows about `answers` (M, N, D), stored pixels, batch by batch.

    `config` is the second step's. A window about NaN is cut somewhere; nothing is to be made of it.
    """
    device, size = resolve_device(config.experiment.device), images.network_size
    precision = resolve_precision(config.experiment.precision, device)
    places = np.nan_to_num(apply_maps(answers, images.maps))  # in pixels of the canvas
    corners = np.rint(places - (np.array(size) - 1) / 2).astype(np.int64)
    landmarks, home = answers.shape[1], images.images.device
    for first in range(0, len(answers), config.evaluation.batch_size):
        chosen = slice(first, min(first + config.evaluation.batch_size, len(answers)))
        image = torch.arange(chosen.start, chosen.stop, device=home).repeat_interleave(landmarks)
        at = torch.from_numpy(corners[chosen]).to(home).flatten(0, 1)
        windows = cut_windows(images.images, image, at, size).to(device)
        with autocast(device, precision):
            outputs = model(windows.reshape(chosen.stop - chosen.start, -1, *size)).float()
        maps = np.repeat(images.maps[chosen][:, None], landmarks, axis=1)
        maps[..., -1] -= corners[chosen]
        yield Windows(chosen, outputs, maps)


def refine_locally(model: nn.Module, records: Sequence[Record], answers: np.ndarray, spread: float, config: Config,
                   calibration: Calibration | None = None) -> Located:
    """The second step's answers; NaN stays NaN. Images are read a few at a time; see interface.Refine."""
    second, some = local_step(config), config.evaluation.batch_size
    located = Located(answers.copy(), *(np.full(answers.shape[:2], np.nan) for _ in range(3)))
    for first in range(0, len(records), some):
        part = slice(first, first + some)
        images = load_images(records[part], second.dataset)
        for chosen, outputs, maps in run_windows(model, images, answers[part], second):
            own = slice(first + chosen.start, first + chosen.stop)
            found = locate_local(outputs, maps, second)
            located.points[own], located.confidence[own] = found.points, found.confidence
    located.points[np.isnan(answers)] = np.nan
    return located
