"""What a run was made from, and whether it may stand for the config that is asked for now."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core.config.config import Config
from core.config.finetune import BACKBONES
from core.config.ssl import SSL, SSL_METHODS
from core.errors import UserError
from core.runs.places import BY_BACKBONE, MEAN_SHAPE, Cell, cell_dir, foreign_keys, ssl_dir

PLACES = ("dataset.root", "dataset.cache_dir", "dataset.phantom")  # the data may move between machines
PRETRAINING_FREE = (*PLACES, "ddpm.iterations", "ddpm.log_every", "ddpm.validate_every", "ddpm.sample_every",
                    "ddpm.save_every", "ddpm.sampler", "ddpm.sampling_steps", "ddpm.sample_count",
                    "ddpm.checkpoint_iterations")
SSL_FREE = (*PLACES, "ssl.workers", "ssl.log_every", "ssl.validate_every", "ssl.save_every")
CELL_FREE = (*PLACES, "finetune.backbones", "finetune.shots", "finetune.draws", "finetune.seeds", "finetune.log_every",
             "finetune.save_every", "finetune.decoder", "finetune.shape_prior", "finetune.losses",
             "finetune.transfer_from")
SCORING = ("evaluation.split", "evaluation.sdr_thresholds", "evaluation.leaked", "evaluation.window_overlap")
BEFORE_THE_KEY = {"evaluation.leaked": "keep"}  # what runs did whose config.json does not have it yet


def check_pretraining(config: Config) -> None:
    """UserError when the pre-training that is there was made with other settings."""
    keys = ("experiment.seed", "dataset", "unet", "ddpm")
    check_unchanged(config.experiment_dir / "ddpm", config, keys, PRETRAINING_FREE)


def check_ssl(config: Config, method: str) -> None:
    """UserError when the encoder that is there was pre-trained with other settings."""
    shared = [f"ssl.{key}" for key in SSL.model_fields if key not in SSL_METHODS]
    keys = ("experiment.seed", "dataset", "finetune.encoder", *shared, f"ssl.{method}")
    check_unchanged(ssl_dir(config, method), config, keys, SSL_FREE)


def check_cell(config: Config, cell: Cell) -> None:
    """UserError when the cell that is there was made, or is scored, with other settings that count for it."""
    if cell.backbone == MEAN_SHAPE:
        keys: tuple[str, ...] = ("dataset", "finetune.selection", "finetune.validation", *SCORING)
        check_unchanged(cell_dir(config, cell), config, keys, PLACES)
        return
    others = [f"finetune.{key}.{name}" for key in BY_BACKBONE for name in BACKBONES if name != cell.backbone]
    foreign = [f"finetune.{key}" for key in foreign_keys(cell.backbone)]
    network: tuple[str, ...] = ("unet",) if BACKBONES[cell.backbone] == "unet" else ()
    if cell.backbone == "ddpm" and config.finetune.checkpoint is None and config.finetune.pretraining_iteration is None:
        network += ("ddpm.checkpoint_iterations",)  # the last one is where it starts
    keys = ("experiment.seed", "dataset", *network, "finetune", *SCORING)
    check_unchanged(cell_dir(config, cell), config, keys, (*CELL_FREE, *others, *foreign))


def scoring_settings(config: Config, decoder: str | None = None) -> dict[str, Any]:
    """{key: value} of the settings that decide a score, with `decoder` in place of the config's."""
    values = _flat(config.plain())
    settings = {key: values[key] for key in (*SCORING, "finetune.decoder", "finetune.shape_prior")}
    return settings | ({} if decoder is None else {"finetune.decoder": decoder})


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
