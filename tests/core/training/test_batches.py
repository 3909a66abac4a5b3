"""Which images a step sees, against lists written by hand."""

import numpy as np
import pytest
import torch

from core.training.batches import BatchPlan, step_generator

CPU = torch.device("cpu")


def fixed_plan(monkeypatch, **settings):
    """A plan whose permutation of epoch e is 0..count-1 turned by e."""
    monkeypatch.setattr(BatchPlan, "_permutation", lambda self, epoch: np.roll(np.arange(self.count), -epoch))
    return BatchPlan(**{"seed": 0, "drop_last": True} | settings)


def lists(plan, step):
    return [indices.tolist() for indices in plan.groups(step)]


def test_epochs_without_the_rest(monkeypatch):
    """7 images, batch 2, drop_last: three micro-batches in groups of 2 and 1; the next epoch is turned by one."""
    plan = fixed_plan(monkeypatch, count=7, batch_size=2, accumulation=2, sampling="epoch")
    assert plan.steps_per_epoch == 2
    assert [lists(plan, step) for step in range(4)] == [
        [[0, 1], [2, 3]], [[4, 5]],
        [[1, 2], [3, 4]], [[5, 6]],
    ]  # fmt: skip


def test_epochs_with_the_rest(monkeypatch):
    plan = fixed_plan(monkeypatch, count=7, batch_size=2, accumulation=2, sampling="epoch", drop_last=False)
    assert plan.steps_per_epoch == 2
    assert [lists(plan, step) for step in range(3)] == [[[0, 1], [2, 3]], [[4, 5], [6]], [[1, 2], [3, 4]]]


def test_stream(monkeypatch):
    """Every micro-batch is full; one permutation runs into the next."""
    plan = fixed_plan(monkeypatch, count=5, batch_size=2, accumulation=2, sampling="stream")
    assert [lists(plan, step) for step in range(3)] == [
        [[0, 1], [2, 3]], [[4, 1], [2, 3]], [[4, 0], [2, 3]],
    ]  # fmt: skip


def test_published_steps_per_epoch():
    """150 images, batch 4, accumulation 8: 37 micro-batches, 5 steps, the last of 5 micro-batches."""
    plan = BatchPlan(150, 4, 8, "epoch", True, 0)
    assert plan.steps_per_epoch == 5
    assert [len(plan.groups(step)) for step in range(5)] == [8, 8, 8, 8, 5]
    seen = np.concatenate([indices for step in range(5) for indices in plan.groups(step)])
    assert len(seen) == len(set(seen)) == 148


@pytest.mark.parametrize("sampling", ["stream", "epoch"])
def test_fewer_images_than_a_batch(sampling):
    plan = BatchPlan(1, 4, 2, sampling, True, 0)
    assert plan.steps_per_epoch == 1
    assert lists(plan, 3) == {"stream": [[0] * 4] * 2, "epoch": [[0]]}[sampling]


@pytest.mark.parametrize("sampling", ["stream", "epoch"])
def test_order_follows_seed_and_epoch_only(sampling):
    plans = [BatchPlan(8, 2, 4, sampling, True, seed) for seed in (0, 0, 1)]
    first, again, other = ([np.concatenate(plan.groups(step)).tolist() for step in (5, 0)] for plan in plans)
    assert first == again and first != other and first[0] != first[1]
    assert all(sorted(order) == list(range(8)) for order in first)


def test_randomness_is_a_function_of_seed_step_and_micro_batch():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]
    draws = [torch.rand(4, generator=step_generator(*key, CPU)).tolist() for key in keys]
    assert draws[0] == draws[4] and len({tuple(draw) for draw in draws}) == 4
