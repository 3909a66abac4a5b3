"""Artefacts change intensities in the way that each is meant to, and nothing else."""

import pytest
import torch

from core.config.section import Augmentation
from core.data.artefacts import (
    BRIGHT,
    DARKEST,
    GRADIENT,
    MARKER,
    STROKE,
    _places,
    add_artefacts,
    collimate,
    expose,
    mark,
)
from core.data.augment import augment
from tests.core.data.test_augment import seeded

SIZES = pytest.mark.parametrize("size", [(40, 48), (20, 24, 28)], ids=["2D", "3D"])


def even(size, count=40, value=0.5):
    """Grey images, two channels, with their places."""
    images = torch.full((count, 2, *size), value)
    return images, _places(size, images.device, images.dtype)


@SIZES
def test_exposure_is_the_exponential_of_a_plane(size):
    images, places = even(size)
    change = (expose(images, places, seeded()) / 0.5).log()
    assert torch.equal(change[:, 0], change[:, 1])
    for axis, length in enumerate(size):
        steps = change.diff(dim=axis + 2).flatten(1)
        cut = expose(images, places, seeded()).flatten(1).amax(dim=1) == 1
        assert (steps - steps[:, :1]).abs()[~cut].max() < 1e-5
        slopes = steps[:, 0] * length / 2
        assert slopes.abs().max() <= GRADIENT + 1e-4 and slopes.abs().max() > 0.8 * GRADIENT
    assert change.flatten(1).mean(dim=1)[~cut].abs().max() < 1e-5  # the centre stays


@SIZES
def test_outside_the_collimator_it_is_dark_and_inside_as_before(size):
    images, places = even(size, value=0.8)
    out = collimate(images, places, seeded())
    middle = out[(slice(None), slice(None), *(slice(round(0.3 * n), round(0.7 * n)) for n in size))]
    assert (middle == 0.8).all()
    flat = out[:, 0].flatten(1)
    lowest = flat.amin(dim=1)
    collimated = lowest < 0.8 * (DARKEST + 0.01)
    assert 0.8 < collimated.double().mean() <= 1  # every other side is open
    share = ((flat > lowest[:, None] + 1e-4) & (flat < 0.8 - 1e-4)).double().mean(dim=1)
    assert share.max() < 0.25  # edges are a pixel wide
    assert 0.05 < (flat < 0.4).double().mean() < 0.6


@pytest.mark.parametrize("size", [(160, 192), (64, 72, 80)], ids=["2D", "3D"])
def test_a_marker_is_a_bright_letter(size):
    images, places = even(size, count=10, value=0.25)
    out = mark(images, places, seeded())
    changed = out[:, 0] != 0.25
    assert (out[:, 0][changed] >= BRIGHT[0]).all() and (out <= BRIGHT[1]).all()
    for image, letter in zip(out[:, 0], changed, strict=True):
        assert letter.any() and len(image[letter].unique()) == 1
        corners = letter.nonzero()
        extents = corners.amax(0) - corners.amin(0) + 1
        assert all(MARKER[0] * n - 2 <= extent <= MARKER[1] * n + 1
                   for extent, n in zip(extents.tolist(), size, strict=True))


def test_the_letter_is_an_l():
    """At a size where its strokes can be seen: the upright on the left, the foot below, the rest free."""
    images, places = even((400, 400), count=6, value=0.0)
    for letter in mark(images, places, seeded())[:, 0] > 0:
        rows, columns = letter.any(dim=1).nonzero()[:, 0], letter.any(dim=0).nonzero()[:, 0]
        part = letter[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        height, width = part.shape
        assert part[:, 0].all() and part[-1].all() and not part[0, -1]
        assert part[0].sum() == pytest.approx(STROKE * width, abs=1)
        assert part[:, -1].sum() == pytest.approx(STROKE * height, abs=1)


@SIZES
def test_shares_and_landmarks(size):
    images, places = even(size, count=600)
    out = add_artefacts(images, 0.3, seeded())
    changed = (out != images).flatten(1).any(dim=1).double().mean().item()
    assert changed == pytest.approx(1 - 0.7 * (1 - 0.3 * (1 - 0.25 ** len(size))) * 0.7, abs=0.06)
    points = torch.rand(600, 3, len(size), dtype=torch.float64)
    still = Augmentation(probability=0, artefacts=1.0)
    out, moved = augment(images[:5], points[:5], still, seeded())
    assert torch.equal(moved, points[:5]) and out.min() >= 0 and out.max() <= 1
    assert not any(torch.equal(one, other) for one, other in zip(out[:-1], out[1:], strict=True))
    again, _ = augment(images[:5], points[:5], still, seeded())
    assert torch.equal(out, again)
