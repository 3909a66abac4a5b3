"""Which labelled images a run is trained on, validated on and scored on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from core.config.config import Config
from core.config.dataset import Dataset as DatasetConfig
from core.config.evaluation import Evaluation
from core.config.finetune import Finetune
from core.data.leaks import find_leaks, leaked_ids
from core.data.records import DataSource, Record
from core.errors import UserError, note_once

MOST_SHOWN = 200  # unlabelled images that a detector answers in place of a score


def select_shots(records: Sequence[Record], shots: int, draw: int, selection: str, order: Sequence[str] | None = None
                 ) -> tuple[Record, ...]:
    """The few labelled images: the first k (the paper), draw number `draw` of a seeded shuffle, or k that cover most.

    These are the first of `order`, ids, without which selection "coverage" cannot do: ValueError. Draws are nested: a
    larger k contains the smaller. UserError when there are fewer records than shots.
    """
    if shots > len(records):
        raise UserError(above_labels([shots], len(records), training_labels(len(records))))
    if selection == "first":
        return tuple(records[:shots])
    if selection == "coverage":
        if order is None:
            raise ValueError('selection "coverage" needs the order of the images')
        chosen = set(order[:shots])
        return tuple(record for record in records if record.id in chosen)
    shuffled = np.random.default_rng([draw, len(records)]).permutation(len(records))
    return tuple(records[i] for i in sorted(shuffled[:shots]))


def training_labels(count: int) -> str:
    """What shots are taken from, in words."""
    return f"the training split's {count} labelled images"


def above_labels(shots: Sequence[int], labels: int, them: str) -> str:
    """Which of finetune.shots ask for more `labels` than there are, `them` in words, and the numbers to set instead."""
    above = [number for number in shots if number > labels]
    numbers = sorted({min(number, labels) for number in shots})
    return (f"finetune.shots {', '.join(map(str, above))} {'is' if len(above) == 1 else 'are'} above {them}; "
            f"set finetune.shots to {numbers}")


def labelled_subset(source: DataSource, finetune: Finetune, shots: int, draw: int, order: Sequence[str] | None = None
                    ) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """(training, validation) records of a run, as finetune.validation says; `order`: see `select_shots`.

    Where the data set holds nothing back, "official" is no image at all: a fixed schedule.
    UserError where the shots are too few to hold some out, a split is empty, or the schedule needs validation labels
    that are not there.
    """
    validation = finetune.validation
    least = validation + 1 if isinstance(validation, int) else 1
    if shots < least or draw < 0:
        raise UserError(f"--shots {shots} --draw {draw}: at least {least} shots are needed (finetune.validation is "
                        f"{validation}), draws count from 0")
    chosen = select_shots(source.require("train"), shots, draw, finetune.selection, order)
    if validation == "official" and source.nothing_held_back:
        check_schedule(finetune)
        return chosen, ()
    if validation == "official":
        return chosen, source.require("validation")
    if validation == "none":
        return chosen, ()
    shuffled = np.random.default_rng([draw, 1]).permutation(len(chosen))
    held_out = set(shuffled[:validation].tolist())
    return (tuple(r for i, r in enumerate(chosen) if i not in held_out),
            tuple(r for i, r in enumerate(chosen) if i in held_out))


def check_schedule(finetune: Finetune) -> None:
    """UserError where the training needs validation labels, for a data set that holds none back."""
    needs = {'scheduler "plateau"': finetune.scheduler == "plateau",
             "early_stop_patience": finetune.early_stop_patience is not None,
             'pretraining_iteration "best"': finetune.pretraining_iteration == "best"}
    for key in (key for key, needed in needs.items() if needed):
        raise UserError(f"finetune.{key} needs validation labels, and this data set holds none back; change it, give "
                        "splits in dataset.json, or set finetune.validation to a number to hold out of the shots")


def cell_records(source: DataSource, config: Config, backbone: str, shots: int, draw: int,
                 order: Sequence[str] | None = None) -> dict[str, tuple[Record, ...]]:
    """The images that a run is made from, by their use: training, validation, and unlabelled where it answers some.

    `order`: see `select_shots`.
    """
    training, validation = labelled_subset(source, config.finetune, shots, draw, order)
    records, settings = {"training": training, "validation": validation}, config.finetune.self_training
    if settings.answers(backbone, shots):
        labelled = {record.id for record in (*training, *validation)}
        unlabelled = unlabelled_training(source, labelled, config.dataset, settings.images)
        if unlabelled:
            records["unlabelled"] = unlabelled
        elif settings.insists(backbone, shots):
            raise UserError(f"finetune.self_training answers unlabelled training images, and {source.root} has none "
                            f"beside the {shots} labelled ones; set rounds and matching to 0 or null, or "
                            "give dataset.unlabelled_dirs")
        else:
            note_once("self-training", f"no training image is unlabelled beside the {shots} labelled ones in "
                                       f"{source.root}: no self-training there")
    return records


def unlabelled_training(source: DataSource, labelled: Collection[str], config: DatasetConfig, count: int
                        ) -> tuple[Record, ...]:
    """Training images without a label in a run: the training split's but for the `labelled` ids, and the unlabelled.

    Labels are removed; of more than `count` some are drawn, the same ones every time. No test or validation image is
    among them, nor one that looks like one; ValueError where the splits share a file.
    """
    twins = {leak.twin for leak in find_leaks(source, config)}
    candidates = [record for record in (*source.splits["train"], *source.unlabelled)
                  if record.id not in labelled and record.id not in twins]
    held_out = {record.image for split in ("validation", "test") for record in source.splits[split]}
    packed = len({record.image for record in source.records}) == 1
    if not packed and any(record.image in held_out for record in candidates):
        raise ValueError("a validation or test image is among the unlabelled training images")
    order = np.random.default_rng([0, len(candidates)]).permutation(len(candidates))[:count]
    return tuple(replace(candidates[index], landmarks=None, annotators=None) for index in sorted(order))


def answered_records(source: DataSource, evaluation: Evaluation, config: DatasetConfig
                     ) -> tuple[str, tuple[Record, ...]]:
    """What a trained detector answers, and its images: those that are scored, or "unlabelled" where none is held back.

    Of more than MOST_SHOWN unlabelled images some are drawn, the same ones every time; there may be none.
    """
    if not source.unscored:
        return evaluation.split, scored_records(source, evaluation, config)
    order = np.random.default_rng([1, len(source.unlabelled)]).permutation(len(source.unlabelled))[:MOST_SHOWN]
    return "unlabelled", tuple(source.unlabelled[index] for index in sorted(order))


def scored_records(source: DataSource, evaluation: Evaluation, config: DatasetConfig) -> tuple[Record, ...]:
    """The images of evaluation.split, where evaluation.leaked is "drop" without those that have a twin elsewhere.

    UserError when none remains.
    """
    records = source.require(evaluation.split)
    if evaluation.leaked == "keep":
        return records
    leaked = leaked_ids(find_leaks(source, config), evaluation.split)
    kept = tuple(record for record in records if record.id not in leaked)
    if not kept:
        raise UserError(f'evaluation.leaked "drop" leaves none of the {len(records)} {evaluation.split} images of '
                        f"{source.root}: each has a twin on the other side of the split")
    return kept
