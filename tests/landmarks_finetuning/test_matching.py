"""Matching by features of a fixed random network: copies of the labelled image that are shifted, turned or mirrored."""

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform, gaussian_filter

from core.config.load import parse_config
from core.config.unet import UNet as UNetConfig
from core.data.dataset import ImageSet
from core.data.records import Record
from core.networks.unet import UNet
from core.networks.weights import save_weights
from landmarks_finetuning.matching import Matcher, match_landmarks, sampled, similarity, whitening
from landmarks_finetuning.shape import Shape
from tests.conftest import error_of
from tests.fake_gpu import fake_gpu, features_on_gpu

SIZES = {2: (64, 48), 3: (24, 32, 24)}
PLACES = {2: np.array([[22.0, 14], [24, 33], [41, 17], [38, 30], [30, 23]]),
          3: np.array([[8.0, 11, 8], [9, 20, 15], [15, 12, 14], [14, 21, 9], [11, 16, 12]])}
UNET = {"base_channels": 8, "channel_multipliers": [1, 2], "blocks_per_level": 1, "attention_heads": 1,
        "attention_head_channels": 8, "linear_attention": False}


def texture(dims):
    """(*size) smooth noise in the middle of zeros, which shifts and turns may fill up."""
    size = SIZES[dims]
    noise = gaussian_filter(np.random.default_rng(0).normal(size=size), 1.5)
    window = np.ones(size)
    for axis, length in enumerate(size):
        along = np.minimum(np.arange(length), np.arange(length)[::-1])
        window = window * np.clip((along - 4) / 3, 0, 1).reshape([-1 if a == axis else 1 for a in range(dims)])
    return window * (0.5 + 0.5 * noise / np.abs(noise).max())


def image_set(images, points, scale=1.0):
    """Images (M, *size) and points (M, N, D) in network pixels; stored pixels are `scale` times as many."""
    dims = images[0].ndim
    maps = np.stack([np.column_stack([np.eye(dims) / scale, np.zeros(dims)])] * len(images))
    records = tuple(Record(str(i), f"{i}.png", own * scale, None) for i, own in enumerate(points))
    size = images[0].shape
    whole = torch.tensor([size] * len(images))
    return ImageSet(records, torch.from_numpy(np.stack(images)[:, None]).float(), torch.from_numpy(np.stack(points)),
                    maps, torch.zeros_like(whole), whole, whole.numpy(), size)


@pytest.fixture(params=[2, 3], ids=["2D", "3D"])
def study(request, tmp_path):
    """(config, image, points): a config whose finetune.checkpoint is a random network."""
    dims = request.param
    torch.manual_seed(4)
    model = UNet(UNetConfig(**{**UNET, "channel_multipliers": (1, 2)}), 1, 1, SIZES[dims])
    dataset = {"layout": "folder", "image_size": list(SIZES[dims]), "root": str(tmp_path)}
    values = {"is_3d": dims == 3, "unet": UNET, "dataset": dataset,
              "experiment": {"device": "cpu", "precision": "float32", "output_dir": str(tmp_path)},
              "finetune": {"checkpoint": str(tmp_path / "w.safetensors"), "backbones": ["ddpm"], "sigma": 8.0}}
    config = parse_config(values, "here")
    save_weights(tmp_path / "w.safetensors", model, config.plain(), {"kind": "ddpm", "iteration": 1})
    return config, texture(dims), PLACES[dims]


def off(found, truth):
    """Largest distance in network pixels."""
    return np.linalg.norm(found - truth, axis=-1).max()


def test_shifted_copies(study):
    """By multiples of what the network halves: its features move with the image, but for what borders reach."""
    config, image, points = study
    shifts = [(0,) * image.ndim, *([(2, -2), (-2, 2)] if image.ndim == 2 else [(0, 2, 0), (0, -2, 0)])]
    copies = image_set([np.roll(image, shift, range(image.ndim)) for shift in shifts],
                       [points + shift for shift in shifts], scale=3.0)
    found, certainty = match_landmarks(config, image_set([image], [points]), copies)
    assert found.shape == (3, 5, image.ndim) and certainty.shape == (3, 5)
    assert off(found / 3, [points + shift for shift in shifts]) < 1
    assert (certainty >= 0).all() and (certainty <= 1).all() and certainty.mean() > 0.3
    again = match_landmarks(config, image_set([image], [points]), copies)
    assert np.array_equal(again[0], found) and np.array_equal(again[1], certainty)


