"""Other studies' labelled images that a run learns from beside its own: finetune.gu2net.together."""

from __future__ import annotations

from typing import NamedTuple

from core.config.config import Config
from core.config.dataset import Dataset
from core.config.load import load_config
from core.config.settings import all_settings
from core.data.digests import ImageDigests, data_digests
from core.data.records import Record
from core.data.shots import select_shots
from core.data.source import load_source
from core.errors import UserError


class OtherData(NamedTuple):
    """Training images of another study, and how it makes tensors of them."""

    dataset: Dataset
    landmark_names: tuple[str, ...]
    records: tuple[Record, ...]


def other_data(config: Config, backbone: str, shots: int, draw: int) -> list[OtherData]:
    """What a run learns from beside its own images: as many shots of each study named, or all it has.

    Empty for starts that learn from one data set. UserError where a study has images of other dimensions.
    """
    if not all_settings()["finetune.gu2net.together"].concerns(backbone):
        return []
    others = []
    for path in config.finetune.gu2net.together:
        study = load_config(path)
        if study.is_3d != config.is_3d:
            raise UserError(f"finetune.gu2net.together {path}: is_3d is {str(study.is_3d).lower()} there, and "
                            f"{str(config.is_3d).lower()} here; one network has images of one number of dimensions")
        source = load_source(study.dataset)
        labelled = source.require("train")
        records = select_shots(labelled, min(shots, len(labelled)), draw, "random")
        others.append(OtherData(study.dataset, tuple(source.landmark_names), records))
    return others


def other_digests(others: list[OtherData]) -> dict[str, ImageDigests]:
    """Their images by their use, for a run's record of what it is made from."""
    return {f"together {number}": data_digests(other.records, other.landmark_names, other.dataset)
            for number, other in enumerate(others, start=1)}
