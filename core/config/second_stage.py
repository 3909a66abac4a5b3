"""The config of the second stage of a study that refines: its own data, pre-training and detectors, on crops."""

from __future__ import annotations

from typing import Any

from core.config.config import Config
from core.config.refine import Refine
from core.config.self_training import SelfTraining

FOLDER = "fine"  # below the experiment for the pre-training on crops, below a run for its second detector


def second_stage(config: Config) -> Config:
    """`config` as the second stage has it: crops of finetune.refine.crop out of images zoomed by finetune.refine.zoom.

    Its experiment is the folder "fine" below the study's. ValueError where the study has one stage.
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
        "refine": Refine(), "self_training": SelfTraining(), "checkpoint": None, "losses": (),
        "loss": "cross_entropy_pixels", "target": "gaussian", "sigma": refine.sigma,
        "decoder": "local_expectation", "shape_prior": None, "iterations": refine.iterations, "epochs": None,
        "batch_size": refine.batch_size, "accumulation": 1, "augmentation": refine.augmentation})
    return config.model_copy(update={
        "experiment": experiment.model_copy(update={"output_dir": str(config.experiment_dir), "name": FOLDER}),
        "dataset": dataset.model_copy(update={"image_size": crop, **grid}),
        "unet": config.unet.model_copy(update={"full_attention_sizes": attention}), "finetune": finetune})
