"""Elastic displacements: as scipy's splines have them, always undone, and landmarks stay on what they mark."""

import itertools

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from core.config.section import Augmentation
from core.data.augment import Crops, augment, warp_images
from core.data.elastic import CELLS, STEEPEST, displacement_field, displacements, draw_knots, undo_displacement
from tests.core.data.test_augment import blobs, centroids, seeded

SIZES = pytest.mark.parametrize("size", [(40, 56), (20, 28, 24)], ids=["2D", "3D"])


def pixels(size):
    """(*size, D) positions."""
    return torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij"), dim=-1)


@SIZES
def test_the_field_is_scipy_s_spline(size):
    dims = len(size)
    knots = draw_knots(2, dims, 0.04, 1.0, seeded())
    field = displacement_field(knots, size)
    assert field.shape == (2, dims, *size)
    places = np.arange(CELLS + 7) - 3  # the uniform knots of CELLS + 3 cubic splines
    expected = knots[1].numpy()
    for axis, length in enumerate(size):
        centres = (np.arange(length) + 0.5) / length * CELLS
        expected = np.moveaxis(BSpline(places, np.moveaxis(expected, axis + 1, 0), 3)(centres), 0, axis + 1)
    np.testing.assert_allclose(field[1].numpy(), expected, atol=1e-12)
    at = displacements(knots, pixels(size).flatten(0, -2).expand(2, -1, -1), size)
    expected = (field * torch.tensor(size).view(-1, *(1,) * dims)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(at, expected, rtol=0, atol=1e-10)


@SIZES
def test_a_stretch_in_closed_form(size):
    """Coefficients a (k - 1) along their own axis are the displacement a t, t in cells: p = q + a n t(q), solved."""
    dims, slope = len(size), STEEPEST / CELLS
    knots = torch.zeros(1, dims, *(CELLS + 3,) * dims, dtype=torch.float64)
    for axis in range(dims):
        steps = (torch.arange(CELLS + 3, dtype=torch.float64) - 1).view(-1, *(1,) * (dims - axis - 1))
        knots[0, axis] = slope * steps
    lengths = torch.tensor(size, dtype=torch.float64)
    points = torch.rand(1, 30, dims, generator=seeded(), dtype=torch.float64) * lengths * 0.8 + 2
    wanted = (points + 0.5) / (1 + slope * CELLS) - 0.5
    found = undo_displacement(knots, points, size, slope * CELLS)
    assert (found - wanted).abs().max() < 1e-3
    torch.testing.assert_close(displacements(knots, wanted, size), points - wanted)
    image = pixels(size)[..., 0][None, None]  # its value is its first coordinate
    moved = warp_images(image, torch.eye(dims, dims + 1).double()[None], bent=displacement_field(knots, size))
    expected = ((pixels(size)[..., 0] + 0.5) * (1 + slope * CELLS) - 0.5).clamp(max=size[0] - 1)
    torch.testing.assert_close(moved[0, 0], expected, rtol=0, atol=1e-9)


@SIZES
@pytest.mark.parametrize("amplitude", [0.02, 0.1])
def test_nothing_folds_and_every_point_is_found(size, amplitude):
    """Steepest change by finite differences; points anywhere, outside and missing ones too, to a thousandth."""
    dims = len(size)
    knots = draw_knots(40, dims, amplitude, 1.0, seeded())
    field = displacement_field(knots, size)
    assert field.abs().max() <= amplitude
    inner = (..., *(slice(0, n - 1) for n in size))
    changes = sum(field.diff(dim=axis + 2)[inner].abs() * length for axis, length in enumerate(size))
    assert changes.max() < STEEPEST + 0.01
    lengths = torch.tensor(size, dtype=torch.float64)
    points = (torch.rand(40, 25, dims, generator=seeded(1), dtype=torch.float64) * 1.4 - 0.2) * lengths
    points[:, 0] = float("nan")
    found = undo_displacement(knots, points, size, amplitude)
    off = (found + displacements(knots, found, size) - points)[:, 1:]
    assert off.abs().max() < 1e-3 and found[:, 0].isnan().all()
    assert (found - points)[:, 1:].abs().max() > 0.3 * amplitude * max(size) * (1 if amplitude < 0.05 else 0.3)


@pytest.mark.parametrize("size", [(96, 128), (64, 72, 60)], ids=["2D", "3D"])
def test_a_blob_and_its_landmark_move_together(size):
    """With turns, zooms, shifts and, of larger images, crops."""
    dims, count = len(size), 8
    settings = Augmentation(probability=1, rotation_degrees=15, scale=0.1, translation=0.05, elastic=0.03)
    generator = seeded(2)
    centres = (0.36 + 0.28 * torch.rand(count, dims, generator=generator, dtype=torch.float64)) * torch.tensor(size)
    pictures = blobs(centres, size, 1.3)
    images, points = augment(pictures, centres[:, None], settings, generator)
    assert (centroids(images) - points[:, 0]).abs().max() < 0.05
    still, plain = (augment(pictures, centres[:, None], settings.model_copy(update={"elastic": value}), seeded(5))[1]
                    for value in (0.03, 0.0))
    assert (still - plain).norm(dim=2).max() > 0.5  # it did bend
    crop = tuple(n - 8 for n in size)
    crops = Crops(crop, torch.rand(count, dims, generator=generator, dtype=torch.float64) * 8)
    images, points = augment(pictures, centres[:, None], settings, generator, crops)
    assert images.shape[2:] == crop and (centroids(images) - points[:, 0]).abs().max() < 0.05


def test_share_of_images_that_bend_and_the_generator_decides():
    knots = draw_knots(2000, 2, 0.02, 0.3, seeded())
    still = (knots == 0).flatten(1).all(dim=1)
    assert still.double().mean().item() == pytest.approx(0.7, abs=0.04)
    assert torch.equal(knots, draw_knots(2000, 2, 0.02, 0.3, seeded()))
    assert not torch.equal(knots, draw_knots(2000, 2, 0.02, 0.3, seeded(1)))
    free = knots[~still].abs().flatten(1).amax(dim=1)
    assert free.max() <= 0.02 and free.min() > 0.017  # small ones are left as drawn
    pairs = itertools.pairwise(knots[~still][:3])
    assert not any(torch.equal(one, other) for one, other in pairs)
