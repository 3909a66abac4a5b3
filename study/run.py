"""A whole study: pre-train, fine-tune every cell, score it, report. What is done is not done again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from core.config.config import Config
from core.errors import RunsFailed
from study.check.launched import check_launch
from study.ending import ending
from study.leftovers import clear
from study.prepare import check_device, data_stamp, prepare, remember
from study.report_page import report_page
from study.runner import failed_at, run_all
from study.runs import Run, study_runs

Do = Callable[[list[Run], dict[Path, int | None]], dict[Path, str]]


def failures_so_far(config: Config, stages: tuple[str, ...]) -> dict[Path, int | None]:
    """When each run of the study failed last: what failed since then failed in this launch."""
    return {run.folder: failed_at(run) for run in study_runs(config, stages)}


def run_study(config: Config, stages: tuple[str, ...], do: Do | None = None,
              failed_before: dict[Path, int | None] | None = None) -> Path | None:
    """Run what is left of `stages` and say how it ended; returns the report's page when there is one.

    `do` is run_all or something like it; `failed_before` the failures_so_far of the launch that this process belongs
    to, None where it is one by itself. Raises UserError before anything is run when the study cannot be run from end to
    end, and RunsFailed after the rest is done and reported when single runs failed.
    """
    alone = failed_before is None
    failed_before = failures_so_far(config, stages) if failed_before is None else failed_before
    runs = prepare(config, stages)
    if do is None:  # several processes look for their devices themselves
        check_device(runs)
    if alone:
        check_launch(config, stages, runs)
    digest = data_stamp(config.dataset)
    failed = (do or run_all)(runs, failed_before)
    clear(config, runs)
    if not failed:
        remember(config.experiment_dir, digest, runs)
    worth = not failed or any(run.done for run in runs)
    listed = "".join(f"\n  {folder}: {why}" for folder, why in failed.items())
    failures = f"{len(failed)} of {len(runs)} runs failed; the same command tries them again{listed}"
    reported = False
    try:
        page = report_page(config.experiment_dir) if "report" in stages and worth else None
        reported = True
        if page is not None:
            own = Path(config.dataset.root) if config.dataset.layout == "folder" else None
            print("\n".join(ending(config.experiment_dir, page, own)), flush=True)
    finally:
        if failed and not reported:  # what ends the report does not hide them
            print(failures, file=sys.stderr, flush=True)
    if failed:
        raise RunsFailed(failures)
    return page
