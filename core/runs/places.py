"""Where the runs of a study lie on disk, and what their folders are called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core.config.config import Config
from core.config.finetune import Finetune
from core.config.ssl import SSL, SSL_METHODS

MEAN_SHAPE = "mean_shape"  # the guess without an image; not a backbone to train
VARIANT_KEYS = {"loss": "loss", "target": "target", "sigma": "sigma", "decoder": "decoder", "shape_prior": "prior",
                "timestep": "t", "pretraining_iteration": "iter", "checkpoint": "from", "encoder": "encoder",
                "encoder_weights": "weights", "iterations": "steps", "epochs": "epochs",
                "learning_rate": "lr", "validation": "val", "selection": "pick", "ema_decay": "ema",
                "batch_size": "batch", "scheduler": "schedule"}
FILE_KEYS = ("checkpoint", "encoder_weights")
OWN_KEYS = {"ddpm": ("timestep", "pretraining_iteration", "checkpoint"), "random": ("encoder",),
            **dict.fromkeys(("imagenet", *SSL_METHODS), ("encoder", "encoder_weights"))}  # for these backbones only
BY_BACKBONE = ("learning_rate", "encoder_weights")  # sections with a value for each backbone


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


def ddpm_paths(config: Config) -> tuple[Path, ...]:
    """runs/<experiment>/ddpm/ema_iter004000.safetensors and so on: every configured EMA checkpoint."""
    folder = config.experiment_dir / "ddpm"
    return tuple(folder / f"ema_iter{i:06d}.safetensors" for i in config.ddpm.checkpoint_iterations)


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
    iteration = finetune.pretraining_iteration or max(config.ddpm.checkpoint_iterations)
    return config.experiment_dir / "ddpm" / f"ema_iter{iteration:06d}.safetensors"


def start_path(config: Config, backbone: str) -> Path | None:
    """The weights file that a run of `backbone` starts from; None for random ones and for torchvision's."""
    if backbone == "ddpm":
        return pretrained_path(config)
    given = getattr(config.finetune.encoder_weights, backbone, None)
    if given is not None:
        return None if Path(given).is_dir() else Path(given)
    return encoder_path(config, backbone) if backbone in SSL_METHODS else None
