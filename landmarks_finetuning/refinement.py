"""Coarse to fine: the first stage's answers, looked at again in finer crops about them.

Each landmark of an image has a crop of its own, and of the second network's maps there only its own counts. The first
answer weighs in as a Gaussian about it (a product of both stages' beliefs).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from core.config.config import Config
from core.config.second_stage import second_stage
from core.data.dataset import ImageSet, load_images
from core.data.records import Record
from core.data.windows import cut_windows
from core.formats.geometry import apply_maps
from core.training.device import autocast, resolve_device, resolve_precision
from landmarks_finetuning.decoding import Located, locate
from landmarks_finetuning.ensemble import over_views
from landmarks_finetuning.shape import add_shape_prior
from landmarks_finetuning.uncertainty import Calibration

CROPS_FOR_AN_IMAGE = 4  # that go through the second network for an image of the first one's batch
WINDOW = 4.0  # pixels about a map's peak, at least, over which its mean is the answer; twice that for the confidence
LARGEST_OFFSET = 0.4  # of a crop: how far from its centre a landmark is put in training


class FirstAnswers(NamedTuple):
    """What the second stage knows of the first.

    errors (K, D): on images that it was not trained on, in the second stage's pixels; validation (V, N, D): its answers
    on the validation images in stored pixels, None without any.
    """

    errors: np.ndarray
    validation: np.ndarray | None

    @property
    def spread(self) -> float:
        """The root mean square of the errors along an axis."""
        return float(np.sqrt((self.errors**2).mean()))


class CropMaps(NamedTuple):
    """Raw outputs (K, 1, *size) of K landmarks, each in its own crop; `maps` (K, D, D + 1) from stored to crop pixels.

    image, landmark: (K,) which ones; answers (K, 1, D): the first stage's, in crop pixels.
    """

    image: np.ndarray
    landmark: np.ndarray
    outputs: Tensor
    maps: np.ndarray
    answers: np.ndarray

    def weighted(self, width_px: float | None) -> Tensor:
        """The outputs under a Gaussian prior of `width_px` about the first answers, or as they are."""
        return self.outputs if width_px is None else add_shape_prior(self.outputs, self.answers, width_px)


def first_errors(answers: np.ndarray, images: ImageSet) -> np.ndarray:
    """(K, D) errors of `answers` (M, N, D), stored pixels, on labelled `images`, in the pixels of their canvas.

    No longer than LARGEST_OFFSET of a crop along an axis.
    """
    errors = apply_maps(answers, images.maps) - apply_maps(images.original_points(), images.maps)
    limit = LARGEST_OFFSET * np.array(images.network_size)
    return errors[np.isfinite(errors).all(axis=2)].clip(-limit, limit)


def guessed_errors(size: tuple[int, ...]) -> np.ndarray:
    """Errors to train with where no held-out label tells them: normal ones of an eighth of a crop."""
    drawn = np.random.default_rng(0).normal(size=(1000, len(size))) * np.array(size) / 8
    limit = LARGEST_OFFSET * np.array(size)
    return drawn.clip(-limit, limit)


@torch.no_grad()
def run_crops(model: nn.Module, images: ImageSet, answers: np.ndarray, config: Config, views: int = 1
              ) -> Iterator[CropMaps]:
    """Yield the second network's maps in crops about `answers` (M, N, D), stored pixels, of all `images`.

    They are averaged over `views` of each crop. `config` is the second stage's. CROPS_FOR_AN_IMAGE crops go through at
    once for each image of evaluation.batch_size; answers that are NaN have none.
    """
    device, size = resolve_device(config.experiment.device), images.network_size
    precision = resolve_precision(config.experiment.precision, device)

    def outputs_of(inputs: Tensor) -> Tensor:
        with autocast(device, precision):
            return model(inputs).float()

    pairs = np.argwhere(np.isfinite(answers).all(axis=2))
    places = apply_maps(answers, images.maps)  # in pixels of the canvas
    some = config.evaluation.batch_size * CROPS_FOR_AN_IMAGE
    for first in range(0, len(pairs), some):
        image, landmark = pairs[first : first + some].T
        centres = places[image, landmark]
        corners = np.rint(centres - (np.array(size) - 1) / 2).astype(np.int64)
        chosen, at = (torch.from_numpy(each).to(images.images.device) for each in (image, corners))
        outputs = over_views(outputs_of, cut_windows(images.images, chosen, at, size).to(device), views)
        own = outputs[torch.arange(len(image)), torch.from_numpy(landmark)][:, None]
        maps = images.maps[image].copy()
        maps[:, :, -1] -= corners
        yield CropMaps(image, landmark, own, maps, (centres - corners)[:, None])


def crop_batches(model: nn.Module, records: Sequence[Record], answers: np.ndarray, config: Config
                 ) -> Iterator[CropMaps]:
    """Yield `run_crops` of all `records`, read a few at a time, through the cache. `config` is the study's."""
    second, some = second_stage(config), config.evaluation.batch_size
    for first in range(0, len(records), some):
        part = slice(first, first + some)
        for crops in run_crops(model, load_images(records[part], second.dataset), answers[part], second,
                               config.evaluation.views):
            yield crops._replace(image=first + crops.image)


def crop_scores(crops: CropMaps, spread: float, config: Config) -> Tensor:
    """The maps (K, 1, *size) that landmarks of `crops` are read off: raw outputs, under the prior where there is one.

    `spread`: the first stage's root mean square error along an axis, in crop pixels; finetune.refine.prior times it is
    the width of the prior. `config` is the study's.
    """
    prior = config.finetune.refine.prior
    return crops.weighted(None if prior is None else prior * spread)


def decode_crops(crops: CropMaps, spread: float, config: Config, spacing: np.ndarray | None = None,
                 calibration: Calibration | None = None) -> Located:
    """The landmarks of `crops`, (K, 1) of everything; `spacing` (K, D) is mm per stored pixel.

    `spread` and `config` are as for `crop_scores`; `calibration` is that of all N landmarks.
    """
    if calibration is not None:
        calibration = replace(calibration, temperatures=calibration.temperatures[crops.landmark][:, None])
    settings = second_stage(config).finetune
    return locate(crop_scores(crops, spread, config), crops.maps, settings, window_of(config), spacing=spacing,
                  calibration=calibration)


def window_of(config: Config) -> float:
    """Pixels of a crop about a map's peak over which the answer is the mean, however sharp the target was.

    `config` is the study's.
    """
    return max(config.finetune.refine.sigma or 0.0, WINDOW)


def refine(model: nn.Module, records: Sequence[Record], answers: np.ndarray, spread: float, config: Config,
           calibration: Calibration | None = None) -> Located:
    """The first stage's `answers` (M, N, D), stored pixels, refined; NaN stays NaN. `config` is the study's."""
    located = Located(answers.copy(), *(np.full(answers.shape[:2], np.nan) for _ in range(3)))
    spacing = np.array([record.spacing or (1.0,) * answers.shape[2] for record in records])
    for crops in crop_batches(model, records, answers, config):
        found = decode_crops(crops, spread, config, spacing[crops.image], calibration)
        for kept, new in zip(located, found, strict=True):
            kept[crops.image, crops.landmark] = new[:, 0]
    return located
