"""What a study's config comes down to for one start: the earlier systems train and decode in a way of their own."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from core.config.config import Config
from core.config.finetune import Finetune, LearningRates
from core.config.section import Augmentation, Clip

NO_AUGMENTATION = Augmentation(probability=0.0, rotation_degrees=0.0, scale=0.0, translation=0.0)
PLAIN = {"batch_size": 4, "accumulation": 1, "warmup_iterations": 0, "clip": Clip(), "ema_decay": None,
         "augmentation": NO_AUGMENTATION}
RELEASED_SIGMA = 3.0  # pixels of GU2Net's input, whatever its size


def recipe(config: Config, backbone: str) -> Config:
    """`config` as a run of `backbone` has it: what its preset fixes stands in place of the shared settings.

    The same for a config that has been through it. Runs record the study's own config.
    """
    changes = RECIPES[backbone](config) if backbone in RECIPES else {}
    if not changes:
        return config
    return config.model_copy(update={"finetune": config.finetune.model_copy(update=changes)})


def _gu2net(config: Config) -> dict[str, Any]:
    """Its sigmoid maps are read like those of a softmax over pixels: only what they are to each other counts."""
    own, changes = config.finetune.gu2net, {"loss": "cross_entropy_pixels"}
    if config.finetune.decoder == "contour_centroid":  # thresholds raw outputs; this is the same on probabilities
        changes["decoder"] = "component_centroid"
    if own.preset == "tuned":
        return changes
    scale = 1.0 if config.dataset.makes_windows else fmean(config.dataset.image_size) / 256
    return {**changes, **PLAIN, "target": "gaussian_window", "sigma": RELEASED_SIGMA / scale, "decoder": "argmax",
            "shape_prior": None, "optimizer": "adam", "weight_decay": 1e-4, "scheduler": "cyclic",
            "cycle_iterations": own.cycle_iterations, "learning_rate": _with_rate(config.finetune, "gu2net",
                                                                                  own.learning_rate)}


def _global_to_local(config: Config) -> dict[str, Any]:
    changes: dict[str, Any] = {"loss": "cross_entropy_pixels", "shape_prior": None}
    if config.finetune.global_to_local.preset == "tuned":
        return changes
    return {**changes, **PLAIN, "optimizer": "amsgrad", "weight_decay": 0.0, "scheduler": "constant"}


def _with_rate(finetune: Finetune, backbone: str, rate: float) -> LearningRates:
    return finetune.learning_rate.model_copy(update={backbone: rate})


RECIPES: dict[str, Callable[[Config], dict[str, Any]]] = {"gu2net": _gu2net, "global_to_local": _global_to_local}
