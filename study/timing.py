"""How long the rest of a study takes, by the steps that its own runs have timed."""

from __future__ import annotations

from core.config.starts import BACKBONES
from core.training.run_log import logged_below
from study.runs import Run


def steps_left(run: Run) -> int:
    """Optimiser steps until a run is done, at most; a stale one starts over, one to be scored again takes none."""
    if run.stale() is not None:
        return run.steps
    return 0 if run.ended else max(0, run.steps - logged_below(run.folder)[1])


def seconds_per_step(kind: str, runs: list[Run]) -> float | None:
    """Mean over what was done of `kind`, finished or begun, whatever the shots; None when nothing was measured.

    Of fine-tuning in the variants of `runs`, or, for the diffusion U-Net, where these are all new, in its other ones.
    """
    folders = {run.folder if run.stage != "finetune" else run.folder.parent for run in runs if run.kind == kind}
    similar = [folders]
    if BACKBONES.get(kind) == "unet":
        similar.append({path for folder in folders for path in folder.parent.glob("*")})
    for some in similar:
        measured = [logged_below(folder) for folder in some]
        steps = sum(count for _, count in measured)
        if steps:
            return sum(seconds for seconds, _ in measured) / steps
    return None


def time_left(runs: list[Run]) -> str:
    """How long one process trains for what is left of `runs`, from the rates of this study; scoring is not counted."""
    steps: dict[str, int] = {}
    for run in runs:
        left = steps_left(run)
        if left:
            steps[run.kind] = steps.get(run.kind, 0) + left
    rates = {kind: seconds_per_step(kind, runs) for kind in steps}
    known = [steps[kind] * rate for kind, rate in rates.items() if rate is not None]
    parts = [f"about {duration(sum(known))}"] if known or not steps else []
    unknown = [f"{count} steps of {kind}" for kind, count in steps.items() if rates[kind] is None]
    parts += [f"{', '.join(unknown)} (no run measured yet)"] if unknown else []
    return " and ".join(parts)


def duration(seconds: float) -> str:
    """90 s, 25 min or 3.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
