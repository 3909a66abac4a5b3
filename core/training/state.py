"""Training states that survive crashes: last.pt, and previous.pt, the one before. One changed bit is noticed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from core.background import snapshot, written
from core.errors import UserError
from core.files import atomic_file
from core.formats.pickles import read_pickle
from core.networks.checksums import checksum_of

CHECKSUM = "checksum"  # of all else in a state; older ones have none


def save_state(run_dir: Path, state: dict[str, Any]) -> None:
    """Save everything stateful as last.pt; what last.pt was becomes previous.pt. No moment is without a whole file."""
    written(_write_state, run_dir, snapshot(state))


def _write_state(run_dir: Path, state: dict[str, Any]) -> None:
    last = run_dir / "last.pt"
    with atomic_file(last) as file:
        torch.save({**state, CHECKSUM: checksum_of(state)}, file)
        if last.exists():
            link = run_dir / ".previous.tmp"
            link.unlink(missing_ok=True)
            os.link(last, link)
            link.replace(run_dir / "previous.pt")
            link.unlink(missing_ok=True)  # renaming does nothing where both are one file, as after a kill just here


def load_state(run_dir: Path, which: str, resume_command: str) -> dict[str, Any]:
    """Read last.pt or previous.pt (`which`); a damaged last.pt ends in one line that offers previous.pt."""
    path = run_dir / f"{which}.pt"
    try:
        return _read_state(path)
    except UserError as error:
        previous = run_dir / "previous.pt"
        if which == "last" and previous.is_file():
            step = _read_state(previous)["step"]
            raise UserError(f"{error}; previous.pt (step {step}) is whole: continue from it with "
                            f"{resume_command} --resume previous") from None
        if path.is_file():
            raise UserError(f"{error}; no whole state is there: delete {path} to start this run over") from None
        raise


def _read_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote; UserError for a file of which one bit is another one, or that holds no state."""
    state = read_pickle(path)
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise UserError(f"{path} is damaged: it holds no training state")
    checksum = state.pop(CHECKSUM, None)
    if checksum not in (None, checksum_of(state)):
        raise UserError(f"{path} is damaged: what it holds does not have the checksum that was saved with it")
    return state


def check_identity(path: Path, state: Mapping[str, Any], identity: str, made_with: Mapping[str, Any]) -> None:
    """UserError where `state`, read from `path`, is that of another run; what an older state does not say counts not.

    `made_with` are the settings that make another run, by their keys.
    """
    saved = state.get("identity", identity)
    if saved != identity:
        raise UserError(f"{path} is the state of {saved}, not of {identity}; delete it to start this run over")
    before = state.get("made_with") or {}
    for key in sorted(before.keys() & made_with.keys()):
        old, new = (json.dumps(values[key]) for values in (before, made_with))
        if old != new:
            raise UserError(f"{path} is the state of a run with {key} = {old:.200}, not {new:.200}; delete it to start "
                            "this run over")


def fit_moments(optimizer: torch.optim.Optimizer, where: Path) -> None:
    """Lay restored moments out in memory as their parameters; UserError for one of another shape."""
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape not in (parameter.shape, torch.Size()):  # a scalar counts the parameter's steps
                raise UserError(f"{where} is damaged: {name} of a parameter of shape {list(parameter.shape)} has the "
                                f"shape {list(value.shape)}")
            if value.shape == parameter.shape and value.stride() != parameter.stride():  # saved on another device
                moments[name] = torch.empty_like(parameter).copy_(value)  # the fused AdamW takes memory as it lies
