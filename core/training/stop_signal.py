"""SIGINT and SIGTERM as a wish that the training loop grants at the end of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopSignal:
    """SIGINT and SIGTERM ask the loop to save and stop after the step in hand; the same one again stops at once.

    Unless `once`: in a job of several processes one wish may come twice, from the terminal or SLURM and from torchrun.
    """

    def __init__(self, once: bool = False) -> None:
        self.received: set[int] = set()
        self.once, self.handlers = once, dict[int, Any]()

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number in self.received and not self.once:  # a worker may get SIGTERM by the system, SIGINT by its launcher
            raise KeyboardInterrupt
        self.received.add(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
