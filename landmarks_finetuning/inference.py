"""A trained detector on images: batches or windows, decoded to points and how far off these may be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from core.config.config import Config
from core.config.dataset import Dataset
from core.config.evaluation import Evaluation
from core.config.finetune import LossSettings
from core.config.load import load_config, parse_recorded_config
from core.config.second_stage import FOLDER
from core.config.settings import all_settings
from core.data.dataset import ImageSet
from core.errors import UserError
from core.formats.geometry import apply_maps, inverse
from core.networks.weights import Weights, load_weights
from core.runs.places import round_dir
from core.training.device import autocast, resolve_device, resolve_precision
from landmarks_finetuning.detectors.registry import DETECTORS
from landmarks_finetuning.ensemble import MeanOutputs, over_views
from landmarks_finetuning.heatmaps import LogMaps, confidence, find_points, log_maps, require_finite
from landmarks_finetuning.shape import add_shape_prior, fit_shape, shape_size, stored_shape
from landmarks_finetuning.uncertainty import Calibration, measure_spread

JOINED_BYTES = 2**27  # of heatmaps that are decoded together
WEIGHTS = "best.safetensors"
OF_PREDICTION = ("experiment.device", "experiment.precision", "experiment.seed")


class Heatmaps(NamedTuple):
    """Raw float32 outputs (B, N, *size), on the device, of images `chosen`; `maps` (B, D, D + 1) from stored pixels."""

    chosen: list[int]
    outputs: Tensor
    maps: np.ndarray


class TrainedDetector:
    """A detector read from best.safetensors: everything it needs stands in the file's header.

    `config` is that of its training, or that of its run's folder under `overrides`, which may say where and how it
    predicts, but nothing that it was trained with: UserError. `own_config` is that of its training in any case. With
    `others`, on the same data and of the same heatmaps, it gives the mean of the outputs of all.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = (), kind: str = "detector",
                 others: Sequence[TrainedDetector] = ()) -> None:
        weights = load_weights(path, tuple(DETECTORS))
        if weights.header.get("kind") != kind:
            raise UserError(f'{path} holds a "{weights.header.get("kind")}", not a landmark detector')
        self.header = weights.header
        self.own_config = as_trained(parse_recorded_config(weights.header["config"], str(path)), self.header)
        self.config = self.own_config
        if overrides:
            self.config = as_trained(overridden(path.parent / "config.json", overrides), self.header)
        self.landmark_names = landmark_names(path, weights)
        self.shape = stored_shape(weights.header)
        self.device = resolve_device(self.config.experiment.device)
        network = DETECTORS[weights.header.get("network", "unet")]
        try:
            model = network.rebuild(weights, self.own_config.dataset.image_size)
            model.load_state_dict(weights.tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} is damaged: its tensors are not those of the network that its header describes "
                            f"({' '.join(str(error).split())[:200]})") from None
        for other in others:
            check_alike(self, other, path)
        models: list[nn.Module] = [model, *(other.model for other in others)]
        self.model: nn.Module = (MeanOutputs(models) if others else model).to(self.device).eval()
        self.path, self.others = path, others

    @cached_property
    def second(self) -> TrainedDetector | None:
        """The detector of its second stage, None where it has one stage."""
        if self.header["kind"] != "detector" or self.own_config.finetune.refine.zoom is None:
            return None
        beside = [other.second for other in self.others if other.second is not None]
        return TrainedDetector(self.path.parent / FOLDER / self.path.name, kind="second stage", others=beside)

    @property
    def sigma(self) -> float:
        """Of its heatmaps, in network pixels."""
        return sigma_pixels(self.config.finetune.sigma, self.config.dataset)

    def heatmaps(self, images: ImageSet, chosen: Sequence[int] | None = None) -> Iterator[Heatmaps]:
        """Yield the raw outputs of all images, or of the `chosen` ones, batch by batch."""
        config = self.config
        return run_batched(self.model, images, config.evaluation, self.device, config.experiment.precision, chosen,
                           config.evaluation.views)


