"""GU2Net's own scorer against numbers by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from core.config.load import parse_config
from core.data.dataset import ImageSet
from landmarks_finetuning.detectors.gu2net_scorer import RADII, release_score
from landmarks_finetuning.metrics import summarise


def config(size=(512, 416), preset="released", **dataset):
    return parse_config({"dataset": {"image_size": list(size), **dataset},
                         "finetune": {"backbones": ["gu2net"], "gu2net": {"preset": preset}}}, "test")


def images(truth, original, size, spacing=(0.1, 0.1)):
    """One image of so many stored pixels, resized to `size` as `core.data` does it; landmarks in stored pixels."""
    scale = np.array(size) / original
    maps = np.concatenate((np.diag(scale), ((scale - 1) / 2)[:, None]), axis=1)[None]
    record = SimpleNamespace(truth=np.array(truth, dtype=float), spacing=spacing)
    return ImageSet((record,), torch.zeros(1, 1, *size), None, maps, torch.zeros(1, 2), torch.tensor([size]),
                    np.array([original]), size)


def stored(network, original, size):
    """Stored pixels of points in network pixels."""
    scale = np.array(size) / original
    return ((np.array(network) + 0.5) / scale - 0.5)[None]


def test_cephalograms_have_one_factor_on_both_axes():
    """Truth (255.6, 207.6) is at (256, 208), the answer (259.4, 212.2) at (259, 212): 5 pixels of 0.46875 mm."""
    original, size = (2400, 1935), (512, 416)
    seen = images([[1200.0, 967.5], [np.nan, np.nan]], original, size)
    found = stored([[259.4, 212.2], [3.0, 3.0]], original, size)
    score = release_score(config(), "cephalo", found, seen)
    assert score.errors.shape == (1, 2) and score.errors[0, 0] == pytest.approx(5 * 0.46875) and score.left_out is None
    assert np.isnan(score.errors[0, 1])
    assert summarise(score.errors, score.radii)["sdr"] == {
        "2": 0, "2.5": 100, "3": 100, "4": 100, "6": 100, "9": 100, "10": 100} and len(RADII) == 7


def test_hands_are_measured_by_the_wrist():
    """Landmarks 1 and 5 lie 30 pixels of the input apart and mean 50 mm; 6 pixels are 10 mm."""
    original, size = (1000, 800), (512, 368)
    places = [[10.0, 10.0], [50.2, 50.0], [60.0, 60.0], [70.0, 70.0], [10.0, 40.0]]
    truth = stored(places, original, size)[0]
    found = stored([*places[:1], [56.4, 50.0], *places[2:]], original, size)
    score = release_score(config(size, layout="folder"), "hand", found, images(truth, original, size, None))
    np.testing.assert_allclose(score.errors, [[0, 10, 0, 0, 0]])


def test_chest_radiographs_are_measured_in_pixels_of_512():
    original, size = (3000, 2900), (256, 256)
    truth, found = stored([[100.0, 100.0]], original, size)[0], stored([[103.0, 104.0]], original, size)
    assert release_score(config(size, layout="folder"), "chest", found, images(truth, original, size)).errors == 10


def test_where_it_does_not_say_anything():
    original, size = (2400, 1935), (128, 128)
    seen = images([[1200.0, 967.5]], original, size)
    points = stored([[64.0, 64.0]], original, size)
    assert release_score(config(size, "tuned"), "cephalo", points, seen) is None
    assert release_score(config(size), None, points, seen) is None
    score = release_score(config(size), "cephalo", points, seen)
    assert score.errors is None
    assert "pixels to be square, as at 512 x 416; dataset.image_size is 128 x 128" in score.left_out
    other = images([[12.0, 9.0]], (240, 200), (512, 416))
    assert "240 x 193.5 mm" in release_score(config(), "cephalo", points, other).left_out
    whole = images([[1200.0, 967.5]], original, (512, 416))
    assert "whole images" in release_score(config(canvas_size=[640, 512]), "cephalo", points, whole).left_out
