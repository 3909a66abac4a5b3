"""The shape prior: exact similarities, robust to outliers, missing landmarks, and what it does to heatmaps."""

import itertools
import json

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from core.config.finetune import LossSettings
from core.config.section import Augmentation
from core.data.dataset import load_images
from core.data.shots import labelled_subset
from core.data.source import load_source
from core.runs.places import Cell
from landmarks_finetuning.decoding import locate
from landmarks_finetuning.heatmaps import decode
from landmarks_finetuning.inference import TrainedDetector
from landmarks_finetuning.predictions import find_landmarks
from landmarks_finetuning.shape import SCALES, SCATTER, Shape, add_shape_prior, mean_shape, shape_modes
from landmarks_finetuning.train import finetune_cell

NAN = float("nan")
dims = pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])


def rotation(dims, rng):
    """A random rotation matrix, by QR."""
    turn, _ = np.linalg.qr(rng.normal(size=(dims, dims)))
    return turn if np.linalg.det(turn) > 0 else turn[:, [1, 0, *range(2, dims)]]


def shape_of(dims, count=12):
    return np.random.default_rng(3).normal(size=(count, dims)) * 10 + 40


@dims
def test_a_similarity_is_found_exactly_and_a_mirror_is_not(dims):
    rng, shape = np.random.default_rng(0), shape_of(dims)
    moved = 1.7 * shape @ rotation(dims, rng) + rng.normal(size=dims) * 30
    np.testing.assert_allclose(Shape(shape).fit(moved, np.ones(12)), moved, atol=1e-9)
    mirrored = shape * np.array([-1, *[1] * (dims - 1)])
    assert np.abs(Shape(shape).fit(mirrored, np.ones(12)) - mirrored).max() > 3


@dims
@pytest.mark.parametrize("seed", range(5))
def test_a_third_of_the_points_may_lie_anywhere(dims, seed):
    rng, shape = np.random.default_rng(seed), shape_of(dims)
    moved = 0.8 * shape @ rotation(dims, rng) + 5
    found = moved + rng.normal(size=moved.shape) * 0.05
    found[:4] = rng.uniform(moved.min(axis=0), moved.max(axis=0), (4, dims))
    np.testing.assert_allclose(Shape(shape).fit(found, np.ones(12)), moved, atol=0.5)


@dims
def test_confidence_decides_between_two_halves(dims):
    shape = shape_of(dims)
    found = shape + np.where(np.arange(12) < 6, 100.0, 0.0)[:, None]
    confidence = np.where(np.arange(12) < 6, 0.01, 1.0)
    np.testing.assert_allclose(Shape(shape).fit(found, confidence), shape, atol=0.5)


@dims
def test_mean_shape_of_moved_copies_is_the_shape_also_with_gaps(dims):
    rng, shape = np.random.default_rng(1), shape_of(dims)
    shapes = np.stack([s * shape @ rotation(dims, rng) + rng.normal(size=dims) * 9 for s in (1.0, 0.6, 1.8)])
    shapes[1, 2], shapes[2, 5], shapes[:, 7] = NAN, NAN, NAN
    mean = mean_shape(shapes)
    assert np.isnan(mean[7]).all() and np.isfinite(np.delete(mean, 7, axis=0)).all()
    np.testing.assert_allclose(np.delete(mean, 7, axis=0), np.delete(shapes[0], 7, axis=0), atol=1e-9)


@dims
def test_too_few_landmarks_give_no_prior(dims):
    shape = shape_of(dims, dims)
    fitted = Shape(shape).fit(shape + 3, np.ones(dims))
    assert np.isnan(fitted).all()
    outputs = torch.randn(1, dims, *(8,) * dims)
    assert torch.equal(add_shape_prior(outputs, fitted[None], 2.0), outputs)


@dims
def test_prior_is_the_log_of_a_gaussian(dims):
    size = (6, 9, 5)[:dims]
    place = np.array([[[2.3, 4.0, 1.5][:dims]]])
    total = add_shape_prior(torch.zeros(1, 1, *size), place, 1.5)[0, 0].numpy()
    for pixel in np.ndindex(size):
        assert total[pixel] == pytest.approx(-((np.array(pixel) - place[0, 0]) ** 2).sum() / (2 * 1.5**2), abs=1e-5)


