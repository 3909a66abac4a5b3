"""The runs of a study, one after the other, beside other processes that do the same."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path

from core.errors import Interrupted, UserError
from core.files import drop_states, write_json
from core.runs.claims import LOCK, Claimed, claim
from core.training.run_log import logged_below
from core.training.stop_signal import interruptible
from study.runs import Run
from study.scoring import MOST_WAITING, Failure, Scorer
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
        case "pool":
            from landmarks_finetuning.cross_validation import pool

            pool(run.config, *run.arguments)
        case _:
            train_cell(run)
            score_cell(run)


def train_cell(run: Run) -> None:
    """The first half of a fine-tuning run."""
    from landmarks_finetuning.train import finetune_cell

    finetune_cell(run.config, *run.arguments)


def score_cell(run: Run) -> None:
    """The second half of a fine-tuning run, for which its folder holds all that is needed."""
    from landmarks_finetuning.evaluate import evaluate

    evaluate(run.folder, config=run.config)
    drop_states(run.folder)


def outcome(work: Callable[[Run], None], run: Run) -> Failure | None:
    """work(run), and why it failed, None where it did not; an interruption passes.

    The one place that catches Exception: the runs of a study are independent, and what may end one (memory, a damaged
    file, a defect, each library with its own exceptions) has no common base. Nothing is hidden: the message is printed
    and listed, the traceback kept, and the launch ends in status 1. What continues an interrupted study is its launch.
    """
    try:
        with interruptible():
            work(run)
    except Interrupted as stop:
        raise Interrupted(stop.saved) from None
    except Exception as error:  # noqa: BLE001
        message = " ".join(str(error).split())
        failure = Failure(message) if isinstance(error, UserError) else Failure(
            f"{type(error).__name__}: {message}", traceback.format_exc())
    else:
        return None
    gc.collect()  # here the traceback is gone: what it held of a GPU's memory is free for the next run
    return failure


def score_beside(run: Run) -> Failure | None:
    """`score_cell` in the process that scores, which gives back what it took of a GPU."""
    failure = outcome(score_cell, run)
    release_gpu()
    return failure


def release_gpu() -> None:
    """Give the memory of a GPU that this process keeps for later to whoever needs it."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def check_results(run: Run) -> None:
    """UserError where a run that has ended lacks results, or has them from data that have changed meanwhile."""
    missing = [path.name for path in run.results if not path.is_file()]
    if missing:
        raise UserError(f"{run.folder} ended without {', '.join(missing)}")
    changes = run.stale() or run.outdated()
    if changes is not None:
        raise UserError(f"{run.folder}: the data changed while it ran: {changes}")


def attempt(run: Run) -> str | None:
    """Train and score a run that is claimed; returns None, or why it failed. An interruption passes."""
    return settled(run, outcome(perform, run))


def settled(run: Run, failure: Failure | None) -> str | None:
    """Write failed.json of a run that failed, or whose results are not as they should be; returns why, else None."""
    failure = failure or outcome(check_results, run)
    if failure is None:
        run.failure_path.unlink(missing_ok=True)
        return None
    with suppress(OSError):  # a full disk is why it failed, as the list of failures says
        write_json(run.failure_path, {
            "message": failure.message, "time": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
            "step": logged_below(run.folder)[1], "traceback": failure.traceback})
    return failure.message


def failed_at(run: Run) -> int | None:
    """When failed.json was written, None where there is none."""
    return run.failure_path.stat().st_mtime_ns if run.failure_path.is_file() else None


def take(run: Run, failed_before: int | None, scorer: Scorer | None = None) -> str | None:
    """Claim a run and do what is left of it; returns why it failed, here or meanwhile in another process.

    With `scorer`, a fine-tuning run is trained here and then handed over with its claim. Raises Claimed when another
    process has it now.
    """
    with ExitStack() as claims:
        claims.enter_context(claim(run.folder))
        if run.done:
            return None
        if failed_at(run) not in (None, failed_before):
            return run.failure()
        reason = run.stale()
        if reason is not None:
            set_aside(run, reason)
        if scorer is None or run.stage != "finetune":
            return attempt(run)
        failure = outcome(train_cell, run)
        if failure is not None:
            return settled(run, failure)
        scorer.hand_over(run, claims.pop_all())
        return None


