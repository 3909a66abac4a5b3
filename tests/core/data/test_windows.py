"""Windows cut out of images: compared with slices of numpy's padding that repeats the border."""

import numpy as np
import pytest
import torch

from core.data.windows import cut_windows


@pytest.mark.parametrize("canvas", [(9, 7), (6, 5, 8)], ids=["2D", "3D"])
def test_windows_are_slices_of_the_image_with_its_border_repeated(canvas):
    random, size = np.random.default_rng(0), (4, 3, 5)[: len(canvas)]
    images = random.normal(size=(3, 2, *canvas)).astype(np.float32)
    chosen, corners = np.array([2, 0, 0, 1]), random.integers(-5, 8, (4, len(canvas)))
    corners[0] = -40  # wholly outside
    cut = cut_windows(torch.from_numpy(images), torch.from_numpy(chosen), torch.from_numpy(corners), size).numpy()
    pad = 60
    padded = np.pad(images, [(0, 0), (0, 0), *[(pad, pad)] * len(canvas)], mode="edge")
    for window, image, corner in zip(cut, chosen, corners, strict=True):
        part = tuple(slice(pad + start, pad + start + length) for start, length in zip(corner, size, strict=True))
        np.testing.assert_array_equal(window, padded[(image, slice(None), *part)])
