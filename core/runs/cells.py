"""The plan of a study: its stages and cells, where each one's files are, what is done and what is left."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.config.load.finetune import (Finetune, LossSettings)
from core.config.load.config import (BACKBONES, Config)
from core.config.load.ssl import (SSL, SSL_METHODS)

MEAN_SHAPE = "mean_shape"  # the guess without an image; not a backbone to train
VARIANT_KEYS = {"loss": "loss", "target": "target", "sigma": "sigma", "decoder": "decoder", "shape_prior": "prior",
                "timestep": "t", "pretraining_iteration": "iter", "checkpoint": "from", "encoder": "encoder",
                "encoder_weights": "weights", "iterations": "steps", "epochs": "epochs",
                "learning_rate": "lr", "validation": "val", "selection": "pick", "ema_decay": "ema",
                "batch_size": "batch", "scheduler": "schedule"}
FILE_KEYS = ("checkpoint", "encoder_weights")
OWN_KEYS = {"ddpm": ("timestep", "pretraining_iteration", "checkpoint"), "random": ("encoder",),
            **dict.fromkeys(("imagenet", *SSL_METHODS), ("encoder", "encoder_weights"))}  # for these backbones only
ENCODER_STUDY = ("vgg19", "densenet161", "resnext50_32x4d")  # the paper's
BY_BACKBONE = ("learning_rate", "encoder_weights")  # sections with a value for each backbone
PLACES = ("dataset.root", "dataset.cache_dir", "dataset.phantom")  # the data may move between machines
PRETRAINING_FREE = (*PLACES, "ddpm.iterations", "ddpm.log_every", "ddpm.validate_every", "ddpm.sample_every",
                    "ddpm.save_every", "ddpm.sampler", "ddpm.sampling_steps", "ddpm.sample_count",
                    "ddpm.checkpoint_iterations")
SSL_FREE = (*PLACES, "ssl.workers", "ssl.log_every", "ssl.validate_every", "ssl.save_every")
CELL_FREE = (*PLACES, "finetune.backbones", "finetune.shots", "finetune.draws", "finetune.seeds", "finetune.log_every",
             "finetune.save_every", "finetune.decoder", "finetune.shape_prior", "finetune.losses",
             "finetune.transfer_from")
SCORING = ("evaluation.split", "evaluation.sdr_thresholds", "evaluation.leaked")
BEFORE_THE_KEY = {"evaluation.leaked": "keep"}  # what runs did whose config.json does not have it yet


@dataclass(frozen=True)
class Cell:
    """One fine-tuning run: which start, how many labels, which draw of them, which initialisation and order."""

    backbone: str
    shots: int
    draw: int
    seed: int

    @property
    def folder(self) -> str:
        """shots010_draw0_seed0."""
        return f"shots{self.shots:03d}_draw{self.draw}_seed{self.seed}"


def ssl_methods(config: Config) -> list[str]:
    """The self-supervised backbones that start from this study's own pre-training."""
    return [method for method in SSL_METHODS if method in config.finetune.backbones
            and getattr(config.finetune.encoder_weights, method) is None]


def encoder_studies(config: Config) -> list[Config]:
    """The study of encoders on ImageNet weights: the config with one of ENCODER_STUDY at a time, and no other start."""
    return [with_finetune(config, backbones=("imagenet",), encoder=encoder) for encoder in ENCODER_STUDY]


def settings_compared(config: Config) -> list[Config]:
    """The study with one loss, one start and one pre-training iteration at a time: what a single cell can be run with.

    For each of finetune.losses all backbones; where finetune.pretraining_iteration is "best" those but ddpm do without,
    and ddpm comes from every EMA checkpoint; then ddpm from the checkpoints of finetune.transfer_from. Raises UserError
    where these are not there.
    """
    finetune, found = config.finetune, []
    kept = config.ddpm.checkpoint_iterations if finetune.pretraining_iteration == "best" else ()
    away = transfer_paths(config) if "ddpm" in finetune.backbones else ()
    for entry in finetune.losses or (finetune,):
        loss = {key: getattr(entry, key) for key in LossSettings.model_fields}
        base = {**loss, "losses": (), "transfer_from": None}
        others = tuple(name for name in finetune.backbones if name != "ddpm" or not kept)
        starts: list[dict[str, Any]] = [{"backbones": others}]
        if kept:
            starts[0]["pretraining_iteration"] = None
        if "ddpm" in finetune.backbones:
            starts += [{"backbones": ("ddpm",), "pretraining_iteration": iteration} for iteration in kept]
            starts += [{"backbones": ("ddpm",), "pretraining_iteration": None, "checkpoint": str(path)}
                       for path in away]
        found += [with_finetune(config, **base, **start) for start in starts]
    return found


