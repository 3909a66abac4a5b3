"""The config's `finetune` section: what is compared, how landmarks become heatmaps and back, and how it is trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from core.config.earlier_systems import TUNED, GlobalToLocal, GU2Net
from core.config.refine import Refine
from core.config.section import (
    FREE,
    Augmentation,
    Clip,
    Count,
    Degrees,
    Fraction,
    Index,
    Rate,
    Section,
    Share,
    only,
    setting,
    unless,
    with_default,
)
from core.config.self_training import SelfTraining
from core.config.starts import BACKBONES, ENCODER_STARTS, HEATMAP_STARTS, MEAN_SHAPE, SOFTMAX_STARTS

OWN_PRETRAINING = "null = this study's own pre-training"


class StrongAugmentation(Augmentation):
    """What few labels want, by measurement (docs/results.md)."""

    probability: Share = with_default(Augmentation, "probability", 1.0)
    rotation_degrees: Degrees | tuple[Degrees, Degrees, Degrees] = with_default(Augmentation, "rotation_degrees", 10.0)
    scale: Fraction = with_default(Augmentation, "scale", 0.1)
    translation: Fraction = with_default(Augmentation, "translation", 0.05)
    intensity: Fraction = with_default(Augmentation, "intensity", 0.3)


class LearningRates(Section):
    """The peak learning rate of each start."""

    ddpm: Rate = setting(1e-3, "from the diffusion pre-training", backbones=("ddpm",))
    scratch: Rate = setting(1e-3, "of the same network from random weights", backbones=("scratch",))
    imagenet: Rate = setting(1e-4, "of an encoder from ImageNet weights", backbones=("imagenet",))
    random: Rate = setting(1e-3, "of an encoder from random weights", backbones=("random",))
    mocov3: Rate = setting(1e-3, "of an encoder from MoCo v3", backbones=("mocov3",))
    simclrv2: Rate = setting(1e-3, "of an encoder from SimCLR v2", backbones=("simclrv2",))
    dino: Rate = setting(1e-3, "of an encoder from DINO", backbones=("dino",))
    gu2net: Rate = setting(1e-3, "of GU2Net, from random weights", backbones=("gu2net",), acts=[TUNED])
    global_to_local: Rate = setting(1e-3, "of both steps of global-to-local localisation, from random weights",
                                    backbones=("global_to_local",))


class EncoderWeights(Section):
    """A file for each start that has one: a state dict by torchvision's names, or one of our encoders."""

    imagenet: str | None = setting(None, "a file, or a folder of torchvision's files; null = fetched",
                                   backbones=("imagenet",))
    mocov3: str | None = setting(None, f"a file; {OWN_PRETRAINING}", backbones=("mocov3",))
    simclrv2: str | None = setting(None, f"a file; {OWN_PRETRAINING}", backbones=("simclrv2",))
    dino: str | None = setting(None, f"a file; {OWN_PRETRAINING}", backbones=("dino",))


class LossSettings(Section):
    """How landmarks become heatmaps, what the network is trained on, and how heatmaps become landmarks again."""

    loss: Literal["cross_entropy_pixels", "cross_entropy_channels"] = setting(
        "cross_entropy_pixels", "softmax over the pixels of each heatmap (the paper's text), or over the landmarks at "
        "each pixel (the published code)", backbones=SOFTMAX_STARTS, slug="loss")
    target: Literal["disk", "gaussian", "pixel"] = setting(
        "gaussian", "heatmap of a label: a Gaussian, the disk where it is above half its maximum, or the one pixel",
        backbones=HEATMAP_STARTS, slug="target")
    sigma: float = setting(2.5, "width of the Gaussian in pixels of a 256-pixel image, scaled with dataset.image_size; "
                           "with dataset.resample_mm or canvas_size in those pixels, whatever the size of the crop. It "
                           "is also the measure of the decoder's and the confidence's windows, whatever the target",
                           backbones=HEATMAP_STARTS, slug="sigma", gt=0)
    decoder: Literal["component_centroid", "contour_centroid", "argmax", "local_expectation", "window_mass",
                     "quadratic"] = setting(
        "local_expectation", "the landmark in a heatmap: centroid of the largest part above half the maximum, the same "
        "as the published code does it, the maximum, the mean around the maximum, the mean in the window of most "
        "mass, or the top of a parabola through the log map about the maximum", counts_for=("scoring",),
        backbones=HEATMAP_STARTS, slug="decoder")
    shape_prior: float | None = setting(
        0.2, "how far a landmark may lie from where the others' common shape puts it, of the shape's size (standard "
        "deviation); null = each landmark by itself", counts_for=("scoring",), backbones=HEATMAP_STARTS, slug="prior",
        null_slug="off", gt=0, acts=[unless("decoder", "contour_centroid")])

    @model_validator(mode="after")
    def _loss_fits(self) -> LossSettings:
        if self.decoder == "window_mass" and self.loss != "cross_entropy_pixels":
            raise ValueError('finetune.decoder "window_mass" needs finetune.loss "cross_entropy_pixels"')
        if self.shape_prior is not None and self.loss != "cross_entropy_pixels":
            raise ValueError('finetune.shape_prior needs finetune.loss "cross_entropy_pixels"; set it to null')
        return self


