"""What a GPU's step is counted to ask for, against hand counts and against what one H100 measured."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from benchmarks.counting import CASES, Counted, count_step, nbytes, order
from core.networks.fused_norm import switched


def counted(function):
    """The totals by class of what `function` does on fake tensors."""
    with FakeTensorMode(), switched("fake", True), Counted() as counts:
        function()
    return counts.kinds


def test_bytes_and_copies_by_hand():
    def work():
        x = torch.empty(2, 4, 8, 8).to(memory_format=torch.channels_last)  # the first copy, counted as one
        y = x + x  # 2 x 2048 bytes in, 2048 out
        y.contiguous()  # to the other layout
        y[:, :2].clone(memory_format=torch.contiguous_format).view(-1)
        y.permute(0, 2, 3, 1).reshape(2, 64, 4)  # a view

    kinds = counted(work)
    assert kinds["other elementwise"].bytes == 3 * 2048 and kinds["other elementwise"].operations == 1
    assert kinds["layout copies"].operations == 3 and kinds["layout copies"].bytes == 2 * (2048 + 2048 + 1024)
    assert set(kinds) == {"other elementwise", "layout copies"}
    assert nbytes(torch.empty(1, 4).expand(100, 4)) == 16 and order(torch.empty(3, 1, 2).transpose(0, 2)) == (2, 0)


def test_a_convolution_by_hand():
    """FLOPs, weights and maps, the pass that adds the bias, and the copy of a map with its channels first."""
    def work(layout):
        x = torch.empty(2, 4, 8, 8, dtype=torch.bfloat16).to(memory_format=layout)
        weight = torch.empty(6, 4, 3, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        with Counted() as inner:
            F.conv2d(x, weight, torch.empty(6, dtype=torch.bfloat16), padding=1)
        return inner.kinds

    with FakeTensorMode():
        last, first = work(torch.channels_last), work(torch.contiguous_format)
    products = last["convolutions and products"]
    assert products.flops == 2 * 2 * 64 * 6 * 4 * 9 and products.bytes == 2 * (2 * 256 + 6 * 36 + 6 + 2 * 6 * 64)
    assert last["other elementwise"].bytes == 2 * 2 * 2 * 6 * 64 and "layout copies" not in last
    assert first["layout copies"].operations == 1 and first["layout copies"].bytes == 2 * 2 * 2 * 256


def copied_maps(kinds):
    """Shapes of the maps of a batch of 3 that are copied into another layout; weights may be."""
    return [shape for shape in kinds["layout copies"].shapes if len(shape) > 3 and shape[0] == 3 and shape[1] > 1]


def test_no_map_changes_its_layout():
    """Between the first and the last convolution; and fewer kernels and bytes than without fusion."""
    now, before = (count_step("ours", 16, (32, 32), 3, fused=fused) for fused in (True, False))
    assert copied_maps(now) == [] and len(copied_maps(before)) > 100
    kernels, others = (sum(totals.kernels for totals in kinds.values()) for kinds in (now, before))
    moved, more = (sum(totals.bytes for totals in kinds.values()) for kinds in (now, before))
    assert kernels < 0.6 * others and moved < 0.75 * more
    flops, same = (kinds["convolutions and products"].flops for kinds in (now, before))
    assert flops == pytest.approx(same, rel=0.1)  # attention computes its scores again going back


def test_no_volume_changes_its_layout():
    assert copied_maps(count_step("ours", 16, (16, 16, 16), 3)) == []


@pytest.mark.parametrize("case", [case for case in CASES if (case.name, case.base, case.batch) == ("ours", 64, 32)
                                  and case.linear_attention],
                         ids=lambda case: f"{case.title}, batch {case.batch}")
def test_the_estimate_is_within_a_third_of_what_was_measured(case):
    assert case.estimate(case.count()) == pytest.approx(case.milliseconds, rel=1 / 3)
