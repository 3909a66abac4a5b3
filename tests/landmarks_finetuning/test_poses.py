"""How labelled shapes lie in the images, and a fit that stays within it."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from core.config.section import Augmentation
from landmarks_finetuning.shape import Poses, Shape, _similarity

dims = pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])


def shape_of(dims, count=12):
    return np.random.default_rng(3).normal(size=(count, dims)) * 10 + 40


def turned_by(degrees, dims):
    """A rotation of rows, about the last axis in 3D."""
    turn, angle = np.eye(dims), np.deg2rad(degrees)
    turn[:2, :2] = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    return turn


@dims
def test_the_poses_of_labels_by_hand(dims):
    """Turned by -5, 0 and 15 degrees: 10 about the middle, and 10 more. Of 0.8 to 1.2: and 15 % more."""
    shape = shape_of(dims)
    labels = np.stack([shape, 0.8 * shape @ turned_by(-5, dims), 1.2 * shape @ turned_by(15, dims) + 9])
    poses = Poses.of(labels, shape, Augmentation(rotation_degrees=2, scale=0.02))
    np.testing.assert_allclose(poses.rotation, turned_by(10 / 3, dims), atol=0.01)  # near the mean of the three
    assert np.rad2deg(poses.turn) == pytest.approx(15 - 10 / 3 + 10, abs=0.1)
    np.testing.assert_allclose(poses.scale, (0.8 / 1.15, 1.2 * 1.15))
    wide = Poses.of(labels, shape, Augmentation(rotation_degrees=40, scale=0.5))
    assert np.rad2deg(wide.turn - poses.turn) == pytest.approx(30)
    np.testing.assert_allclose(wide.scale, (0.8 / 1.5, 1.2 * 1.5))


@dims
@pytest.mark.parametrize("degrees", [-170, -60, -12, 8, 25, 100])
def test_a_turn_ends_at_the_largest_one(dims, degrees):
    middle = turned_by(5, dims)
    found = Poses(middle, np.deg2rad(20), (0.1, 9)).nearest(np.stack([turned_by(degrees, dims), middle]))
    np.testing.assert_allclose(found[0], turned_by(np.clip(degrees, -15, 25), dims), atol=1e-9)
    np.testing.assert_allclose(found[1], middle, atol=1e-12)


def test_a_turn_about_any_axis_ends_on_its_way():
    turn = Rotation.from_rotvec(np.array([0.3, -0.5, 0.8]) * 2).as_matrix().T
    found = Poses(np.eye(3), 0.4, (0.1, 9)).nearest(turn[None])[0]
    axis = np.array([0.3, -0.5, 0.8]) / np.linalg.norm([0.3, -0.5, 0.8])
    np.testing.assert_allclose(found, Rotation.from_rotvec(0.4 * axis).as_matrix().T, atol=1e-9)


@dims
def test_the_fit_within_poses_is_the_best_there_by_search(dims):
    """Of all turns about the last axis and all scales within the bounds none is nearer to the points."""
    rng, shape = np.random.default_rng(4), shape_of(dims)
    points = 0.4 * shape @ turned_by(70, dims) + rng.normal(size=shape.shape)
    poses = Poses(np.eye(dims), np.deg2rad(20), (0.7, 1.3))
    fitted = _similarity(shape, points, np.ones(12), poses)
    centred = shape - shape.mean(axis=0)

    def distance(moved):
        return np.square(moved - points).sum()

    tried = [distance(scale * centred @ turned_by(angle, dims) + points.mean(axis=0))
             for angle in np.linspace(-20, 20, 41) for scale in np.linspace(0.7, 1.3, 25)]
    assert distance(fitted) <= min(tried) * (1 + (0.05 if dims == 3 else 1e-9))
    longest = np.argmax(np.linalg.norm(centred[:, :2], axis=1))  # its arm says by how much it is turned
    before, after = centred[longest], (fitted - fitted.mean(axis=0))[longest]
    cosine = before @ after / np.linalg.norm(before) / np.linalg.norm(after)
    assert np.rad2deg(np.arccos(cosine)) < 20.001


@dims
def test_a_collapsed_answer_does_not_collapse_the_shape(dims):
    """Two of three landmarks on one wrong structure: the free fit shrinks onto it, the bounded one stays a shape."""
    rng, shape = np.random.default_rng(1), shape_of(dims)
    found = shape + rng.normal(size=shape.shape) * 0.3
    found[:8] = shape[11] + rng.normal(size=(8, dims))
    free, bounded = (model.fit(found, np.ones(12)) for model in (
        Shape(shape), Shape.of(np.stack([shape, 1.05 * shape]), Augmentation())))
    size = Shape(shape).size
    assert Shape(free).size < 0.6 * size
    assert Shape(bounded).size > 0.8 * size
    assert np.linalg.norm(bounded - shape, axis=1).mean() < 0.5 * np.linalg.norm(free - shape, axis=1).mean()
