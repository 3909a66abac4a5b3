"""Features of the diffusion U-Net: which maps they are, of which timestep, and of which part of an image."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core.config.unet import UNet as UNetConfig
from core.data.dataset import ImageSet
from core.data.records import Record
from core.networks.unet import UNet, pointwise
from landmarks_finetuning.features import batches, decoder_maps, decoder_places

TINY = UNetConfig(base_channels=8, channel_multipliers=(1, 2), attention_heads=2, attention_head_channels=4)
sizes = pytest.mark.parametrize("size", [(16, 24), (8, 16, 8)], ids=["2D", "3D"])


def network(size):
    torch.manual_seed(0)
    return UNet(TINY, 1, 1, size).eval()


@sizes
def test_maps_are_those_of_the_decoder(size):
    """What follows a place in the network, applied to its map, gives what the network gives."""
    model, images = network(size), torch.randn(3, 1, *size, generator=torch.Generator().manual_seed(1))
    coarse, fine, last = decoder_maps(model, images, (0, 1, 2), (5,))
    half = tuple(length // 2 for length in size)
    assert [tuple(level.shape) for level in (coarse, fine, last)] == [(3, 16, *half), (3, 8, *size), (3, 8, *size)]
    with torch.no_grad():
        time = torch.full((3,), 5)
        torch.testing.assert_close(pointwise(model.final_conv, last), model(images, time))
        together = torch.cat((model.ups[1][-1](fine), model.embed_input(images)), dim=1)
        torch.testing.assert_close(model.final_res_block(together, model.time_mlp(time)), last)
        assert model.ups[0][-1](coarse).shape == (3, 8, *size)


def test_timesteps_are_joined_in_their_order_and_places_in_theirs():
    model, images = network((16, 16)), torch.rand(2, 1, 16, 16)
    last, coarse = decoder_maps(model, images, (2, 0), (7, 3))
    for timestep, part in ((7, slice(8)), (3, slice(8, 16))):
        alone = decoder_maps(model, images, (2,), (timestep,))[0]
        assert torch.equal(last[:, part], alone)
    assert not torch.allclose(last[:, :8], last[:, 8:]) and coarse.shape == (2, 32, 8, 8)
    again = decoder_maps(model, images, (2, 0), (7, 3))
    assert torch.equal(again[0], last) and torch.equal(again[1], coarse)
    assert not any(module._forward_hooks for module in decoder_places(model))


def canvas_set(images, firsts, sizes, network_size):
    """An ImageSet whose maps put stored pixel 0 at the first pixel that an image fills."""
    dims = len(network_size)
    maps = np.stack([np.column_stack([np.eye(dims), first]) for first in firsts]).astype(float)
    records = tuple(Record(str(index), f"{index}.png", None, None) for index in range(len(images)))
    return ImageSet(records, images, None, maps, torch.tensor(firsts), torch.tensor(sizes), np.array(sizes),
                    network_size)


def test_small_images_go_in_batches():
    images = torch.rand(5, 1, 8, 8)
    given = list(batches(canvas_set(images, [(0, 0)] * 5, [(8, 8)] * 5, (8, 8)), 2, 4))
    assert [batch.chosen for batch in given] == [[0, 1], [2, 3], [4]]
    assert torch.equal(torch.cat([batch.images for batch in given]), images)


def test_large_images_go_whole_and_alone_with_zeros_at_their_far_ends():
    canvas = torch.zeros(2, 1, 20, 18)
    canvas[0, 0, 2:17, 4:14] = torch.rand(15, 10) + 1
    canvas[1] = torch.rand(1, 20, 18) + 1
    images = canvas_set(canvas, [(2, 4), (0, 0)], [(15, 10), (20, 18)], (8, 8))
    first, second = batches(images, 16, 4)
    assert first.images.shape == (1, 1, 16, 12) and second.images.shape == (1, 1, 20, 20)
    assert torch.equal(first.images[0, 0, :15, :10], canvas[0, 0, 2:17, 4:14])
    assert torch.equal(second.images, F.pad(canvas[[1]], (0, 2)))
    np.testing.assert_array_equal(first.maps[0], [[1, 0, 0], [0, 1, 0]])  # stored pixel 0 is now pixel 0
