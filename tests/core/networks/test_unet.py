"""The network against the published outputs, PyTorch's own operations and naive loops, in 2D and 3D."""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from core.config.unet import UNet as UNetConfig
from core.networks.convolutions import CHANNELS_LAST, CONV, Downsample, Standardize, StandardizedConv, Upsample
from core.networks.unet import Attention, LinearAttention, SinusoidalEmbedding, UNet
from core.networks.weights import load_weights, save_weights
from tests.conftest import PROJECT

OFFICIAL = PROJECT / "tests/fixtures/official_ddpm_base8"
TINY = UNetConfig(base_channels=8, channel_multipliers=(1, 2), attention_heads=2, attention_head_channels=4)
SIZES = pytest.mark.parametrize("size", [(8, 12), (4, 6, 8)], ids=["2D", "3D"])


@pytest.fixture(scope="module", params=["published", "converted"])
def official(request, tmp_path_factory):
    """The network of the published file, read directly and after a round trip through our own format."""
    weights = load_weights(OFFICIAL / "ema_model_epoch800_step6000.pt")
    model = weights.build((64, 64))
    if request.param == "converted":
        path = tmp_path_factory.mktemp("converted") / "ours.safetensors"
        save_weights(path, model, {"unet": weights.unet.model_dump(mode="json")}, {"kind": "ddpm", "iteration": 6000})
        model = load_weights(path).build((64, 64))
    return model.eval()


@pytest.mark.parametrize("layout, tolerance", [(torch.contiguous_format, 1e-5), (torch.channels_last, 1e-4)])
def test_official_outputs(official, layout, tolerance):
    expected = {name: torch.from_numpy(value) for name, value in np.load(OFFICIAL / "expected.npz").items()}
    model, x = official.to(memory_format=layout), expected["x"].to(memory_format=layout)
    with torch.no_grad():
        with_time, without = model(x, expected["t"]), model(x)
    assert (with_time - expected["noise_prediction"]).abs().max() < tolerance
    assert (without - expected["null_time_output"]).abs().max() < tolerance
    assert (with_time - without).abs().max() > 0.01  # the two expectations do differ


def test_published_header():
    weights = load_weights(OFFICIAL / "ema_model_epoch800_step6000.pt")
    assert (weights.header["epoch"], weights.header["iteration"]) == (800, 6000)
    assert (weights.unet.base_channels, weights.unet.channel_multipliers) == (8, (1, 2, 4, 8))
    assert (weights.channels, weights.out_channels) == (1, 1)


def test_published_size_has_558_5_million_parameters():
    with torch.device("meta"):
        model = UNet(UNetConfig(base_channels=256), 1, 1, (256, 256))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 558.5


@SIZES
def test_downsampling_is_an_unshuffle_and_a_1x1_convolution(size):
    """Channel order (channel, offsets in axis order), spelt out by slices; torch has the same for images."""
    layer, x = Downsample(len(size), 3, 5).double(), torch.randn(2, 3, *size, dtype=torch.float64)
    parts = [x[(slice(None), c, *(slice(offset, None, 2) for offset in offsets))]
             for c in range(3) for offsets in product(range(2), repeat=len(size))]
    stacked = torch.stack(parts, dim=1)
    if len(size) == 2:
        assert torch.equal(stacked, F.pixel_unshuffle(x, 2))
    torch.testing.assert_close(layer(x), layer[1](stacked), rtol=0, atol=1e-12)


@SIZES
def test_upsampling_is_repetition_and_a_convolution(size):
    layer, x = Upsample(len(size), 3, 5).double(), torch.randn(2, 3, *size, dtype=torch.float64)
    expected = layer[1](F.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [Downsample, Upsample])
