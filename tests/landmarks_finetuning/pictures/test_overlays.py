"""Pictures of images of any shape."""

import numpy as np
from PIL import Image

from landmarks_finetuning.pictures.overlays import _overlaps, draw_numbers, draw_overlay


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
