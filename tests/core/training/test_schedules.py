"""Cycles of the learning rate against torch's."""

import pytest
import torch

from core.training.schedules import cosine_restarts, triangle


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def rates(scheduler, steps=40):
    given = []
    for _ in range(steps):
        given.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return given


def test_triangles():
    reference = torch.optim.lr_scheduler.CyclicLR(optimizer(), 0.01, 1.0, step_size_up=5, mode="triangular2",
                                                  cycle_momentum=False)
    assert [triangle(step, 5) for step in range(40)] == pytest.approx(rates(reference))


def test_restarts():
    reference = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer(), 5, T_mult=2)
    assert [cosine_restarts(step, 5) for step in range(40)] == pytest.approx(rates(reference))