@pytest.mark.parametrize("size", [(2, 2, 2), (2, 6, 4), (4, 2, 2), (6, 6, 6)])
def test_half_precision_gradients_of_resampling_volumes(kind, size):
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        layer, x = kind(3, 32, 32), torch.randn(2, 32, *size)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            layer(x).float().square().sum().backward()
        gradients.append(layer[1].weight.grad)
    torch.testing.assert_close(*gradients, atol=0.03 * gradients[1].abs().max().item(), rtol=0)


@SIZES
def test_gradients_of_own_functions(size):
    """Against differences of the function's own values, in either memory layout."""
    weight = torch.randn(3, 2, *(3,) * len(size), dtype=torch.float64)
    layouts = (torch.contiguous_format, CHANNELS_LAST[len(size)])
    for layout in layouts:
        given = weight.contiguous(memory_format=layout).requires_grad_()
        assert torch.autograd.gradcheck(lambda w: Standardize.apply(w, 1e-5, torch.float64), given)


def test_every_feature_map_lies_channels_last():
    """One map in the other layout, as the first 1x1 convolution gives it, would be copied in every block it meets."""
    model = UNet(TINY, 1, 1, (16, 16)).to(memory_format=torch.channels_last)
    strides = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _module, _inputs, out, name=name: strides.update({name: out}))
    model(torch.randn(2, 1, 16, 16), torch.tensor([1, 2]))
    maps = {name: out for name, out in strides.items() if out.ndim == 4 and out.shape[1] > 1}
    assert len(maps) > 40
    assert [name for name, out in maps.items() if not out.is_contiguous(memory_format=torch.channels_last)] == []


@SIZES
def test_linear_attention(size):
    heads, width, channels = 3, 4, 5
    layer = LinearAttention(len(size), channels, heads, width).double()
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    qkv = torch.einsum("oc,bcn->bon", layer.to_qkv.weight.flatten(1), x.flatten(2))
    parts = []
    for head in range(heads):  # (B, features, positions) each
        q, k, v = (qkv[:, (part * heads + head) * width:][:, :width] for part in range(3))
        q, k = q.softmax(dim=1) / math.sqrt(width), k.softmax(dim=2)
        context = torch.stack([torch.stack([(k[:, d] * v[:, e]).sum(1) for e in range(width)], 1)
                               for d in range(width)], 1)
        parts.append(torch.einsum("bde,bdn->ben", context, q))
    project, norm = layer.to_out
    out = torch.einsum("oc,bcn->bon", project.weight.flatten(1), torch.cat(parts, 1)) + project.bias[:, None]
    mean, variance = out.mean((1, 2), keepdim=True), out.var((1, 2), keepdim=True, correction=0)
    expected = (out - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None] + norm.bias[:, None]
    torch.testing.assert_close(layer(x), expected.view_as(x), rtol=0, atol=1e-12)


