"""The config's `ssl` section: self-supervised pre-training of encoders, with the presets "tuned" and "paper"."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from core.config.section import Count, Degrees, Index, NormClip, Rate, Section, Share

SSL_METHODS = ("mocov3", "simclrv2", "dino")


class Views(Section):
    """How a view is made of an image; lists are of the first and the second view, further views are as the first."""

    crop_area: tuple[Share, Share] = Field((0.3, 1.0), description="smallest and largest share of the image's area")
    flip: Share = Field(0.0, description="probability; off for X-rays, whose left and right differ")
    rotation_degrees: Degrees = Field(10.0, description="largest angle, either way")
    jitter: Share = Field(0.8, description="probability of another brightness and contrast")
    jitter_strength: float = Field(0.4, ge=0, lt=1)
    blur: tuple[Share, Share] = Field((0.5, 0.5), description="probabilities; sigma 0.1 to 2 of 224 pixels")
    solarise: tuple[Share, Share] = Field((0.0, 0.0), description="probabilities")

    @model_validator(mode="after")
    def _crop_is_a_range(self) -> Views:
        if not 0 < self.crop_area[0] <= self.crop_area[1]:
            raise ValueError(f"ssl views: crop_area {list(self.crop_area)} must be two shares, 0 < low <= high <= 1")
        return self


class MoCoV3(Section):
    """Momentum contrast without a queue (Chen et al., ICCV 2021)."""

    temperature: float = Field(1.0, gt=0)
    scaled_loss: bool = Field(True, description="times twice the temperature (their algorithm 1)")
    momentum: float = Field(0.99, ge=0, lt=1, description="of the momentum encoder")
    momentum_schedule: Literal["constant", "cosine"] = Field("cosine", description="cosine: rising to 1")
    hidden: Count = 2048
    out: Count = 256
    views: Views = Views()


class SimCLRv2(Section):
    """Contrast of the two views of each image within the batch, a projector of three layers (Chen et al., 2020)."""

    temperature: float = Field(0.5, gt=0)
    hidden: Count = 2048
    out: Count = 128
    views: Views = Views()


class DINO(Section):
    """Self-distillation without labels (Caron et al., ICCV 2021)."""

    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: float = Field(0.07, gt=0, description="below the student's, or the outputs become alike")
    teacher_warmup_temperature: float = Field(0.04, gt=0, description="where the teacher's temperature starts")
    teacher_warmup: Share = Field(0.1, description="share of the iterations over which it rises")
    momentum: float = Field(0.996, ge=0, lt=1, description="of the teacher")
    momentum_schedule: Literal["constant", "cosine"] = Field("cosine", description="cosine: rising to 1")
    centre_momentum: float = Field(0.9, ge=0, lt=1)
    freeze_last_layer: Index = Field(100, description="iterations in which the last layer stays as it is")
    head_norm: bool = Field(True, description="batch normalisation in the head, as for convolutional encoders")
    hidden: Count = 2048
    bottleneck: Count = 256
    out: Count = Field(4096, description="prototypes; 65536 for ImageNet's million images")
    local_crops: Index = 6
    local_size: float = Field(3 / 7, gt=0, le=1, description="side of a local view, of the image's")
    local_area: tuple[Share, Share] = Field((0.05, 0.3), description="share of the image's area in a local view")
    views: Views = Views()

    @model_validator(mode="after")
    def _local_is_a_range(self) -> DINO:
        if not 0 < self.local_area[0] <= self.local_area[1]:
            raise ValueError(f"ssl.dino.local_area {list(self.local_area)} must be two shares, 0 < low <= high <= 1")
        return self


PAPER_VIEWS = {"flip": 0.5, "rotation_degrees": 0.0}
PRESETS: dict[str, dict[str, Any]] = {  # what differs from the defaults
    "tuned": {},
    "paper": {  # as released with the WACV 2025 paper, but that every image gets crops of its own
        "batch_size": 4, "accumulation": 8, "learning_rate": 1e-4, "scheduler": "constant", "warmup_iterations": 0,
        "clip": {"mode": "none"},
        "mocov3": {"temperature": 0.5, "scaled_loss": False, "momentum": 0.999, "momentum_schedule": "constant",
                   "views": {**PAPER_VIEWS, "crop_area": [0.08, 1.0], "blur": [1.0, 0.1], "solarise": [0.0, 0.2]}},
        "simclrv2": {"views": {**PAPER_VIEWS, "crop_area": [0.2, 1.0], "blur": [0.5, 0.5]}},
        "dino": {"teacher_temperature": 0.5, "teacher_warmup_temperature": 0.5, "centre_momentum": 0.5, "out": 256,
                 "momentum_schedule": "constant", "freeze_last_layer": 0, "head_norm": False, "local_area": [0.05, 0.4],
                 "views": {**PAPER_VIEWS, "crop_area": [0.04, 1.0], "blur": [1.0, 0.1], "solarise": [0.0, 0.2]}},
    },
}


class SSL(Section):
    """Self-supervised pre-training of finetune.encoder on the unlabelled images, 2D; for each method of backbones."""

    preset: Literal["tuned", "paper"] = Field("tuned", description="what the other keys are where none is given")
    iterations: Count = Field(10000, description="optimiser steps")
    learning_rate: Rate = 5e-4
    weight_decay: float = Field(0.01, ge=0)
    scheduler: Literal["cosine", "constant"] = "cosine"
    warmup_iterations: Index = 100
    batch_size: int = Field(64, gt=1, description="images; a batch is all that contrastive losses compare with")
    accumulation: Count = Field(1, description="micro-batches a step; they add no negatives")
    clip: NormClip = NormClip(limit=3.0)
    workers: Index | None = Field(None, description="processes that make views; null: by device, 0: none of their own")
    log_every: Count = 20
    validate_every: Count = Field(500, description="steps between looks for collapse")
    save_every: Count = 500
    mocov3: MoCoV3 = MoCoV3()
    simclrv2: SimCLRv2 = SimCLRv2()
    dino: DINO = DINO()


def fill_in_preset(values: dict[str, Any]) -> dict[str, Any]:
    """The plain values of a whole config, with what ssl.preset says below those given in its `ssl` section."""
    ssl = values.get("ssl")
    if not isinstance(ssl, dict):
        return values  # nothing to do, or refused by the models
    return {**values, "ssl": merge(PRESETS.get(str(ssl.get("preset")), {}), ssl)}


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `top` over it, section by section."""
    both = base.keys() & top.keys()
    nested = {k: merge(base[k], top[k]) for k in both if isinstance(base[k], dict) and isinstance(top[k], dict)}
    return {**base, **top, **nested}
