"""Commands in children of this process, struck by kill -9 after so many of their writes, and what they leave.

A moment is a number of writes since the start (files opened for writing, renamed or deleted, folders made), which an
audit hook of the interpreter counts, and a time after that. So most moments lie where files are being written, and no
code of the command is changed. Children are forked from a process that has imported everything, and so are a launcher's
workers: an interpreter that starts would take most of the time.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

from core.errors import UserError, run_command
from core.files import LEFT_BEHIND, walk
from core.formats.pickles import read_pickle
from core.runs.claims import LOCK
from core.training.state import CHECKSUM
from study import runner, workers

PR_SET_CHILD_SUBREAPER = 36
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}
SECONDS, PATIENCE_SECONDS, CRASHED = 120.0, 20.0, 70
TIMED = {"seconds", "images_per_second", "time", "mtime_ns"}
UNLIKE = {"logs", "tensorboard", "report"}  # folders whose files hold times
Whom = Literal["alone", "group", "workers too"]


class Strike(NamedTuple):
    """kill -9 of a `process` ("" the command itself, else a worker's name): `seconds` after its `writes`-th write."""

    process: str
    writes: int
    seconds: float
    whom: Whom = "alone"

    def fire(self) -> None:
        """What happens then."""
        if self.whom == "workers too":
            for worker in multiprocessing.active_children():
                worker.kill()
        if self.whom == "group":
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


NEVER = Strike("", -1, 0)


def arm(strike: Strike, counted: Callable[[], int]) -> None:
    """Have this process struck; `counted()` adds one to its writes and returns them."""

    def begin() -> None:
        if strike.seconds:
            timer = threading.Timer(strike.seconds, strike.fire)
            timer.daemon = True
            timer.start()
        else:
            strike.fire()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (event in CHANGES or (event == "open" and _writes(*arguments))) and counted() == strike.writes:
            begin()

    own = os.getpid()
    sys.addaudithook(lambda event, arguments: hook(event, arguments) if os.getpid() == own else None)
    if not strike.writes:
        begin()


def _writes(path: Any, _mode: Any, flags: Any) -> bool:
    new = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
    return bool(new) and isinstance(path, str | os.PathLike) and "__pycache__" not in os.fspath(path)


class ForkedWorkers:
    """In place of study.workers' multiprocessing: workers are forked, and armed by their names."""

    def __init__(self, strikes: Sequence[Strike]) -> None:
        self.strikes = strikes

    def get_context(self, _method: str) -> ForkedWorkers:
        """Where a launcher asks how to start workers."""
        return self

    def Process(self, target: Callable[..., None], name: str, args: tuple[Any, ...]) -> Any:  # noqa: N802
        """One of them, not started."""
        return multiprocessing.get_context("fork").Process(target=self.obey, name=name, args=(target, args))

    def obey(self, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """What it does."""
        for strike in self.strikes:
            writes = count(1)
            if strike.process and multiprocessing.current_process().name.startswith(strike.process):
                arm(strike, lambda writes=writes: next(writes))  # type: ignore[misc]
        target(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(multiprocessing, name)


class Ended(NamedTuple):
    """How a command ended: its status (-9 where it was struck, None where it was stuck), what it said, its writes."""

    status: int | None
    said: str
    writes: int

    @property
    def killed(self) -> bool:
        """Whether the command itself was."""
        return self.status == -signal.SIGKILL


class Child:
    """`python -m module arguments`, begun in a fork of this process, in a process group of its own."""

    def __init__(self, log: Path, module: str, *arguments: str, strikes: Sequence[Strike] = ()) -> None:
        self.log, self.count = log, multiprocessing.get_context("fork").Value("q", 0)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._obey(module, arguments, strikes)
            finally:
                os._exit(CRASHED)  # _obey ends by itself

    def _obey(self, module: str, arguments: Sequence[str], strikes: Sequence[Strike]) -> None:
        os.setpgid(0, 0)
        with self.log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: PTH123, SIM115
        runner.POLL_SECONDS = 0.2
        sys.argv = [module, *arguments]
        workers.multiprocessing = ForkedWorkers(strikes)  # type: ignore[assignment]
        arm(next((strike for strike in strikes if not strike.process), NEVER), self._counted)
        status = 0
        try:
            run_command(importlib.import_module(module).main)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:  # noqa: BLE001  what Python would do
            sys.excepthook(*sys.exc_info())
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _counted(self) -> int:
        self.count.value += 1
        return self.count.value

    def wait(self, seconds: float = SECONDS) -> Ended:
        """Its end; it is killed where it takes longer."""
        end, status = time.monotonic() + seconds, None
        while True:
            pid, ended = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                status = os.waitstatus_to_exitcode(ended)
                break
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                break
            time.sleep(0.005)
        return Ended(status, self.log.read_text(errors="backslashreplace"), self.count.value)


def adopt_orphans() -> None:
    """Have processes whose parents were killed become children of this one, so that none goes unseen."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise UserError("this system has no PR_SET_CHILD_SUBREAPER: orphans cannot be counted")


def children() -> set[int]:
    """The processes that this one has made or adopted."""
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def orphans(own: set[int]) -> int:
    """How many adopted processes, all but the `own` ones, have not ended after a while; those are killed."""
    end = time.monotonic() + PATIENCE_SECONDS
    while living := [pid for pid in children() - own if os.waitpid(pid, os.WNOHANG)[0] == 0]:
        if time.monotonic() > end:
            for pid in living:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return len(living)
        time.sleep(0.02)
    return 0


def left_over(*folders: Path) -> list[str]:
    """Temporary files and folders, and locks, that nobody needs any more."""
    return [entry.path for folder in folders if folder.is_dir() for entry in walk(folder)
            if entry.name == LOCK or entry.name.endswith(".tmp") or LEFT_BEHIND.fullmatch(entry.name)]


def contents(*folders: Path) -> dict[str, Any]:
    """{path: what it holds, less times} of all files below folders but those of UNLIKE."""
    found: dict[str, Any] = {}
    for folder in folders:
        for entry in walk(folder):
            path = Path(entry.path)
            if entry.is_file() and not UNLIKE.intersection(path.parts):
                found[entry.path] = _content(path)
    return found


def same(found: Any, whole: Any) -> bool:
    """Whether a file holds the same.

    An older state is one, too: who has its last weights does not save once more. A worker whose launcher is killed
    saves at another step, and logs that: a log with more lines must have all steps.
    """
    if isinstance(found, list) and isinstance(whole, list) and len(found) > len(whole):
        return {line["step"] for line in whole} <= {line["step"] for line in found}
    if isinstance(found, State) and isinstance(whole, State):
        return found.step < whole.step or found == whole
    return bool(found == whole)


class State(NamedTuple):
    """What a last.pt holds: the checksum is of all of it."""

    step: int
    checksum: int


def _content(path: Path) -> Any:
    if path.suffix == ".pt":
        state = read_pickle(path)
        return State(state["step"], state[CHECKSUM])
    if path.suffix == ".jsonl":
        return [_untimed(json.loads(line)) for line in path.read_text().splitlines()]
    return _untimed(json.loads(path.read_bytes())) if path.suffix == ".json" else path.read_bytes()


def _untimed(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _untimed(value) for key, value in values.items() if key not in TIMED}
    return [_untimed(value) for value in values] if isinstance(values, list) else values


def copy_of(source: Path, target: Path) -> None:
    """`source` in place of `target`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
