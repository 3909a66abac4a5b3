"""GU2Net against counts of the released network, against its parts, and in three dimensions against two."""

import pytest
import torch
from torch import nn

from core.networks.gu2net import GlobalBranch, GU2Net, LocalBranch, SeparableUnit


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def in_3d(flat: nn.Module, deep: nn.Module) -> None:
    """Give `deep` the parameters of `flat`: kernels lie in the middle slice of theirs, the other slices are 0."""
    source = {**dict(flat.named_parameters()), **dict(flat.named_buffers())}
    with torch.no_grad():
        for name, target in [*deep.named_parameters(), *deep.named_buffers()]:
            given = source[name]
            if target.shape == given.shape:
                target.copy_(given)
                continue
            target.zero_()
            target[:, :, target.shape[2] // 2] = given


def test_as_many_parameters_as_the_released_network():
    """Counted on the released modules: hand, cephalograms and chest together, and cephalograms alone."""
    assert size_of(GU2Net(2, 1, (37, 19, 6))) == 4_381_052
    assert size_of(GU2Net(2, 1, (19,))) == 2_742_694
    assert size_of(LocalBranch(2, 1, (37, 19, 6))) == 2_117_630
    # 3 x 3 of image and maps to 64 channels, five of 128 with norms, 1 x 1: by hand
    assert size_of(GlobalBranch(2, 1, 19)) == 640 + (19 * 9 * 64 + 64) + 5 * (128 * 128 * 9 + 128 + 256) + 129 * 19


def test_a_separable_unit_by_hand():
    """Depthwise first: a delta of each channel passes its own kernel, and then the channels are mixed."""
    unit = SeparableUnit(2, 2, 1, 1).eval()
    with torch.no_grad():
        unit.depthwise[0].weight.copy_(torch.arange(18.0).view(2, 1, 3, 3))
        unit.depthwise[0].bias.copy_(torch.tensor([1.0, 2.0]))
        unit.pointwise.weight.copy_(torch.tensor([[[[1.0]], [[-10.0]]]]))
        unit.pointwise.bias.zero_()
        x = torch.zeros(1, 2, 5, 5)
        x[0, :, 2, 2] = 1
        out = unit(x, 0)[0, 0] * (1 + 1e-5) ** 0.5
    # at (1, 1) the kernels' last entries, 8 and 17, with the biases: 9 - 190, times the slope of LeakyReLU
    assert out[1, 1].item() == pytest.approx(0.01 * (9 - 190), rel=1e-5)
    assert out[0, 0].item() == pytest.approx(0.01 * (1 - 20), rel=1e-5)


def test_data_sets_share_pointwise_kernels_alone():
    model = GU2Net(2, 1, (3, 5))
    names = {name for name, _ in model.named_parameters()}
    shared = {name for name in names if ".pointwise." in name}
    own = {name for name in names if any(f"{part}.{k}." in name for part in ("depthwise", "norms", "inputs", "outputs",
                                                                            "global_branches") for k in (0, 1))}
    assert shared and shared | own == names and not shared & own
    model.data_set = 1
    assert model.out_channels == 5
    model(torch.rand(2, 1, 16, 20)).sum().backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert shared <= touched and not [name for name in touched if ".0." in name.replace("layers.0.", "")
                                      and any(f"{part}.0." in name for part in ("depthwise", "norms", "inputs",
                                                                                "outputs", "global_branches"))]


def test_outputs_are_logarithms_of_a_product():
    torch.manual_seed(0)
    model, x = GU2Net(2, 1, (3,)).eval(), torch.rand(1, 1, 22, 36)  # neither divisible by 16
    with torch.no_grad():
        local = model.local_branch(x, 0)
        coarse = model.global_branches[0](x, local.sigmoid())
        out = model(x)
    assert local.shape == (1, 3, 22, 36) and coarse.shape == (1, 3, 5, 9)
    assert out[0, 1, 0, 35].exp().item() == pytest.approx(
        (local[0, 1, 0, 35].sigmoid() * coarse[0, 1, 0, 8].sigmoid()).item(), rel=1e-5)


def test_volumes_constant_along_an_axis_are_as_images():
    torch.manual_seed(1)
    flat, deep, x = GU2Net(2, 1, (2,)).eval(), GU2Net(3, 1, (2,)).eval(), torch.rand(1, 1, 16, 32)
    in_3d(flat, deep)
    with torch.no_grad():
        expected, found = flat(x), deep(x[:, :, None].expand(-1, -1, 16, -1, -1))
    torch.testing.assert_close(found, expected[:, :, None].expand_as(found), rtol=1e-4, atol=1e-5)
