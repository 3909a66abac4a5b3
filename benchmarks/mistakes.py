"""Hundreds of mistakes and damages, one after the other: is each told in one line that names it?

A small study is made once. For each mistake it is put back, damaged, and a command is run in a child of this process,
which ends as `python -m` would. Counted are tracebacks (and crashes, and what takes longer than a minute), statuses
other than those expected, messages that do not name the file or key, and damages that pass in silence.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.bed import make_bed
from benchmarks.mistakes_table import COMMANDS, Mistake, mistakes
from core.errors import CommandParser, UserError, run_command
from core.files import content_digest

SECONDS, BYTES, NOBODY = 60, 12 * 2**30, 65534
REFUSED, FAILED = 2, 1
ENDS_BY_SIGNAL = 128
USED_LATE = ("encodings.utf_8_sig", "encodings.idna", "encodings.cp437", "matplotlib.pyplot",
             "matplotlib.backends.backend_agg", "torchvision.models", "torch._dynamo",
             "landmarks_finetuning.report.build", "study.report_page", "study.runner", "study.plan", "study.ending",
             "study.review.server", "tensorboard.summary.writer", "torch.utils.tensorboard")


class Outcome(NamedTuple):
    """How a command ended: its exit status, what it printed, and its peak memory in MiB."""

    status: int
    out: str
    err: str
    peak: float


def run_child(mistake: Mistake) -> Outcome:
    """The command of a mistake, in a child that has this process's imports and nothing else of it."""
    files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115  closed below
    child = os.fork()
    if child == 0:
        try:
            for number, file in enumerate(files, start=1):
                os.dup2(file.fileno(), number)
            _obey(mistake)
        finally:
            os._exit(ENDS_BY_SIGNAL)  # _obey ends by itself
    _, ended, usage = os.wait4(child, 0)
    said = []
    for file in files:
        file.seek(0)
        said.append(file.read().decode("utf-8", "backslashreplace"))
        file.close()
    return Outcome(os.waitstatus_to_exitcode(ended), said[0], said[1], usage.ru_maxrss / 1024)


def _obey(mistake: Mistake) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)  # its signal ends the process
    if mistake.as_nobody and os.getuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    command = COMMANDS[mistake.command]
    sys.argv = [command.module, *command.arguments, *mistake.typed]
    status = 0
    try:
        module = importlib.import_module(command.module)
        run_command(module.main if command.main is None else command.main)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001  what Python would do, said on the child's stderr
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def import_all() -> None:
    """All that commands import, once for all children: it takes seconds, and a child without rights cannot."""
    for name in (*(command.module for command in COMMANDS.values()), *USED_LATE):
        importlib.import_module(name)


