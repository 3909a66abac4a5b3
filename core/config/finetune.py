"""The config's `finetune` section: what is compared, how landmarks become heatmaps and back, and how it is trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from core.config.section import Augmentation, Clip, Count, Degrees, Index, Rate, Section
from core.config.ssl import SSL_METHODS


class StrongAugmentation(Augmentation):
    """What few labels want, by measurement (docs/results.md)."""

    probability: float = Field(1.0, ge=0, le=1)
    rotation_degrees: Degrees | tuple[Degrees, Degrees, Degrees] = Field(
        10.0, description="largest angle, either way; of volumes about each axis, or three: about x, y and z")
    scale: float = Field(0.1, ge=0, lt=1, description="factor drawn from 1 +- scale")
    translation: float = Field(0.05, ge=0, lt=1, description="fraction of the size, each axis")
    intensity: float = Field(0.3, ge=0, lt=1, description="strength of brightness, contrast and gamma; 0 = off")


class LearningRates(Section):
    """The peak learning rate of each start."""

    ddpm: Rate = 1e-3
    scratch: Rate = 1e-3
    imagenet: Rate = 1e-4
    random: Rate = 1e-3
    mocov3: Rate = 1e-3
    simclrv2: Rate = 1e-3
    dino: Rate = 1e-3


class EncoderWeights(Section):
    """A file for each start that has one: a state dict by torchvision's names, or one of our encoders."""

    imagenet: str | None = Field(None, description="or a folder of torchvision's files; null = fetched")
    mocov3: str | None = Field(None, description="null = this study's own pre-training")
    simclrv2: str | None = Field(None, description="null = this study's own pre-training")
    dino: str | None = Field(None, description="null = this study's own pre-training")


class LossSettings(Section):
    """How landmarks become heatmaps, what the network is trained on, and how heatmaps become landmarks again."""

    loss: Literal["cross_entropy_pixels", "cross_entropy_channels"] = "cross_entropy_pixels"
    target: Literal["disk", "gaussian", "pixel"] = "gaussian"
    sigma: float = Field(2.5, gt=0, description="pixels of a 256-pixel image, scaled with dataset.image_size; with "
                         "dataset.resample_mm pixels of that many mm, whatever the size of the crop")
    decoder: Literal["component_centroid", "contour_centroid", "argmax", "local_expectation", "window_mass"] = (
        "local_expectation")
    shape_prior: float | None = Field(
        0.2, gt=0, description="how far a landmark may lie from where the others' common shape puts it, of the shape's "
        "size (standard deviation); null = each landmark by itself")

    @model_validator(mode="after")
    def _loss_fits(self) -> LossSettings:
        if self.decoder == "window_mass" and self.loss != "cross_entropy_pixels":
            raise ValueError('finetune.decoder "window_mass" needs finetune.loss "cross_entropy_pixels"')
        if self.shape_prior is not None and self.loss != "cross_entropy_pixels":
            raise ValueError('finetune.shape_prior needs finetune.loss "cross_entropy_pixels"; set it to null')
        return self


