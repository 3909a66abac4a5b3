"""The runs of a study, one after the other, beside other processes that do the same."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Collection
from datetime import datetime
from pathlib import Path

from core.errors import Interrupted, UserError
from core.files import drop_states, write_json
from core.runs.claims import LOCK, Claimed, claim
from core.training.run_log import logged_below
from core.training.stop_signal import interruptible
from study.runs import Run
from study.timing import time_left

POLL_SECONDS = 5.0  # between two looks at what other processes hold
NEWS_SECONDS = 60.0  # between two lines about it


def perform(run: Run) -> None:
    """Train or score a run. Stages are imported where they are run: torch takes seconds, a finished study none."""
    match run.stage:
        case "pretrain":
            from ddpm_pretraining.train import pretrain

            pretrain(run.config)
        case "ssl":
            from ssl_baselines.train import pretrain_encoder

            pretrain_encoder(run.config, *run.arguments)
        case "mean_shape":
            from landmarks_finetuning.evaluate import evaluate_mean_shape

            evaluate_mean_shape(run.config, *run.arguments)
        case _:
            from landmarks_finetuning.evaluate import evaluate
            from landmarks_finetuning.train import finetune_cell

            evaluate(finetune_cell(run.config, *run.arguments), config=run.config)
            drop_states(run.folder)


def attempt(run: Run) -> str | None:
    """Train and score a run that is claimed; returns None, or why it failed, which failed.json says as well.

    An interruption passes. The one place that catches Exception: the runs of a study are independent, and what may end
    one (memory, a damaged file, a defect, each library with its own exceptions) has no common base. Nothing is hidden:
    the message is printed and listed, the traceback kept, and the launch ends in status 1.
    """
    try:
        with interruptible():
            perform(run)
        missing = [path.name for path in run.results if not path.is_file()]
        if missing:
            raise UserError(f"{run.folder} ended without {', '.join(missing)}")
        changes = run.stale() or run.outdated()
        if changes is not None:
            raise UserError(f"{run.folder}: the data changed while it ran: {changes}")
    except Interrupted:
        raise
    except Exception as error:  # noqa: BLE001
        said = " ".join(str(error).split())
        message, trace = said, None
        if not isinstance(error, UserError):
            message, trace = f"{type(error).__name__}: {said}", traceback.format_exc()
        write_json(run.failure_path, {
            "message": message, "time": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
            "step": logged_below(run.folder)[1], "traceback": trace})
    else:
        run.failure_path.unlink(missing_ok=True)
        return None
    gc.collect()  # here the traceback is gone: what it held of a GPU's memory is free for the next run
    return message


def failed_at(run: Run) -> int | None:
    """When failed.json was written, None where there is none."""
    return run.failure_path.stat().st_mtime_ns if run.failure_path.is_file() else None


def take(run: Run, failed_before: int | None) -> str | None:
    """Claim a run and do what is left of it; returns why it failed, here or meanwhile in another process.

    Raises Claimed when another process has it now.
    """
    with claim(run.folder):
        if run.done:
            return None
        if failed_at(run) not in (None, failed_before):
            return run.failure()
        reason = run.stale()
        if reason is not None:
            set_aside(run, reason)
        return attempt(run)


def set_aside(run: Run, reason: str) -> Path:
    """Move what lies in the claimed folder of a stale run to runs/<experiment>/stale/<time>/...; returns its place."""
    home = run.config.experiment_dir
    target = home / "stale" / f"{datetime.now():%Y%m%d-%H%M%S}" / run.folder.relative_to(home)
    target.mkdir(parents=True)
    for path in run.folder.iterdir():
        if path.name != LOCK:
            path.rename(target / path.name)
    write_json(target / "stale.json", {"folder": str(run.folder), "reason": reason})
    print(f"set aside: {run.folder} is now {target}: {reason}", flush=True)
    return target


def run_all(runs: list[Run], failed_before: dict[Path, int | None]) -> dict[Path, str]:
    """Do what is left of `runs`, beside other processes that may do the same; returns {folder: why it failed}.

    What another process holds is left to it and looked at again when nothing else is left; what it leaves undone,
    because it was killed, is done here; what failed there since `failed_before` counts as failed. What needs a run
    waits for it, or fails with it.
    """
    failed: dict[Path, str] = {}
    claimed: dict[Run, str] = {}  # and by whom
    news = 0.0
    while remaining := [run for run in runs if not run.done and run.folder not in failed]:
        claimed = {}
        for run in remaining:
            if any(other.folder in run.needs and other.folder not in failed and not other.done for other in remaining):
                continue
            try:
                missing = [folder for folder in run.needs if folder in failed]
                why = f"it needs {missing[0]}" if missing else take(run, failed_before[run.folder])
            except Claimed as other:
                claimed[run] = str(other)
                continue
            if why is not None:
                failed[run.folder] = why
                print(f"failed: {run.folder}: {why}", file=sys.stderr, flush=True)
            print_progress(runs, failed)
            news = 0.0
        if claimed and not any(run.done or run.folder in failed for run in remaining):
            if time.monotonic() >= news:
                print_waiting(claimed, len(remaining))
                news = time.monotonic() + NEWS_SECONDS
            time.sleep(POLL_SECONDS)
    if claimed:  # until others had done the last ones
        print_progress(runs, failed)
    return failed


def print_progress(runs: list[Run], failed: Collection[Path]) -> None:
    """How many runs are done and how long the others take."""
    remaining = [run for run in runs if not run.done and run.folder not in failed]
    done = sum(run.done for run in runs)
    print(f"done {done} of {len(runs)} runs; training time to come: {time_left(remaining)}", flush=True)


def print_waiting(claimed: dict[Run, str], remaining: int) -> None:
    """What is waited for, who does it, and how far it is."""
    run, owner = next(iter(claimed.items()))
    step = f"step {logged_below(run.folder)[1]} of {run.steps}"
    doing = step if run.steps else "scoring"
    print(f"waiting for other processes, {remaining} runs left: {doing}; {owner}", flush=True)