@SIZES
def test_full_attention(size):
    heads, width, channels = 2, 4, 5
    layer = Attention(len(size), channels, heads, width).double()
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    qkv = torch.einsum("oc,bcn->bon", layer.to_qkv.weight.flatten(1), x.flatten(2))
    parts = []
    for head in range(heads):
        q, k, v = (qkv[:, (part * heads + head) * width:][:, :width] for part in range(3))
        scores = torch.exp(torch.einsum("bdi,bdj->bij", q, k) / math.sqrt(width))
        parts.append(torch.einsum("bij,bdj->bdi", scores / scores.sum(2, keepdim=True), v))
    out = torch.einsum("oc,bcn->bon", layer.to_out.weight.flatten(1), torch.cat(parts, 1)) + layer.to_out.bias[:, None]
    torch.testing.assert_close(layer(x), out.view_as(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dims", [2, 3])
def test_weights_are_standardised_over_each_filter(dims):
    layer = StandardizedConv(dims, 2, 3).double()
    weight = layer.weight.detach().numpy()
    rows = weight.reshape(3, -1)
    centred = (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, ddof=0, keepdims=True) + 1e-5)
    x = torch.randn(1, 2, *(5,) * dims, dtype=torch.float64)
    seen = layer(x)[(0, slice(None), *(2,) * dims)].detach().numpy()  # one inner position: a plain dot product
    patch = x[(0, slice(None), *(slice(1, 4),) * dims)].numpy().ravel()
    np.testing.assert_allclose(seen, centred @ patch + layer.bias.detach().numpy(), atol=1e-12)


def test_standardisation_epsilon_is_larger_in_half_precision():
    layer = StandardizedConv(2, 1, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(9.0).view(1, 1, 3, 3) * 0.01)
        layer.bias.zero_()
    x = torch.zeros(1, 1, 3, 3)
    x[..., 2, 2] = 1  # seen at the centre: the last weight, deviation 0.04 of a variance of 0.0001 * 60 / 9
    for dtype, eps in ((torch.float32, 1e-5), (torch.bfloat16, 1e-3)):
        value = layer(x.to(dtype))[0, 0, 1, 1].item()
        assert value == pytest.approx(0.04 / math.sqrt(0.0001 * 60 / 9 + eps), rel=4e-3), dtype


def test_timestep_embedding_by_hand():
    seen = SinusoidalEmbedding(8)(torch.tensor([0, 7]))
    assert seen[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    angles = [7, 7 * 10000 ** (-1 / 3), 7 * 10000 ** (-2 / 3), 7 / 10000]
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    assert seen[1].tolist() == pytest.approx(expected, abs=1e-6)


@SIZES
def test_shape_and_null_timestep(size):
    torch.manual_seed(0)
    model = UNet(TINY, 1, 3, size)
    x = torch.randn(2, 1, *size)
    out = model(x)
    assert out.shape == (2, 3, *size)
    out.sum().backward()
    branch = {name for name, _ in model.named_parameters() if name.startswith("time_mlp.") or ".mlp." in name}
    assert branch and {name for name, p in model.named_parameters() if p.grad is None} == branch
    timed = model(x, torch.tensor([3, 400]))
    timed.sum().backward()
    assert all(p.grad is not None for p in model.parameters()) and not torch.allclose(timed, out)
    again = model(x.flip(0), torch.tensor([400, 3])).flip(0)
    torch.testing.assert_close(again, timed)  # every image has its own timestep


def test_constant_volume_without_convolution_over_depth_is_the_2d_network():
    """A volume that repeats one slice, through kernels that look at one slice, gives the 2D result in every slice."""
    torch.manual_seed(0)
    config = TINY.model_copy(update={"channel_multipliers": (1,), "linear_attention": False})
    flat, deep = UNet(config, 1, 2, (8, 8)).double(), UNet(config, 1, 2, (4, 8, 8)).double()
    weights = deep.state_dict()
    for name, value in flat.state_dict().items():
        if weights[name].ndim == value.ndim:
            weights[name] = value
        elif value.shape[-1] == 1:
            weights[name] = value[:, :, None]
        else:
            weights[name] = value[:, :, None].expand_as(weights[name]) / 3
    deep.load_state_dict(weights)
    for model in (flat, deep):
        for module in model.modules():
            if isinstance(module, StandardizedConv):  # standardisation depends on the filter's size: taken out here
                module.forward = PlainConv(module)
    for name, module in deep.named_modules():  # zero padding in depth is not a repeated slice: pad by repetition
        if isinstance(module, torch.nn.Conv3d) and module.kernel_size[0] == 3:
            parent, _, last = name.rpartition(".")
            setattr(deep.get_submodule(parent), last, Repeated(module))
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    out = deep(x[:, :, None].expand(-1, -1, 4, -1, -1), torch.tensor([1, 9]))
    torch.testing.assert_close(out, flat(x, torch.tensor([1, 9]))[:, :, None].expand_as(out))


def repeat_depth(x):
    return F.pad(F.pad(x, (0, 0, 0, 0, 1, 1), mode="replicate"), (1, 1, 1, 1))


class PlainConv:
    """A convolution without standardisation; in 3D the slices at both ends are repeated."""

    def __init__(self, module):
        self.module = module

    def __call__(self, x, biased):
        weight, bias = self.module.weight, self.module.bias
        return F.conv2d(x, weight, bias, padding=1) if x.ndim == 4 else F.conv3d(repeat_depth(x), weight, bias)


class Repeated(torch.nn.Module):
    """A 3D convolution whose input's end slices are repeated."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return F.conv3d(repeat_depth(x), self.module.weight, self.module.bias)


def test_input_slot_is_a_zero_channel_in_front():
    torch.manual_seed(0)
    model = UNet(TINY, 2, 1, (8, 8)).double()
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    joined = torch.cat((torch.zeros_like(x), x), dim=1)
    torch.testing.assert_close(model.embed_input(x), model.init_conv(joined))
    assert UNet(TINY.model_copy(update={"input_slot": False}), 2, 1, (8, 8)).init_conv.in_channels == 2


class AutocastStates(TorchFunctionMode):
    """Notes whether autocast is on where a norm or a softmax is computed, and the types that come out."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.__name__ in ("group_norm", "softmax"):
            self.seen.add((function.__name__, torch.is_autocast_enabled("cpu"), out.dtype))
        return out


def test_norms_and_softmaxes_stay_in_half_precision():
    """Autocast on CUDA makes them float32, on a CPU it does not: so it must be off there."""
    model, states = UNet(TINY, 1, 1, (8, 8)), AutocastStates()
    with states, torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 1, 8, 8), torch.tensor([1]))
    assert states.seen == {("group_norm", False, torch.bfloat16), ("softmax", False, torch.bfloat16)}


