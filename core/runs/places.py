"""Where the runs of a study lie on disk, and what their folders are called."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config.config import Config
from core.config.second_stage import second_stage
from core.config.settings import all_settings
from core.config.ssl import SSL
from core.config.starts import MEAN_SHAPE, SSL_METHODS
from core.errors import DamagedFile
from core.formats.json_files import read_object


@dataclass(frozen=True)
class Cell:
    """One fine-tuning run: which start, how many labels, which draw of them, which initialisation and order.

    `fold`, from 1, is the part of the labels that it must not see; None under evaluation.folds: all its folds together.
    """

    backbone: str
    shots: int
    draw: int
    seed: int
    fold: int | None = None

    @property
    def folder(self) -> str:
        """shots010_draw0_seed0, shots010_draw0_seed0_fold01."""
        part = "" if self.fold is None else f"_fold{self.fold:02d}"
        return f"shots{self.shots:03d}_draw{self.draw}_seed{self.seed}{part}"


def variant(config: Config, backbone: str) -> str:
    """A readable slug of the fine-tuning settings that differ from the defaults; "default" when none does.

    Where the folder of an earlier version is there, which called a file by its stem alone, it is that folder's name.
    """
    name, earlier = _variant(config, backbone, file_slug), _variant(config, backbone, lambda path: Path(path).stem)
    if name != earlier and _is_of_the_same_files(config, backbone, earlier):
        return earlier
    return name


def _variant(config: Config, backbone: str, slug_of_file: Callable[[str], str]) -> str:
    folds = config.evaluation.folds
    if backbone == MEAN_SHAPE:  # of the studies of one data set all are alike, but for images chosen otherwise
        chosen = "pick-coverage" if config.finetune.selection == "coverage" else "default"
        return chosen if folds is None else f"folds-{folds}"
    own_ssl = backbone in SSL_METHODS and getattr(config.finetune.encoder_weights, backbone) is None
    parts = [f"ssl-{config.ssl.preset}"] if own_ssl and config.ssl.preset != SSL().preset else []
    for setting in all_settings().values():
        if setting.slug is None or not setting.concerns(backbone):
            continue
        value = setting.of(config)
        if value is None:
            value = setting.null_slug  # of most null says that another one counts
        if value is not None and value != setting.default:
            if isinstance(value, tuple):  # of files
                value = "+".join(map(slug_of_file, value))
            parts.append(f"{setting.slug}-{slug_of_file(value) if setting.is_file else value}")
    return "_".join(parts).replace("/", "-") or "default"


def file_slug(path: str) -> str:
    """The stem of a weights file and a digest of its folder and suffix: files of one stem differ, a folder's are alike.

    ema_iter004000-3fa2b1.
    """
    file = Path(path)
    place = f"{file.parent.resolve()} {file.suffix}"
    return f"{file.stem}-{hashlib.sha256(place.encode()).hexdigest()[:6]}"


def _is_of_the_same_files(config: Config, backbone: str, name: str) -> bool:
    """Whether there are runs in the folder of variant `name`, all made from the weights files that `config` names."""
    keys = [key for key, setting in all_settings().items() if setting.is_file and setting.concerns(backbone)]
    wanted = {_file_named(config.plain(), key) for key in keys}
    paths = (config.experiment_dir / "landmarks" / backbone / name).glob("*/config.json")
    try:
        runs = [read_object(path, "") for path in paths]
    except DamagedFile:
        return False
    return bool(runs) and all({_file_named(run, key) for key in keys} == wanted for run in runs)


def _file_named(values: dict[str, Any], key: str) -> tuple[str, Path | None]:
    value: Any = values
    for name in key.split("."):
        value = None if value is None else value.get(name)
    return key, None if value is None else Path(os.path.realpath(value))


def cell_dir(config: Config, cell: Cell) -> Path:
    """runs/<experiment>/landmarks/<backbone>/<variant>/shots010_draw0_seed0."""
    return config.experiment_dir / "landmarks" / cell.backbone / variant(config, cell.backbone) / cell.folder


def round_dir(run_dir: Path, number: int) -> Path:
    """The folder of a round of self-training: the run's own for the first training, round1 below it and so on."""
    return run_dir / f"round{number}" if number else run_dir


def is_scored(config: Config, cell: Cell) -> bool:
    """Whether the cell's metrics.json is there."""
    return (cell_dir(config, cell) / "metrics.json").is_file()


def ema_path(experiment_dir: Path, iteration: int) -> Path:
    """runs/<experiment>/ddpm/ema_iter004000.safetensors."""
    return experiment_dir / "ddpm" / f"ema_iter{iteration:06d}.safetensors"


def ddpm_paths(config: Config) -> tuple[Path, ...]:
    """runs/<experiment>/ddpm/ema_iter004000.safetensors and so on: every configured EMA checkpoint."""
    return tuple(ema_path(config.experiment_dir, iteration) for iteration in config.ddpm.checkpoint_iterations)


def is_pretrained(config: Config) -> bool:
    """Whether every configured EMA checkpoint is there."""
    return all(path.is_file() for path in ddpm_paths(config))


def ssl_dir(config: Config, method: str) -> Path:
    """runs/<experiment>/ssl/<method>, or <method>_<preset> for a preset that is not the default."""
    preset = config.ssl.preset
    return config.experiment_dir / "ssl" / (method if preset == SSL().preset else f"{method}_{preset}")


def encoder_path(config: Config, method: str) -> Path:
    """runs/<experiment>/ssl/<method>/encoder_iter010000.safetensors."""
    return ssl_dir(config, method) / f"encoder_iter{config.ssl.iterations:06d}.safetensors"


def pretrained_path(config: Config) -> Path:
    """The weights file that backbone ddpm starts from: finetune.checkpoint, or this study's EMA checkpoint."""
    finetune = config.finetune
    if finetune.checkpoint is not None:
        return Path(finetune.checkpoint)
    chosen = finetune.pretraining_iteration
    iteration = chosen if isinstance(chosen, int) else max(config.ddpm.checkpoint_iterations)
    return ema_path(config.experiment_dir, iteration)


def choosing_path(config: Config) -> Path:
    """The weights file whose features choose images: finetune.checkpoint, or this study's last EMA checkpoint.

    Whichever iteration a run starts from: all starts are compared on the same images.
    """
    finetune = config.finetune.model_copy(update={"pretraining_iteration": None})
    return pretrained_path(config.model_copy(update={"finetune": finetune}))


def second_start_path(config: Config, backbone: str) -> Path | None:
    """The weights file that the second stage of a run of `backbone` starts from, see `start_path`."""
    own = backbone == "ddpm" and config.finetune.refine.start == "crops"
    return start_path(second_stage(config) if own else config, backbone)


def start_path(config: Config, backbone: str) -> Path | None:
    """The weights file that a run of `backbone` starts from; None for random ones and for torchvision's."""
    if backbone == "ddpm":
        return pretrained_path(config)
    given = getattr(config.finetune.encoder_weights, backbone, None)
    if given is not None:
        return None if Path(given).is_dir() else Path(given)
    return encoder_path(config, backbone) if backbone in SSL_METHODS else None
