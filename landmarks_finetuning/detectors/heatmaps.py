"""What the heatmap detectors share: targets, the softmax losses, decoding under the shape prior, a second stage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from core.config.config import Config
from landmarks_finetuning.decoding import Located, locate, sigma_pixels
from landmarks_finetuning.detectors.interface import SecondStage
from landmarks_finetuning.heatmaps import draw_target
from landmarks_finetuning.losses import LOSSES
from landmarks_finetuning.refinement import refine
from landmarks_finetuning.regression import CropRegression
from landmarks_finetuning.shape import Shape
from landmarks_finetuning.uncertainty import Calibration

CROPS = SecondStage(None, CropRegression, refine)


def heatmap_loss(outputs: Tensor, points: Tensor, config: Config, crop: bool = False, weights: Tensor | None = None
                 ) -> Tensor:
    """finetune.loss between raw heatmaps (B, N, *size) and finetune.target of `points`; see interface.Loss."""
    finetune = config.finetune
    target = draw_target(points, outputs.shape[2:], finetune.target, sigma_pixels(finetune.sigma, config.dataset))
    absent = ~points.isnan().any(dim=2) & ~target.flatten(2).any(dim=2) if crop else None
    return LOSSES[finetune.loss](outputs.float(), target, absent, weights)


def heatmap_terms(points: Tensor, size: Sequence[int], config: Config, crop: bool) -> Tensor | int:
    """What `heatmap_loss` averages over: images, or the landmarks that the softmax over pixels has; interface.Terms."""
    finetune = config.finetune
    if finetune.loss == "cross_entropy_channels":
        return len(points)
    target = draw_target(points, size, finetune.target, sigma_pixels(finetune.sigma, config.dataset))
    present = target.flatten(2).any(dim=2)
    return (present | ~points.isnan().any(dim=2) if crop else present).sum().clamp(min=1)


def locate_heatmaps(outputs: Tensor, maps: np.ndarray, config: Config, decoder: str | None = None,
                    shape: Shape | None = None, spacing: np.ndarray | None = None,
                    calibration: Calibration | None = None, measure: bool = True) -> Located:
    """Raw heatmaps (B, N, *size) read as `config` says; see interface.Locate."""
    sigma = sigma_pixels(config.finetune.sigma, config.dataset)
    return locate(outputs, maps, config.finetune, sigma, decoder, shape, spacing, calibration, measure)


def as_they_are(outputs: Tensor) -> Tensor:
    """Raw outputs that are trained with a softmax are what the published decoder thresholds."""
    return outputs
