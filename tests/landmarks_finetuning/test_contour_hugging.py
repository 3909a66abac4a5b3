"""Contour-hugging heatmaps (McCouat and Voiculescu, CVPR 2022) as configs/contour_hugging.json has them, by hand."""

import numpy as np
import pytest
import torch

from core.config.load import CONFIG_DIR, load_config
from core.config.second_stage import second_of
from landmarks_finetuning.detectors.registry import kind_of
from landmarks_finetuning.statistics import roc_area, roc_curve
from landmarks_finetuning.uncertainty import Calibration, fit_temperatures, log_likelihoods

MAP = torch.tensor([[[[1.0, 2.0, 1.0], [1.0, 1.0, 3.0]]]]).log()  # its softmax is that by 9
OFFSETS = np.array([[np.hypot(1, 2), np.hypot(1, 1), 1], [2, 1, 0]])  # from its largest pixel


@pytest.fixture(scope="module")
def config():
    return load_config(CONFIG_DIR / "contour_hugging.json")


@pytest.fixture(scope="module")
def kind(config):
    return kind_of(*config.finetune.backbones)


def test_answers_are_those_of_the_pixels_heatmaps(config):
    """No second stage, whose targets are Gaussians, and no shape prior between the map and the answer."""
    finetune = config.finetune
    assert second_of(config, "imagenet") is None and finetune.shape_prior is None
    assert (finetune.loss, finetune.target, finetune.decoder) == ("cross_entropy_pixels", "pixel", "argmax")


def test_the_loss_is_that_of_the_one_pixel(config, kind):
    """-log 2/9 at the pixel nearest to the point, whatever the others; a landmark without a label costs nothing."""
    point, unknown = torch.tensor([[[0.2, 0.9]]]), torch.full((1, 1, 2), torch.nan)
    assert kind.loss(MAP, point, config).item() == pytest.approx(np.log(9 / 2), rel=1e-6)
    both = kind.loss(MAP.repeat(1, 2, 1, 1), torch.cat((point, unknown), dim=1), config)
    assert both.item() == pytest.approx(np.log(9 / 2), rel=1e-6)


def test_a_temperature_for_each_landmark():
    """One of 16 pixels has 15 times the weight of each other one; the truth lies there in 75 % and 50 % of the images.

    The likelihood is largest where that pixel's probability p, with 5 % of the truths anywhere, is that share:
    0.95 p + 0.05 / 16 = 0.75, so that 15^(1 / T) = 15 p / (1 - p) = 55.15 and T = 0.675; of the other T = 0.967.
    """
    scores = torch.zeros(400, 2, 4, 4)
    scores[:, :, 1, 2] = np.log(15)
    truth = torch.tensor([1.0, 2.0]).repeat(400, 2, 1)
    truth[:100, 0], truth[:200, 1] = torch.tensor([3.0, 0.0]), torch.tensor([3.0, 0.0])
    np.testing.assert_allclose(fit_temperatures(log_likelihoods(scores, truth)), [0.675, 0.967], rtol=0.03)


def test_the_expected_radial_error(config, kind):
    """About the largest pixel, in mm of 0.5 a pixel; a temperature of 1/2 squares the map, to 1 4 1 1 1 9 by 17.

    Each distance is the root mean square over the pixel: a sixth of its area is added to the square.
    """
    spacing, maps = np.array([[0.5, 0.5]]), np.eye(2, 3)[None]
    lengths = 0.5 * np.sqrt(OFFSETS**2 + 1 / 6)
    raw = kind.locate(MAP, maps, config, spacing=spacing)
    assert raw.points.tolist() == [[[1, 2]]]
    assert raw.expected_error[0, 0] == pytest.approx((np.array([[1, 2, 1], [1, 1, 3]]) / 9 * lengths).sum(), rel=1e-5)
    calibration = Calibration(np.array([0.5]), 1.0, 1.0, 1, 1)
    sharp = kind.locate(MAP, maps, config, spacing=spacing, calibration=calibration)
    wanted = (np.array([[1, 4, 1], [1, 1, 9]]) / 17 * lengths).sum()
    assert sharp.expected_error[0, 0] == pytest.approx(wanted, rel=1e-5) and wanted < raw.expected_error[0, 0]


def test_errors_above_4_mm_are_told_by_the_expected_ones():
    """Errors 1, 5, 6 and 2 mm, expected 0.5, 3, 1 and 2: of four pairs of a miss and a hit three are in order."""
    expected, missed = np.array([0.5, 3, 1, 2]), np.array([1, 5, 6, 2]) > 4
    assert roc_area(expected, missed, np.arange(4))[0] == 0.75
    false, true = roc_curve(expected, missed)
    assert false.tolist() == [0, 0, 0.5, 0.5, 1] and true.tolist() == [0, 0.5, 0.5, 1, 1]