@dims
def test_a_landmark_on_the_wrong_structure_comes_back(dims):
    """Two equal peaks, the wrong one a little higher: the others' shape decides."""
    shape, size = shape_of(dims, 8) * 0.4, (40,) * dims
    shape = np.round(np.clip(shape, 2, 37))
    outputs = torch.zeros(1, 8, *size)
    for number, point in enumerate(shape.astype(int)):
        outputs[(0, number, *point)] = 20.0
    wrong = (int(39 - shape[0, 0]), *[1] * (dims - 1))
    outputs[(0, 0, *wrong)] = 21.0
    points, sure = decode(outputs, "argmax", "cross_entropy_pixels", 1.0)
    assert points[0, 0].tolist() == list(wrong)
    fitted = Shape(shape).fit(points[0].numpy(), sure[0].numpy())
    weighted = add_shape_prior(outputs, fitted[None], 0.2 * Shape(shape).size)
    assert decode(weighted, "argmax", "cross_entropy_pixels", 1.0)[0][0].tolist() == shape.tolist()


def test_size_by_hand():
    assert Shape(np.array([[0.0, 0.0], [0.0, 6.0], [NAN, NAN], [8.0, 0.0], [8.0, 6.0]])).size == pytest.approx(5.0)


def test_locate_uses_the_prior_but_for_the_published_decoder():
    settings, sigma = LossSettings(decoder="argmax"), 2.5 * 32 / 256
    shape = np.array([[4.0, 4], [4, 26], [26, 4], [26, 26], [15, 8]])
    outputs = torch.zeros(1, 5, 32, 32)
    for number, (y, x) in enumerate(shape.astype(int)):
        outputs[0, number, y - 1 : y + 2, x - 1 : x + 2] = 20.0
    outputs[0, 0, 28:31, 15:18] = 21.0
    same = np.eye(2, 3)[None]
    assert locate(outputs, same, settings, sigma).points[0, 0].tolist() == [28, 15]
    points, expected, radii, confidence = locate(outputs, same, settings, sigma, shape=Shape(shape))
    np.testing.assert_allclose(points[0], shape, atol=1)
    # the network's own belief in that place, a window about a block's corner: four pixels of its nine, which are all
    # that there is of four landmarks; of the first, nine of e^20 lie beside nine of e^21
    np.testing.assert_allclose(confidence[0], 4 / 9 / np.array([1 + np.e, 1, 1, 1, 1]), rtol=1e-4)
    assert expected[0, 0] == pytest.approx(expected[0, 1], rel=1e-3) and radii.max() < 4  # of the map under the prior
    published = [locate(outputs, same, settings, sigma, "contour_centroid", s)[0] for s in (None, Shape(shape))]
    np.testing.assert_array_equal(*published)


@pytest.mark.parametrize("share", [0.1, 0.2])
@pytest.mark.parametrize(("height", "stays"), [(0.9, False), (1.1, True)], ids=["lower", "higher"])
def test_the_prior_of_locate_is_as_wide_as_the_setting_says(share, height, stays):
    """A peak that is off by two and a half widths stays where it is only if its log is higher by more than 2.5^2 / 2.

    The width is finetune.shape_prior times the root mean square distance of the landmarks from their centroid.
    """
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    shape = np.round(32 + 20 * np.stack([np.sin(angles), np.cos(angles)], axis=1))
    width = share * np.sqrt(np.square(shape - shape.mean(axis=0)).sum(axis=1).mean())
    off = round(2.5 * width)
    outputs = torch.zeros(1, 12, 64, 64)
    for number, (y, x) in enumerate(shape.astype(int)):
        outputs[0, number, y, x] = 40.0
    y, x = shape[0].astype(int)
    outputs[0, 0, y, x - off] = 40.0 + height * off**2 / (2 * width**2)
    settings = LossSettings(decoder="argmax", shape_prior=share)
    points = locate(outputs, np.eye(2, 3)[None], settings, 1.0, shape=Shape(shape)).points
    assert points[0, 0].tolist() == [y, x - off if stays else x]
    np.testing.assert_array_equal(points[0, 1:], shape[1:])


