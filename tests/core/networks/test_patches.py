"""The networks of global-to-local localisation against counts of the released ones, and in 3D against 2D."""

import pytest
import torch

from core.networks import patches
from core.networks.patches import GlobalNetwork, LocalNetworks
from tests.core.networks.test_gu2net import in_3d, size_of


def test_as_many_parameters_as_the_released_networks():
    assert size_of(GlobalNetwork(2, 1, 19, 32, 32)) == 5_602_361
    assert size_of(GlobalNetwork(3, 1, 8, 32, 8)) == 16_133_184
    assert size_of(LocalNetworks(2, 1, 19, 32)) == 19 * 100_835
    assert size_of(LocalNetworks(3, 1, 8, 32)) == 8 * 267_364


@pytest.mark.parametrize("patch", [2, 4, 8, 16, 32])
def test_a_position_for_each_patch_of_images_of_any_size(patch):
    model = GlobalNetwork(2, 1, 3, 4, patch).eval()
    rows, columns = -(-70 // patch), -(-64 // patch)
    assert model(torch.rand(1, 1, 70, 64)).shape == (1, 3 * 2 + 3, rows, columns)


def test_padding_is_zeros_at_the_far_end():
    model, x = GlobalNetwork(2, 1, 1, 4, 8).eval(), torch.rand(1, 1, 10, 16)
    whole = torch.zeros(1, 1, 16, 16)
    whole[:, :, :10] = x
    torch.testing.assert_close(model(x), model(whole))


def test_volumes_constant_along_an_axis_are_as_images(monkeypatch):
    """With the norm on shortcuts that the released 3D network lacks; displacements along that axis are its own."""
    monkeypatch.setattr(patches, "NORM_ON_SHORTCUT", {2: True, 3: True})
    torch.manual_seed(0)
    flat, deep, x = GlobalNetwork(2, 1, 2, 4, 8).eval(), GlobalNetwork(3, 1, 2, 4, 8).eval(), torch.rand(1, 1, 16, 24)
    in_3d(flat.features, deep.features)
    with torch.no_grad():
        expected, found = flat.features(x), deep.features(x[:, :, None].expand(-1, -1, 16, -1, -1))
    torch.testing.assert_close(found, expected[:, :, None].expand_as(found), rtol=1e-4, atol=1e-5)


def test_each_landmark_has_a_network_of_its_own():
    """Another window of the second landmark changes its outputs alone: two displacements and a presence."""
    torch.manual_seed(0)
    model, windows = LocalNetworks(2, 1, 3, 4).eval(), torch.rand(1, 3, 16, 16)
    other = windows.clone()
    other[:, 1] = 0
    with torch.no_grad():
        before, after = model(windows), model(other)
    assert before.shape == (1, 9, 8, 8)
    assert (before != after).flatten(2).any(dim=2)[0].nonzero().flatten().tolist() == [2, 3, 7]
