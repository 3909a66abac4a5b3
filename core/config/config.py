"""The models of the config file: every key with its type, default, meaning and limits; strict and frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import model_validator

from core.config.dataset import Dataset, check_divisible
from core.config.ddpm import DDPM
from core.config.evaluation import Evaluation, Report
from core.config.experiment import Experiment
from core.config.finetune import Finetune
from core.config.section import Section, setting
from core.config.slurm import Slurm
from core.config.ssl import SSL
from core.config.starts import BACKBONES, ENCODER_LEVELS, ENCODER_STARTS, HEATMAP_STARTS, UNET_STARTS
from core.config.unet import UNet


class Config(Section):
    """The whole file."""

    schema_: str | None = setting(None, "the JSON Schema that editors complete and check with", alias="$schema")
    is_3d: bool = setting(False, "volumes, in place of images; dataset.image_size has three numbers then")
    experiment: Experiment = setting(Experiment(), "what the study is called, where it goes and what it runs on")
    dataset: Dataset = setting(Dataset(), "where images and landmarks come from and how they become tensors",
                               counts_for=("pretraining", "ssl", "training"))
    unet: UNet = setting(UNet(), "the diffusion network", counts_for=("pretraining", "training"), backbones=UNET_STARTS,
                         may_wait=True)
    ddpm: DDPM = setting(DDPM(), "denoising diffusion pre-training", counts_for=("pretraining",), may_wait=True)
    ssl: SSL = setting(SSL(), "self-supervised pre-training of encoders", counts_for=("ssl",), may_wait=True)
    finetune: Finetune = setting(Finetune(), "training of the detectors", counts_for=("training",),
                                 backbones=tuple(BACKBONES))
    evaluation: Evaluation = setting(Evaluation(), "how predictions are scored")
    report: Report = setting(Report(), "the HTML page")
    slurm: Slurm = setting(Slurm(), "what a study asks of a cluster")
    run: dict[str, Any] | None = setting(None, "written by the program into a run's config.json")
    environment: dict[str, Any] | None = setting(None, "written by the program into a run's config.json")

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
                             "local_expectation, window_mass or quadratic")
        levels = len(self.unet.channel_multipliers)
        check_divisible(self.dataset.image_size, levels)
        if self.finetune.refine.zoom is not None:
            check_divisible((self.finetune.refine.crop,), levels, key="finetune.refine.crop")
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
        if self.evaluation.folds is not None and self.finetune.selection == "coverage":
            raise ValueError('finetune.selection "coverage" chooses one set of images, and evaluation.folds trains on '
                             "others for each fold; cross-validate with selection random or first")
        for backbone in self.finetune.backbones:
            self.check_backbone(backbone)
        return self

    def check_backbone(self, backbone: str) -> None:
        """ValueError in one line where a detector cannot start from `backbone` under this config."""
        if backbone not in BACKBONES:
            raise ValueError(f'backbone "{backbone}" is unknown; choose from {", ".join(BACKBONES)}')
        local = self.finetune.global_to_local.local
        if backbone not in HEATMAP_STARTS and local.window_mm and self.dataset.layout not in ("folder", "cephalo"):
            raise ValueError('finetune.global_to_local.local.window_mm needs images in mm: layout "folder" or '
                             f'"cephalo", not "{self.dataset.layout}"; set it to null, and zoom instead')
        if backbone not in ENCODER_STARTS:
            return
        if self.is_3d:
            others = ", ".join(name for name in BACKBONES if name not in ENCODER_STARTS)
            raise ValueError(f'backbone "{backbone}" is a 2D baseline; with is_3d choose from {others}')
        check_divisible(self.dataset.image_size, ENCODER_LEVELS, f"{backbone}'s encoder's ")
        if self.finetune.refine.zoom is not None:
            check_divisible((self.finetune.refine.crop,), ENCODER_LEVELS, f"{backbone}'s encoder's ",
                            "finetune.refine.crop")

    @property
    def experiment_dir(self) -> Path:
        """runs/<experiment>."""
        return Path(self.experiment.output_dir) / self.experiment.name

    def plain(self) -> dict[str, Any]:
        """The config as JSON types, ready for a file."""
        return self.model_dump(mode="json", exclude={"schema_", "run", "environment"})


