"""Training states that survive crashes: last.pt, and previous.pt, the one before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from core.background import snapshot, written
from core.errors import UserError
from core.files import atomic_file
from core.formats.pickles import read_pickle


def save_state(run_dir: Path, state: dict[str, Any]) -> None:
    """Save everything stateful as last.pt; what last.pt was becomes previous.pt. No moment is without a whole file."""
    written(_write_state, run_dir, snapshot(state))


def _write_state(run_dir: Path, state: dict[str, Any]) -> None:
    last = run_dir / "last.pt"
    with atomic_file(last) as file:
        torch.save(state, file)
        if last.exists():
            link = run_dir / ".previous.tmp"
            link.unlink(missing_ok=True)
            os.link(last, link)
            link.replace(run_dir / "previous.pt")


def load_state(run_dir: Path, which: str, resume_command: str) -> dict[str, Any]:
    """Read last.pt or previous.pt (`which`); a damaged last.pt ends in one line that offers previous.pt."""
    path = run_dir / f"{which}.pt"
    try:
        return read_pickle(path)
    except UserError as error:
        previous = run_dir / "previous.pt"
        if which == "last" and previous.is_file():
            step = read_pickle(previous)["step"]
            raise UserError(f"{error}; previous.pt (step {step}) is whole: continue from it with "
                            f"{resume_command} --resume previous") from None
        if path.is_file():
            raise UserError(f"{error}; no whole state is there: delete {path} to start this run over") from None
        raise
