"""What GU2Net learns from and how it is read, against torch and numbers by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from core.config.load import parse_config
from core.config.recipes import recipe
from landmarks_finetuning.detectors.gu2net import binary_cross_entropy, gu2net_loss, probabilities
from landmarks_finetuning.heatmaps import draw_target


def config(**own):
    return parse_config({"dataset": {"image_size": [64, 64]}, "finetune": {"backbones": ["gu2net"], "gu2net": own}},
                        "test")


def test_the_cross_entropy_is_torchs():
    chance = torch.tensor([1e-8, 0.01, 0.3, 0.5, 0.7, 0.99, 0.9999])
    target = torch.linspace(0, 1, 7)
    found = binary_cross_entropy(chance.log(), target)
    torch.testing.assert_close(found, F.binary_cross_entropy(chance, target, reduction="none"), rtol=1e-4, atol=1e-5)


def test_its_ends_are_finite_with_gradients():
    logs = torch.tensor([0.0, -1e-12, -1e4], requires_grad=True)
    cost = binary_cross_entropy(logs, torch.tensor([0.0, 0.5, 1.0]))
    cost.sum().backward()
    assert torch.isfinite(cost).all() and torch.isfinite(logs.grad).all() and cost[2].item() == 100


def test_the_loss_is_summed_and_knows_no_missing_landmark():
    """Every pixel at p = 1/2 costs log 2: 64 x 64 pixels, two of three landmarks; weights 1 and 0.5."""
    outputs = torch.full((1, 3, 64, 64), math.log(0.5))
    points = torch.tensor([[[10.0, 20.0], [30.0, 31.5], [math.nan, math.nan]]])
    one = 64 * 64 * math.log(2)
    assert gu2net_loss(outputs, points, config()).item() == pytest.approx(2 * one, rel=1e-5)
    weights = torch.tensor([[1.0, 0.5, 1.0]])
    assert gu2net_loss(outputs, points, config(), weights=weights).item() == pytest.approx(1.5 * one, rel=1e-5)


def test_the_released_target():
    """A window of 18 pixels, half open, about the nearest whole pixel; its corner is 0 and its middle 1."""
    target = draw_target(torch.tensor([[[20.4, 30.6]]]), (64, 64), "gaussian_window", 3.0)[0, 0]
    rows, columns = target.nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (11, 28, 22, 39)
    assert target[20, 31] == 1 and target[11, 22] == 0 and target[29, 31] == 0
    corner = math.exp(-162 / 18)
    assert target[20, 22].item() == pytest.approx((math.exp(-81 / 18) - corner) / (1 - corner), rel=1e-5)
    assert not draw_target(torch.full((1, 1, 2), math.nan), (64, 64), "gaussian_window", 3.0).any()


def test_presets():
    tuned, released = recipe(config(), "gu2net").finetune, recipe(config(preset="released"), "gu2net").finetune
    assert tuned.decoder == "local_expectation" and tuned.augmentation.rotation_degrees == 10
    assert (released.decoder, released.target, released.optimizer, released.scheduler, released.batch_size) == (
        "argmax", "gaussian_window", "adam", "cyclic", 4)
    assert released.sigma * 64 / 256 == 3 and released.learning_rate.gu2net == 1e-2
    assert released.augmentation.probability == 0 and released.augmentation.intensity == 0
    again = recipe(recipe(config(preset="released"), "gu2net"), "gu2net")
    assert again.finetune == released and recipe(config(), "scratch") == config()


def test_what_the_published_decoder_sees_is_a_probability():
    assert probabilities(torch.tensor([0.25]).log()).item() == pytest.approx(0.25)