def best_similarity(source, target, weights):
    """The least-squares rotation, scale and shift by other means: complex numbers in 2D, scipy's rotations in 3D."""
    weights = weights / weights.sum()
    source_mean, target_mean = weights @ source, weights @ target
    source, target = source - source_mean, target - target_mean
    if source.shape[1] == 2:
        moving, fixed = source @ [1, 1j], target @ [1, 1j]
        moved = moving * (weights * moving.conj() @ fixed) / (weights @ abs(moving) ** 2)
        return np.stack([moved.real, moved.imag], axis=1) + target_mean
    turned = Rotation.align_vectors(target, source, weights=weights)[0].apply(source)
    return turned * (weights @ (turned * target).sum(axis=1)) / (weights @ (source**2).sum(axis=1)) + target_mean


@dims
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("size", [1.0, 0.01])
def test_the_fit_under_its_own_weights_is_the_least_squares_similarity(dims, mirrored, size):
    """Also where a mirror would fit better. The last weights are Geman and McClure's of the fit before."""
    rng = np.random.default_rng(dims)
    shape = rng.normal(size=(9, dims)) * size
    points = (shape * ([-1] if mirrored else [1]) + [[0.5] * dims]) * 1.3 + rng.normal(size=shape.shape) * 0.2 * size
    points[0] += 3 * size
    confidence = weights = rng.uniform(0.2, 1.0, 9)
    radius = np.sqrt(np.square(shape - shape.mean(axis=0)).sum(axis=1).mean())
    for scale in SCALES:
        fitted = best_similarity(shape, points, weights)
        squares = np.square(fitted - points).sum(axis=1) / (scale * radius) ** 2
        weights = confidence / (1 + squares) ** 2
    np.testing.assert_allclose(Shape(shape).fit(points, confidence), fitted, atol=1e-5 * size)


@dims
def test_mean_shape_of_noisy_copies_is_nearer_than_any_of_them(dims):
    """At the pose of the fullest one, the third; two landmarks that it alone has lie where it says."""
    rng, shape = np.random.default_rng(5), shape_of(dims)
    noisy = shape + rng.normal(size=(60, *shape.shape))
    shapes = np.stack([copy @ rotation(dims, rng) + rng.normal(size=dims) * 9 for copy in noisy])
    shapes[2] = noisy[2]
    lone = 40 + rng.normal(size=(60, 1, dims))
    shapes = np.concatenate([shapes, np.where(np.arange(60)[:, None, None] == 2, lone, NAN)], axis=1)
    shapes[np.arange(60) != 2, 0] = NAN
    shapes = np.concatenate([shapes, np.full_like(lone, NAN)], axis=1)  # and one that none has
    mean = mean_shape(shapes)
    assert np.isnan(mean[-1]).all()
    mean, shapes = mean[:-1], shapes[:, :-1]
    np.testing.assert_allclose(mean[[0, -1]], shapes[2, [0, -1]], atol=2)
    inner = slice(1, len(shape))

    def distance(points):
        moved = best_similarity(points[inner], shape[inner], np.ones(len(shape) - 1))
        return np.sqrt(np.square(moved - shape[inner]).sum(axis=1).mean())

    assert distance(mean) < 0.4 * min(distance(one) for one in noisy)
    assert np.linalg.norm((mean[inner] - shapes[2, inner]).mean(axis=0)) < 0.2  # its place


def test_degenerate_shapes_do_not_spoil_the_mean_nor_the_size():
    shape = shape_of(2)
    mean = mean_shape(np.stack([shape, np.full_like(shape, 3.0)]))
    assert np.isfinite(mean).all()
    assert Shape(np.full((4, 2), NAN)).size == 0.0
    np.testing.assert_allclose(Shape(shape).fit(shape + 4, np.zeros(12)), shape + 4)  # nothing is certain


@dims
def test_many_images_are_fitted_as_each_by_itself(dims):
    rng = np.random.default_rng(5)
    shape = shape_of(dims, 12)
    points = shape + rng.normal(0, 2, (4, 12, dims))
    points[1, 3] = NAN
    points[2, :10] = NAN  # too few are left in 3D, and in 2D
    points[3, 5] += 50
    confidence = rng.uniform(0.1, 1, (4, 12))
    together = Shape(shape).fit(points, confidence)
    alone = np.stack([Shape(shape).fit(*pair) for pair in zip(points, confidence, strict=True)])
    np.testing.assert_allclose(together, alone, rtol=1e-12)
    assert np.isnan(together[2]).all() and np.isfinite(together[[0, 1, 3]]).all()

# ---- modes


