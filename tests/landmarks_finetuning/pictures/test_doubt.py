"""90 % circles in pictures: as large as they should be, measured on the pixels."""

import numpy as np
import pytest

from landmarks_finetuning.pictures.overlays import TITLE_HEIGHT, Doubt, draw_overlay
from landmarks_finetuning.pictures.volume_overlays import draw_volume_overlay

NAN = float("nan")


def changed(*pictures):
    """(K, 2) rows and columns where two pictures differ."""
    one, other = (np.asarray(picture, dtype=int) for picture in pictures)
    rows, columns = (min(sizes) for sizes in zip(one.shape[:2], other.shape[:2], strict=True))
    return np.argwhere(np.abs(one[:rows, :columns] - other[:rows, :columns]).max(axis=2) > 20)


def test_an_image_has_an_ellipse_where_pixels_are_not_square():
    """90 x 60 pixels shown 10 times as large: half axes of 6 and 12 pixels are 60 and 120."""
    image, points = np.zeros((1, 90, 60)), np.array([[30.0, 25.0], [70.0, 40.0]])
    doubt = Doubt(np.array([[6.0, 12.0], [NAN, NAN]]), ["expected error 1.3 mm", ""])
    pair = [draw_overlay(image, points, None, ["a", "b"], None, "t", 600, each) for each in (None, doubt)]
    seen = changed(*pair)
    seen = seen[seen[:, 0] < TITLE_HEIGHT + 900] - (TITLE_HEIGHT, 0)
    away = (seen - (30.5 * 10 - 0.5, 25.5 * 10 - 0.5)) / (60, 120)
    assert len(seen) > 200 and np.abs(np.linalg.norm(away, axis=1) - 1).max() < 0.05


@pytest.mark.parametrize(("off", "radius"), [(0, 5), (3, 4), (6, None)])
def test_a_slice_cuts_the_sphere(off, radius):
    """Of 5 mm about a prediction `off` voxels above the truth, through which the slices go: Pythagoras.

    The close-ups are 18 mm wide and 389 pixels, one beside the other; voxels are 1, 0.5 and 1 mm.
    """
    volume, truth = np.zeros((1, 60, 100, 60)), np.array([[30.0, 50, 30]])
    doubt = Doubt(np.array([[5.0, 10, 5]]), [""])
    pair = [draw_volume_overlay(volume, truth + (off, 0, 0), truth, ["a"], None, "t", (1, 0.5, 1), doubt=each)
            for each in (None, doubt)]
    seen = changed(*pair)
    seen = seen[seen[:, 0] < pair[0].height - 44]  # not the legend
    tiles = [seen[(seen[:, 1] >= left) & (seen[:, 1] < left + 389)] for left in (12, 405, 798)]
    if radius is None:
        assert not len(tiles[0])
    else:
        extent = np.ptp(tiles[0], axis=0) * 18 / 389 / 2
        assert extent == pytest.approx([radius, radius], abs=0.15)
    across = np.ptp(tiles[1], axis=0)[1] * 18 / 389 / 2  # the coronal slice holds the axis that is off
    assert across == pytest.approx(5, abs=0.15)