def test_turned_copy(study):
    """By 3 degrees about the middle, in the plane of the last two axes."""
    config, image, points = study
    turn, angle = np.eye(image.ndim), np.deg2rad(3)
    turn[-2:, -2:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    middle = (np.array(image.shape) - 1) / 2
    copy = affine_transform(image, turn.T, middle - turn.T @ middle, order=3)
    truth = (points - middle) @ turn.T + middle
    found, _ = match_landmarks(config, image_set([image], [points]), image_set([copy], [truth]))
    assert off(found[0], truth) < 1


def test_another_picture_is_less_certain(study):
    config, image, points = study
    other = texture(image.ndim)[tuple([slice(None, None, -1)] * image.ndim)] ** 2
    _, certainty = match_landmarks(config, image_set([image], [points]), image_set([image, other], [points, points]))
    assert certainty[1].mean() < 0.5 * certainty[0].mean()


def test_a_landmark_that_no_label_has_and_one_that_some_have(study):
    config, image, points = study
    first, second = points.copy(), points.copy()
    first[[0, 2]], second[0] = np.nan, np.nan
    found, certainty = match_landmarks(config, image_set([image, image], [first, second]), image_set([image], [points]))
    assert np.isnan(found[0, 0]).all() and certainty[0, 0] == 0
    assert off(found[0, 1:], points[1:]) < 1 and (certainty[0, 1:] > 0).all()


def test_the_prior_holds_a_landmark_that_another_place_resembles():
    """Scores by hand: four peaks in their places, one lower in its own than elsewhere."""
    points, size = PLACES[2], SIZES[2]
    grid = np.stack(np.indices(size), axis=-1)
    peaks = np.stack([np.exp(-(((grid - point) / 2) ** 2).sum(axis=-1) / 2) for point in points])
    peaks[4] = 0.8 * peaks[4] + np.exp(-(((grid - [55, 10]) / 2) ** 2).sum(axis=-1) / 2)
    scores, matcher = torch.from_numpy(80 * peaks[None]).float(), Matcher.__new__(Matcher)
    matcher.shape, matcher.sigma, matcher.spreads = Shape(points * 1.1 + 3), 2.0, ()
    np.testing.assert_allclose(matcher.locate(scores)[0][0], [*points[:4], [55, 10]], atol=0.2)
    matcher.spreads = (0.1, 0.1, 0.07)
    found, sure = matcher.locate(scores)
    np.testing.assert_allclose(found[0], points, atol=0.3)
    assert (sure[0, :4] > 0.9).all() and sure[0, 4] < 0.1  # the network's own map sees it elsewhere


def test_no_weights_yet(study, tmp_path):
    config, image, points = study
    labelled = image_set([image], [points])
    (tmp_path / "w.safetensors").unlink()
    assert "run the stage pretrain first" in error_of(match_landmarks, config, labelled, labelled)


# ---- its parts


def test_whitened_features_are_uncorrelated():
    generator = torch.Generator().manual_seed(0)
    mixed = torch.einsum("bchw,cd->bdhw", torch.randn(6, 4, 16, 16, generator=generator), torch.randn(
        4, 4, generator=generator)) + 3
    ((mean, turn),) = whitening(iter([[mixed[:2]], [mixed[2:]]]))
    rows = mixed.permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(mean, rows.mean(dim=0))
    white = (rows - mean) @ turn
    covariance = white.T @ white / len(white)
    assert (covariance - torch.diag(covariance.diag())).abs().max() < 1e-4
    assert covariance.diag().max() <= 1 and covariance.diag().median() > 0.9


def test_samples_lie_where_the_points_do():
    """A level of half the size whose channels are its own pixels' places: the point comes out again."""
    level = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij"))[None] + 1
    points = np.array([[[3.0, 4.0], [10.0, 7.5], [np.nan, 1.0]]])
    (vectors,) = sampled([level], points, (16, 12))
    expected = torch.from_numpy((points[0, :2] + 0.5) / 2 - 0.5 + 1).float()
    torch.testing.assert_close(vectors[0, :2], expected / expected.norm(dim=1, keepdim=True))
    assert torch.isfinite(vectors).all()


def test_every_resolution_counts_the_same():
    """Two maps at full size, one at half: the two share one half of the mean."""
    full, half = torch.ones(1, 1, 4, 4), -torch.ones(1, 1, 2, 2)
    one = torch.ones(3, 1)
    torch.testing.assert_close(similarity([half, full, full], [one] * 3, (4, 4)), torch.zeros(1, 3, 4, 4))
    torch.testing.assert_close(similarity([half, full], [one, -one], (4, 4)), -torch.ones(1, 3, 4, 4))


def test_agreement_by_hand():
    """A match that leads back to the landmark agrees wholly, one 2 sigmas' standard deviation away exp(-1/2)."""
    level = torch.zeros(1, 2, 8, 8)
    level[0, 0, 2, 3] = level[0, 1, 2, 5] = 1
    matcher = Matcher.__new__(Matcher)
    matcher.sigma = 1.0
    matcher.labels = [([level], np.array([[2.0, 3.0], [2.0, 3.0], [np.nan, 0.0]]), (8, 8))]
    vectors = [torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])]
    np.testing.assert_allclose(matcher.agreement(vectors), [[1, np.exp(-0.5), 0]])


def test_on_a_gpu(study, monkeypatch):
    """Every step has its tensors on one device, and what becomes an array is copied first."""
    config, image, points = study
    features_on_gpu(monkeypatch, config.unet)
    with fake_gpu(monkeypatch, "landmarks_finetuning.features"):
        found, certainty = match_landmarks(config, image_set([image], [points]), image_set([image] * 3, [points] * 3))
    assert found.shape == (3, 5, image.ndim) and certainty.shape == (3, 5)
