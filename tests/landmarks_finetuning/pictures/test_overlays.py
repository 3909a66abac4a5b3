"""Pictures of images of any shape: marks lie on the centre of their pixel, contours follow, numbers stay apart."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from landmarks_finetuning.pictures.overlays import (
    PREDICTION,
    TITLE_HEIGHT,
    TRUTH,
    _overlaps,
    draw_numbers,
    draw_overlay,
)


def mark_centre(picture: Image.Image, height: int, colour: tuple[int, int, int]) -> np.ndarray:
    """(y, x) centre of mass, within the image's area, of what is more like `colour` than grey."""
    pixels = np.asarray(picture, dtype=float)[TITLE_HEIGHT : TITLE_HEIGHT + height]
    weight = (pixels[..., 0] - pixels[..., 2]) * (1 if colour[0] > colour[2] else -1)
    weight = np.clip(weight, 0, None)
    y, x = np.mgrid[: weight.shape[0], : weight.shape[1]]
    return np.array([(weight * y).sum(), (weight * x).sum()]) / weight.sum()


@pytest.mark.parametrize(("size", "width"), [((40, 60), 240), ((400, 600), 150), ((90, 70), 350), ((200, 300), 450)])
@pytest.mark.parametrize("colour", [PREDICTION, TRUTH])
def test_marks_land_on_the_centre_of_their_pixel(size, width, colour):
    """The left and top edges of pixel i are i * scale; its centre is half a pixel further, less half a new pixel."""
    point = np.array([[size[0] // 2 + 3.0, size[1] // 3]])
    nowhere = np.full((1, 2), np.nan)
    marks = (point, nowhere) if colour is PREDICTION else (nowhere, point)
    picture = draw_overlay(np.zeros((1, *size)), *marks, ["A"], None, "t", width)
    scale = width / size[1]
    height = round(size[0] * scale)
    expected = [(point[0, 0] + 0.5) * scale - 0.5, (point[0, 1] + 0.5) * scale - 0.5]
    assert mark_centre(picture, height, colour) == pytest.approx(expected, abs=0.12)  # without the half: 0.25 and more


@pytest.mark.parametrize(("size", "width"), [((24, 32), 256), ((480, 640), 160)])
def test_the_picture_and_the_marks_agree(size, width):
    """A bright square of the image and a mark at its centre have the same centre in the picture."""
    image = np.zeros((1, *size))
    rows, columns = slice(size[0] // 2, size[0] // 2 + 5), slice(size[1] // 4, size[1] // 4 + 5)
    image[0, rows, columns] = 7.0
    centre = np.array([[rows.start + 2.0, columns.start + 2.0]])
    height = round(size[0] * width / size[1])
    bare = draw_overlay(image, np.full((1, 2), np.nan), None, ["A"], None, "t", width)
    bright = np.asarray(bare, dtype=float)[TITLE_HEIGHT : TITLE_HEIGHT + height, :, 0]
    y, x = np.mgrid[:height, :width]
    seen = np.array([(bright * y).sum(), (bright * x).sum()]) / bright.sum()
    marked = draw_overlay(np.zeros((1, *size)), centre, None, ["A"], None, "t", width)
    assert mark_centre(marked, height, PREDICTION) == pytest.approx(seen, abs=0.1)


def test_contours_follow_the_half_pixel_rule():
    """A 16 x 16 heatmap of a 320-pixel picture: the disk at (5, 9) is centred at (5.5 * 20 - 0.5, 9.5 * 20 - 0.5)."""
    y, x = np.mgrid[:16, :16]
    heatmap = np.exp(-((y - 5) ** 2 + (x - 9) ** 2) / (2 * 1.5**2))
    picture = draw_overlay(np.zeros((1, 64, 64)), np.full((1, 2), np.nan), None, ["A"], heatmap[None], "t", 320)
    assert mark_centre(picture, 320, PREDICTION) == pytest.approx([109.5, 189.5], abs=0.35)


def test_overlay_shows_any_range_and_missing_marks():
    points = np.array([[1.0, 2.0], [np.nan, np.nan]])
    picture = draw_overlay(np.linspace(-1000, 3000, 3 * 20 * 30).reshape(3, 20, 30), points, points[::-1],
                           ("a", "b"), None, "a very long title " * 20, 300)
    assert picture.width == 300


@pytest.mark.parametrize("second", [(60.0, 60.0), (60.0, 72.0)])
def test_numbers_of_neighbours_do_not_cover_each_other(second):
    """The ink of two numbers is the sum of each one's alone: none lies on another's."""
    nowhere = (np.nan, np.nan)

    def ink(*points: tuple[float, float]) -> int:
        picture = Image.new("RGB", (120, 120))
        draw_numbers(picture, np.array(points), np.full((len(points), 2), np.nan))
        return int((np.asarray(picture) > 0).sum())

    assert ink((60.0, 60.0), second) == ink((60.0, 60.0)) + ink(nowhere, second)


def test_a_strip_is_squeezed():
    """5000 x 1 pixels would be a picture of 900 x 4.5 million."""
    image = np.zeros((1, 5000, 1))
    drawn = draw_overlay(image, np.array([[2500.0, 0]]), None, ["p"], None, "strip")
    assert drawn.size[0] == 900 and drawn.size[1] < 4 * 900 + 400


def test_shared_areas_of_boxes():
    """Apart, touching, in a corner, one in the other, the same."""
    box = np.array([[0.0, 0, 4, 2]])
    others = np.array([[5.0, 0, 6, 2], [4, 0, 6, 2], [3, 1, 6, 5], [1, 0.5, 2, 1.5], [0, 0, 4, 2], [0, 3, 4, 4]])
    assert _overlaps(box, others).tolist() == [[0, 0, 1, 1, 8, 0]]
    assert _overlaps(np.empty((0, 4)), others).sum(axis=0).tolist() == [0] * 6


def test_numbers_hide_neither_marks_nor_each_other():
    """Forty marks on a grid: as many changed places of ink as numbers, all of them away from the marks."""
    marks = np.stack(np.meshgrid(np.arange(30, 400, 60.0), np.arange(30, 400, 60.0)), axis=-1).reshape(-1, 2)
    picture = Image.new("RGB", (430, 430), (90, 90, 90))
    draw_numbers(picture, marks, marks)
    changed = (np.asarray(picture) != 90).any(axis=2)
    for y, x in marks.astype(int):
        assert not changed[y - 3 : y + 4, x - 3 : x + 4].any()
        assert changed[y - 30 : y + 30, x - 30 : x + 30].any()
