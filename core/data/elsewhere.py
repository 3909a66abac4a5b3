"""Another data set under the settings of a run: a folder, or what another study's config names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from core.config.dataset import Dataset as DatasetConfig
from core.config.load import load_config
from core.data.records import SPLITS, DataSource
from core.errors import UserError

OF_THE_DATA = ("name", "layout", "root", "description", "unlabelled_dirs", "exclude", "spacing_mm", "check_geometry",
               "max_megapixels", "phantom")  # where files lie and what they mean; the rest says what a network sees


def dataset_at(place: Path, run: DatasetConfig) -> DatasetConfig:
    """The settings that read the data set at `place` as the `run`'s network wants its images.

    `place` is a folder (or pack) of layout "folder", or the config (.json) of a study, of whose dataset section only
    OF_THE_DATA counts. UserError where it does not exist.
    """
    if not place.exists():
        raise UserError(f"--data {place} does not exist; give a folder with images/, or a study's config (.json)")
    if place.is_file() and place.suffix == ".json":
        given = load_config(place).dataset
    else:
        name = "".join(letter if letter.isalnum() or letter in "_.-" else "-" for letter in place.resolve().stem)
        given = DatasetConfig(name=name, root=str(place))
    return run.model_copy(update={key: getattr(given, key) for key in OF_THE_DATA})


def all_test(source: DataSource) -> DataSource:
    """The data set with every label to be scored, where it holds nothing back; else as it is."""
    if not source.unscored:
        return source
    splits = {**dict.fromkeys(SPLITS, ()), "test": source.labelled}
    return replace(source, splits=splits)
