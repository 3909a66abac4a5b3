"""SIGINT and SIGTERM as a wish that the training loop grants at the end of a step, and as an end that nothing swallows.

A KeyboardInterrupt may come anywhere, also where a library turns it into an error of its own (torch.save: RuntimeError)
or drops it (in a destructor). What is done here therefore ends as KeyboardInterrupt whatever became of the first one.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopSignal:
    """SIGINT and SIGTERM ask the loop to save and stop after the step in hand; the same one again stops at once.

    Unless `once`: in a job of several processes one wish may come twice, from the terminal or SLURM and from torchrun.
    """

    def __init__(self, once: bool = False) -> None:
        self.received: set[int] = set()
        self.at_once = False
        self.once, self.handlers = once, dict[int, Any]()

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number in self.received and not self.once:  # a worker may get SIGTERM by the system, SIGINT by its launcher
            self.at_once = True
            raise KeyboardInterrupt
        self.received.add(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.at_once:
            raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[None]:
    """A Ctrl-C in the block ends it as KeyboardInterrupt, never as another error; an ignored SIGINT stays ignored."""
    interrupted = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    usual = (threading.current_thread() is threading.main_thread()
             and signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    if usual:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if interrupted:
            raise KeyboardInterrupt
