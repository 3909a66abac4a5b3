"""What the benchmarks measure with, against hand counts."""

import torch
import torch.nn.functional as F

from benchmarks.measuring import count_flops, measure_apart, peak_functions, time_interleaved
from core.config.unet import UNet as UNetConfig
from core.networks.unet import UNet
from core.training.memory import LiveBytes


def test_live_bytes_by_hand():
    with LiveBytes() as counted:
        first = torch.zeros(256)  # 1024 bytes
        view = first.view(16, 16)  # the same storage
        assert (counted.live, counted.peak) == (1024, 1024)
        second = first + view.flatten()  # 1024 more; the flat view holds nothing of its own
        assert counted.live == 2048
        del first, view
        assert (counted.live, counted.peak) == (1024, 2048)
        second.mul_(2)  # in place
        assert (counted.live, counted.peak) == (1024, 2048)


def test_flops_of_a_convolution_and_its_gradients_by_hand():
    x, weight = torch.zeros(2, 3, 8, 8, requires_grad=True), torch.zeros(5, 3, 3, 3, requires_grad=True)
    forward = 2 * 2 * 8 * 8 * 5 * 3 * 9  # multiplications and additions
    assert count_flops(lambda: F.conv2d(x, weight, padding=1)) == forward
    assert count_flops(lambda: F.conv2d(x, weight, padding=1).sum().backward()) == 3 * forward


def test_flops_of_the_peaks_are_what_is_computed():
    for dims in (2, 3):
        for name, (function, flops) in peak_functions(torch.device("meta"), dims).items():
            assert count_flops(function) == flops, name


def test_rounds_are_interleaved_after_a_warm_up():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = time_interleaved(functions, 3, torch.device("cpu"))
    assert calls == list("ab" * 4) and [len(values) for values in seconds.values()] == [3, 3]


def test_a_row_that_fails_apart_says_why():
    assert "unexpected keyword" in measure_apart("measuring.machine", {"nonsense": 1})["failed"]


def test_the_published_network_takes_fewer_products_than_its_makers_counted():
    """3.49 TFLOP per 256x256 forward pass as published; the same outputs take less here. Counted on the meta device."""
    with torch.device("meta"):
        model = UNet(UNetConfig(base_channels=256), 1, 1, (256, 256))
        flops = count_flops(lambda: model(torch.empty(1, 1, 256, 256), torch.zeros(1, dtype=torch.long)))
    assert 3.0e12 < flops < 3.49e12
