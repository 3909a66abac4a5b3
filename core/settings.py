"""The models of the config file: every key with its type, default, meaning and limits; strict and frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from core.finetune_settings import Finetune
from core.section import Augmentation, Count, Index, NormClip, Section
from core.slurm_settings import Slurm
from core.ssl_settings import SSL, SSL_METHODS

BACKBONES = {"ddpm": "unet", "scratch": "unet", "imagenet": "encoder_unet", "random": "encoder_unet",
             **dict.fromkeys(SSL_METHODS, "encoder_unet")}  # start: network
ENCODER_LEVELS = 6  # sizes of an encoder's feature maps, the image's own included


class Experiment(Section):
    """What the study is called, where it goes and what it runs on."""

    name: str = Field("experiment", pattern=r"^[\w.-]+$", description="folder name below output_dir")
    output_dir: str = "runs"
    seed: Index = 0
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "bf16", "float32"] = Field("auto", description="auto = bf16 where native, else float32")
    sharding: Literal["none", "full"] = Field(
        "none", description="diffusion pre-training by several processes: full = each holds a share of the network")
    compile: bool = Field(False, description="torch.compile the network's training step")
    cuda_graphs: bool = Field(True, description="on a GPU: replay training steps of one shape as one launch")
    activation_checkpointing: bool = Field(
        False, description="diffusion U-Net: recompute activations going back: less memory for about a third more time")


class PhantomData(Section):
    """Synthetic radiographs or volumes written to dataset.root when it does not exist yet."""

    count: int = Field(210, gt=0, description="radiographs: 150 for training and validation, the rest for testing")
    size: tuple[Count, ...] = Field((300, 242), min_length=2, max_length=3,
                                    description="height, width in pixels; depth, height, width for volumes")
    seed: int = 0

    @model_validator(mode="after")
    def _enough(self) -> PhantomData:
        least = 152 if len(self.size) == 2 else 10
        if self.count < least:
            raise ValueError(f"dataset.phantom.count must be at least {least}, so that every split has images")
        return self


class Dataset(Section):
    """Where images and landmarks come from and how they become tensors."""

    name: str = Field("dataset", pattern=r"^[\w.-]+$")
    layout: Literal["cephalo", "chest", "hand", "folder"] = "folder"
    root: str = "datasets/mine"
    description: str | None = Field(None, description="folder layout: a dataset.json in another place than root")
    image_size: tuple[int, ...] = Field((256, 256), description="height, width (3D: depth, height, width) of the "
                                        "network's input; a crop of this size where resample_mm is given")
    resample_mm: float | None = Field(None, gt=0, description="null: each image is resized to image_size; a number: "
                                      "isotropic pixels of so many mm, training on crops, predicting in windows")
    check_geometry: bool = Field(True, description="compare volumes' spacings and landmarks' orientation")
    unlabelled_dirs: tuple[str, ...] = ()
    exclude: tuple[str, ...] = Field((), description="image ids left out of every split")
    spacing_mm: float | None = Field(None, gt=0, description="overrides the layout's mm per pixel")
    cache_dir: str = "runs/cache"
    intensity: Literal["minmax", "percentile", "window"] = "minmax"
    percentiles: tuple[float, float] = (1.0, 99.0)
    window: tuple[float, float] | None = Field(None, description="low, high intensities mapped to 0..1")
    phantom: PhantomData | None = None

    @model_validator(mode="after")
    def _window_is_given(self) -> Dataset:
        if self.intensity == "window" and (self.window is None or self.window[0] >= self.window[1]):
            raise ValueError('dataset.intensity "window" needs dataset.window = [low, high] with low < high')
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError("dataset.percentiles must be two numbers, 0 <= low < high <= 100")
        if self.description is not None and self.layout != "folder":
            raise ValueError(f'dataset.description belongs to layout "folder", not "{self.layout}"')
        if self.resample_mm is not None and self.layout not in ("folder", "cephalo"):
            raise ValueError('dataset.resample_mm needs images in mm: layout "folder" or "cephalo", not '
                             f'"{self.layout}"')
        dims, made = len(self.image_size), None if self.phantom is None else len(self.phantom.size)
        if made not in (None, dims) or (made and self.layout != ("cephalo", "folder")[made - 2]):
            raise ValueError('dataset.phantom writes radiographs of two sizes in layout "cephalo" and volumes of three '
                             f'in layout "folder"; size {list(self.phantom.size)}, image_size {list(self.image_size)}, '
                             f'layout "{self.layout}"')
        return self


class UNet(Section):
    """The network; the defaults are the published weights' shape but for base_channels."""

    base_channels: int = Field(64, gt=0, multiple_of=4)
    channel_multipliers: tuple[Count, ...] = Field((1, 2, 4, 8), min_length=1)
    blocks_per_level: int = Field(2, gt=0)
    norm_groups: int = Field(4, gt=0)
    attention_heads: int = Field(4, gt=0)
    attention_head_channels: int = Field(32, gt=0)
    full_attention_sizes: tuple[int, ...] = Field(
        (), description="feature-map sizes with full attention in place of linear attention (middle is always full)"
    )
    linear_attention: bool = Field(True, description="linear attention on the other levels")
    input_slot: bool = Field(True, description="the published network's unused zero input channel (kept in files)")

    @model_validator(mode="after")
    def _groups_divide(self) -> UNet:
        if self.base_channels % self.norm_groups:
            raise ValueError(f"unet.norm_groups {self.norm_groups} must divide base_channels {self.base_channels}")
        return self