def put_back(bed: Path, work: Path, own_files: bool = True, open_to_all: bool = False) -> None:
    """The study as it was made, in `work`, which becomes the working folder.

    Without `own_files` they are links, for commands that change no file in place, as the damages do not.
    """
    os.chdir(bed.parent)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(bed, work, symlinks=True, copy_function=shutil.copy2 if own_files or open_to_all else os.link)
    if open_to_all:
        for path in (work, *work.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
    os.chdir(work)


def results(command: str) -> str:
    """A digest of what a command wrote that counts."""
    return content_digest(*(path for pattern in COMMANDS[command].results for path in sorted(Path().glob(pattern))))


def faults(mistake: Mistake, outcome: Outcome, same: bool) -> list[str]:
    """What is wrong with the outcome of a mistake; nothing where it is as it should be."""
    text = outcome.err + outcome.out
    if "Traceback (most recent call last)" in text or outcome.status < 0 or outcome.status >= ENDS_BY_SIGNAL:
        return ["traceback"]
    named = any(name.lower() in text.lower() for name in mistake.names)
    found = []
    if outcome.status == 0 and not named and mistake.right != "any" and not (mistake.right == "same" and same):
        return ["silent"]
    statuses = {"refused": (REFUSED,), "failed": (FAILED, REFUSED)}.get(mistake.right, (0, FAILED, REFUSED))
    if outcome.status not in statuses:
        found.append("status")
    errors = re.findall(r"^error: ", outcome.err, re.MULTILINE)
    if outcome.status and (not named or len(errors) > 1):
        found.append("unnamed")
    if outcome.peak > mistake.most_mib:
        found.append("memory")
    return found


def try_all(chosen: Sequence[Mistake], folder: Path, show: bool, seconds: float
            ) -> list[tuple[Mistake, Outcome, list[str]]]:
    """Make the study, commit each mistake, and say what came of it."""
    bed, work = folder / "bed", folder / "work"
    import_all()
    child = os.fork()
    if child == 0:  # so that this process keeps no thread, cache or note of it
        os.dup2(os.open(folder / "made.txt", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        try:
            make_bed(work)
        except BaseException:  # noqa: BLE001
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise UserError(f"the study was not made: see {folder / 'made.txt'}")
    work.rename(bed)
    whole: dict[str, str] = {}
    for name in dict.fromkeys(mistake.command for mistake in chosen if mistake.right == "same"):
        put_back(bed, work)
        run_child(Mistake("nothing", name, "any", ()))
        whole[name] = results(name)
    done = []
    end = time.monotonic() + seconds
    for mistake in chosen:
        if time.monotonic() > end:
            break
        put_back(bed, work, COMMANDS[mistake.command].appends, mistake.as_nobody)
        for pattern, damage in mistake.damages:
            paths = sorted(Path().glob(pattern)) or [Path(pattern)]
            damage(paths[0])
        outcome = run_child(mistake)
        wrong = faults(mistake, outcome, mistake.right == "same" and results(mistake.command) == whole[mistake.command])
        done.append((mistake, outcome, wrong))
        if wrong or show:
            last = (outcome.err.strip() or outcome.out.strip() or "nothing said").splitlines()[-1]
            print(f"{' '.join(wrong) or 'right'} | {mistake.what} | {mistake.command} {' '.join(mistake.typed)[:90]} | "
                  f"{outcome.status} | {last[-300:]}", flush=True)
            if "traceback" in wrong:
                print("    " + "\n    ".join(outcome.err.strip().splitlines()[-7:-1]), flush=True)
    os.chdir(folder)
    return done


def main() -> None:
    """Command line."""
    parser = CommandParser(prog="python -m benchmarks.mistakes", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter,
                           epilog="example: python -m benchmarks.mistakes --only last.pt")
    parser.add_argument("--only", default="", metavar="TEXT", help="mistakes whose name or command holds this text")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each Nth of them")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="from number K, so that "
                        "--every N with K = 0 to N - 1 are all of them")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop; their order is drawn")
    parser.add_argument("--show", action="store_true", help="print what was right as well")
    arguments = parser.parse_args()
    chosen = [each for each in mistakes() if arguments.only in f"{each.what} {each.command}"]
    chosen = chosen[max(0, arguments.first)::max(1, arguments.every)]
    random.Random(0).shuffle(chosen)
    if not chosen:
        raise UserError(f'--only "{arguments.only}" --first {arguments.first}: there is no such mistake')
    before = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        done = try_all(chosen, Path(folder), arguments.show, arguments.seconds)
    counts = Counter(fault for _, _, wrong in done for fault in wrong)
    by_status = Counter(outcome.status for _, outcome, _ in done)
    print(f"{len(done)} of {len(chosen)} mistakes over {len({mistake.command for mistake, _, _ in done})} commands in "
          f"{time.monotonic() - before:.0f} s: {counts['traceback']} tracebacks, {counts['status']} wrong statuses, "
          f"{counts['unnamed']} messages without file or key, {counts['silent']} silent, {counts['memory']} too large; "
          f"statuses {dict(sorted(by_status.items()))}; largest peak {max(each.peak for _, each, _ in done):.0f} MiB")
    if counts:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