def known_model(dims, count, spreads, landmarks=14):
    """(mean, modes, shapes): shapes mean + sum b modes with b normal, moved, turned and scaled at random.

    No mode has a part that a small similarity has too. Modes are as long as `spreads` times the mean's size.
    """
    rng, mean = np.random.default_rng(0), shape_of(dims, landmarks)
    centred = mean - mean.mean(axis=0)
    turns = [np.zeros((dims, dims)) for _ in range(dims * (dims - 1) // 2)]
    for turn, (i, j) in zip(turns, itertools.combinations(range(dims), 2), strict=True):
        turn[i, j], turn[j, i] = 1, -1
    moves = [np.tile(axis, (landmarks, 1)) for axis in np.eye(dims)] + [centred] + [centred @ turn for turn in turns]
    columns = [way.ravel() for way in moves] + list(rng.normal(size=(len(spreads), mean.size)))
    directions = np.linalg.qr(np.stack(columns, axis=1))[0].T[len(moves) :].reshape(-1, *mean.shape)
    modes = directions * np.array(spreads)[:, None, None] * Shape(mean).size
    plain = mean + np.tensordot(rng.normal(size=(count, len(spreads))), modes, axes=1)
    shapes = np.stack([rng.uniform(0.7, 1.4) * one @ rotation(dims, rng) + rng.normal(size=dims) * 20 for one in plain])
    return mean, modes, shapes


@dims
def test_modes_of_a_known_linear_model_are_recovered(dims):
    """Their directions, their lengths, and what they are for: other shapes of the model are fitted."""
    mean, modes, shapes = known_model(dims, 430, (0.5, 0.25))
    shapes, others = shapes[:400], shapes[400:]
    found_mean = mean_shape(shapes)
    found = shape_modes(shapes, found_mean, 5)
    assert found.shape == (2, *mean.shape)  # no more are needed
    turned = best_similarity(found_mean, mean, np.ones(len(mean)))  # in the known one's pose
    for mode, known in zip(found, modes, strict=True):
        back = (best_similarity(found_mean + 0.01 * mode, turned, np.ones(len(mean))) - turned) / 0.01
        likeness = abs((back * known).sum()) / np.linalg.norm(back) / np.linalg.norm(known)
        assert likeness > 0.97
        assert np.linalg.norm(back) == pytest.approx(np.linalg.norm(known), rel=0.1)
        assert np.linalg.norm(mode) / Shape(found_mean).size == pytest.approx(
            np.linalg.norm(known) / Shape(mean).size, rel=0.1)
    model = Shape(found_mean, found)
    bent, rigid = [], []
    for shape in others:
        size = Shape(shape).size
        bent.append(np.linalg.norm(model.fit(shape, np.ones(14)) - shape, axis=1).mean() / size)
        rigid.append(np.linalg.norm(Shape(found_mean).fit(shape, np.ones(14)) - shape, axis=1).mean() / size)
    assert np.mean(bent) < 0.25 * np.mean(rigid)


@dims
def test_an_outlier_is_put_right_better_than_by_the_rigid_fit(dims):
    _, _, shapes = known_model(dims, 90, (0.5, 0.3, 0.2))
    mean, rng = mean_shape(shapes[:60]), np.random.default_rng(2)
    model = Shape(mean, shape_modes(shapes[:60], mean, 5))
    bent, rigid = [], []
    for shape in shapes[60:]:
        size, seen = Shape(shape).size, shape.copy()
        seen += rng.normal(size=seen.shape) * 0.02 * size
        wrong = rng.integers(14)
        seen[wrong] = shape[(wrong + 5) % 14]  # on another landmark
        bent.append(np.linalg.norm(model.fit(seen, np.ones(14))[wrong] - shape[wrong]) / size)
        rigid.append(np.linalg.norm(Shape(mean).fit(seen, np.ones(14))[wrong] - shape[wrong]) / size)
    assert np.median(bent) < 0.7 * np.median(rigid) and np.mean(bent) < 0.8 * np.mean(rigid)


def test_the_number_of_modes():
    """One for two labels beside the first, no more than asked for, and none where the labels are alike."""
    _, _, shapes = known_model(2, 20, (0.4, 0.35, 0.3, 0.25, 0.2, 0.15))
    shapes += np.random.default_rng(0).normal(size=shapes.shape) * 0.5
    counts = [len(shape_modes(shapes[:labels], mean_shape(shapes[:labels]), most))
              for labels, most in ((20, 0), (20, 3), (1, 9), (2, 9), (3, 9), (4, 9), (5, 9), (20, 99))]
    assert counts[:-1] == [0, 3, 0, 0, 1, 1, 2] and 5 <= counts[-1] < 9
    moved = np.stack([s * shapes[0] @ rotation(2, np.random.default_rng(9)) for s in (1.0, 0.6, 1.8, 1.2, 1.0)])
    assert shape_modes(moved, mean_shape(moved), 3).shape == (0, 14, 2)


def test_a_coefficient_is_shrunk_by_its_variance_by_hand():
    """b = (sum w mode off) / (sum w mode^2 + scatter^2): the least squares divided by 1 + scatter^2 / variance."""
    mean = np.array([[-3.0, -4.0], [3.0, -4.0], [3.0, 4.0], [-3.0, 4.0], [NAN, NAN]])  # of size 5
    mode, weights = np.zeros((1, 5, 2)), np.array([1.0, 0.5, 1.0, 0.0, 1.0])
    mode[0, 0, 0], mode[0, 1, 1], mode[0, 3, 0] = 0.2, 0.1, 7.0
    points = mean + np.array([[0.4, 0.0], [0.0, 0.6], [0.3, 0.3], [5.0, 5.0], [0.0, 0.0]])
    scatter = (SCATTER * 5) ** 2
    b = (0.2 * 0.4 + 0.5 * 0.1 * 0.6) / (0.2**2 + 0.5 * 0.1**2 + scatter)
    np.testing.assert_allclose(Shape(mean, mode)._bent(points, weights), mean + b * mode[0])


@dims
def test_gaps_and_nothing_known(dims):
    """Missing landmarks do not count; where too few are known there is no fit, with modes as without."""
    mean, _, shapes = known_model(dims, 40, (0.5, 0.3))
    shapes[::3, 2], shapes[:, 7] = NAN, NAN
    mean = mean_shape(shapes)
    model = Shape(mean, shape_modes(shapes, mean, 4))
    assert np.isfinite(model.modes).all() and (model.modes[:, 7] == 0).all()
    fitted = model.fit(np.nan_to_num(shapes[1], nan=3.0), np.where(np.arange(14) == 7, 0.0, 1.0))
    assert np.isnan(fitted[7]).all() and np.isfinite(np.delete(fitted, 7, axis=0)).all()
    few = np.full_like(mean, NAN)
    few[:dims] = shapes[0, :dims]
    assert np.isnan(model.fit(few, np.ones(14))).all()
    assert model.size == Shape(mean).size


@dims
@pytest.mark.parametrize("most", [0, 2])
def test_the_header_holds_the_shape(dims, most):
    _, _, shapes = known_model(dims, 8, (0.5, 0.3))
    shapes[:, 7] = NAN
    shape = Shape.of(shapes, Augmentation(), most)
    back = Shape.stored(json.loads(json.dumps(shape.header())))
    np.testing.assert_array_equal(back.mean, shape.mean)
    assert (back.modes is None) == (most == 0)
    if most:
        np.testing.assert_array_equal(back.modes, shape.modes)
    np.testing.assert_array_equal(back.poses.rotation, shape.poses.rotation)
    assert back.poses[1:] == shape.poses[1:]


def test_a_header_older_than_the_prior_or_the_poses():
    assert Shape.stored({}) is None
    shape = Shape.stored({"shape": [[1.0, 2.0], [None, None]]})
    np.testing.assert_array_equal(shape.mean, [[1, 2], [NAN, NAN]])
    assert shape.modes is None and shape.poses is None


@pytest.mark.parametrize("most", [0, 1])
def test_a_trained_detector_has_the_modes_that_its_labels_give(make_config, tmp_path, most):
    config = make_config(tmp_path, finetune={"shape_modes": most, "backbones": ["scratch"], "shots": [4]})
    run_dir = finetune_cell(config, Cell("scratch", 4, 0, 0))
    detector = TrainedDetector(run_dir / "best.safetensors")
    assert ("shape_modes" in detector.header) == bool(most)
    labels = load_images(labelled_subset(load_source(config.dataset), config.finetune, 4, 0)[0], config.dataset)
    mean = mean_shape(labels.truth.numpy())
    np.testing.assert_allclose(detector.shape.mean, mean)
    if most:
        np.testing.assert_allclose(detector.shape.modes, shape_modes(labels.truth.numpy(), mean, 1))
    assert np.isfinite(find_landmarks(detector, labels).points).all()
