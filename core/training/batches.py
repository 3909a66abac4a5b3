"""Which images each optimiser step sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

READERS, STEPS_AHEAD = 2, 3  # threads that read batches, and how many steps before they are asked for


def gather(images: Tensor, indices: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """(images[indices], indices), both on `device`, which may be the images' own; nothing waits for a GPU."""
    there = on_device(indices, device)
    if device.type == "cpu" or images.is_cuda:
        return images[there], there
    return images[torch.from_numpy(indices)].pin_memory().to(device, non_blocking=True), there


def on_device(indices: np.ndarray, device: torch.device) -> Tensor:
    """`indices` as a tensor on `device`; nothing waits for a GPU."""
    chosen = torch.from_numpy(indices)
    return chosen if device.type == "cpu" else chosen.pin_memory().to(device, non_blocking=True)


class ReadAhead:
    """Batches that threads read while the device works: what `read` gives for some indices, whatever was read ahead.

    `upcoming(step)` are the index arrays that this process will ask for at a step. Errors of `read` come with a batch.
    """

    def __init__(self, read: Callable[[np.ndarray], Tensor], upcoming: Callable[[int], Sequence[np.ndarray]],
                 threads: int = READERS) -> None:
        self.read, self.upcoming, self.pool = read, upcoming, ThreadPoolExecutor(threads)
        self.pending: dict[tuple[int, bytes], Future[Tensor]] = {}
        self.step, self.begun = -1, 0  # asked for last; the first step that is not being read

    def take(self, step: int, indices: np.ndarray) -> Tensor:
        """read(indices), where step `step` asks for them."""
        if step != self.step:
            if step != self.step + 1:  # another place in the run: nothing that was read is wanted
                self.begun = step
            self.pending = {key: batch for key, batch in self.pending.items() if step <= key[0] < self.begun}
            for ahead in range(self.begun, step + STEPS_AHEAD + 1):
                for some in self.upcoming(ahead):
                    self.pending[ahead, some.tobytes()] = self.pool.submit(self.read, some)
            self.step, self.begun = step, step + STEPS_AHEAD + 1
        batch = self.pending.pop((step, indices.tobytes()), None)
        return self.read(indices) if batch is None else batch.result()


@dataclass(frozen=True)
class BatchPlan:
    """Which images each optimiser step sees: a pure function of the step.

    `stream` draws from endless permutations, every micro-batch full. `epoch` cuts each permutation into micro-batches
    (`drop_last` as given), groups them by `accumulation`, and the last partial group steps too (the published code).
    """

    count: int
    batch_size: int
    accumulation: int
    sampling: str
    drop_last: bool
    seed: int

    def _permutation(self, epoch: int) -> np.ndarray:
        return permutation(self.seed, epoch, self.count)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in which every image is seen about once."""
        return max(1, math.ceil(self._micro_batches / self.accumulation))

    @property
    def smallest_batch(self) -> int:
        """Images in the smallest micro-batch."""
        full = self.sampling == "stream" or (self.drop_last and self.count >= self.batch_size)
        return self.batch_size if full else self.count % self.batch_size or self.batch_size

    @property
    def _micro_batches(self) -> int:
        whole = self.count // self.batch_size if self.drop_last else math.ceil(self.count / self.batch_size)
        return max(1, whole)

    def groups(self, step: int) -> list[np.ndarray]:
        """The micro-batches (index arrays) of optimiser step `step` (0-based)."""
        if self.sampling == "epoch":
            epoch, group = divmod(step, self.steps_per_epoch)
            order = self._permutation(epoch)
            first, last = group * self.accumulation, min((group + 1) * self.accumulation, self._micro_batches)
            return [order[i * self.batch_size : (i + 1) * self.batch_size].copy() for i in range(first, last)]
        start = step * self.batch_size * self.accumulation
        positions = np.arange(start, start + self.batch_size * self.accumulation)
        epochs, offsets = np.divmod(positions, self.count)
        orders = {int(epoch): self._permutation(int(epoch)) for epoch in np.unique(epochs)}
        drawn = np.array([orders[int(e)][o] for e, o in zip(epochs, offsets, strict=True)])
        return list(drawn.reshape(self.accumulation, self.batch_size))


@lru_cache(maxsize=3)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of `count` images in an epoch, kept while it lasts (a million takes 20 ms); not to be written to."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    order.setflags(write=False)
    return order


def step_generator(seed: int, step: int, micro: int, device: torch.device) -> torch.Generator:
    """Randomness as a function of (seed, step, micro-batch)."""
    entropy = np.random.SeedSequence([seed, step, micro]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(entropy >> np.uint64(1)))