def trains_on_gpu(run: Run) -> bool:
    """Whether the run trains on a GPU: there, what scores it would keep the GPU waiting."""
    if run.config.experiment.device == "cpu":
        return False
    from core.training.device import resolve_device  # imports for seconds

    return resolve_device(run.config.experiment.device).type == "cuda"


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


def run_all(runs: list[Run], failed_before: dict[Path, int | None], beside: bool | None = None) -> dict[Path, str]:
    """Do what is left of `runs`, beside other processes that may do the same; returns {folder: why it failed}.

    What another process holds is left to it and looked at again when nothing else is left; what it leaves undone,
    because it was killed, is done here; what failed there since `failed_before` counts as failed. What needs a run
    waits for it, or fails with it. `beside`: fine-tuning runs are scored by a process beside the training of the next
    ones; None = where they train on a GPU.
    """
    failed: dict[Path, str] = {}
    claimed: dict[Run, str] = {}  # and by whom
    news = 0.0
    with Scorer(score_beside) as scorer:
        while remaining := left_of(runs, failed):
            claimed = {}
            for run in remaining:
                take_outcomes(scorer, MOST_WAITING, runs, failed)
                if scorer.holds(run) or any(other.folder in run.needs for other in left_of(remaining, failed)):
                    continue
                try:
                    if missing := [folder for folder in run.needs if folder in failed]:
                        report_failed(run, f"it needs {missing[0]}", failed)
                    else:
                        helper = scorer if scored_beside(run, remaining, scorer, beside) else None
                        report_failed(run, take(run, failed_before[run.folder], helper), failed)
                except Claimed as other:
                    claimed[run] = str(other)
                    continue
                if not scorer.holds(run):
                    print_progress(runs, failed)
                news = 0.0
            if scorer.waiting and all(run in claimed or scorer.holds(run) for run in left_of(remaining, failed)):
                take_outcomes(scorer, len(scorer.waiting) - 1, runs, failed)
            elif claimed and not any(run.done or run.folder in failed for run in remaining):
                if time.monotonic() >= news:
                    print_waiting(claimed, len(remaining))
                    news = time.monotonic() + NEWS_SECONDS
                time.sleep(POLL_SECONDS)
        take_outcomes(scorer, 0, runs, failed)
    if claimed:  # until others had done the last ones
        print_progress(runs, failed)
    return failed


def left_of(runs: list[Run], failed: Collection[Path]) -> list[Run]:
    """Those of `runs` that are neither done nor failed."""
    return [run for run in runs if not run.done and run.folder not in failed]


def scored_beside(run: Run, remaining: list[Run], scorer: Scorer, beside: bool | None) -> bool:
    """Whether `run` is scored by another process: where one is there, or another run is to be trained meanwhile."""
    others = any(other.stage == "finetune" and other is not run and not scorer.holds(other) for other in remaining)
    if run.stage != "finetune" or not (scorer.running or others):
        return False
    return trains_on_gpu(run) if beside is None else beside


def take_outcomes(scorer: Scorer, most_waiting: int, runs: list[Run], failed: dict[Path, str]) -> None:
    """Settle what was scored beside the training; waits until at most `most_waiting` runs are not."""
    for run, failure in scorer.outcomes(most_waiting):
        if failure is not None and failure.message.startswith("OutOfMemoryError"):  # beside a training, not by itself
            release_gpu()
            failure = outcome(score_cell, run)
        report_failed(run, settled(run, failure), failed)
        print_progress(runs, failed)


def report_failed(run: Run, why: str | None, failed: dict[Path, str]) -> None:
    """Say and note that a run failed; nothing where it did not (None)."""
    if why is not None:
        failed[run.folder] = why
        print(f"failed: {run.folder}: {why}", file=sys.stderr, flush=True)


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
