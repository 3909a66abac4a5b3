"""Expected radial errors, radii and their calibration, against closed forms, hand numbers and simulated truths."""

import numpy as np
import pytest
import torch
from scipy import stats

from landmarks_finetuning.uncertainty import (
    Calibration,
    Spread,
    fit_scales,
    fit_temperatures,
    log_likelihoods,
    measure_spread,
)

SIZES = {2: (83, 95), 3: (39, 43, 41)}
dims = pytest.mark.parametrize("dims", [2, 3])


def gaussian(size, centre, sigma):
    """(1, 1, *size) log of a Gaussian, and its centre (1, 1, D)."""
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1)
    scores = -np.square((grid - centre) / sigma).sum(axis=-1) / 2
    return torch.from_numpy(scores)[None, None].float(), torch.tensor(centre).double()[None, None]


def same(dims):
    return np.eye(dims, dims + 1)[None]


@dims
def test_a_gaussian_has_the_expected_error_and_radius_of_the_chi_distribution(dims):
    """In 2D sigma sqrt(pi / 2) and sigma sqrt(2 ln 10), in 3D 2 sigma sqrt(2 / pi) and 2.5003 sigma."""
    sigma = 4.0
    scores, centre = gaussian(SIZES[dims], [length / 2 + 0.3 for length in SIZES[dims]], sigma)
    spread = measure_spread(scores, centre, same(dims), None)
    expected = {2: np.sqrt(np.pi / 2), 3: 2 * np.sqrt(2 / np.pi)}[dims]
    radius = {2: np.sqrt(2 * np.log(10)), 3: stats.chi(3).ppf(0.9)}[dims]
    assert spread.expected_error[0, 0] == pytest.approx(sigma * expected, rel=0.005)
    assert spread.radius90[0, 0] == pytest.approx(sigma * radius, rel=0.01)


def test_a_point_beside_the_map_is_off_by_the_rice_distribution():
    scores, centre = gaussian((121, 121), [60.0, 60.0], 4.0)
    spread = measure_spread(scores, centre + torch.tensor([9.0, 12.0]), same(2), None)
    law = stats.rice(15 / 4, scale=4)
    assert spread.expected_error[0, 0] == pytest.approx(law.mean(), rel=0.003)
    assert spread.radius90[0, 0] == pytest.approx(law.ppf(0.9), rel=0.005)


def test_distances_are_in_stored_pixels_times_spacing_by_hand():
    """Two pixels of the map, 3/4 and 1/4. A step down is 2 stored pixels of 3 mm, one to the right 5 of 0.1 mm.

    From the first one the second, 1 down and 2 right, is (6, 1) mm away; a pixel's extent adds (36 + 0.25) / 12 mm^2.
    """
    scores = torch.full((1, 1, 4, 4), -60.0)
    scores[0, 0, 1, 1], scores[0, 0, 2, 3] = np.log(3), 0.0
    to_stored = np.array([[[2.0, 0, 7], [0, 5, -3]]])
    own = 36.25 / 12
    expected = 0.75 * np.sqrt(own) + 0.25 * np.sqrt(37 + own)
    spread = measure_spread(scores, torch.tensor([[[1.0, 1]]]), to_stored, np.array([[3.0, 0.1]]))
    assert spread.expected_error[0, 0] == pytest.approx(expected, rel=1e-5)
    assert spread.radius90[0, 0] == pytest.approx(np.sqrt(37 + own), rel=2e-3)  # 3/4 is not enough
    own = 29 / 12
    pixels = measure_spread(scores, torch.tensor([[[1.0, 1]]]), to_stored, None)
    assert pixels.expected_error[0, 0] == pytest.approx(0.75 * np.sqrt(own) + 0.25 * np.sqrt(104 + own), rel=1e-5)


@dims
def test_turned_grids_of_which_each_landmark_may_have_its_own(dims):
    """Maps of two landmarks in three images of unlike spacing, cropped with turned axes, each about its own point."""
    rng = np.random.default_rng(dims)
    scores = torch.from_numpy(rng.normal(size=(3, 2, *(9, 7, 8)[:dims]))).float()
    points = torch.from_numpy(rng.uniform(0, 6, (3, 2, dims)))
    turn = np.linalg.qr(rng.normal(size=(3, 2, dims, dims)))[0]
    scale = rng.uniform(0.3, 3, (3, 2, 1, dims))
    to_stored = np.concatenate((turn * scale, rng.normal(size=(3, 2, dims, 1))), axis=-1)
    spacing = rng.uniform(0.3, 3, (3, dims))
    seen = measure_spread(scores, points, to_stored, spacing)
    grid = np.stack(np.meshgrid(*map(np.arange, scores.shape[2:]), indexing="ij"), axis=-1)
    for image in range(3):
        for n in range(2):
            mass = scores[image, n].double().exp().numpy()
            step = np.diag(spacing[image]) @ to_stored[image, n, :, :-1]  # of a pixel, in mm
            offsets = np.einsum("ij,...j->...i", step, grid - points[image, n].numpy())
            away = np.sqrt((offsets**2).sum(axis=-1) + (step**2).sum() / 12)
            assert seen.expected_error[image, n] == pytest.approx((mass * away).sum() / mass.sum(), rel=1e-4)
            order = np.argsort(away.ravel())
            place = np.searchsorted(mass.ravel()[order].cumsum(), 0.9 * mass.sum())
            assert seen.radius90[image, n] == pytest.approx(away.ravel()[order][place], rel=2e-3)


