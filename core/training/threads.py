"""How many threads compute on a CPU: on shared cores the threads of one step wait for each other, and fewer are faster.

Beside another busy process on one of two cores, two threads took ten times as long for a step as one: at the end of
each operation the faster one spins until the other gets its core back. So the choice is measured where a training
starts. A resumed run takes the number that it was begun with, for sums are rounded as the threads part them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

ROUNDS = 7  # of which the median counts
FEWEST, ENOUGH_SECONDS = 3, 0.5  # rounds of a number of threads that has taken so long
CLOSE = 1.05  # what is no slower than this times the fastest may use fewer threads
VALID_SECONDS = 600.0  # of a measurement, for the next trainings of this process
OPERATIONS = 12  # of a probe: some 20 ms for one thread, with a wait at the end of each, as in a training step
ASKED = "OMP_NUM_THREADS"
_measured: dict[str, tuple[float, int]] = {}  # when, and what was chosen


def use_threads(recorded: int | None = None) -> str:
    """Set how many threads compute in this process, and say which and why.

    OMP_NUM_THREADS, where the user has set it, is obeyed; then a resumed run's `recorded` number; else it is measured.
    """
    asked = os.environ.get(ASKED)
    if asked:
        count = torch.get_num_threads()  # torch has read it
        other = "" if recorded in (None, count) else (f"; the run was begun with {recorded}, so its numbers may now "
                                                      "differ by rounding")
        return f"threads: {count}, as {ASKED} says{other}"
    if recorded is not None:
        torch.set_num_threads(recorded)
        return f"threads: {recorded}, as this run was begun with; {ASKED} sets another number"
    before = _measured.get("fastest")
    if before is not None and time.monotonic() - before[0] < VALID_SECONDS:
        torch.set_num_threads(before[1])
        return f"threads: {before[1]}, as measured before"
    seconds = measure(candidates(len(os.sched_getaffinity(0))))
    count = fastest(seconds)
    torch.set_num_threads(count)
    _measured["fastest"] = time.monotonic(), count
    return f"threads: {count}; {explain(seconds)}"


def candidates(cores: int) -> list[int]:
    """1, 2, 4, ... and all of the `cores`."""
    return sorted({cores, *(2**power for power in range(cores.bit_length()) if 2**power < cores)})


def fastest(seconds: Mapping[int, Sequence[float]]) -> int:
    """The smallest number of threads whose median of `seconds` is next to the least of all."""
    if len(seconds) == 1:
        return next(iter(seconds))
    medians = {count: statistics.median(times) for count, times in seconds.items()}
    return min(count for count, median in medians.items() if median <= CLOSE * min(medians.values()))


def explain(seconds: Mapping[int, Sequence[float]]) -> str:
    """The measurement in words."""
    times = ", ".join(f"{1000 * statistics.median(each):.0f} ms with {count}" for count, each in seconds.items())
    return f"a probe took {times}" if len(seconds) > 1 else "the process may use one core"


def measure(counts: Sequence[int], probe: Callable[[], None] | None = None) -> dict[int, list[float]]:
    """Seconds of ROUNDS probes with each number of threads, in turn; one number alone is not measured."""
    probe = probe or convolutions()
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for turn in range(ROUNDS + 1 if len(counts) > 1 else 0):
        for count in counts:
            if len(seconds[count]) >= FEWEST and sum(seconds[count]) > ENOUGH_SECONDS:
                continue
            torch.set_num_threads(count)
            started = time.perf_counter()
            probe()
            if turn:  # in the first one threads are started and kernels are made
                seconds[count].append(time.perf_counter() - started)
    return seconds


def convolutions() -> Callable[[], None]:
    """A few small convolutions and what comes between them in a network."""
    maps = torch.ones(2, 32, 48, 48).contiguous(memory_format=torch.channels_last)
    weight = torch.full((32, 32, 3, 3), 1e-3).contiguous(memory_format=torch.channels_last)

    def probe() -> None:
        x = maps
        with torch.no_grad():
            for _ in range(OPERATIONS):
                x = F.silu(F.conv2d(x, weight, padding=1))

    return probe
