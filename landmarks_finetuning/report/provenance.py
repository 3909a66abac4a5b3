"""What a run started from: the data set and the iteration of its pre-training, read from its config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from core.errors import DamagedFile, UserError
from core.files import parse_json
from core.formats.json_files import read_object
from core.training.run_log import read_metrics

UNKNOWN = "unknown"
ITERATION = re.compile(r"(?:iter|step)(\d+)$")  # ema_iter008000, ema_model_epoch800_step6000


def starting_point(folder: Path, backbone: str) -> dict[str, Any]:
    """{"pretraining_dataset", "pretraining_iteration", "validation_mre"} of the run in `folder`; None where not known.

    The iteration is 0 from scratch, of a given checkpoint the one in its name; data set and iteration are the diffusion
    model's only. validation_mre is the one logged at the step that was kept, that of the lowest validation loss.
    """
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "validation_loss" in line]
    best = min(lines, key=lambda line: line["validation_loss"], default={})
    start = {"pretraining_dataset": None, "pretraining_iteration": 0 if backbone == "scratch" else None,
             "validation_mre": best.get("validation_mre")}
    path = folder / "config.json"
    if backbone != "ddpm" or not path.is_file():
        return start
    config = config_of(path)
    finetune, checkpoints = config.get("finetune", {}), config.get("ddpm", {}).get("checkpoint_iterations")
    if finetune.get("checkpoint"):
        path = Path(finetune["checkpoint"])
        named = ITERATION.search(path.stem)
        return start | {"pretraining_dataset": checkpoint_dataset(path),
                        "pretraining_iteration": int(named.group(1)) if named else None}
    iteration = finetune.get("pretraining_iteration") or max(checkpoints or [0]) or None
    return start | {"pretraining_dataset": config.get("dataset", {}).get("name"), "pretraining_iteration": iteration}


def config_of(path: Path) -> dict[str, Any]:
    """A config.json whose run stands without it too; empty where there is none, or it is damaged."""
    try:
        return read_object(path, "") if path.is_file() else {}
    except DamagedFile:
        return {}


def checkpoint_dataset(path: Path) -> str:
    """The data set a weights file was pre-trained on: as its header says, else by its place, else "unknown".

    Places: <experiment>/ddpm/<file> of ours, where the experiment stands for its data set, and DDPM/<data set>/<file>
    of the published ones. Raises UserError for a .safetensors file that cannot be read.
    """
    if path.suffix == ".safetensors" and path.is_file():
        try:
            with safe_open(path, framework="np") as file:
                header = parse_json((file.metadata() or {}).get("header", "{}"))
            name = header.get("config", {}).get("dataset", {}).get("name")
        except (SafetensorError, ValueError, AttributeError, OSError) as error:
            raise UserError(f"{path} is truncated or not a weights file ({error})") from None
        if name:
            return str(name)
    if path.parent.name == "ddpm":
        return path.parent.parent.name
    return path.parent.name if path.parent.parent.name == "DDPM" else UNKNOWN