def landmark_names(path: Path, weights: Weights) -> list[str]:
    """What the outputs of a detector stand for; UserError where its header does not name each of them once."""
    names = weights.header.get("landmark_names")
    if not isinstance(names, list) or len(names) != weights.out_channels or len(set(map(str, names))) < len(names):
        count = f"{len(names)} names" if isinstance(names, list) else "no list"
        raise UserError(f"{path} is damaged: its network has {weights.out_channels} outputs, its header's "
                        f"landmark_names are {count}")
    return [str(name) for name in names]


def check_alike(one: TrainedDetector, other: TrainedDetector, path: Path) -> None:
    """UserError where the outputs of two detectors cannot be averaged: other landmarks, images or heatmaps."""

    def what_counts(detector: TrainedDetector) -> dict[str, Any]:
        plain, settings = detector.own_config.plain(), all_settings()
        images = {f"dataset.{key}": value for key, value in plain["dataset"].items()}
        heatmaps = {f"finetune.{key}": plain["finetune"][key] for key in ("loss", "sigma")}
        heatmaps |= {f"finetune.refine.{key}": plain["finetune"]["refine"][key] for key in ("zoom", "crop", "sigma")}
        of_images = {key: value for key, value in images.items() if key not in settings or settings[key].counts_for}
        return {**of_images, **heatmaps, "landmark_names": detector.landmark_names}

    first, second = what_counts(one), what_counts(other)
    for key, value in first.items():
        if value != second[key]:
            raise UserError(f"{other.path} cannot be averaged with {path}: {key} is {json.dumps(second[key])} there "
                            f"and {json.dumps(value)} here")


def trained_detector(run_dir: Path, overrides: Sequence[str] = (), others: Sequence[Path] = ()) -> TrainedDetector:
    """The detector of a run: that of its last round of self-training, where it has some.

    With other runs it gives the mean of the outputs of all of them.
    """
    beside = [trained_detector(other) for other in others]
    detector = TrainedDetector(run_dir / WEIGHTS, overrides)
    rounds = detector.own_config.finetune.self_training.rounds
    if not rounds and not beside:
        return detector
    folder = round_dir(run_dir, rounds) if rounds else run_dir
    return TrainedDetector(folder / WEIGHTS, overrides, others=beside)


def overridden(path: Path, overrides: Sequence[str]) -> Config:
    """A run's config.json under `overrides` that a trained detector can follow; UserError for any other."""
    config = load_config(path, overrides)
    scoring = (key for key, each in all_settings().items() if "scoring" in each.counts_for)
    free = ("dataset.", "evaluation.", *OF_PREDICTION, *(key for key in scoring if key.startswith("finetune.")))
    for override in overrides:
        given = override.partition("=")[0]
        fixed = [key for key in all_settings() if f"{key}.".startswith(f"{given}.") and not key.startswith(free)]
        if fixed:
            raise UserError(f"--set {override}: {fixed[0]} has no effect on a trained detector; the keys that have one "
                            f"are {', '.join(free)}")
    return config


@torch.no_grad()
def run_batched(model: Callable[[Tensor], Tensor], images: ImageSet, settings: Evaluation, device: torch.device,
                precision: str, chosen: Sequence[int] | None = None, views: int = 1) -> Iterator[Heatmaps]:
    """Yield the raw outputs of `model` for all images, or the `chosen` ones, batch by batch, averaged over `views`.

    Images of the network's size go through in batches of settings.batch_size. Larger ones go one by one, in windows
    that overlap by settings.window_overlap; outputs are averaged, weighted by the distance from a window's border.
    """
    size, batch = images.network_size, settings.batch_size
    indices = list(range(len(images.records))) if chosen is None else list(chosen)
    precision = resolve_precision(precision, device)

    def outputs_of_view(inputs: Tensor) -> Tensor:
        with autocast(device, precision, keep_casts=False):
            return model(inputs).float()

    def outputs_of(inputs: Tensor) -> Tensor:
        return over_views(outputs_of_view, inputs.to(device), views)

    if images.fits:
        for first in range(0, len(indices), batch):
            some = indices[first : first + batch]
            inputs = images.images[first : first + batch] if chosen is None else images.images[some]
            yield Heatmaps(some, outputs_of(inputs), images.maps[some])
        return
    for index in indices:
        part, maps = images.seen(index), images.maps[[index]]
        maps[:, :, -1] -= [place.start for place in part]
        image = images.images[(slice(index, index + 1), slice(None), *part)]
        outputs = _over_windows(outputs_of, image, size, settings.window_overlap, batch)
        yield Heatmaps([index], outputs, maps)


