"""Whether a study can run from end to end, before anything is run."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from core.config.config import Config
from core.config.dataset import Dataset
from core.errors import DamagedFile, UserError
from core.files import drop_left_behind, stamp, write_json
from core.formats.json_files import read_object
from core.runs.cells import cells, pretraining_configs, require_backbone, ssl_methods
from core.runs.identity import check_cell, check_pretraining, check_ssl
from core.runs.inputs import CROSS_VALIDATED, CROSS_VALIDATION, GroupedImages, ImageDigests
from core.runs.places import is_scored
from core.runs.requirements import check_memory, check_places
from study.plan import print_plan
from study.runs import Run, optimiser_steps, studies, study_runs

if TYPE_CHECKING:
    from core.data.records import DataSource, Record

CHECKED = "data_checked"  # in the experiment's folder: a data_stamp and the runs that stand for it


def check_shots(config: Config, source: DataSource) -> None:
    """Fail now, not after pre-training, when a cell asks for labels or splits that are not there."""
    from core.data.folds import fewest_outside
    from core.data.shots import above_labels, check_schedule, training_labels

    labels, folds = len(source.require("train")), config.evaluation.folds
    them = training_labels(labels)
    if folds is not None:
        labels = fewest_outside(source, folds, config.finetune.draws)
        them = f"the {labels} labelled images that {folds} folds leave to train on"
    if max(config.finetune.shots) > labels:
        raise UserError(above_labels(config.finetune.shots, labels, them))
    if folds is None and not (source.unscored and config.evaluation.split == "test"):
        source.require(config.evaluation.split)
    if config.finetune.validation == "official" and source.nothing_held_back:
        check_schedule(config.finetune)
    elif config.finetune.validation == "official":
        source.require("validation")


def check_done(config: Config, stages: tuple[str, ...]) -> None:
    """Fail now when a run that is there was made with other settings: it would neither be used nor be done again.

    One whose config.json is damaged is noted: where something is left to do of it that fails, and the others are done.
    """
    checks = [partial(check_pretraining, each)
              for each in (pretraining_configs(config) if {"pretrain", "finetune"} & set(stages) else ())]
    checks += [partial(check_ssl, config, method)
               for method in (ssl_methods(config.finetune) if {"ssl", "finetune"} & set(stages) else ())]
    checks += [partial(check_cell, study, cell) for study in studies(config, stages) for cell in cells(study)]
    for check in checks:
        try:
            check()
        except DamagedFile as error:
            print(f"note: {error}", file=sys.stderr)


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


def check_start_files(runs: Sequence[Run]) -> None:
    """Fail now, not after other runs, where a weights file that no run makes is not there or holds none."""
    to_come = {run.folder for run in runs}
    given: set[Path] = set()
    for run in runs:
        for path in (run.start, run.second_start, run.chosen_by) if not run.done else ():
            if path is not None and path.is_file() and path == Path(run.config.finetune.checkpoint or ""):
                given.add(path)
            if path is None or path.is_file() or path.parent in to_come:
                continue
            if path.parent in run.needs:
                stage = "pretrain" if path.parent.name == "ddpm" else "ssl"
                raise UserError(f"{run.folder.parts[-3]} needs {path}, which is not there; run stage {stage} first, or "
                                "add it to --stages")
            raise UserError(f"{run.folder.parts[-3]} starts from {path}, which does not exist; correct "
                            "finetune.checkpoint or finetune.encoder_weights")
    for path in sorted(given):
        from core.networks.weights import load_weights  # imports for seconds

        load_weights(path)


def check_device(runs: Sequence[Run]) -> None:
    """UserError now, not in every run, where this machine lacks the device that what is left would be trained on."""
    for name in {run.config.experiment.device for run in runs if not run.done and run.steps}:
        from core.training.device import resolve_device  # imports for seconds

        resolve_device(name)


def with_inputs(runs: list[Run], source: DataSource) -> list[Run]:
    """The runs with what the data set gives each of them now: images it is made from, and those it is scored on.

    Which images a pre-training chooses that is still to come is not known: its runs' inputs stay None.
    """
    from core.data.digests import data_digests
    from core.data.folds import cell_source
    from core.data.shots import answered_records, cell_records
    from core.data.together import other_data, other_digests

    if not runs:
        return []
    dataset = runs[0].config.dataset

    def digests(records: Sequence[Record], scoring: bool = False) -> ImageDigests:
        return data_digests(records, source.landmark_names, dataset, scoring)

    if any(run.is_pretraining for run in runs):
        pretraining = {"pretraining": digests(source.pretraining_records())}
    extended, orders = [], orders_of(runs, source)
    for run in runs:
        if run.is_pretraining:
            extended.append(replace(run, inputs=pretraining))
            continue
        cell, evaluation = run.arguments[0], run.config.evaluation
        if run.stage == "pool":
            labels = source.require("train")
            extended.append(replace(run, inputs={CROSS_VALIDATED: digests(labels)},
                                    test={CROSS_VALIDATION: digests(labels, scoring=True)}))
            continue
        own = cell_source(run.config, cell.draw, cell.fold)
        use, answered = answered_records(own, evaluation, dataset)
        test: GroupedImages = {use: digests(answered, scoring=True)}
        if run.chosen_by is not None and run.chosen_by not in orders:
            extended.append(replace(run, test=test))
            continue
        order = orders[run.chosen_by] if run.chosen_by is not None else None
        records = cell_records(own, run.config, cell.backbone, cell.shots, cell.draw, order)
        uses = ("training",) if run.stage == "mean_shape" else tuple(records)
        inputs = {use: digests(records[use]) for use in uses}
        inputs |= other_digests(other_data(run.config, cell.backbone, cell.shots, cell.draw))
        steps = optimiser_steps(run.config, cell, len(records.get("unlabelled", ()))) if run.steps else 0
        extended.append(replace(run, inputs=inputs, test=test, steps=steps))
    return extended


def orders_of(runs: Sequence[Run], source: DataSource) -> dict[Path, tuple[str, ...]]:
    """{weights: the images in the order in which they choose them}, for those weights of the runs that are there."""
    orders: dict[Path, tuple[str, ...]] = {}
    choosers = {run.chosen_by: run.config for run in runs if run.chosen_by is not None and run.chosen_by.is_file()}
    for path, config in choosers.items():
        from landmarks_finetuning.coverage import coverage_order  # imports for seconds

        most = max(run.arguments[0].shots for run in runs if run.chosen_by == path)
        orders[path] = coverage_order(config, source, most) or ()
    return orders


def check_pretraining_inputs(runs: Sequence[Run]) -> None:
    """UserError where a pre-training saw other images than those there are now, some of which may now be test images.

    It may have taken days: it is never done again unasked.
    """
    for run in runs:
        reason = run.stale() if run.is_pretraining else None
        if reason is not None:
            raise UserError(f"{run.folder} was pre-trained on other images than those there are now: {reason}; "
                            "--redo-pretraining sets it aside and pre-trains again, another experiment.name keeps both")


def data_stamp(dataset: Dataset) -> str:
    """Of all files of the data set and of how it is read: unchanged, it gives the same records."""
    places = [dataset.root, *dataset.unlabelled_dirs, dataset.description]
    stamps = [stamp(Path(place)) for place in places if place is not None]
    return hashlib.sha256(json.dumps([stamps, dataset.model_dump(mode="json")]).encode()).hexdigest()


def remembered(experiment_dir: Path, digest: str) -> set[str]:
    """The folders of the runs that stand for the data with this `data_stamp`, as a launch has checked."""
    path = experiment_dir / CHECKED
    try:
        memo = read_object(path, "") if path.is_file() else {}
        return set(memo["runs"]) if memo.get("stamp") == digest else set()
    except (DamagedFile, KeyError, TypeError):  # the data are read again
        return set()


def remember(experiment_dir: Path, digest: str, runs: Sequence[Run]) -> None:
    """Note that `runs` stand for the data with this `data_stamp`: the next launch need not read them."""
    before = remembered(experiment_dir, digest)
    folders = before | {str(run.folder) for run in runs}
    if folders != before:
        write_json(experiment_dir / CHECKED, {"stamp": digest, "runs": sorted(folders)})


def prepare(config: Config, stages: tuple[str, ...]) -> list[Run]:
    """Check that the study can run from end to end, print its plan and return its runs.

    Where all of them are done and no file of the data has changed since, neither the data nor the modules that would
    read them are touched.
    """
    for each in (config, *studies(config, stages)):
        check_memory(each)
    source, runs = None, study_runs(config, stages)
    check_places([run.folder for run in runs])
    unchecked = {str(run.folder) for run in runs} - remembered(config.experiment_dir, data_stamp(config.dataset))
    if unchecked or not all(run.done for run in runs):
        from core.data.source import load_source

        if "encoders" in stages:
            require_backbone(config, "imagenet")
        source = load_source(config.dataset)
        if studies(config, stages):
            check_shots(config, source)
        runs = with_inputs(runs, source)
    check_done(config, stages)
    check_pretraining_inputs(runs)
    if source is not None:
        for study in studies(config, stages):
            check_start_weights(study, ssl_methods(config.finetune) if "ssl" in stages else ())
    check_start_files(runs)
    if config.dataset.cache_dir is not None and Path(config.dataset.cache_dir).is_dir():
        drop_left_behind(Path(config.dataset.cache_dir))  # of plans that were killed
    print_plan(config, stages, source, runs)
    return runs
