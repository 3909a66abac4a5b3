"""The plan of a study: its stages and cells, where each one's files are, what is done and what is left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.config.config import Config
from core.config.finetune import Finetune, LossSettings
from core.config.second_stage import second_stage
from core.config.starts import MEAN_SHAPE, SSL_METHODS
from core.errors import UserError
from core.files import parse_json
from core.runs.places import Cell, ema_path, variant

ENCODER_STUDY = ("vgg19", "densenet161", "resnext50_32x4d")  # the paper's


def ssl_methods(finetune: Finetune) -> list[str]:
    """The self-supervised backbones that start from this study's own pre-training."""
    return [method for method in SSL_METHODS if method in finetune.backbones
            and getattr(finetune.encoder_weights, method) is None]


def encoder_studies(config: Config) -> list[Config]:
    """The study of encoders on ImageNet weights: the config with one of ENCODER_STUDY at a time, and no other start."""
    return [with_finetune(config, backbones=("imagenet",), encoder=encoder) for encoder in ENCODER_STUDY]


def settings_compared(config: Config) -> list[Config]:
    """The study with one loss, one start and one pre-training iteration at a time: what a single cell can be run with.

    For each of finetune.losses all backbones; where finetune.pretraining_iteration is "best" those but ddpm do without,
    and ddpm comes from every EMA checkpoint; then ddpm from the checkpoints of finetune.transfer_from. Raises UserError
    where these are not there.
    """
    finetune, compared = config.finetune, []
    kept = config.ddpm.checkpoint_iterations if finetune.pretraining_iteration == "best" else ()
    away = transfer_paths(config) if "ddpm" in finetune.backbones else ()
    for entry in finetune.losses or (finetune,):
        loss = {key: getattr(entry, key) for key in LossSettings.model_fields}
        base = {**loss, "losses": (), "transfer_from": None}
        others = tuple(name for name in finetune.backbones if name != "ddpm" or not kept)
        starts: list[dict[str, Any]] = [{"backbones": others}]
        if kept:
            starts[0]["pretraining_iteration"] = None
        if "ddpm" in finetune.backbones:
            starts += [{"backbones": ("ddpm",), "pretraining_iteration": iteration} for iteration in kept]
            starts += [{"backbones": ("ddpm",), "pretraining_iteration": None, "checkpoint": str(path)}
                       for path in away]
        compared += [with_finetune(config, **base, **start) for start in starts]
    return compared


def with_finetune(config: Config, **values: Any) -> Config:
    """The config with other values in its `finetune` section."""
    return config.model_copy(update={"finetune": config.finetune.model_copy(update=values)})


def transfer_paths(config: Config) -> list[Path]:
    """The EMA checkpoints of the study finetune.transfer_from that ddpm starts from as well, oldest first.

    The one of finetune.pretraining_iteration, or its last one, or all of them for "best". Raises UserError where that
    folder holds no diffusion pre-training, where a checkpoint is not there yet, or for a network of another shape.
    """
    if config.finetune.transfer_from is None:
        return []
    folder, wanted = Path(config.finetune.transfer_from) / "ddpm", config.finetune.pretraining_iteration
    if not (folder / "config.json").is_file():
        raise UserError(f"finetune.transfer_from {folder.parent}: {folder} holds no diffusion pre-training; run that "
                        "study's stage pretrain first, or name another runs/<experiment>")
    theirs = parse_json((folder / "config.json").read_text(encoding="utf8"))
    for key, value in config.unet.model_dump(mode="json").items():
        other = theirs["unet"].get(key, value)
        if other != value:
            raise UserError(f"finetune.transfer_from {folder.parent}: its network has unet.{key} {json.dumps(other)}, "
                            f"this study's {json.dumps(value)}; they must be the same")
    kept = theirs["ddpm"]["checkpoint_iterations"]
    iterations = sorted(kept) if wanted == "best" else [wanted or max(kept)]
    paths = [ema_path(folder.parent, iteration) for iteration in iterations]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"finetune.transfer_from {folder.parent}: {missing[0]} is not there (yet); it keeps iterations "
                        f"{', '.join(map(str, kept))}")
    return paths


def single_setting(config: Config, backbone: str) -> Config:
    """The config of one run from `backbone`, from the study's own pre-training.

    UserError where the study compares several settings: which of them is meant?
    """
    alone = with_finetune(config, backbones=(backbone,), transfer_from=None)
    settings = {variant(each, backbone): each for each in settings_compared(alone) if each.finetune.backbones}
    if len(settings) > 1:
        raise UserError(f"this study runs {backbone} in {len(settings)} settings ({', '.join(settings)}), and one run "
                        "has one: add --set finetune.losses=[] and a number for finetune.pretraining_iteration")
    return with_finetune(next(iter(settings.values())), backbones=config.finetune.backbones)


def cells(config: Config) -> list[Cell]:
    """Every fine-tuning run of the study, the mean-shape guess first, in the order in which they are run.

    Under evaluation.folds the folds of each come before what joins them.
    """
    finetune, folds = config.finetune, config.evaluation.folds or 0
    draws = finetune.draws if finetune.selection == "random" else finetune.draws[:1]
    guesses = [Cell(MEAN_SHAPE, shots, draw, 0) for shots in finetune.shots for draw in draws]
    trained = [Cell(backbone, shots, draw, seed) for shots in finetune.shots for draw in draws
               for seed in finetune.seeds for backbone in finetune.backbones]
    parts = (*range(1, folds + 1), None)
    return [replace(cell, fold=fold) for cell in (*guesses, *trained) for fold in parts]


def needs_pretraining(finetune: Finetune) -> bool:
    """Whether the study's cells start from this study's own DDPM, or are trained on images that it has chosen."""
    return ("ddpm" in finetune.backbones or finetune.selection == "coverage") and finetune.checkpoint is None


def needs_crop_pretraining(finetune: Finetune) -> bool:
    """Whether the second stage of the study's cells starts from a DDPM of its own."""
    return "ddpm" in finetune.backbones and finetune.refine.zoom is not None and finetune.refine.start == "crops"


def pretraining_configs(config: Config) -> list[Config]:
    """The diffusion pre-trainings of the study: of whole images, and of its second stage's crops."""
    first = [config] if needs_pretraining(config.finetune) else []
    return first + ([second_stage(config)] if needs_crop_pretraining(config.finetune) else [])


def require_backbone(config: Config, backbone: str) -> None:
    """UserError where a detector cannot start from `backbone` under this config."""
    try:
        config.check_backbone(backbone)
    except ValueError as error:
        raise UserError(str(error)) from None