def joined(batches: Iterable[Heatmaps], most_bytes: int = JOINED_BYTES) -> Iterator[Heatmaps]:
    """Batches of one size put together while they are small: what decodes them waits for the device less often."""
    group: list[Heatmaps] = []
    for batch in batches:
        together = sum(each.outputs.nbytes for each in group) + batch.outputs.nbytes
        if group and (together > most_bytes or batch.outputs.shape[1:] != group[0].outputs.shape[1:]):
            yield _together(group)
            group = []
        group.append(batch)
    if group:
        yield _together(group)


def _together(group: Sequence[Heatmaps]) -> Heatmaps:
    chosen = [index for batch in group for index in batch.chosen]
    outputs = group[0].outputs if len(group) == 1 else torch.cat([batch.outputs for batch in group])
    return Heatmaps(chosen, outputs, np.concatenate([batch.maps for batch in group]))


def _over_windows(outputs_of: Callable[[Tensor], Tensor], image: Tensor, size: tuple[int, ...], overlap: float,
                  batch: int) -> Tensor:
    """(1, C, *large) -> (1, N, *large): outputs of overlapping windows of `size`, averaged."""
    starts = [window_starts(length, window, overlap) for length, window in zip(image.shape[2:], size, strict=True)]
    places = [tuple(slice(first, first + window) for first, window in zip(corner, size, strict=True))
              for corner in product(*starts)]
    weight = window_weight(size)
    total, weights = torch.zeros(()), torch.zeros(image.shape[2:])
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        outputs = outputs_of(torch.cat([image[(slice(None), slice(None), *place)] for place in some]))
        if first == 0:
            total = outputs.new_zeros((outputs.shape[1], *image.shape[2:]))
        for place, output in zip(some, outputs, strict=True):
            total[(slice(None), *place)] += output * weight.to(output.device)
            weights[place] += weight
    return (total / weights.to(total.device))[None]


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """First pixels of evenly spaced windows that cover `length` pixels and overlap by at least `overlap`."""
    step = max(1, math.floor(window * (1 - overlap) + 1e-9))
    count = 1 + math.ceil((length - window) / step)
    return np.linspace(0, length - window, count).round().astype(int).tolist()


def window_weight(size: tuple[int, ...]) -> Tensor:
    """(*size) weights above 0, the product of a triangle along each axis."""
    weight = torch.ones(())
    for length in size:
        rise = torch.minimum(torch.arange(length) + 1, length - torch.arange(length)).float()
        weight = weight[..., None] * (rise / rise.max())
    return weight


def as_trained(config: Config, header: dict[str, Any]) -> Config:
    """`config` for a detector of this `header`, with finetune.sigma in today's pixels.

    One without "sigma_pixels" was trained when resampled images had sigma scaled by the size of the crop as well.
    """
    if config.dataset.resample_mm is None or "sigma_pixels" in header:
        return config
    sigma = config.finetune.sigma * float(np.mean(config.dataset.image_size)) / 256
    return config.model_copy(update={"finetune": config.finetune.model_copy(update={"sigma": sigma})})


def sigma_pixels(sigma: float, dataset: Dataset) -> float:
    """finetune.sigma in pixels of this study's input.

    Of images resized to dataset.image_size it is stated for 256 pixels (mean over the axes); with dataset.resample_mm
    pixels have one size in mm, and it counts them as they are: another crop, the same sigma in mm.
    """
    return sigma if dataset.makes_windows else sigma * float(np.mean(dataset.image_size)) / 256


