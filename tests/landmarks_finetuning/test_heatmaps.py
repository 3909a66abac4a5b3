"""Drawing against the closed form in a naive loop; decoding against maps whose answer is known by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from core.config.load import CONFIG_DIR, load_config, parse_config
from core.errors import UserError
from landmarks_finetuning.decoding import sigma_pixels
from landmarks_finetuning.heatmaps import (
    DECODERS,
    TARGETS,
    confidence,
    contour_centroid,
    decode,
    draw_target,
    log_maps,
    probability_maps,
)

PIXELS, CHANNELS = "cross_entropy_pixels", "cross_entropy_channels"
sizes = pytest.mark.parametrize("size", [(24, 20), (14, 12, 16)], ids=["2d", "3d"])
any_dimension = pytest.mark.parametrize("decoder", ["component_centroid", "argmax", "local_expectation",
                                                        "window_mass", "quadratic"])


def points_inside(size, count=3, batch=2, margin=4, seed=0):
    fraction = torch.rand(batch, count, len(size), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return margin + fraction * (torch.tensor(size) - 1 - 2 * margin)


def naive_gaussian(point, size, sigma):
    heatmap = np.zeros(size)
    for pixel in itertools.product(*map(range, size)):
        heatmap[pixel] = math.exp(-sum((i - p) ** 2 for i, p in zip(pixel, point, strict=True)) / (2 * sigma**2))
    return heatmap


# ---- drawing


@sizes
def test_targets_equal_the_closed_form(size):
    points, sigma = points_inside(size, batch=1), 1.7
    drawn = {kind: draw_target(points, size, kind, sigma)[0].numpy() for kind in TARGETS}
    for n, point in enumerate(points[0].tolist()):
        expected = naive_gaussian(point, size, sigma)
        np.testing.assert_allclose(drawn["gaussian"][n], expected, atol=1e-5)
        np.testing.assert_array_equal(drawn["disk"][n], expected > 0.5)
        one = np.zeros(size)
        one[tuple(round(p) for p in point)] = 1
        np.testing.assert_array_equal(drawn["pixel"][n], one)


def test_the_published_disk_has_the_area_and_shape_counted_by_hand():
    disk = draw_target(torch.tensor([[[20.0, 20.0]]]), (41, 41), "disk", 5.0)[0, 0]
    assert disk.sum() == 109  # integer pairs with y^2 + x^2 < 2 ln 2 * 25 = 34.66
    assert disk[20, 25] == 1 and disk[20, 26] == 0
    assert disk[23, 25] == 1 and disk[24, 25] == 0  # 34 < 34.66 < 41


@sizes
@pytest.mark.parametrize("kind", TARGETS)
def test_gaussian_peaks_at_one_and_targets_are_float32(kind, size):
    heatmap = draw_target(torch.full((1, 1, len(size)), 5.0, dtype=torch.float64), size, kind, 2.0)
    assert heatmap.dtype == torch.float32 and heatmap.shape == (1, 1, *size)
    assert heatmap.max() == 1
    assert heatmap[(0, 0, *(5,) * len(size))] == 1


@sizes
@pytest.mark.parametrize("kind", TARGETS)
def test_missing_and_far_outside_landmarks_are_all_zeros_and_leave_the_others_alone(kind, size):
    points = points_inside(size, count=4)
    alone = draw_target(points, size, kind, 2.0)
    points[0, 1] = math.nan
    points[1, 2, 0] = math.nan  # one missing coordinate is a missing landmark
    points[0, 3] = -9.0  # 2.4 px is the disk's radius
    drawn = draw_target(points, size, kind, 2.0)
    for image, landmark in [(0, 1), (1, 2), (0, 3)]:
        assert drawn[image, landmark].abs().sum() == 0
        alone[image, landmark] = 0
    torch.testing.assert_close(drawn, alone, rtol=0, atol=0)


@sizes
def test_a_landmark_just_outside_draws_what_falls_in(size):
    point = torch.full((1, 1, len(size)), 5.0)
    point[..., 0] = -1.0
    disk, gaussian, pixel = (draw_target(point, size, kind, 2.0)[0, 0] for kind in ("disk", "gaussian", "pixel"))
    expected = naive_gaussian(point[0, 0].tolist(), size, 2.0)
    np.testing.assert_array_equal(disk.numpy(), expected > 0.5)
    np.testing.assert_allclose(gaussian.numpy(), expected, atol=1e-6)
    assert disk.sum() > 0 and pixel.sum() == 0


@sizes
def test_pixel_on_the_image_border_is_clipped_into_the_image(size):
    far = torch.tensor(size, dtype=torch.float64) - 0.5
    drawn = draw_target(torch.stack([torch.full_like(far, -0.5), far, far + 0.01])[None], size, "pixel", 1.0)[0]
    assert drawn[(0, *(0,) * len(size))] == 1
    assert drawn[(1, *(length - 1 for length in size))] == 1
    assert drawn.flatten(1).sum(dim=1).tolist() == [1, 1, 0]


@sizes
@pytest.mark.parametrize("kind", TARGETS)
def test_a_tiny_sigma_never_loses_a_landmark_inside_the_image(kind, size):
    assert draw_target(torch.full((1, 1, len(size)), 5.5), size, kind, 0.4).sum() > 0  # the disk's radius is 0.47


# ---- decoding


@sizes
@any_dimension
@pytest.mark.parametrize("loss", [PIXELS, CHANNELS])
def test_round_trip_through_a_gaussian(decoder, loss, size):
    if (decoder, loss) == ("window_mass", CHANNELS):
        with pytest.raises(UserError, match="sums probability over pixels, which .* does not learn"):
            decode(torch.zeros(1, 2, *size), decoder, loss, 2.0)
        return
    points = points_inside(size)
    decoded, sure = decode(10 * draw_target(points, size, "gaussian", 2.0), decoder, loss, 2.0)
    tolerance = {"argmax": 0.5, "component_centroid": 0.5, "local_expectation": 0.05,
                 "window_mass": 0.05, "quadratic": 0.05}[decoder]
    if loss == CHANNELS:  # neighbours bend the softmax over landmarks
        tolerance = 2.0
    assert decoded.dtype == torch.float64 and decoded.shape == points.shape
    assert (decoded - points).abs().max() <= tolerance
    assert sure.shape == points.shape[:2] and sure.min() >= 0 and sure.max() <= 1


@sizes
@pytest.mark.parametrize("loss", [PIXELS, CHANNELS])
def test_component_centroid_of_a_disk_is_scipy_s_centre_of_mass(loss, size):
    disks = draw_target(points_inside(size, count=2, seed=3), size, "disk", 1.5)
    disks[:, 1] = draw_target(torch.full((2, 1, len(size)), 2.0), size, "disk", 1.5)[:, 0]
    disks[:, 0] *= 1 - disks[:, 1]
    decoded, _ = decode(20 * disks, "component_centroid", loss, 1.5)
    for disk, point in zip(disks.flatten(0, 1).numpy(), decoded.flatten(0, 1).numpy(), strict=True):
        np.testing.assert_allclose(point, ndimage.center_of_mass(disk), atol=1e-9)


@sizes
def test_component_centroid_takes_the_largest_component_and_joins_by_faces_only(size):
    outputs = torch.zeros(1, 1, *size)
    tail = (3,) * (len(size) - 2)
    outputs[(0, 0, 2, 2, *tail)] = 10.3  # the maximum, alone
    outputs[(0, 0, 8, slice(4, 7), *tail)] = 10.0
    outputs[(0, 0, 9, 7, *tail)] = 10.0  # touches only at a corner
    decoded, _ = decode(outputs, "component_centroid", PIXELS, 1.0)
    assert decoded[0, 0].tolist() == [8.0, 5.0, *map(float, tail)]


@sizes
def test_component_centroid_thresholds_at_half_of_the_probability_not_of_the_output(size):
    outputs = torch.zeros(1, 1, *size)
    row = (0, 0, *(5,) * (len(size) - 1))
    outputs[(*row, 4)] = 10.0
    outputs[(*row, 5)] = 10.0 + math.log(0.55)
    outputs[(*row, 6)] = 10.0 + math.log(0.45)  # above half of the raw maximum
    decoded, _ = decode(outputs, "component_centroid", PIXELS, 1.0)
    assert decoded[0, 0].tolist() == [5.0] * (len(size) - 1) + [4.5]


@sizes
def test_plateau_maps_decode_to_their_middle_with_the_confidence_of_chance(size):
    outputs = torch.full((1, 2, *size), -3.0)
    middle = [(length - 1) / 2 for length in size]
    decoded, sure = decode(outputs, "component_centroid", PIXELS, 1.0)
    np.testing.assert_allclose(decoded[0].numpy(), [middle] * 2)
    np.testing.assert_allclose(sure.numpy(), 5 ** len(size) / math.prod(size), rtol=1e-5)
    _, sure = decode(outputs, "component_centroid", CHANNELS, 1.0)
    np.testing.assert_allclose(sure.numpy(), 0.5, rtol=1e-6)


@sizes
def test_local_expectation_equals_a_naive_weighted_mean_also_at_the_border(size):
    outputs = torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(5))
    outputs[(0, 0, *(0,) * len(size))] = 6.0
    decoded, _ = decode(outputs, "local_expectation", PIXELS, 1.6)  # radius 2
    for heatmap, point in zip(outputs.flatten(0, 1).double().numpy(), decoded.flatten(0, 1).numpy(), strict=True):
        peak = np.unravel_index(heatmap.argmax(), size)
        ranges = [range(max(0, c - 2), min(n, c + 3)) for c, n in zip(peak, size, strict=True)]
        window = list(itertools.product(*ranges))
        weights = np.exp([heatmap[pixel] for pixel in window])
        np.testing.assert_allclose(point, np.average(window, axis=0, weights=weights), atol=1e-5)


@sizes
@pytest.mark.parametrize("slanted", [False, True])
@pytest.mark.parametrize("margin", [3, 0])
def test_quadratic_is_exact_for_gaussians(size, slanted, margin):
    """At every position, in corners too, of slanted ones whose log has mixed terms; to float32."""
    dims, points = len(size), points_inside(size, count=20, margin=margin)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(dims, dims)))[0] if slanted else np.eye(dims)
    precision = torch.from_numpy(turn @ np.diag([1.0, 0.5, 0.7][:dims]) @ turn.T)
    pixels = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"), dim=-1).double()
    away = pixels - points[(..., *(None,) * dims, slice(None))]
    outputs = (-0.5 * (away @ precision * away).sum(dim=-1) + 3).float()
    decoded, _ = decode(outputs, "quadratic", PIXELS, 1.5)
    assert (decoded - points).abs().max() < 1e-4


@sizes
def test_quadratic_without_a_top_stays_at_the_argmax_or_on_its_axis(size):
    """A plateau, a lone pixel at the border and a saddle, by hand: then each axis has its own parabola."""
    dims = len(size)
    outputs = torch.zeros(1, 4, *size)
    outputs[(0, 1, *(0,) * dims)] = 50.0
    ridge = torch.tensor([[-20.0, 1.0, 3.0], [1.0, 4.0, 2.0], [3.9, 2.0, -20.0]])  # mixed: -11.7
    outputs[(0, 2, slice(4, 7), slice(4, 7), *(5,) * (dims - 2))] = ridge
    outputs[(0, 3, *(5,) * dims)] = float(2**20)
    decoded, _ = decode(outputs, "quadratic", PIXELS, 1.0)
    assert decoded[0, 0].tolist() == [0.0] * dims
    assert decoded[0, 1].tolist() == [0.0] * dims
    # along an axis f = (1, 4, 2): slope 0.5, curvature -5
    np.testing.assert_allclose(decoded[0, 2], [5.1, 5.1, 5.0][:dims], atol=1e-5)
    assert decoded[0, 3].tolist() == [5.0] * dims


@sizes
def test_window_mass_equals_a_naive_search_of_all_windows(size):
    outputs = torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(7)) * 2
    outputs[(0, 0, *(0,) * len(size))] = 7.0  # a lone peak at the border, and a broad hill
    outputs[(0, 0, *(slice(n - 4, n - 1) for n in size))] = 6.0
    decoded, _ = decode(outputs, "window_mass", PIXELS, 0.6)  # radius 1
    for heatmap, point in zip(outputs.flatten(0, 1).double().numpy(), decoded.flatten(0, 1).numpy(), strict=True):
        raw = np.exp(heatmap)
        ranges = [[range(max(0, c - 1), min(n, c + 2)) for c, n in zip(pixel, size, strict=True)]
                  for pixel in np.ndindex(size)]
        windows = [list(itertools.product(*parts)) for parts in ranges]
        best = max(windows, key=lambda window: sum(raw[pixel] for pixel in window))
        expected = np.average(best, axis=0, weights=[raw[pixel] for pixel in best])
        np.testing.assert_allclose(point, expected, atol=1e-5)
    np.testing.assert_allclose(decoded[0, 0].numpy(), np.array(size) - 3, atol=0.2)  # the hill, not the peak


@sizes
def test_confidence_is_the_mass_or_the_mean_probability_within_two_sigma(size):
    outputs = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(6))
    for n, corner in enumerate([0, 5]):
        outputs[(0, n, *(corner,) * len(size))] = 8.0
    for loss in (PIXELS, CHANNELS):
        points, sure = decode(outputs, "argmax", loss, 1.0)
        raw = np.exp(outputs[0].double().numpy())
        spatial = tuple(range(1, raw.ndim))
        probability = raw / raw.sum(axis=spatial if loss == PIXELS else 0, keepdims=True)
        for n in range(3):
            window = tuple(slice(max(0, int(c) - 2), int(c) + 3) for c in points[0, n])
            values = probability[n][window]
            expected = values.sum() if loss == PIXELS else values.mean()
            assert sure[0, n].item() == pytest.approx(expected, rel=1e-5)


@sizes
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.2])
def test_confidence_of_points_on_the_border_counts_the_pixels_inside(size, sigma):
    """Equal outputs: the share of all pixels that lie in the window, whose half width is 2 sigma, rounded, at least 1.

    A point half a pixel outside belongs to the pixel on the border.
    """
    radius = max(1, round(2 * sigma))
    places = [-0.5, 0.0, 3.0, 0.49]
    points = torch.tensor([[[place] * len(size) for place in places] + [[length - 0.5 for length in size]]])
    maps = log_maps(torch.zeros(1, 5, *size), PIXELS)
    expected = []
    for point in points[0].numpy():
        centre = np.clip(np.rint(point), 0, np.array(size) - 1)
        pixels = itertools.product(*map(range, size))
        expected.append(sum(np.abs(np.array(pixel) - centre).max() <= radius for pixel in pixels) / math.prod(size))
    np.testing.assert_allclose(confidence(maps, points.double(), PIXELS, sigma)[0], expected, rtol=1e-5)
    of_five = confidence(log_maps(torch.zeros(1, 5, *size), CHANNELS), points.double(), CHANNELS, sigma)
    np.testing.assert_allclose(of_five[0], [0.2] * 5, rtol=1e-6)


@sizes
@pytest.mark.parametrize(("sigma", "expected"), [(0.2, 1), (0.4, 1), (1.4, 1), (1.6, 2), (2.4, 2)])
def test_the_window_about_the_peak_is_sigma_wide_and_reaches_the_neighbours_at_least(size, sigma, expected):
    """A second peak, with a quarter of the probability, has no say outside the window and its quarter within."""
    for distance, pull in ((expected, expected / 4), (expected + 1, 0.0)):
        outputs = torch.full((1, 1, *size), -60.0)
        outputs[(0, 0, *(6,) * len(size))] = 20.0
        outputs[(0, 0, 6 + distance, *(6,) * (len(size) - 1))] = 20.0 - math.log(3)
        point = decode(outputs, "local_expectation", PIXELS, sigma)[0][0, 0]
        assert point.tolist() == pytest.approx([6 + pull, *[6.0] * (len(size) - 1)], abs=1e-5)


@sizes
@pytest.mark.parametrize(("level", "sigma", "apart"), [(0.0, 0.1, 1), (500.0, 0.1, 1), (-500.0, 1.0, 2), (0.0, 1.3, 3)])
def test_the_window_of_most_mass_is_two_sigma_wide_and_knows_no_level(size, level, sigma, apart):
    """Two equal pixels against a lone one that holds more than each of them and less than both."""
    outputs = torch.full((1, 2, *size), -150.0)
    outputs[(0, 0, *(length - 3 for length in size))] = 100.0
    for first in (6, 6 + apart):
        outputs[(0, 0, first, *(6,) * (len(size) - 1))] = 100.0 - math.log(1.5)
    outputs[0, 1] = outputs[0, 0] + 400.0
    points, _ = decode(outputs + level, "window_mass", PIXELS, sigma)
    np.testing.assert_allclose(points[0].numpy(), [[6 + apart / 2, *[6.0] * (len(size) - 1)]] * 2, atol=1e-4)


@sizes
def test_each_map_is_thresholded_at_half_its_own_maximum(size):
    """Two pixels whose probabilities are as 3 to 2 make one component, in a map of any height."""
    outputs = torch.zeros(1, 2, *size)
    for number, height in enumerate((9.0, 4.0)):
        outputs[(0, number, *(6,) * len(size))] = height
        outputs[(0, number, 7, *(6,) * (len(size) - 1))] = height - math.log(1.5)
    points, _ = decode(outputs, "component_centroid", PIXELS, 1.0)
    assert points[0].tolist() == [[6.5, *[6.0] * (len(size) - 1)]] * 2
    if len(size) == 2:
        disks = draw_target(torch.tensor([[[11.0, 7.0], [8.0, 13.0]]]), size, "disk", 3.0) * torch.tensor([9.0, 2])[
            :, None, None]
        assert contour_centroid(disks)[0].numpy() == pytest.approx(np.array([[11.0, 7.0], [8.0, 13.0]]))


@sizes
def test_a_gaussian_whose_half_height_falls_outside_is_not_drawn(size):
    """0.6 of the height reaches the first pixel, and 0.4 does not."""
    for height in (0.6, 0.4):
        outside = -3.0 * math.sqrt(-2 * math.log(height))
        drawn = draw_target(torch.tensor([[[outside, *[7.0] * (len(size) - 1)]]]), size, "gaussian", 3.0)
        assert drawn.max().item() == pytest.approx(height if height > 0.5 else 0, rel=1e-5)


@pytest.mark.parametrize("decoder", ["argmax", "local_expectation", "component_centroid", "contour_centroid"])
def test_the_published_decoder_alone_looks_at_raw_outputs(decoder):
    """The largest output lies where another landmark is more probable still."""
    outputs = torch.zeros(1, 2, 24, 20)
    outputs[0, 0, 4:7, 5:8], outputs[0, 0, 15:18, 11:14] = 10.0, 20.0
    outputs[0, 1] = 5.0
    outputs[0, 1, 15:18, 11:14] = 40.0
    outputs[0, 0, 5, 6] += 1
    expected = [16.0, 12.0] if decoder == "contour_centroid" else [5.0, 6.0]
    assert decode(outputs, decoder, CHANNELS, 1.0)[0][0, 0].tolist() == pytest.approx(expected, abs=1e-3)


@sizes
def test_probability_maps_are_the_softmax_over_pixels_or_landmarks(size):
    outputs = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(8)) * 5
    pixels = outputs.double().flatten(2).softmax(dim=2).view(outputs.shape)
    torch.testing.assert_close(probability_maps(outputs, PIXELS).double(), pixels, rtol=1e-4, atol=1e-8)
    landmarks = outputs.double().softmax(dim=1)
    torch.testing.assert_close(probability_maps(outputs, CHANNELS).double(), landmarks, rtol=1e-4, atol=1e-8)


@sizes
def test_argmax_over_landmarks_survives_probabilities_that_round_to_one(size):
    outputs = torch.zeros(1, 2, *size)
    outputs[0, 0] = 30.0
    outputs[(0, 0, *(7,) * len(size))] = 31.0
    outputs[0, 1] = 12.0  # every probability of the first landmark is 1 - 1.5e-8 or more: 1 in float32
    decoded, _ = decode(outputs, "argmax", CHANNELS, 1.0)
    assert decoded[0, 0].tolist() == [7.0] * len(size)


# ---- the published decoder


def test_contour_centroid_of_a_symmetric_disk_is_its_centre_in_row_column_order():
    disks = draw_target(torch.tensor([[[11.0, 7.0], [8.0, 13.0]]]), (24, 20), "disk", 3.0)
    for outputs in (disks, disks - 0.4, (disks * 50).bfloat16()):
        np.testing.assert_allclose(contour_centroid(outputs)[0].numpy(), [[11, 7], [8, 13]], atol=1e-6)


def test_contour_centroid_thresholds_raw_outputs_and_takes_the_contour_of_the_largest_area():
    outputs = torch.full((1, 1, 20, 20), -5.0)
    outputs[0, 0, 2:5, 2:5] = 10.0
    outputs[0, 0, 9:16, 8:13] = 5.001  # the larger, just above half of 10; its probability is tiny
    decoded, _ = decode(outputs, "contour_centroid", PIXELS, 1.0)
    np.testing.assert_allclose(decoded[0, 0].numpy(), [12, 10], atol=1e-9)
    outputs[0, 0, 9:16, 8:13] = 5.0  # exactly half is not above half
    np.testing.assert_allclose(contour_centroid(outputs)[0, 0].numpy(), [3, 3], atol=1e-9)
    outputs[0, 0, 9:16, 8:13] = 5.001  # whichever contour OpenCV lists first
    np.testing.assert_allclose(contour_centroid(outputs.flip(2))[0, 0].numpy(), [7, 10], atol=1e-9)


def test_contour_centroid_ignores_holes_where_component_centroid_does_not():
    outputs = torch.zeros(1, 1, 20, 20)
    outputs[0, 0, 5:12, 4:15] = 20.0
    outputs[0, 0, 7:9, 5:8] = 0.0
    np.testing.assert_allclose(contour_centroid(outputs)[0, 0].numpy(), [8, 9], atol=1e-9)
    decoded, _ = decode(outputs, "component_centroid", PIXELS, 1.0)
    np.testing.assert_allclose(decoded[0, 0].numpy(), ndimage.center_of_mass(outputs[0, 0].numpy()))


@pytest.mark.parametrize("fill", ["negative", "zero", "one pixel", "a line"])
def test_contour_centroid_leaves_the_point_at_the_origin(fill):
    outputs = torch.full((1, 1, 16, 16), -1.0 if fill == "negative" else 0.0)
    if fill == "negative":
        outputs[0, 0, 4:9, 4:9] = -0.1
    if fill == "one pixel":
        outputs[0, 0, 6, 7] = 1.0
    if fill == "a line":
        outputs[0, 0, 6, 3:9] = 1.0
    assert contour_centroid(outputs)[0, 0].tolist() == [0.0, 0.0]


def test_contour_centroid_refuses_volumes():
    with pytest.raises(UserError, match="component_centroid"):
        decode(torch.zeros(1, 1, 4, 4, 4), "contour_centroid", PIXELS, 1.0)


# ---- mistakes


def test_unknown_names_are_refused_with_the_choices():
    outputs = torch.zeros(1, 1, 8, 8)
    with pytest.raises(UserError, match='^finetune.decoder: unknown value "argmx"; .* mean "argmax"'):
        decode(outputs, "argmx", PIXELS, 1.0)
    with pytest.raises(UserError, match='^finetune.loss: unknown value "mse"'):
        decode(outputs, "argmax", "mse", 1.0)
    with pytest.raises(UserError, match='^finetune.target: unknown value "circle"'):
        draw_target(torch.zeros(1, 1, 2), (8, 8), "circle", 1.0)
    with pytest.raises(ValueError, match="3 coordinates"):
        draw_target(torch.zeros(1, 1, 3), (8, 8), "disk", 1.0)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_diverged_network_is_reported_not_decoded(decoder):
    outputs = torch.zeros(1, 2, 8, 8)
    outputs[0, 1, 3, 3] = math.nan
    with pytest.raises(UserError, match="diverged"):
        decode(outputs, decoder, PIXELS, 1.0)


# ---- sigma in mm


def test_sigma_is_one_of_the_image_unless_images_are_resampled():
    """Whole images: stated for 256 pixels. Resampled: pixels of resample_mm, whatever the crop's size."""
    def pixels(**dataset):
        return sigma_pixels(2.0, parse_config({"dataset": dataset}, "test").dataset)

    assert [pixels(image_size=size) for size in ([256, 256], [128, 128], [64, 128])] == [2.0, 1.0, 0.75]
    assert [pixels(image_size=size, resample_mm=0.5) for size in ([256, 256], [128, 128], [64, 128])] == [2.0] * 3


@pytest.mark.parametrize("name, sigma", [("config_3d", 2.0), ("mouse_ct", 0.9375), ("demo_3d", 1.0), ("config", 2.5)])
def test_sigma_of_the_configs_is_what_it_was(name, sigma):
    """4 x 128 / 256, 5 x 48 / 256, 8 x 32 / 256 and 2.5 x 256 / 256."""
    config = load_config(CONFIG_DIR / f"{name}.json")
    assert sigma_pixels(config.finetune.sigma, config.dataset) == sigma