class DDPM(Section):
    """Denoising diffusion pre-training."""

    num_train_timesteps: int = Field(500, gt=1)
    min_timestep: int = Field(0, ge=0, description="smallest timestep drawn in training (the published code: 1)")
    schedule: Literal["linear", "cosine", "quadratic", "sigmoid"] = "linear"
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    loss: Literal["l1", "l2", "huber"] = "l2"
    iterations: int = Field(10000, gt=0, description="optimiser steps")
    checkpoint_iterations: tuple[int, ...] = (4000, 6000, 8000, 10000)
    learning_rate: float = Field(1e-4, gt=0)
    warmup_iterations: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    batch_size: int = Field(8, gt=0)
    accumulation: int = Field(1, gt=0)
    accumulation_reduction: Literal["mean", "sum"] = "mean"
    sampling: Literal["stream", "epoch"] = Field(
        "stream", description="stream: endless permutations; epoch: drop_last and a step for the last partial group"
    )
    clip: NormClip = NormClip()
    ema_decay: float = Field(0.995, ge=0, lt=1)
    augmentation: Augmentation = Augmentation()
    log_every: int = Field(20, gt=0)
    validate_every: int = Field(1000, gt=0)
    sample_every: int = Field(2000, gt=0)
    save_every: int = Field(500, gt=0)
    sampler: Literal["ddpm", "ddim"] = "ddim"
    sampling_steps: int = Field(50, gt=0, description="DDIM steps")
    sample_count: int = Field(8, gt=0)

    @model_validator(mode="after")
    def _iterations_fit(self) -> DDPM:
        late = [i for i in self.checkpoint_iterations if not 0 < i <= self.iterations]
        if late or not self.checkpoint_iterations:
            raise ValueError(f"ddpm.checkpoint_iterations {late} must lie in 1..ddpm.iterations ({self.iterations})")
        if self.min_timestep >= self.num_train_timesteps:
            raise ValueError("ddpm.min_timestep must be below ddpm.num_train_timesteps")
        if self.sampling_steps > self.num_train_timesteps:
            raise ValueError("ddpm.sampling_steps must not exceed ddpm.num_train_timesteps")
        return self


class Evaluation(Section):
    """How predictions are scored."""

    split: Literal["test", "validation"] = Field("test", description="choose settings on validation, test once")
    batch_size: int = Field(16, gt=0)
    leaked: Literal["keep", "drop"] = Field(
        "keep", description="images with a twin in train, validation or pre-training: drop = they are not scored")
    sdr_thresholds: tuple[float, ...] | None = Field(None, description="null = the data set's own")
    overlays: int = Field(12, ge=0, description="worst cases drawn in full")
    window_overlap: float = Field(0.5, ge=0, lt=1, description="share of a window that the next one covers again")


class Report(Section):
    """The HTML page."""

    title: str | None = None
    overlays: int = Field(4, ge=0, description="worst cases shown per run")


