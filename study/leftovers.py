"""What killed processes have left of a study: temporary files, claims that nobody holds, states of scored runs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from core.config.config import Config
from core.files import drop_left_behind, drop_states
from core.runs.claims import LOCK, Claimed, claim
from study.runs import Run


def clear(config: Config, runs: list[Run]) -> None:
    """Delete it; what a running process holds stays."""
    for run in runs:
        scored = run.stage == "finetune" and all(path.is_file() for path in run.results)
        if (run.folder / LOCK).is_file() or (scored and any(run.folder.rglob("*.pt"))):
            with suppress(Claimed), claim(run.folder):
                (run.folder / ".previous.tmp").unlink(missing_ok=True)
                if scored and run.done:
                    drop_states(run.folder)
    for folder in (config.experiment_dir, config.dataset.cache_dir):
        if folder is not None and Path(folder).is_dir():
            drop_left_behind(Path(folder))