def kinds(config, size):
    """The attention of every level down, from the input's size on."""
    model = UNet(config, 1, 1, size)
    names = {Attention: "full", LinearAttention: "linear"}
    return [names[type(level[-2].fn.fn)] if hasattr(level[-2], "fn") else "none" for level in model.downs], model


@pytest.mark.parametrize("settings, expected", [
    ({}, ["linear"] * 3),
    ({"full_attention_sizes": (8,)}, ["linear", "full", "linear"]),
    ({"full_attention_sizes": (8, 4), "linear_attention": False}, ["none", "full", "full"]),
    ({"linear_attention": False}, ["none"] * 3),
])
def test_attention_settings(settings, expected):
    config = TINY.model_copy(update={"channel_multipliers": (1, 2, 4), **settings})
    found, model = kinds(config, (16, 16))
    assert found == expected and type(model.mid_attn.fn.fn) is Attention
    assert [hasattr(level[-2], "fn") for level in model.ups] == [kind != "none" for kind in reversed(expected)]
    assert model(torch.randn(1, 1, 16, 16)).shape == (1, 1, 16, 16)


def test_more_blocks_per_level():
    model = UNet(TINY.model_copy(update={"blocks_per_level": 4}), 1, 1, (8, 8))
    assert [len(level) for level in (*model.downs, *model.ups)] == [6] * 4
    assert model(torch.randn(1, 1, 8, 8)).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("size", [(2, 2, 2), (2, 6, 4), (4, 2, 2)])
def test_half_precision_gradients_of_thin_volumes(size):
    """bf16 weight gradients of inputs of depth 2 are wrong in torch on a CPU; ours are those of float32."""
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        conv, x = CONV[3](64, 64, 3, padding=1), torch.randn(2, 64, *size)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            conv(x).float().square().sum().backward()
        gradients.append(conv.weight.grad)
    torch.testing.assert_close(*gradients, atol=0.03 * gradients[1].abs().max().item(), rtol=0)


def test_double_precision_stays_double_in_thin_volumes():
    conv = CONV[3](2, 3, 3, padding=1).double()
    x = torch.randn(1, 2, 2, 4, 4, dtype=torch.float64)
    expected = torch.nn.functional.conv3d(x, conv.weight, conv.bias, padding=1)
    assert conv(x).dtype == torch.float64 and torch.equal(conv(x), expected)