class Finetune(LossSettings):
    """Supervised training of the detector on a few labelled images. A variant's name has its parts in this order."""

    backbones: tuple[Literal["ddpm", "scratch", "imagenet", "random", "mocov3", "simclrv2", "dino", "gu2net",
                             "global_to_local"], ...] = setting(
        ("ddpm", "scratch"), "starts to compare: the diffusion pre-training, its network from random weights, (2D) "
        "a U-Net around finetune.encoder from ImageNet, from random weights or from self-supervision, and two earlier "
        "systems from random weights", counts_for=FREE)
    shots: tuple[Count, ...] = setting((1, 5, 10, 25, 50), "numbers of labelled training images to compare",
                                       counts_for=FREE, min_length=1)
    draws: tuple[Index, ...] = setting((0, 1, 2), "which labelled images: each number draws others; with selection "
                                       "first or coverage only one is run", counts_for=FREE, min_length=1)
    seeds: tuple[Index, ...] = setting((0,), "initialisations and orders of the images, each a run", counts_for=FREE,
                                       min_length=1)
    losses: tuple[LossSettings, ...] = setting(
        (), "settings to compare, each run in place of loss, target, sigma, decoder and shape_prior above; what one "
        "does not say is as above ({}: all of it); none = those above alone", counts_for=FREE)
    transfer_from: str | None = setting(
        None, "the folder of another study, runs/<experiment>: ddpm is also run from its DDPM (table 5)",
        counts_for=FREE)
    timestep: Index | None = setting(None, "the network's timestep: null = no timestep embedding (the paper), or a "
                                     "fixed one", backbones=("ddpm",), slug="t")
    pretraining_iteration: Literal["best"] | int | None = setting(
        None, "which EMA checkpoint; null = the last one; best: each is fine-tuned, and the report shows the one with "
        "the lowest validation error at each number of shots", backbones=("ddpm",), slug="iter",
        acts=[only("checkpoint", None)])
    checkpoint: str | None = setting(None, "a weights file instead: ours (.safetensors) or published (.pt)",
                                     backbones=("ddpm",), slug="from", is_file=True)
    encoder: Literal["densenet161", "vgg19", "resnext50_32x4d", "resnet50"] = setting(
        "densenet161", "network of imagenet, random and the self-supervised starts", counts_for=("ssl", "training"),
        backbones=ENCODER_STARTS, slug="encoder")
    encoder_weights: EncoderWeights = setting(EncoderWeights(), "files that encoders start from", slug="weights",
                                              is_file=True)
    iterations: Count | None = setting(400, "optimiser steps; null where epochs are given", slug="steps")
    epochs: Count | None = setting(None, "passes through the training images; null where iterations are given",
                                   slug="epochs")
    learning_rate: LearningRates = setting(LearningRates(), "peak learning rates", slug="lr", may_wait=True)
    validation: Literal["official", "none"] | int = setting(
        "official", "official: all validation labels, none where the data set holds none back; N: held out of the "
        "shots; none: fixed schedule",
        backbones=(MEAN_SHAPE, *BACKBONES), slug="val")
    selection: Literal["first", "random", "coverage"] = setting(
        "random", "first k images (the paper), a seeded draw, or those whose diffusion features cover the images of "
        "the pre-training best", backbones=(MEAN_SHAPE, *BACKBONES), slug="pick")
    shape_modes: Index = setting(
        0, "most ways in which the common shape may bend, those in which the labels differ most; fewer with few labels "
        "(one for two beside the first); 0 = moved, turned and scaled only", backbones=HEATMAP_STARTS, slug="modes",
        before=0,
        acts=[unless("shape_prior", None), unless("decoder", "contour_centroid")])
    ema_decay: Fraction | None = setting(None, "decay of a moving average of the weights, each step; null = none",
                                         slug="ema")
    batch_size: Count = setting(8, "images of a micro-batch", slug="batch")
    scheduler: Literal["plateau", "cosine", "constant", "cyclic", "restarts"] = setting(
        "cosine", "the learning rate: plateau = falls where the validation loss does not, cosine = falls to 0, cyclic "
        "= rises from a hundredth and falls back, half as high each time, restarts = cosine that starts over, twice as "
        "long each time", slug="schedule")
    cycle_iterations: Count = setting(2000, "steps of a rise, and of a fall; until the first restart",
                                      acts=[only("scheduler", "cyclic", "restarts")])
    plateau_factor: float = setting(0.5, "what the learning rate is multiplied by on a plateau", gt=0, lt=1,
                                    acts=[only("scheduler", "plateau")])
    plateau_patience: Index = setting(13, "validations without improvement that make a plateau",
                                      acts=[only("scheduler", "plateau")])
    warmup_iterations: Index = setting(0, "steps over which the learning rate rises to its peak")
    optimizer: Literal["adamw", "adam", "amsgrad"] = setting(
        "adamw", "adamw; adam and amsgrad = the decay is added to the gradient, not to the step", before="adamw")
    weight_decay: float = setting(0.01, "the optimiser's weight decay", ge=0)
    early_stop_patience: Count | None = setting(None, "validations without improvement that end the training; null = "
                                                "never")
    validate_every: Count | None = setting(None, "optimiser steps between validations; null = every epoch; it may stay "
                                           "where validation is none")
    accumulation: Count = setting(1, "micro-batches of an optimiser step")
    accumulation_reduction: Literal["mean", "sum"] = setting(
        "mean", "how the micro-batches' gradients are joined", acts=[unless("accumulation", 1)])
    sampling: Literal["stream", "epoch"] = setting(
        "stream", "stream: endless permutations; epoch: a step for the last partial group")
    clip: Clip = setting(Clip(), "gradient clipping")
    refine: Refine = setting(Refine(), "a second stage on finer crops around the first one's answers",
                             backbones=HEATMAP_STARTS)
    gu2net: GU2Net = setting(GU2Net(), "an earlier system: shared and own kernels, and a global branch",
                             backbones=("gu2net",))
    global_to_local: GlobalToLocal = setting(
        GlobalToLocal(), "an earlier system: displacements and presence of patches, then windows",
        backbones=("global_to_local",))
    self_training: SelfTraining = setting(
        SelfTraining(), "learning from the detector's own answers in unlabelled images")
    augmentation: StrongAugmentation = setting(StrongAugmentation(), "random changes of images and landmarks")
    log_every: Count = setting(10, "steps between lines of the log", counts_for=FREE)
    save_every: Count = setting(100, "steps between saved states, from which a run can be continued", counts_for=FREE)

    @model_validator(mode="after")
    def _budget_and_validation(self) -> Finetune:
        if (self.iterations is None) == (self.epochs is None):
            raise ValueError("finetune needs exactly one of iterations and epochs (set the other to null)")
        needs_validation = self.scheduler == "plateau" or self.early_stop_patience is not None
        if self.validation == "none" and needs_validation:
            raise ValueError('finetune.validation "none" needs a fixed schedule: scheduler cosine, constant, cyclic or '
                             "restarts, early_stop_patience null")
        if self.pretraining_iteration == "best" and self.validation == "none":
            raise ValueError('finetune.pretraining_iteration "best" is chosen by the validation error, and '
                             'finetune.validation is "none"; give an iteration, or validation labels')
        if self.pretraining_iteration == "best" and self.checkpoint is not None:
            raise ValueError('finetune.pretraining_iteration "best" is one of this study\'s own checkpoints, and '
                             "finetune.checkpoint names another file; give one of the two")
        if self.transfer_from is not None and (self.checkpoint is not None or "ddpm" not in self.backbones):
            raise ValueError('finetune.transfer_from compares another study\'s DDPM with this one\'s own: it needs '
                             '"ddpm" in finetune.backbones, and no finetune.checkpoint')
        if self.transfer_from is not None and self.selection == "coverage":
            raise ValueError('finetune.selection "coverage" chooses images by the features of one pre-training, and '
                             "finetune.transfer_from compares two; compare them with selection random")
        repeated = [entry for entry in self.losses if self.losses.count(entry) > 1]
        if repeated:
            raise ValueError(f"finetune.losses holds the same settings twice: {repeated[0].model_dump_json()}")
        if isinstance(self.validation, int) and self.validation < 1:
            raise ValueError('finetune.validation must be "official", "none" or a number of at least 1')
        if isinstance(self.validation, int) and self.validation >= min(self.shots):
            raise ValueError(f"finetune.validation {self.validation} leaves no training image at {min(self.shots)} "
                             "shots")
        return self

    def optimiser_steps(self, steps_per_epoch: int) -> int:
        """The budget: `iterations`, or `epochs` of so many steps (one of them is given)."""
        return self.iterations or (self.epochs or 0) * steps_per_epoch


def fill_in_losses(values: dict[str, Any]) -> dict[str, Any]:
    """The plain values of a whole config, with what `finetune` says itself below each entry of finetune.losses."""
    finetune = values.get("finetune")
    if not isinstance(finetune, dict):
        return values  # nothing to do, or refused by the models
    losses = finetune.get("losses")
    if not isinstance(losses, list) or not all(isinstance(entry, dict) for entry in losses):
        return values
    own = {key: finetune[key] for key in LossSettings.model_fields if key in finetune}
    return {**values, "finetune": {**finetune, "losses": [{**own, **entry} for entry in losses]}}
