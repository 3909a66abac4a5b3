"""Which images each optimiser step sees."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def gather(images: Tensor, indices: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """(images[indices], indices), both on `device`, which may be the images' own; nothing waits for a GPU."""
    chosen = torch.from_numpy(indices)
    if device.type == "cpu":
        return images[chosen], chosen
    there = chosen.pin_memory().to(device, non_blocking=True)
    return (images[there] if images.is_cuda else images[chosen].pin_memory().to(device, non_blocking=True)), there


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
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)

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
            return [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(first, last)]
        start = step * self.batch_size * self.accumulation
        positions = np.arange(start, start + self.batch_size * self.accumulation)
        epochs, offsets = np.divmod(positions, self.count)
        orders = {int(epoch): self._permutation(int(epoch)) for epoch in np.unique(epochs)}
        drawn = np.array([orders[int(e)][o] for e, o in zip(epochs, offsets, strict=True)])
        return list(drawn.reshape(self.accumulation, self.batch_size))


def step_generator(seed: int, step: int, micro: int, device: torch.device) -> torch.Generator:
    """Randomness as a function of (seed, step, micro-batch)."""
    entropy = np.random.SeedSequence([seed, step, micro]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(entropy >> np.uint64(1)))
