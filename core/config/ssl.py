"""The config's `ssl` section: self-supervised pre-training of encoders, with the presets "tuned" and "paper"."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from core.config.section import FREE, Count, Degrees, Fraction, Index, NormClip, Rate, Section, Share, setting, unless


class Views(Section):
    """How a view is made of an image; lists are of the first and the second view, further views are as the first."""

    crop_area: tuple[Share, Share] = setting((0.3, 1.0), "smallest and largest share of the image's area in a view")
    flip: Share = setting(0.0, "probability of a mirrored view; off for X-rays, whose left and right differ")
    rotation_degrees: Degrees = setting(10.0, "largest angle, either way")
    jitter: Share = setting(0.8, "probability of another brightness and contrast",
                            acts=[unless("jitter_strength", 0)])
    jitter_strength: Fraction = setting(0.4, "largest relative change of brightness and contrast",
                                        acts=[unless("jitter", 0)])
    blur: tuple[Share, Share] = setting((0.5, 0.5), "probabilities of a blur; sigma 0.1 to 2 of 224 pixels")
    solarise: tuple[Share, Share] = setting((0.0, 0.0), "probabilities that pixels above the middle are inverted")

    @model_validator(mode="after")
    def _crop_is_a_range(self) -> Views:
        if not 0 < self.crop_area[0] <= self.crop_area[1]:
            raise ValueError(f"ssl views: crop_area {list(self.crop_area)} must be two shares, 0 < low <= high <= 1")
        return self


class MoCoV3(Section):
    """Momentum contrast without a queue (Chen et al., ICCV 2021)."""

    temperature: Rate = setting(1.0, "divides the similarities of views")
    scaled_loss: bool = setting(True, "the loss times twice the temperature (their algorithm 1)")
    momentum: Fraction = setting(0.99, "decay of the momentum encoder, each step")
    momentum_schedule: Literal["constant", "cosine"] = setting("cosine", "cosine: the momentum rises to 1")
    hidden: Count = setting(2048, "width of the projector's hidden layers")
    out: Count = setting(256, "width of the projector's output")
    views: Views = setting(Views(), "how views are made")


class SimCLRv2(Section):
    """Contrast of the two views of each image within the batch, a projector of three layers (Chen et al., 2020)."""

    temperature: Rate = setting(0.5, "divides the similarities of views")
    hidden: Count = setting(2048, "width of the projector's hidden layers")
    out: Count = setting(128, "width of the projector's output")
    views: Views = setting(Views(), "how views are made")


class DINO(Section):
    """Self-distillation without labels (Caron et al., ICCV 2021)."""

    student_temperature: Rate = setting(0.1, "divides the student's outputs before their softmax")
    teacher_temperature: Rate = setting(0.07, "the same of the teacher; below the student's, or the outputs become "
                                        "alike")
    teacher_warmup_temperature: Rate = setting(0.04, "where the teacher's temperature starts",
                                               acts=[unless("teacher_warmup", 0)])
    teacher_warmup: Share = setting(0.1, "share of the iterations over which it rises")
    momentum: Fraction = setting(0.996, "decay of the teacher, each step")
    momentum_schedule: Literal["constant", "cosine"] = setting("cosine", "cosine: the momentum rises to 1")
    centre_momentum: Fraction = setting(0.9, "decay of the outputs' centre, each step")
    freeze_last_layer: Index = setting(100, "iterations in which the last layer stays as it is")
    head_norm: bool = setting(True, "batch normalisation in the head, as for convolutional encoders")
    hidden: Count = setting(2048, "width of the head's hidden layers")
    bottleneck: Count = setting(256, "width of the head's last layer but one")
    out: Count = setting(4096, "prototypes; 65536 for ImageNet's million images")
    local_crops: Index = setting(6, "local views of an image beside its two global ones")
    local_size: float = setting(3 / 7, "side of a local view as a share of the image's", gt=0, le=1,
                                acts=[unless("local_crops", 0)])
    local_area: tuple[Share, Share] = setting((0.05, 0.3), "smallest and largest share of the image's area in a local "
                                              "view", acts=[unless("local_crops", 0)])
    views: Views = setting(Views(), "how views are made")

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

    preset: Literal["tuned", "paper"] = setting("tuned", "what the other keys are where none is given")
    iterations: Count = setting(10000, "optimiser steps")
    learning_rate: Rate = setting(5e-4, "AdamW's peak learning rate")
    weight_decay: float = setting(0.01, "AdamW's weight decay")
    scheduler: Literal["cosine", "constant"] = setting("cosine", "cosine: the learning rate falls to 0")
    warmup_iterations: Index = setting(100, "steps over which the learning rate rises to its peak")
    batch_size: int = setting(64, "images; a batch is all that contrastive losses compare with", gt=1)
    accumulation: Count = setting(1, "micro-batches of an optimiser step; they add no negatives")
    clip: NormClip = setting(NormClip(limit=3.0), "gradient clipping")
    workers: Index | None = setting(None, "processes that make views; null: by device, 0: none of their own",
                                    counts_for=FREE)
    log_every: Count = setting(20, "steps between lines of the log", counts_for=FREE)
    validate_every: Count = setting(500, "steps between looks for collapse", counts_for=FREE)
    save_every: Count = setting(500, "steps between saved states, from which a run can be continued", counts_for=FREE)
    mocov3: MoCoV3 = setting(MoCoV3(), "momentum contrast", backbones=("mocov3",))
    simclrv2: SimCLRv2 = setting(SimCLRv2(), "contrast within the batch", backbones=("simclrv2",))
    dino: DINO = setting(DINO(), "self-distillation", backbones=("dino",))


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
