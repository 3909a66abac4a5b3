"""What a run was made from, and whether it may stand for the config that is asked for now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core.config.config import Config
from core.config.section import Run
from core.config.settings import all_settings, counting_for
from core.errors import UserError
from core.formats.json_files import read_object
from core.runs.places import Cell, cell_dir, ssl_dir


def check_pretraining(config: Config) -> None:
    """UserError when the pre-training that is there was made with other settings."""
    check_unchanged(config.experiment_dir / "ddpm", config, counting_for("pretraining", "ddpm"))


def check_ssl(config: Config, method: str) -> None:
    """UserError when the encoder that is there was pre-trained with other settings."""
    check_unchanged(ssl_dir(config, method), config, counting_for("ssl", method))


def check_cell(config: Config, cell: Cell) -> None:
    """UserError when the cell that is there was made, or is scored, with other settings that count for it."""
    keys = counting_for("training", cell.backbone) | counting_for("scoring", cell.backbone)
    if config.finetune.checkpoint is not None or config.finetune.pretraining_iteration is not None:
        keys -= {"ddpm.checkpoint_iterations"}  # whose last one is where a cell starts that names no other
    check_unchanged(cell_dir(config, cell), config, keys)


def scoring_settings(config: Config, backbone: str, decoder: str | None = None) -> dict[str, Any]:
    """{key: value} of the settings that decide a score of `backbone`, with `decoder` in place of the config's."""
    values = _flat(config.plain())
    settings = {key: values[key] for key in sorted(counting_for("scoring", backbone))}
    return settings | ({} if decoder is None else {"finetune.decoder": decoder})


def training_settings(config: Config, stage: Run, backbone: str) -> dict[str, Any]:
    """{key: value} of the settings of which another value makes another run of this stage.

    Without files, whose places do not count, and what says where they come from: see core.runs.inputs.
    """
    values, settings = _flat(config.plain()), all_settings()
    keys = {key for key in counting_for(stage, backbone) & values.keys() if not settings[key].is_file}
    return {key: values[key] for key in sorted(keys - {"ddpm.checkpoint_iterations"})}


def check_unchanged(run_dir: Path, config: Config, keys: frozenset[str]) -> None:
    """UserError when `run_dir` was made with another value of one of `keys` than `config` has.

    DamagedFile where what it was made with cannot be read.
    """
    path = run_dir / "config.json"
    if not path.is_file():
        return
    older = {key: each.before for key, each in all_settings().items() if each.before is not None}
    before = older | _flat(read_object(path, "delete its folder to make that run again"))
    now = _flat(config.plain())
    changed = [key for key in sorted(before.keys() & now.keys() & keys) if before[key] != now[key]]
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