class Finetune(LossSettings):
    """Supervised training of the detector on a few labelled images."""

    backbones: tuple[Literal["ddpm", "scratch", "imagenet", "random", "mocov3", "simclrv2", "dino"], ...] = Field(
        ("ddpm", "scratch"), description="starts to compare; from imagenet on: 2D, a U-Net around finetune.encoder")
    shots: tuple[Count, ...] = Field((1, 5, 10, 25, 50), min_length=1)
    draws: tuple[Index, ...] = Field((0, 1, 2), min_length=1)
    seeds: tuple[Index, ...] = Field((0,), min_length=1)
    selection: Literal["first", "random"] = Field("random", description="first k images (the paper) or a seeded draw")
    losses: tuple[LossSettings, ...] = Field(
        (), description="settings to compare, each run in place of loss, target, sigma, decoder and shape_prior above; "
        "what one does not say is as above ({}: all of it); none = those above alone")
    pretraining_iteration: Literal["best"] | int | None = Field(
        None, description="which EMA checkpoint; null = the last one; best: each is fine-tuned, and the report shows "
        "the one with the lowest validation error at each number of shots")
    checkpoint: str | None = Field(None, description="a weights file instead: ours (.safetensors) or published (.pt)")
    transfer_from: str | None = Field(
        None, description="the folder of another study, runs/<experiment>: ddpm is also run from its DDPM (table 5)")
    encoder: Literal["densenet161", "vgg19", "resnext50_32x4d", "resnet50"] = Field(
        "densenet161", description="of every backbone but ddpm and scratch")
    encoder_weights: EncoderWeights = EncoderWeights()
    timestep: int | None = Field(None, ge=0, description="null: no timestep embedding (the paper), or a fixed one")
    validation: Literal["official", "none"] | int = Field(
        "official", description="official: all validation labels; N: held out of the shots; none: fixed schedule"
    )
    iterations: int | None = Field(400, gt=0, description="optimiser steps; null where epochs are given")
    epochs: int | None = Field(None, gt=0)
    learning_rate: LearningRates = LearningRates()
    weight_decay: float = Field(0.01, ge=0)
    scheduler: Literal["plateau", "cosine", "constant"] = "cosine"
    plateau_factor: float = Field(0.5, gt=0, lt=1)
    plateau_patience: int = Field(13, ge=0)
    warmup_iterations: int = Field(0, ge=0)
    early_stop_patience: int | None = Field(None, gt=0, description="validations without improvement; null = off")
    validate_every: int | None = Field(None, gt=0, description="optimiser steps; null = every epoch")
    batch_size: int = Field(8, gt=0)
    accumulation: int = Field(1, gt=0)
    accumulation_reduction: Literal["mean", "sum"] = "mean"
    sampling: Literal["stream", "epoch"] = "stream"
    clip: Clip = Clip()
    ema_decay: float | None = Field(None, ge=0, lt=1, description="null = no moving average")
    augmentation: StrongAugmentation = StrongAugmentation()
    log_every: int = Field(10, gt=0)
    save_every: int = Field(100, gt=0)

    @model_validator(mode="after")
    def _budget_and_validation(self) -> Finetune:
        if (self.iterations is None) == (self.epochs is None):
            raise ValueError("finetune needs exactly one of iterations and epochs (set the other to null)")
        needs_validation = self.scheduler == "plateau" or self.early_stop_patience is not None
        if self.validation == "none" and needs_validation:
            raise ValueError('finetune.validation "none" needs a fixed schedule: scheduler cosine or constant, '
                             "early_stop_patience null")
        if self.pretraining_iteration == "best" and self.validation == "none":
            raise ValueError('finetune.pretraining_iteration "best" is chosen by the validation error, and '
                             'finetune.validation is "none"; give an iteration, or validation labels')
        if self.pretraining_iteration == "best" and self.checkpoint is not None:
            raise ValueError('finetune.pretraining_iteration "best" is one of this study\'s own checkpoints, and '
                             "finetune.checkpoint names another file; give one of the two")
        if self.transfer_from is not None and (self.checkpoint is not None or "ddpm" not in self.backbones):
            raise ValueError('finetune.transfer_from compares another study\'s DDPM with this one\'s own: it needs '
                             '"ddpm" in finetune.backbones, and no finetune.checkpoint')
        repeated = [entry for entry in self.losses if self.losses.count(entry) > 1]
        if repeated:
            raise ValueError(f"finetune.losses holds the same settings twice: {repeated[0].model_dump_json()}")
        if isinstance(self.validation, int) and self.validation < 1:
            raise ValueError('finetune.validation must be "official", "none" or a number of at least 1')
        if isinstance(self.validation, int) and self.validation >= min(self.shots):
            raise ValueError(f"finetune.validation {self.validation} leaves no training image at {min(self.shots)} "
                             "shots")
        return self


def fill_in_losses(values: dict[str, Any]) -> dict[str, Any]:
    """The plain values of a whole config, with what `finetune` says itself below each entry of finetune.losses."""
    finetune = values.get("finetune")
    losses = finetune.get("losses") if isinstance(finetune, dict) else None
    if not isinstance(losses, list) or not all(isinstance(entry, dict) for entry in losses):
        return values  # nothing to do, or refused by the models
    own = {key: finetune[key] for key in LossSettings.model_fields if key in finetune}
    return {**values, "finetune": {**finetune, "losses": [{**own, **entry} for entry in losses]}}


BACKBONES = {"ddpm": "unet", "scratch": "unet", "imagenet": "encoder_unet", "random": "encoder_unet",
             **dict.fromkeys(SSL_METHODS, "encoder_unet")}  # start: network
ENCODER_LEVELS = 6  # sizes of an encoder's feature maps, the image's own included