def with_finetune(config: Config, **values: Any) -> Config:
    """The config with other values in its `finetune` section."""
    return config.model_copy(update={"finetune": config.finetune.model_copy(update=values)})


def transfer_paths(config: Config) -> list[Path]:
    """The EMA checkpoints of the study finetune.transfer_from that ddpm starts from as well, oldest first.

    The one of finetune.pretraining_iteration, or its last one, or all of them for "best". Raises UserError where that
    folder holds no diffusion pre-training, where a checkpoint is not there yet, or for a network of another shape.
    """
    if config.finetune.transfer_from is None:
        return []
    folder, wanted = Path(config.finetune.transfer_from) / "ddpm", config.finetune.pretraining_iteration
    if not (folder / "config.json").is_file():
        raise UserError(f"finetune.transfer_from {folder.parent}: {folder} holds no diffusion pre-training; run that "
                        "study's stage pretrain first, or name another runs/<experiment>")
    theirs = json.loads((folder / "config.json").read_text(encoding="utf8"))
    for key, value in config.unet.model_dump(mode="json").items():
        held = theirs["unet"].get(key, value)
        if held != value:
            raise UserError(f"finetune.transfer_from {folder.parent}: its network has unet.{key} {json.dumps(held)}, "
                            f"this study's {json.dumps(value)}; they must be the same")
    kept = theirs["ddpm"]["checkpoint_iterations"]
    iterations = sorted(kept) if wanted == "best" else [wanted or max(kept)]
    paths = [folder / f"ema_iter{iteration:06d}.safetensors" for iteration in iterations]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"finetune.transfer_from {folder.parent}: {missing[0]} is not there (yet); it keeps iterations "
                        f"{', '.join(map(str, kept))}")
    return paths


def single_setting(config: Config, backbone: str) -> Config:
    """The config of one run from `backbone`, from the study's own pre-training.

    UserError where the study compares several settings: which of them is meant?
    """
    alone = with_finetune(config, backbones=(backbone,), transfer_from=None)
    found = {variant(each, backbone): each for each in settings_compared(alone) if each.finetune.backbones}
    if len(found) > 1:
        raise UserError(f"this study runs {backbone} in {len(found)} settings ({', '.join(found)}), and one run has "
                        "one: add --set finetune.losses=[] and a number for finetune.pretraining_iteration")
    return with_finetune(next(iter(found.values())), backbones=config.finetune.backbones)


def cells(config: Config) -> list[Cell]:
    """Every fine-tuning run of the study, the mean-shape guess first, in the order in which they are run."""
    finetune = config.finetune
    draws = finetune.draws if finetune.selection == "random" else finetune.draws[:1]
    guesses = [Cell(MEAN_SHAPE, shots, draw, 0) for shots in finetune.shots for draw in draws]
    trained = [Cell(backbone, shots, draw, seed) for shots in finetune.shots for draw in draws
               for seed in finetune.seeds for backbone in finetune.backbones]
    return guesses + trained


def foreign_keys(backbone: str) -> set[str]:
    """Keys of `finetune` that mean nothing to `backbone`."""
    return {key for keys in OWN_KEYS.values() for key in keys} - set(OWN_KEYS.get(backbone, ()))


def variant(config: Config, backbone: str) -> str:
    """A readable slug of the fine-tuning settings that differ from the defaults; "default" when none does."""
    if backbone == MEAN_SHAPE:
        return "default"
    defaults, foreign = Finetune(), foreign_keys(backbone)
    own_ssl = backbone in SSL_METHODS and getattr(config.finetune.encoder_weights, backbone) is None
    parts = [f"ssl-{config.ssl.preset}"] if own_ssl and config.ssl.preset != SSL().preset else []
    for key, short in VARIANT_KEYS.items():
        value, usual = getattr(config.finetune, key), getattr(defaults, key)
        if key in BY_BACKBONE:
            value, usual = getattr(value, backbone, None), getattr(usual, backbone, None)
        if key == "shape_prior" and value is None:
            value = "off"  # of the other keys null says that another one counts
        if value != usual and value is not None and key not in foreign:
            text = Path(value).stem if key in FILE_KEYS else str(value)
            parts.append(f"{short}-{text}")
    return "_".join(parts).replace("/", "-") or "default"


