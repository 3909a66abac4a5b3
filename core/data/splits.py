"""Splits of a folder data set, as lists of image ids, as fractions of the patients, or left out: all labels train.

Fractions are drawn once and written down beside dataset.json: an image stays in its split when labels are added.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.data.records import SPLITS, Draw, Record, image_id, is_number, patient_group
from core.errors import UserError, did_you_mean, note_once
from core.files import parse_json, write_json

Patients = Mapping[str, str | None]


def check_keys(value: Any, allowed: Sequence[str], required: Sequence[str], where: str) -> None:
    """UserError unless `value` is an object with all `required` keys and none but the `allowed`."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object with the keys {', '.join(allowed)}")
    for key in value:
        if key not in allowed:
            raise UserError(f'{where}: unknown key "{key}"{did_you_mean(key, allowed)}; keys are {", ".join(allowed)}')
    for key in required:
        if key not in value:
            raise UserError(f'{where}: key "{key}" is missing')


def read_splits(wanted: Any, labelled: Patients, images: Collection[str], description: Path,
                labels: Path) -> dict[str, list[str]]:
    """Image ids by split, as listed or drawn from fractions; `labelled` maps the ids with landmarks to their patients.

    None wanted: every label is for training. What is drawn here is written down by `keep_draw`.

    UserError: an id that is unknown, without landmarks or listed twice; lists and fractions mixed.
    """
    where = f"{description}, splits"
    if wanted is None:
        return {**{split: [] for split in SPLITS}, "train": sorted(labelled)}
    check_keys(wanted, (*SPLITS, "seed"), (), where)
    given = {split: wanted[split] for split in SPLITS if split in wanted}
    if all(is_number(share) for share in given.values()):
        return _drawn_splits(given, wanted.get("seed", 0), labelled, description)
    if "seed" in wanted or not all(isinstance(ids, list) for ids in given.values()):
        raise UserError(f"{where}: give either a list of image ids per split, or a fraction per split and a seed")
    split_of: dict[str, str] = {}
    for split, listed in given.items():
        for entry in listed:
            name = entry if entry in images else image_id(str(entry))
            if name not in images:
                raise UserError(f'{where}.{split}: image "{entry}" is not in images/{did_you_mean(name, list(images))}')
            if name not in labelled:
                raise UserError(f'{where}.{split}: image "{entry}" has no landmarks in {labels}')
            if name in split_of:
                raise UserError(f'{where}: image "{entry}" is listed twice, in {split_of[name]} and in {split}')
            split_of[name] = split
    return {split: [name for name in split_of if split_of[name] == split] for split in SPLITS}


def draws_path(description: Path) -> Path:
    """Where the splits drawn for `description` are written down: dataset.json -> dataset.splits.json."""
    return description.with_suffix(".splits.json")


def new_draw(wanted: Any, splits: dict[str, list[str]], description: Path) -> Draw | None:
    """The draw that made `splits` of the fractions `wanted`; None for lists, no labels, or one that is written down."""
    shares = {split: wanted[split] for split in SPLITS if split in wanted} if isinstance(wanted, dict) else {}
    if not shares or not all(map(is_number, shares.values())) or not any(splits.values()):
        return None
    seed, path = wanted.get("seed", 0), draws_path(description)
    if _written_draw(_read_draws(path), shares, seed) is not None:
        return None
    return Draw(path, {"shares": shares, "seed": seed, "splits": splits})


def keep_draw(draw: Draw) -> None:
    """Write a draw down beside those that are there, or note that its place cannot be written to."""
    try:
        write_json(draw.path, [*_read_draws(draw.path), draw.entry])
    except OSError as error:
        note_once(f"draw {draw.path}", f"note: {draw.path} cannot be written ({error.strerror}): when labels are "
                                       "added, the splits will be drawn anew")


def _written_draw(draws: list[dict[str, Any]], shares: dict[str, float], seed: Any) -> dict[str, Any] | None:
    return next((draw for draw in draws if (draw["shares"], draw["seed"]) == (shares, seed)), None)


def _drawn_splits(shares: dict[str, float], seed: Any, labelled: Patients, description: Path) -> dict[str, list[str]]:
    """The splits written down for these fractions and this seed, else newly drawn ones.

    Images labelled since then join the split of their patient, or train: pre-training may have seen them. Without any
    label nothing is drawn. UserError for a file that is not what was written.
    """
    if not labelled:
        return {split: [] for split in SPLITS}
    before = _written_draw(_read_draws(draws_path(description)), shares, seed)
    if before is None:
        return _draw_splits(shares, seed, labelled, f"{description}, splits")
    split_of = {name: split for split, names in before["splits"].items() for name in names}
    split_of_patient = {labelled[name]: split for name, split in split_of.items() if labelled.get(name)}
    chosen = {name: split_of.get(name) or split_of_patient.get(labelled[name] or "", "train") for name in labelled}
    return {split: [name for name in sorted(labelled) if chosen[name] == split] for split in SPLITS}


def _read_draws(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        draws = parse_json(path.read_text(encoding="utf8"))
        if all({"shares", "seed", "splits"} <= draw.keys() and draw["splits"].keys() == set(SPLITS) for draw in draws):
            return draws
    except (ValueError, AttributeError, TypeError):
        pass
    raise UserError(f"{path} is damaged: it keeps the splits that were drawn; delete it to draw them anew (images may "
                    "then move between train and test)")


def _draw_splits(shares: dict[str, float], seed: Any, labelled: Patients, where: str) -> dict[str, list[str]]:
    """Fractions of the patients (an image without one is a patient by itself); a share above 0 gets at least one."""
    if not all(0 <= share <= 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"{where}: the fractions must lie between 0 and 1 and sum to 1")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"{where}.seed must be a whole number from 0, not {seed!r}")
    group_of = {key: patient_group(key, patient) for key, patient in labelled.items()}
    groups = sorted(set(group_of.values()))
    groups = [groups[index] for index in np.random.default_rng(seed).permutation(len(groups))]
    counts = [max(1, round(shares.get(s, 0) * len(groups))) if shares.get(s, 0) else 0 for s in ("test", "validation")]
    split_of = dict.fromkeys(groups, "train")
    split_of.update(dict.fromkeys(groups[: counts[0]], "test"))
    split_of.update(dict.fromkeys(groups[counts[0] : sum(counts)], "validation"))
    return {split: [key for key in sorted(labelled) if split_of[group_of[key]] == split] for split in SPLITS}


def check_patients(splits: dict[str, tuple[Record, ...]], path: Path) -> None:
    """UserError when a patient is in two splits; a note where two patients' names differ in their case alone."""
    names: dict[str, str] = {}
    for patient in {record.patient for records in splits.values() for record in records if record.patient}:
        other = names.setdefault(patient.casefold(), patient)
        if other != patient:
            first, second = sorted((other, patient))
            note_once(f"{path} {first}", f'note: patients "{first}" and "{second}" of {path} are taken for two people')
    split_of: dict[str, str] = {}
    for split, records in splits.items():
        for record in records:
            if record.patient and split_of.setdefault(record.patient, split) != split:
                raise UserError(
                    f'{path}: patient "{record.patient}" is in both {split_of[record.patient]} and {split} '
                    f'(image "{record.id}"); keep each patient in one split'
                )
