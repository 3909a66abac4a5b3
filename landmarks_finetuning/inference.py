"""A trained detector: everything that its weights file says, its second stage, and others beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from core.config.config import Config
from core.config.dataset import Dataset
from core.config.load import load_config, parse_recorded_config
from core.config.recipes import recipe
from core.config.second_stage import FOLDER, second_of
from core.config.settings import all_settings
from core.data.dataset import ImageSet
from core.data.records import parse_spacing
from core.errors import UserError
from core.networks.weights import Weights, load_weights
from core.runs.places import round_dir
from core.training.device import resolve_device
from landmarks_finetuning.decoding import sigma_pixels
from landmarks_finetuning.detectors.registry import DETECTORS
from landmarks_finetuning.ensemble import MeanOutputs
from landmarks_finetuning.running import Outputs, run_batched
from landmarks_finetuning.shape import Shape

JOINED_BYTES = 2**27  # of heatmaps that are decoded together
WEIGHTS = "best.safetensors"
GRID = ("image_size", "canvas_size", "resample_mm")  # of dataset, what a second stage sees
OF_PREDICTION = ("experiment.device", "experiment.precision", "experiment.seed")


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
            check_grid(self.config.dataset, self.own_config.dataset, path)
        self.config = writing_nowhere(self.config, overrides)
        self.landmark_names = landmark_names(path, weights)
        dims = len(self.own_config.dataset.image_size)
        self.spacing_mm = parse_spacing(self.header.get("spacing_mm"), dims, str(path))
        self.shape = Shape.stored(weights.header)
        self.device = resolve_device(self.config.experiment.device)
        self.kind = DETECTORS[weights.header.get("network", "unet")]
        try:
            model = self.kind.rebuild(weights, self.own_config.dataset.image_size)
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
        if self.header["kind"] != "detector" or second_config(self) is None:
            return None
        beside = [other.second for other in self.others if other.second is not None]
        return TrainedDetector(self.path.parent / FOLDER / self.path.name, kind="second stage", others=beside)

    @property
    def rounds(self) -> int:
        """Of self-training, in the run that it is of."""
        rounds = self.header.get("rounds", self.own_config.finetune.self_training.rounds)
        if not isinstance(rounds, int) or rounds < 0:
            raise UserError(f"{self.path} is damaged: its header's rounds are {json.dumps(rounds)[:50]}")
        return rounds

    @property
    def sigma(self) -> float:
        """Of its heatmaps, in network pixels."""
        return sigma_pixels(self.recipe.finetune.sigma, self.config.dataset)

    @property
    def recipe(self) -> Config:
        """`config` as a detector of this kind has it."""
        return recipe(self.config, self.header["backbone"])

    def outputs(self, images: ImageSet, chosen: Sequence[int] | None = None) -> Iterator[Outputs]:
        """Yield the raw outputs of all images, or of the `chosen` ones, batch by batch."""
        config = self.config
        maps = self.kind.heatmaps is not None
        return run_batched(self.model, images, config.evaluation, self.device, config.experiment.precision, chosen,
                           config.evaluation.views if maps else 1, whole=not maps)


def writing_nowhere(config: Config, overrides: Sequence[str]) -> Config:
    """`config`, which came with the weights, without places that it would write to: they may be anybody's.

    Images are not kept but in a dataset.cache_dir of `overrides`; phantoms are not made.
    """
    given = any(override.startswith(("dataset.cache_dir=", "dataset=")) for override in overrides)
    dataset = config.dataset if given else config.dataset.model_copy(update={"cache_dir": None})
    if dataset.phantom is not None and not Path(dataset.root).exists():
        dataset = dataset.model_copy(update={"phantom": None})
    return config.model_copy(update={"dataset": dataset})


def landmark_names(path: Path, weights: Weights) -> list[str]:
    """What the outputs of a detector stand for; UserError where its header does not name each of them once."""
    names = weights.header.get("landmark_names")
    if not isinstance(names, list) or len(names) != weights.out_channels or len(set(map(str, names))) < len(names):
        count = f"{len(names)} names" if isinstance(names, list) else "no list"
        raise UserError(f"{path} is damaged: its network has {weights.out_channels} outputs, its header's "
                        f"landmark_names are {count}")
    return [str(name) for name in names]


def second_config(detector: TrainedDetector) -> Config | None:
    """What the second stage of `detector` was trained with, None where it has one stage."""
    return second_of(detector.own_config, detector.header["backbone"], detector.header["shots"])


def check_alike(one: TrainedDetector, other: TrainedDetector, path: Path) -> None:
    """UserError where the outputs of two detectors cannot be averaged: other landmarks, images or kinds of outputs."""

    def what_counts(detector: TrainedDetector) -> dict[str, Any]:
        plain, settings = detector.own_config.plain(), all_settings()
        images = {f"dataset.{key}": value for key, value in plain["dataset"].items()}
        own = recipe(detector.own_config, detector.header["backbone"]).finetune
        heatmaps = {f"finetune.{key}": getattr(own, key) for key in ("loss", "sigma")}
        refine = plain["finetune"]["refine"]
        heatmaps |= {"finetune.refine.zoom": refine["zoom"],
                     "finetune.refine.crop": None if refine["zoom"] is None else refine["crop"]}
        of_images = {key: value for key, value in images.items() if key not in settings or settings[key].counts_for}
        second = second_config(detector)
        seen = None if second is None else {key: getattr(second.dataset, key) for key in GRID}
        return {**of_images, **heatmaps, "images of the second stage": seen,
                "finetune.refine.sigma": None if second is None else second.finetune.sigma,
                "patch": detector.header.get("patch"), "landmark_names": detector.landmark_names}

    if (one.kind.locate, one.kind.heatmaps) != (other.kind.locate, other.kind.heatmaps):
        raise UserError(f'{other.path} cannot be averaged with {path}: backbone "{other.header["backbone"]}" has other '
                        f'outputs than "{one.header["backbone"]}"')
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
    if not detector.rounds and not beside:
        return detector
    return TrainedDetector(round_dir(run_dir, detector.rounds) / WEIGHTS, overrides, others=beside)


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


def check_grid(asked: Dataset, own: Dataset, path: Path) -> None:
    """UserError where a detector would see images of another size, or of other pixels, than it was trained on."""
    for key in GRID:
        if getattr(asked, key) != getattr(own, key):
            raise UserError(f"--set dataset.{key}: {path} was trained with {json.dumps(getattr(own, key))}, and sees "
                            "images as it did then")


def as_trained(config: Config, header: dict[str, Any]) -> Config:
    """`config` for a detector of this `header`, with finetune.sigma in today's pixels.

    One without "sigma_pixels" was trained when resampled images had sigma scaled by the size of the crop as well.
    """
    if config.dataset.resample_mm is None or "sigma_pixels" in header:
        return config
    sigma = config.finetune.sigma * float(np.mean(config.dataset.image_size)) / 256
    return config.model_copy(update={"finetune": config.finetune.model_copy(update={"sigma": sigma})})