def cell_dir(config: Config, cell: Cell) -> Path:
    """runs/<experiment>/landmarks/<backbone>/<variant>/shots010_draw0_seed0."""
    return config.experiment_dir / "landmarks" / cell.backbone / variant(config, cell.backbone) / cell.folder


def is_scored(config: Config, cell: Cell) -> bool:
    """Whether the cell's metrics.json is there."""
    return (cell_dir(config, cell) / "metrics.json").is_file()


def needs_pretraining(config: Config) -> bool:
    """Whether the study's cells start from this study's own DDPM."""
    return "ddpm" in config.finetune.backbones and config.finetune.checkpoint is None


def ddpm_paths(config: Config) -> tuple[Path, ...]:
    """runs/<experiment>/ddpm/ema_iter004000.safetensors and so on: every configured EMA checkpoint."""
    folder = config.experiment_dir / "ddpm"
    return tuple(folder / f"ema_iter{i:06d}.safetensors" for i in config.ddpm.checkpoint_iterations)


def is_pretrained(config: Config) -> bool:
    """Whether every configured EMA checkpoint is there."""
    return all(path.is_file() for path in ddpm_paths(config))


def check_pretraining(config: Config) -> None:
    """UserError when the pre-training that is there was made with other settings."""
    keys = ("experiment.seed", "dataset", "unet", "ddpm")
    check_unchanged(config.experiment_dir / "ddpm", config, keys, PRETRAINING_FREE)


def ssl_dir(config: Config, method: str) -> Path:
    """runs/<experiment>/ssl/<method>, or <method>_<preset> for a preset that is not the default."""
    preset = config.ssl.preset
    return config.experiment_dir / "ssl" / (method if preset == SSL().preset else f"{method}_{preset}")


def encoder_path(config: Config, method: str) -> Path:
    """runs/<experiment>/ssl/<method>/encoder_iter010000.safetensors."""
    return ssl_dir(config, method) / f"encoder_iter{config.ssl.iterations:06d}.safetensors"


def check_ssl(config: Config, method: str) -> None:
    """UserError when the encoder that is there was pre-trained with other settings."""
    shared = [f"ssl.{key}" for key in SSL.model_fields if key not in SSL_METHODS]
    keys = ("experiment.seed", "dataset", "finetune.encoder", *shared, f"ssl.{method}")
    check_unchanged(ssl_dir(config, method), config, keys, SSL_FREE)


def check_cell(config: Config, cell: Cell) -> None:
    """UserError when the cell that is there was made, or is scored, with other settings that count for it."""
    if cell.backbone == MEAN_SHAPE:
        keys = ("dataset", "finetune.selection", "finetune.validation", *SCORING)
        check_unchanged(cell_dir(config, cell), config, keys, PLACES)
        return
    others = [f"finetune.{key}.{name}" for key in BY_BACKBONE for name in BACKBONES if name != cell.backbone]
    foreign = [f"finetune.{key}" for key in foreign_keys(cell.backbone)]
    network = ("unet",) if BACKBONES[cell.backbone] == "unet" else ()
    if cell.backbone == "ddpm" and config.finetune.checkpoint is None and config.finetune.pretraining_iteration is None:
        network += ("ddpm.checkpoint_iterations",)  # the last one is where it starts
    keys = ("experiment.seed", "dataset", *network, "finetune", *SCORING)
    check_unchanged(cell_dir(config, cell), config, keys, (*CELL_FREE, *others, *foreign))


def require_backbone(config: Config, backbone: str) -> None:
    """UserError where a detector cannot start from `backbone` under this config."""
    try:
        config.check_backbone(backbone)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_unchanged(run_dir: Path, config: Config, keys: Iterable[str], free: Iterable[str] = ()) -> None:
    """UserError when `run_dir` was made with other settings than `config` below `keys` (those in `free` may differ)."""
    path = run_dir / "config.json"
    if not path.is_file():
        return
    before = BEFORE_THE_KEY | _flat(json.loads(path.read_text(encoding="utf8")))
    now = _flat(config.plain())
    watched = [key for key in sorted(before.keys() & now.keys())
               if any(key == k or key.startswith(f"{k}.") for k in keys) and key not in free]
    changed = [key for key in watched if before[key] != now[key]]
    if changed:
        key = changed[0]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(f"{run_dir} was made with {key} = {json.dumps(before[key])}, now it is {json.dumps(now[key])}"
                        f"{more}; choose another experiment.name, or delete that folder to start over")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
