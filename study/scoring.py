"""Trained runs scored by a second process while this one trains the next on a GPU.

A process and not a thread: the training loop launches a step's work from Python in a few milliseconds, and beside a
thread that draws pictures and writes tables it would wait for the interpreter at each of its calls. What is scored is
read from the run's files by the same function as without it, so that the results are the same.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from typing import NamedTuple

from study.runs import Run

MOST_WAITING = 2  # trained runs, each of which is claimed until it is scored
PATIENCE_SECONDS = 10.0  # for a process that ends by itself


class Failure(NamedTuple):
    """Why a run failed, and the traceback where that is not a user's mistake."""

    message: str
    traceback: str | None = None


Outcome = Callable[[Run], Failure | None]


class Scorer:
    """A process that scores, started with the first run that is handed over; it ends with this one, however that ends.

    `score` is called there with each run, in turn. Claims are kept until a run's outcome was looked at; leaving the
    block ends the process and releases them: a run whose scoring was cut is scored by the next launch.
    """

    def __init__(self, score: Outcome) -> None:
        self.score = score
        self.waiting: deque[tuple[Run, ExitStack]] = deque()
        self.process: SpawnProcess | None = None
        self.pipe: connection.Connection | None = None

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(0.0 if self.waiting else PATIENCE_SECONDS)
        while self.waiting:
            self.waiting.popleft()[1].close()

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self.process is not None

    def holds(self, run: Run) -> bool:
        """Whether `run` was handed over and its outcome not yet taken."""
        return any(each.folder == run.folder for each, _ in self.waiting)

    def hand_over(self, run: Run, claims: ExitStack) -> None:
        """Have `run` scored after those before it; `claims` are closed when its outcome has been taken."""
        if not self.waiting and self.process is not None and not self.process.is_alive():
            self.end(PATIENCE_SECONDS)  # killed while it had nothing to do
        self.waiting.append((run, claims))
        with suppress(BrokenPipeError):  # it was killed: `outcomes` sees to it
            self._started().send(run)

    def outcomes(self, most_waiting: int) -> Iterator[tuple[Run, Failure | None]]:
        """The outcome of each run that is scored by now; waits until at most `most_waiting` are left."""
        while self.waiting and (len(self.waiting) > most_waiting or self._started().poll()):
            run = self.waiting[0][0]
            try:
                failure = self._started().recv()
            except (EOFError, ConnectionError):
                failure = Failure(f"the process that scored it {self.end(PATIENCE_SECONDS)}")
                for later, _ in list(self.waiting)[1:]:
                    self._started().send(later)
            with self.waiting.popleft()[1]:
                yield run, failure

    def _started(self) -> connection.Connection:
        if self.pipe is None:
            spawning = multiprocessing.get_context("spawn")
            self.pipe, there = spawning.Pipe()
            self.process = spawning.Process(target=serve, name="scoring", args=(there, self.score), daemon=True)
            self.process.start()
            there.close()
        return self.pipe

    def end(self, patience_seconds: float) -> str:
        """End the process if it has not ended after this time; returns how it ended, in words."""
        if self.process is None or self.pipe is None:
            return "was not there"
        self.pipe.close()
        self.process.join(patience_seconds)
        self.process.kill()  # no use where it has ended
        self.process.join()
        code, self.process, self.pipe = self.process.exitcode or 0, None, None
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def serve(pipe: connection.Connection, score: Outcome) -> None:
    """What the process does: the outcome of each run that comes, until none will come or the one that asks is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the one that asks, which ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            run = pipe.recv()
        except EOFError:
            return
        pipe.send(score(run))


def _end_with_parent() -> None:
    """End at once when the other process was killed: its claims are free, and others may have taken the run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