def test_many_maps_in_chunks_equal_one_at_a_time(monkeypatch):
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(size=(2, 5, 8, 8))).float()
    points = torch.from_numpy(rng.uniform(0, 7, (2, 5, 2)))
    spacing, maps = np.array([[1.0, 2], [3, 4]]), np.tile(same(2), (2, 1, 1))
    calibration = Calibration(np.array([0.5, 1, 2, 3, 4]), 2.0, 3.0, 1, 1)
    whole = measure_spread(scores, points, maps, spacing, calibration)
    monkeypatch.setattr("landmarks_finetuning.uncertainty.CHUNK_PIXELS", 3 * 64)
    np.testing.assert_array_equal(whole, measure_spread(scores, points, maps, spacing, calibration))
    alone = measure_spread(scores[1:, 3:4] / 3, points[1:, 3:4], maps[1:], spacing[1:])
    np.testing.assert_allclose([part[1, 3] for part in whole], [2 * alone[0][0, 0], 3 * alone[1][0, 0]], rtol=1e-5)


def drawn_from(scores, rng):
    """One pixel (B, N, 2) of each map, as probable as it says."""
    flat = scores.flatten(2).double().softmax(dim=2).numpy()
    chosen = [[rng.choice(flat.shape[2], p=row / row.sum()) for row in image] for image in flat]
    return torch.from_numpy(np.stack(np.unravel_index(np.array(chosen), scores.shape[2:]), axis=-1)).double()


def some_maps(images, landmarks, rng):
    """Gaussians of 3 pixels about random places, with some noise."""
    centres = torch.from_numpy(rng.uniform(12, 28, (images, landmarks, 2))).float()
    grid = torch.arange(40.0)
    squares = (grid[:, None] - centres[..., 0, None, None]) ** 2 + (grid - centres[..., 1, None, None]) ** 2
    return squares / -18 + torch.from_numpy(rng.normal(size=squares.shape)).float() / 2


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_temperature_of_maps_that_are_too_sharp_is_the_factor(factor):
    rng = np.random.default_rng(1)
    scores = some_maps(150, 4, rng)
    temperatures = fit_temperatures(log_likelihoods(scores * factor, drawn_from(scores, rng)))
    np.testing.assert_allclose(temperatures, factor, rtol=0.25)
    assert np.exp(np.log(temperatures).mean()) == pytest.approx(factor, rel=0.1)


def test_a_landmark_with_few_labels_takes_the_others_temperature():
    """Landmark 0 is four times too sharp, seen 3 or 150 times; the others are right, and one has no label at all."""
    rng = np.random.default_rng(2)
    scores = some_maps(150, 5, rng)
    truth = drawn_from(scores, rng)
    scores[:, 0] *= 4
    truth[:, 4] = torch.nan
    own = fit_temperatures(log_likelihoods(scores, truth))
    truth[3:, 0] = torch.nan
    few = fit_temperatures(log_likelihoods(scores, truth))
    assert own[0] > 3 and 1 < few[0] < 2.6
    np.testing.assert_allclose(own[1:4], 1, rtol=0.25)
    assert few[4] == pytest.approx(few[1:4].mean(), rel=0.15)


def test_likelihoods_by_hand():
    """Two pixels of four, 1/4 and 3/4: at temperature 1 the log of 0.95 / 4 + 0.05 / 4. Outside and NaN: none."""
    scores = torch.tensor([[[[0.0, np.log(3)], [-80, -80]]] * 4]).float()
    truth = torch.tensor([[[0.4, -0.4], [1.0, 2], [-1.0, 0], [torch.nan, 0]]]).double()
    seen = log_likelihoods(scores, truth)
    assert np.isnan(seen[0, 1:]).all()
    assert seen[0, 0, 12] == pytest.approx(np.log(0.95 / 4 + 0.05 / 4))
    assert seen[0, 0, 15] == pytest.approx(np.log(0.95 / (1 + np.sqrt(3)) + 0.05 / 4))  # 16^(3/12) = 2


def test_one_gross_miss_does_not_blur_the_maps():
    rng = np.random.default_rng(3)
    scores = some_maps(40, 2, rng)
    truth = drawn_from(scores, rng)
    truth[0] = 0.0
    assert (fit_temperatures(log_likelihoods(scores, truth)) < 1.4).all()


def test_scales_by_hand():
    """Nine ratios of error to radius, 1 to 9: the 9th smallest counts, as ceil(0.9 * 10) = 9. The mean error is 5."""
    errors = np.array([[1.0, 2, 3, np.nan], [4, 5, 6, np.nan], [7, 8, 9, np.nan]])
    spread = Spread(np.full((3, 4), 2.0), np.ones((3, 4)))
    found = fit_scales(np.ones(4), spread, errors)
    assert (found.error_scale, found.radius_scale, found.images, found.landmarks) == (2.5, 9.0, 3, 9)
    more = np.concatenate([errors, np.full((8, 4), 0.5)])  # 41 ratios: the 38th, which is 6
    assert fit_scales(np.ones(4), Spread(np.ones((11, 4)), np.ones((11, 4))), more).radius_scale == 6.0
    with pytest.raises(ValueError, match="at least one"):
        fit_scales(np.ones(4), spread, np.full((3, 4), np.nan))


@pytest.mark.parametrize("labels", [9, 40])
def test_calibrated_circles_hold_nine_of_ten_truths(labels):
    """2000 simulated calibrations: the promise is kept in the mean, and exceeded by at most 1 / (labels + 1)."""
    rng = np.random.default_rng(labels)
    shares = []
    for _ in range(2000):
        radii, scale = rng.uniform(0.5, 3, labels), rng.gamma(2.0, size=labels)
        found = fit_scales(np.ones(1), Spread(radii[:, None], radii[:, None]), (radii * scale)[:, None])
        shares.append(stats.gamma(2.0).cdf(found.radius_scale))
    assert 0.9 - 0.01 < np.mean(shares) < 0.9 + 1 / (labels + 1) + 0.01