class Config(Section):
    """The whole file."""

    schema_: str | None = Field(None, alias="$schema")
    is_3d: bool = False
    experiment: Experiment = Experiment()
    dataset: Dataset = Dataset()
    unet: UNet = UNet()
    ddpm: DDPM = DDPM()
    ssl: SSL = SSL()
    finetune: Finetune = Finetune()
    evaluation: Evaluation = Evaluation()
    report: Report = Report()
    slurm: Slurm = Slurm()
    run: dict[str, Any] | None = Field(None, description="written by the program into a run's config.json")
    environment: dict[str, Any] | None = Field(None, description="written by the program into a run's config.json")

    @model_validator(mode="after")
    def _sizes_agree(self) -> Config:
        dims = 3 if self.is_3d else 2
        if len(self.dataset.image_size) != dims:
            raise ValueError(f"dataset.image_size needs {dims} numbers when is_3d is {str(self.is_3d).lower()} "
                             "(volumes: is_3d true and three numbers, images: false and two)")
        for stage in ("ddpm", "finetune"):
            angles = getattr(self, stage).augmentation.rotation_degrees
            if not self.is_3d and not isinstance(angles, float):
                raise ValueError(f"{stage}.augmentation.rotation_degrees must be one number when is_3d is false")
        if self.is_3d and self.dataset.layout != "folder":
            raise ValueError(f'dataset.layout "{self.dataset.layout}" holds radiographs; is_3d needs layout "folder"')
        decoders = {entry.decoder for entry in (self.finetune, *self.finetune.losses)}
        if self.is_3d and "contour_centroid" in decoders:
            raise ValueError('finetune.decoder "contour_centroid" is 2D only; choose component_centroid, argmax, '
                             "local_expectation or window_mass")
        levels = len(self.unet.channel_multipliers)
        check_divisible(self.dataset.image_size, levels)
        sizes = [self.dataset.image_size[0] // 2**level for level in range(levels)]
        strange = [n for n in self.unet.full_attention_sizes if n not in sizes]
        if strange:
            raise ValueError(f"unet.full_attention_sizes {strange} are no sizes of a level; those are {sizes}")
        fixed = self.finetune.timestep
        if fixed is not None and fixed >= self.ddpm.num_train_timesteps:
            raise ValueError(f"finetune.timestep {fixed} must be below ddpm.num_train_timesteps")
        iteration, kept = self.finetune.pretraining_iteration, self.ddpm.checkpoint_iterations
        if iteration not in (None, "best", *kept):
            raise ValueError(f"finetune.pretraining_iteration {iteration} is not one of ddpm.checkpoint_iterations "
                             f"{list(kept)}")
        other = self.finetune.transfer_from
        if other is not None and Path(other).resolve() == self.experiment_dir.resolve():
            raise ValueError(f"finetune.transfer_from {other} is this study's own folder; name another one")
        for backbone in self.finetune.backbones:
            self.check_backbone(backbone)
        return self

    def check_backbone(self, backbone: str) -> None:
        """ValueError in one line where a detector cannot start from `backbone` under this config."""
        if backbone not in BACKBONES:
            raise ValueError(f'backbone "{backbone}" is unknown; choose from {", ".join(BACKBONES)}')
        if BACKBONES[backbone] != "encoder_unet":
            return
        if self.is_3d:
            raise ValueError(f'backbone "{backbone}" is a 2D baseline; with is_3d choose from ddpm, scratch')
        check_divisible(self.dataset.image_size, ENCODER_LEVELS, f"{backbone}'s encoder's ")

    @property
    def experiment_dir(self) -> Path:
        """runs/<experiment>."""
        return Path(self.experiment.output_dir) / self.experiment.name

    def plain(self) -> dict[str, Any]:
        """The config as JSON types, ready for a file."""
        return self.model_dump(mode="json", exclude={"schema_", "run", "environment"})


def check_divisible(size: tuple[int, ...], levels: int, who: str = "") -> None:
    """Raise ValueError in one line, naming `who` and the nearest sizes, where the levels' halvings do not divide."""
    step = 2 ** (levels - 1)
    bad = next((n for n in size if n % step or n < step), None)
    if bad is not None:
        below = bad // step * step
        near = f"{below} or {below + step}" if below >= step else f"{step}"
        raise ValueError(f"dataset.image_size {list(size)}: {who}{levels} levels need multiples of {step}; "
                         f"nearest to {bad}: {near}")
