"""Run a whole study: pre-train, fine-tune every cell, score it, report. What is done is not done again."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from core.config import add_config_arguments, load_config
from core.dataset import load_source, select_shots
from core.encoders import START_WEIGHTS, start_encoder_unet
from core.errors import run_command
from core.leaks import find_leaks, leak_lines
from core.records import DataSource
from core.settings import Config
from core.study import (
    MEAN_SHAPE,
    Cell,
    cell_dir,
    cells,
    check_cell,
    check_pretraining,
    check_ssl,
    encoder_path,
    encoder_studies,
    is_pretrained,
    is_scored,
    ssl_methods,
)

STAGES = ("pretrain", "ssl", "finetune", "encoders", "report")
DEFAULT_STAGES = ("pretrain", "ssl", "finetune", "report")  # of `encoders` only those who ask have the weights
FUNCTIONS = {  # looked up by name: core imports no stage package
    "pretrain": "ddpm_pretraining.train:pretrain",
    "ssl": "ssl_baselines.train:pretrain_encoder",
    "finetune_cell": "landmarks_finetuning.train:finetune_cell",
    "evaluate": "landmarks_finetuning.evaluate:evaluate",
    "mean_shape": "landmarks_finetuning.evaluate:evaluate_mean_shape",
    "report": "landmarks_finetuning.report.build:build_report",
}


def function(name: str) -> Callable[..., Any]:
    """The registered stage function."""
    module, _, attribute = FUNCTIONS[name].partition(":")
    return getattr(import_module(module), attribute)


def needs_pretraining(config: Config) -> bool:
    """Whether the study's cells start from this study's own DDPM."""
    return "ddpm" in config.finetune.backbones and config.finetune.checkpoint is None


def studies(config: Config, stages: tuple[str, ...]) -> list[Config]:
    """The configs whose cells `stages` run: the study itself, and one for each encoder compared."""
    return ([config] if "finetune" in stages else []) + (encoder_studies(config) if "encoders" in stages else [])


def print_plan(config: Config, stages: tuple[str, ...], source: DataSource) -> None:
    """Stages, images per split and leaks, checkpoints found, runs done and left, optimiser steps to come."""
    ddpm = config.ddpm
    print(f"study {config.experiment.name} in {config.experiment_dir}; stages {' '.join(stages)}")
    counts = ", ".join(f"{len(records)} {name}" for name, records in source.splits.items())
    print(f"data  {config.dataset.name} ({source.layout}) at {source.root}: {counts}; {len(source.landmark_names)} "
          f"landmarks; {len(source.pretraining_records())} images for pre-training")
    for line in leak_lines(find_leaks(source, config.dataset)) if studies(config, stages) else ():
        print(line)
    steps = 0
    if "pretrain" in stages and needs_pretraining(config):
        found = sorted(path.name for path in (config.experiment_dir / "ddpm").glob("ema_iter*.safetensors"))
        done = is_pretrained(config)
        steps += 0 if done else ddpm.iterations
        print(f"pretrain  {'done' if done else f'{ddpm.iterations} steps'}; checkpoints found: "
              f"{', '.join(found) or 'none'}")
    for method in ssl_methods(config) if "ssl" in stages else ():
        done = encoder_path(config, method).is_file()
        steps += 0 if done else config.ssl.iterations
        print(f"ssl  {method}: {'done' if done else f'{config.ssl.iterations} steps'}")
    steps += sum(print_cells(study) for study in studies(config, stages))
    print(f"optimiser steps to come: {steps}")


def print_cells(config: Config) -> int:
    """The fine-tuning runs of a study that are left; returns their optimiser steps."""
    finetune, plan = config.finetune, cells(config)
    left = [cell for cell in plan if not is_scored(config, cell)]
    trained = [cell for cell in left if cell.backbone != MEAN_SHAPE]
    if finetune.iterations:
        total = finetune.iterations * len(trained)
    else:
        group = finetune.batch_size * finetune.accumulation
        total = sum(finetune.epochs * -(-cell.shots // group) for cell in trained)
    print(f"finetune  {len(plan)} runs, {len(plan) - len(left)} done, {len(left)} left ({total} steps at most)")
    for cell in left:
        print(f"    {cell.backbone:<11}{cell_dir(config, cell)}")
    return total


def check_shots(config: Config, source: DataSource) -> None:
    """Fail now, not after pre-training, when a cell asks for labels or splits that are not there."""
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
    for backbone in START_WEIGHTS:
        waiting = any(cell.backbone == backbone and not is_scored(config, cell) for cell in cells(config))
        if waiting and backbone not in to_come:
            start_encoder_unet(config, backbone, channels=1, landmarks=1)


def prepare(config: Config, stages: tuple[str, ...]) -> None:
    """Check that the study can run from end to end, and print its plan."""
    if "encoders" in stages:
        config.check_backbone("imagenet")
    source = load_source(config.dataset)
    plans = studies(config, stages)
    if plans:
        check_shots(config, source)
    check_done(config, stages)
    for study in plans:
        check_start_weights(study, ssl_methods(config) if "ssl" in stages else ())
    print_plan(config, stages, source)


def run_cell(config: Config, cell: Cell) -> None:
    """Train and score one cell, unless it is scored already."""
    if is_scored(config, cell):
        return
    if cell.backbone == MEAN_SHAPE:
        run_dir = function("mean_shape")(config, cell)
    else:
        run_dir = function("finetune_cell")(config, cell)
        function("evaluate")(run_dir)
    print(f"scored {run_dir}", flush=True)


def run_study(config: Config, stages: tuple[str, ...]) -> Path | None:
    """Run `stages` in order; returns the report's page when there is one."""
    prepare(config, stages)
    if "pretrain" in stages and needs_pretraining(config) and not is_pretrained(config):
        function("pretrain")(config)
    for method in ssl_methods(config) if "ssl" in stages else ():
        if not encoder_path(config, method).is_file():
            function("ssl")(config, method)
    for study in studies(config, stages):
        for cell in cells(study):
            run_cell(study, cell)
    return function("report")([config.experiment_dir]) if "report" in stages else None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="./launch_experiments.sh", description=__doc__,
        epilog="example: ./launch_experiments.sh --config configs/cephalo.json --stages pretrain finetune report")
    add_config_arguments(parser)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(DEFAULT_STAGES),
                        help="encoders: compare VGG19, DenseNet161 and ResNeXt50 on ImageNet weights")
    parser.add_argument("--shots", nargs="+", type=int, help="numbers of labelled images, instead of the config's")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds, instead of the config's")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    arguments = parser.parse_args()
    overrides = list(arguments.set)
    overrides += [f"finetune.shots={arguments.shots}"] if arguments.shots else []
    overrides += [f"finetune.seeds={arguments.seeds}"] if arguments.seeds else []
    config = load_config(arguments.config, overrides)
    stages = tuple(stage for stage in STAGES if stage in arguments.stages)
    if arguments.dry_run:
        prepare(config, stages)
        return
    page = run_study(config, stages)
    if page is not None:
        print(f"report: {page}")


if __name__ == "__main__":
    run_command(main)