class Decoded(NamedTuple):
    """In the pixels of the maps: points (B, N, D), float64 on the CPU, and the scores (B, N, *size) they were read off.

    The scores, on the outputs' device, are log-probabilities up to a constant for each map, under the shape prior.
    confidence (B, N) in [0, 1] is a weight: the mass of the network's own map about the point.
    """

    points: Tensor
    scores: Tensor
    confidence: Tensor


def decode_maps(outputs: Tensor, settings: LossSettings, sigma: float, decoder: str | None = None,
                shape: np.ndarray | None = None) -> Decoded:
    """Raw outputs (B, N, *size) -> points, and the maps they come from; `sigma` is the heatmaps' in network pixels.

    With `shape` (N, D), the labelled shapes' mean, or (1 + M, N, D) with modes, points are decoded again under
    settings.shape_prior, to whose fit each landmark counts by the mass of its map about it. `decoder` replaces
    settings.decoder.
    """
    decoder, loss = decoder or settings.decoder, settings.loss
    seen = log_maps(outputs, loss)
    points = find_points(outputs, seen, decoder, loss, sigma)
    raw = decoder == "contour_centroid"  # thresholds raw outputs, which a prior must not shift
    points, sure = _copied(points, confidence(seen, points, loss, sigma), seen)
    if shape is None or settings.shape_prior is None or raw:
        return Decoded(points, seen.scores, sure)
    fitted = fit_shape(shape, points.numpy(), sure.numpy())
    weighted = add_shape_prior(outputs, fitted, settings.shape_prior * shape_size(shape))
    points = find_points(weighted, seen._replace(scores=weighted), decoder, loss, sigma)
    points, sure = _copied(points, confidence(seen, points, loss, sigma), seen)
    return Decoded(points, weighted, sure)


def _copied(points: Tensor, sure: Tensor, maps: LogMaps) -> tuple[Tensor, Tensor]:
    """Points (B, N, D) and confidences (B, N) on the CPU, by one copy: one wait for the device."""
    copied = torch.cat((points.to(sure.device), sure[..., None], maps.finite[..., None].double()), dim=2).cpu()
    require_finite(copied[..., -1] > 0)
    return copied[..., :-2], copied[..., -2]


class Located(NamedTuple):
    """Landmarks in stored pixels, and how far off they may be in mm where the spacing is known, else stored pixels."""

    points: np.ndarray  # (B, N, D)
    expected_error: np.ndarray  # (B, N), NaN where the loss says nothing of it
    radius90: np.ndarray  # (B, N), the same
    confidence: np.ndarray  # (B, N) in [0, 1], a weight: see `Decoded`


def locate(outputs: Tensor, maps: np.ndarray, settings: LossSettings, sigma: float, decoder: str | None = None,
           shape: np.ndarray | None = None, spacing: np.ndarray | None = None,
           calibration: Calibration | None = None) -> Located:
    """Raw outputs (B, N, *size) -> points (B, N, D) in stored pixels with expected errors and 90 % radii (B, N).

    `maps` (B, D, D + 1) lead from stored to network pixels, `spacing` (B, D) is mm per stored pixel. The rest is as
    for `decode_maps`. A softmax over landmarks says which landmark a pixel belongs to, not where one lies: NaN there.
    """
    decoded, to_stored = decode_maps(outputs, settings, sigma, decoder, shape), inverse(maps)
    points = apply_maps(decoded.points.numpy(), to_stored)
    if settings.loss != "cross_entropy_pixels":
        nothing = np.full(points.shape[:2], np.nan)
        return Located(points, nothing, nothing, decoded.confidence.numpy())
    spread = measure_spread(decoded.scores, decoded.points, to_stored, spacing, calibration)
    return Located(points, *spread, decoded.confidence.numpy())
