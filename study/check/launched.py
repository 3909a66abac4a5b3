"""The check as a launch does it: a short text, once for a state of the data, and never a reason not to go on."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from core.config.config import Config
from core.files import write_atomically
from study.prepare import data_stamp
from study.runs import Run

FOLDER, TEXT, STAMP = "check", "check.txt", "stamp"  # the folder lies in the experiment's


def check_launch(config: Config, stages: tuple[str, ...], runs: list[Run]) -> None:
    """Print the short text of the check, and write its page beside the experiment; nothing where all runs are done.

    What was said of the same data is said again from the file, without looking again.
    """
    if all(run.done for run in runs):
        return
    folder, stamp = config.experiment_dir / FOLDER, _stamp(config, runs)
    if not _said(folder, stamp):
        try:
            _look(config, stages, runs, folder, stamp)
        except Exception as error:  # noqa: BLE001  whatever it is: the check is no reason not to train
            print(f"note: the data were not checked ({type(error).__name__}: {' '.join(str(error).split())}); "
                  "python -m study.check says more", file=sys.stderr)
            return
    print((folder / TEXT).read_text(encoding="utf8"), end="", flush=True)


def tell_check(config: Config, runs: list[Run], command: str) -> None:
    """Print what a launch's check said of the same data, or that `command` looks at them. It takes no time itself."""
    folder = config.experiment_dir / FOLDER
    if all(run.done for run in runs):
        return
    if _said(folder, _stamp(config, runs)):
        print((folder / TEXT).read_text(encoding="utf8"), end="", flush=True)
    else:
        print(f"check  not done: {command} looks at the data and at what a study of them costs; a launch does, too")


def _stamp(config: Config, runs: list[Run]) -> str:
    """Of the data and of what is done with them: the check says the same of the same."""
    made_of = f"{data_stamp(config.dataset)} {[(run.kind, run.steps) for run in runs]}"
    return hashlib.sha256(made_of.encode()).hexdigest()


def _look(config: Config, stages: tuple[str, ...], runs: list[Run], folder: Path, stamp: str) -> None:
    """Check, and leave page, text and stamp in `folder`."""
    from core.data.source import load_source  # imports for seconds
    from study.check.cost import cost_of
    from study.check.overview import overview
    from study.check.page import write_page

    source = load_source(config.dataset)
    found = overview(config, source, cost_of(config, stages, runs))
    write_page(folder / "index.html", config, source, found)
    text = "\n".join(found.lines()) + f"\ncheck  {folder / 'index.html'}\n"
    write_atomically(folder / TEXT, text.encode())
    write_atomically(folder / STAMP, stamp.encode())


def _said(folder: Path, stamp: str) -> bool:
    path = folder / STAMP
    return path.is_file() and (folder / TEXT).is_file() and path.read_text(encoding="utf8") == stamp
