"""Files written in a thread, in the order they were given, while a GPU goes on training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MOST_WAITING = 2  # writes, each with a copy of what it writes in memory


class Writer:
    """One thread. What a write raises is raised by the next call, at the latest by `finish`."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.waiting: deque[Future[None]] = deque()

    def write(self, function: Callable[..., None], *arguments: Any) -> None:
        """function(*arguments) after the writes given so far; waits while more than MOST_WAITING are not done."""
        while self.waiting and (self.waiting[0].done() or len(self.waiting) >= MOST_WAITING):
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(function, *arguments))

    def finish(self) -> None:
        """Return when all is written."""
        while self.waiting:
            self.waiting.popleft().result()


_writers: list[Writer] = []


@contextmanager
def writing_in_background(apply: bool) -> Iterator[None]:
    """Within it, where `apply`, `written` hands over to a thread; all is written when it ends, well or not."""
    if not apply:
        yield
        return
    writer = Writer()
    _writers.append(writer)
    try:
        yield
    finally:
        _writers.remove(writer)
        try:
            writer.finish()
        finally:
            writer.pool.shutdown()


def written(function: Callable[..., None], *arguments: Any) -> None:
    """function(*arguments), now or in the background; the arguments must be `snapshot`s, which nothing changes."""
    if _writers:
        _writers[-1].write(function, *arguments)
    else:
        function(*arguments)


def finish_writing() -> None:
    """Return when all that was given to the background is in its files."""
    for writer in _writers:
        writer.finish()


def snapshot(values: Any) -> Any:
    """Nested `values` with every tensor on the CPU; those of a GPU are copies, at the speed of pinned memory."""
    copied = _copied(values)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copied


def _copied(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _copied(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(map(_copied, values))
    if not isinstance(values, Tensor) or not values.is_cuda:
        return values
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values.detach(), non_blocking=True)
