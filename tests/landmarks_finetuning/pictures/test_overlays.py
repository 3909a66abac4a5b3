"""Pictures of images of any shape."""

import numpy as np

from landmarks_finetuning.pictures.overlays import draw_overlay


def test_a_strip_is_squeezed():
    """5000 x 1 pixels would be a picture of 900 x 4.5 million."""
    image = np.zeros((1, 5000, 1))
    drawn = draw_overlay(image, np.array([[2500.0, 0]]), None, ["p"], None, "strip")
    assert drawn.size[0] == 900 and drawn.size[1] < 4 * 900 + 400
