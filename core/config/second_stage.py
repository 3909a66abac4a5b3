"""The config of the second stage of a study that refines: its own data, pre-training and detectors, on crops."""

from __future__ import annotations

from typing import Any

from core.config.config import Config
from core.config.earlier_systems import GlobalToLocal
from core.config.recipes import PLAIN
from core.config.refine import Refine
from core.config.self_training import SelfTraining
from core.config.starts import HEATMAP_STARTS

FOLDER = "fine"  # below the experiment for the pre-training on crops, below a run for its second detector


def second_stage(config: Config, labels: int = 0, answered: int = 0) -> Config:
    """`config` as the second stage has it: crops of finetune.refine.crop out of images zoomed by finetune.refine.zoom.

    Its experiment is the folder "fine" below the study's; target and steps are those for so many labelled and
    answered images, which only training asks for. ValueError where the study has one stage.
    """
    refine, dataset, experiment = config.finetune.refine, config.dataset, config.experiment
    if refine.zoom is None:
        raise ValueError("finetune.refine.zoom is null: there is no second stage")
    crop = (refine.crop,) * len(dataset.image_size)
    if dataset.resample_mm is None:
        canvas = tuple(max(round(length * refine.zoom), refine.crop) for length in dataset.whole_size)
        grid: dict[str, Any] = {"canvas_size": canvas}
    else:
        grid = {"resample_mm": dataset.resample_mm / refine.zoom}
    levels = [refine.crop // 2**level for level in range(len(config.unet.channel_multipliers))]
    attention = tuple(size for size in config.unet.full_attention_sizes if size in levels)
    finetune = config.finetune.model_copy(update={
        "refine": Refine(), "self_training": _without_rounds(config), "checkpoint": None, "losses": (),
        "loss": "cross_entropy_pixels", "target": "gaussian", "sigma": refine.sigma_of(labels),
        "decoder": "local_expectation", "shape_prior": None, "iterations": refine.iterations_of(labels + answered),
        "epochs": None, "batch_size": refine.batch_size, "accumulation": 1,
        "gu2net": config.finetune.gu2net.model_copy(update={"together": ()}), "augmentation": refine.augmentation})
    return config.model_copy(update={
        "experiment": experiment.model_copy(update={"output_dir": str(config.experiment_dir), "name": FOLDER}),
        "dataset": dataset.model_copy(update={"image_size": crop, **grid}),
        "unet": config.unet.model_copy(update={"full_attention_sizes": attention}), "finetune": finetune})


def local_step(config: Config) -> Config:
    """`config` as the second step of global-to-local localisation has it: windows, and one small network a landmark.

    ValueError where the study has the first step alone.
    """
    own = config.finetune.global_to_local
    local, dataset, experiment = own.local, config.dataset, config.experiment
    if not local.iterations:
        raise ValueError("finetune.global_to_local.local.iterations is 0: there is no second step")
    window = (local.window,) * len(dataset.image_size)
    if local.window_mm is not None:
        grid: dict[str, Any] = {"resample_mm": local.window_mm / local.window, "canvas_size": None}
    elif dataset.resample_mm is not None:
        grid = {"resample_mm": dataset.resample_mm / local.zoom}
    else:
        grid = {"canvas_size": tuple(max(round(length * local.zoom), local.window) for length in dataset.whole_size)}
    changes: dict[str, Any] = {
        "refine": Refine(), "self_training": _without_rounds(config), "losses": (), "iterations": local.iterations,
        "epochs": None, "batch_size": local.batch_size, "accumulation": 1, "augmentation": local.augmentation,
        "global_to_local": GlobalToLocal(channels=own.channels, local=local.model_copy(update={"iterations": 0}))}
    if own.preset == "released":
        changes |= {**PLAIN, "optimizer": "amsgrad", "weight_decay": 0.0, "scheduler": "restarts",
                    "cycle_iterations": local.cycle_iterations}
    return config.model_copy(update={
        "experiment": experiment.model_copy(update={"output_dir": str(config.experiment_dir), "name": FOLDER}),
        "dataset": dataset.model_copy(update={"image_size": window, **grid}),
        "finetune": config.finetune.model_copy(update=changes)})


def _without_rounds(config: Config) -> SelfTraining:
    """What answers weigh in the second stage: as in the first; its rounds are those of the whole run."""
    return config.finetune.self_training.model_copy(update={"rounds": 0, "matching": 0})


def second_of(config: Config, backbone: str, labels: int = 0, answered: int = 0) -> Config | None:
    """The config of the second stage of a run of `backbone` with so many images, None where it has one stage."""
    finetune = config.finetune
    if backbone in HEATMAP_STARTS:
        return None if finetune.refine.zoom is None else second_stage(config, labels, answered)
    return local_step(config) if finetune.global_to_local.local.iterations else None
