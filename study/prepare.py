"""Whether a study can run from end to end, before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from core.config.config import Config
from core.runs.cells import cells, needs_pretraining, require_backbone, ssl_methods
from core.runs.identity import check_cell, check_pretraining, check_ssl
from core.runs.places import is_scored
from study.plan import Run, print_plan, studies, study_runs

if TYPE_CHECKING:
    from core.data.records import DataSource


def check_shots(config: Config, source: DataSource) -> None:
    """Fail now, not after pre-training, when a cell asks for labels or splits that are not there."""
    from core.data.shots import select_shots

    for shots in config.finetune.shots:
        select_shots(source.require("train"), shots, 0, "first")
    source.require(config.evaluation.split)
    if config.finetune.validation == "official":
        source.require("validation")


def check_done(config: Config, stages: tuple[str, ...]) -> None:
    """Fail now when a run that is there was made with other settings: it would neither be used nor be done again."""
    if {"pretrain", "finetune"} & set(stages) and needs_pretraining(config):
        check_pretraining(config)
    for method in ssl_methods(config) if {"ssl", "finetune"} & set(stages) else ():
        check_ssl(config, method)
    for study in studies(config, stages):
        for cell in cells(study):
            check_cell(study, cell)


def check_start_weights(config: Config, to_come: Sequence[str]) -> None:
    """Fail now, not after pre-training, when an encoder that cells start from cannot be had or does not fit.

    The encoders of the backbones in `to_come` are made by this very study.
    """
    from landmarks_finetuning.detectors.encoder_unet import start_encoder_unet
    from landmarks_finetuning.starts import START_WEIGHTS

    for backbone in START_WEIGHTS:
        waiting = any(cell.backbone == backbone and not is_scored(config, cell) for cell in cells(config))
        if waiting and backbone not in to_come:
            start_encoder_unet(config, backbone, channels=1, landmarks=1)


def prepare(config: Config, stages: tuple[str, ...]) -> list[Run]:
    """Check that the study can run from end to end, print its plan and return its runs.

    Where all of them are done, neither the data nor the modules that would read them are touched.
    """
    source, runs = None, study_runs(config, stages)
    if not all(run.done for run in runs):
        from core.data.source import load_source

        if "encoders" in stages:
            require_backbone(config, "imagenet")
        source = load_source(config.dataset)
        if studies(config, stages):
            check_shots(config, source)
    check_done(config, stages)
    if source is not None:
        for study in studies(config, stages):
            check_start_weights(study, ssl_methods(config) if "ssl" in stages else ())
    print_plan(config, stages, source)
    return runs
