"""What a GPU runs in place of PyTorch's own operations, against those in double precision.

Without a GPU these tests run in a process of their own, through Triton's interpreter.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core.config.unet import UNet as UNetConfig
from core.networks.convolutions import CHANNELS_LAST, Standardize, StandardizedConv
from core.networks.fused_attention import ReadQueries, SeeKeys
from core.networks.fused_norm import INTERPRETED, fusable, normalize, row_stride, switched
from core.networks.fused_weights import StandardizeAll
from core.networks.unet import UNet
from core.training.batches import BatchPlan
from core.training.cuda_graphs import MOST_GRAPHS, WARM_UP, Replayed
from core.training.loop import Training
from tests.conftest import PROJECT
from tests.core.training.test_loop import Regression, make_training

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
kernels = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="the kernels need a CUDA GPU, or TRITON_INTERPRET=1")
cuda = pytest.mark.skipif(not CUDA, reason="CUDA graphs need a CUDA GPU")


@pytest.fixture(autouse=True)
def whole_float32():
    """No tf32 in convolutions, and the same algorithm every time."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = before


@pytest.mark.skipif(CUDA or INTERPRETED, reason="they run in this process")
def test_kernels_through_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    release = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    if release < (3, 7):
        pytest.skip("older interpreters of Triton do not go with NumPy 2.4")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
                          cwd=PROJECT, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


def random_map(*shape, of=None):
    """Random numbers in channels-last memory; `of` more channels: a slice of a wider map."""
    layout = CHANNELS_LAST[len(shape) - 2]
    wide = torch.randn(shape[0], shape[1] + (of or 0), *shape[2:]).to(DEVICE, memory_format=layout)
    return wide if of is None else wide[:, of // 2 : of // 2 + shape[1]]


def assert_near(seen, wanted, limit):
    """|seen - wanted| <= limit |wanted| in the Euclidean norm, for each pair; NaN never passes."""
    for one, other in zip(seen, wanted, strict=True):
        assert ((one.double() - other).norm() <= limit * other.norm() + 1e-6).item(), (one.shape, one, other)


def norm_in_double(x, weight, bias, groups, added, scale_shift, residual, activate):
    """The reference, by PyTorch's operations."""
    place = (1, -1, *(1,) * (x.ndim - 2))
    x = x if added is None else x + added.view(place)
    x = F.group_norm(x, groups, weight, bias, 1e-5)
    if scale_shift is not None:
        scale, shift = scale_shift.chunk(2, dim=1)
        x = x * (1 + scale.view(len(x), *place[1:])) + shift.view(len(x), *place[1:])
    x = F.silu(x) if activate else x
    return x if residual is None else x + residual


@kernels
@pytest.mark.parametrize("parts", [(), ("added", "activate"), ("scale_shift", "activate"), ("residual",),
                                   ("added", "scale_shift", "residual", "activate")], ids="+".join)
@pytest.mark.parametrize(("shape", "groups"), [((2, 12, 9, 7), 4), ((3, 8, 4, 6, 5), 1), ((1, 96, 40, 70), 2),
                                               ((2, 6, 3, 1), 3)])
def test_norm_and_gradients(shape, groups, parts):
    """Channels of unlike means, maps that are slices of wider ones, gradients too."""
    torch.manual_seed(0)
    batch, channels = shape[:2]
    mean = torch.randn(channels, device=DEVICE).mul(3).view(1, -1, *(1,) * (len(shape) - 2))
    x = random_map(*shape, of=3) * 2 + mean
    given = {"x": x, "weight": torch.randn(channels, device=DEVICE), "bias": torch.randn(channels, device=DEVICE)}
    given |= {"added": torch.randn(channels, device=DEVICE)} if "added" in parts else {}
    given |= {"scale_shift": torch.randn(batch, 2 * channels, device=DEVICE)} if "scale_shift" in parts else {}
    given |= {"residual": random_map(*shape, of=5)} if "residual" in parts else {}
    gradient = random_map(*shape, of=4)

    def call(function, inputs, **options):
        inputs = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        optional = {name: inputs.get(name) for name in ("added", "scale_shift", "residual")}
        out = function(inputs["x"], inputs["weight"], inputs["bias"], groups, **optional, **options)
        return [out, *torch.autograd.grad(out, list(inputs.values()), gradient.to(out.dtype))]

    assert fusable(x)
    seen = call(lambda *a, **k: normalize(*a, 1e-5, **k), given, activate="activate" in parts)
    wanted = call(norm_in_double, {name: t.double() for name, t in given.items()}, activate="activate" in parts)
    assert_near(seen, wanted, 1e-5)
    assert all(out.is_contiguous(memory_format=CHANNELS_LAST[len(shape) - 2]) for out in seen[:2])
    rounded = {name: t.bfloat16() for name, t in given.items()}
    assert_near(call(lambda *a, **k: normalize(*a, 1e-5, **k), rounded, activate="activate" in parts),
                call(norm_in_double, {name: t.double() for name, t in rounded.items()}, activate="activate" in parts),
                1e-2)


@kernels
def test_moments_of_a_map_far_from_zero():
    """A mean of 1000 deviations: the squares alone would lose all digits."""
    x = random_map(1, 4, 64, 64) + 1000
    ones, zeros = torch.ones(4, device=DEVICE), torch.zeros(4, device=DEVICE)
    wanted = F.group_norm(x.double(), 1, ones.double(), zeros.double(), 1e-5)
    assert_near([normalize(x, ones, zeros, 1, 1e-5)], [wanted], 1e-4)


def test_row_stride_by_hand():
    x = torch.empty(2, 6, 4, 5).to(memory_format=torch.channels_last)
    assert row_stride(x) == row_stride(x[:, 1:3]) == 6 and row_stride(x[1:]) == 6
    assert row_stride(x[:, :, 1:]) is None and row_stride(x[..., :3]) is None and row_stride(x[:, ::2]) is None
    assert row_stride(torch.empty(2, 6, 4, 5)) is None and row_stride(torch.empty(2, 1, 4, 5)) == 1
    assert row_stride(torch.empty(2, 6, 1, 1)) == 6 and row_stride(x.expand(2, 6, 4, 5)) == 6
    assert row_stride(torch.empty(1, 6, 1, 1).expand(1, 6, 4, 5)) is None


@kernels
@pytest.mark.parametrize(("batch", "positions", "channels", "features", "width"), [
    (2, 150, 24, 32, 8), (1, 65, 64, 16, 16), (3, 700, 5, 64, 16)])
def test_linear_attention_and_gradients(batch, positions, channels, features, width):
    torch.manual_seed(0)
    given = [torch.randn(shape, device=DEVICE) for shape in (
        (batch, positions, channels), (features, channels), (features, channels), (batch, features, channels))]
    ends = torch.randn(batch, features, channels, device=DEVICE), torch.randn_like(given[0])

    def call(function, inputs):
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        outputs = function(*inputs)
        return [*outputs, *torch.autograd.grad(outputs, inputs, [end.to(outputs[0].dtype) for end in ends])]

    def fused(rows, key, query, read):
        return SeeKeys.apply(rows, key), ReadQueries.apply(rows, query, read, width)

    def reference(rows, key, query, read):
        heads = (rows @ query.T).unflatten(2, (-1, width)).softmax(3).flatten(2)
        return (rows @ key.T).softmax(1).transpose(1, 2) @ rows, heads @ read

    assert_near(call(fused, given), call(reference, [tensor.double() for tensor in given]), 1e-5)


@kernels
def test_all_weights_are_standardised_at_once():
    torch.manual_seed(0)
    layers = [StandardizedConv(2, 3, 5), StandardizedConv(2, 130, 4), StandardizedConv(3, 7, 2)]
    layers = [layer.to(DEVICE, memory_format=CHANNELS_LAST[layer.weight.ndim - 2]) for layer in layers]
    weights = [*(layer.weight for layer in layers), StandardizedConv(2, 6, 3).to(DEVICE).weight]  # one contiguous
    ends = [torch.randn_like(weight) for weight in weights]
    made = StandardizeAll.apply(torch.float32, *weights)
    seen = [*made, *torch.autograd.grad(made, weights, ends)]
    exact = [weight.double() for weight in weights]
    made = [Standardize.apply(weight, 1e-5, torch.float64) for weight in exact]
    assert_near(seen, [*made, *torch.autograd.grad(made, weights, [end.double() for end in ends])], 1e-5)
    assert [out.stride() for out in seen] == [weight.stride() for weight in weights] * 2


@kernels
@pytest.mark.parametrize("size", [(16, 8), (4, 8, 8)], ids=["2D", "3D"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_network_and_gradients(size, checkpointing):
    """The whole network, fused and by PyTorch's operations."""
    torch.manual_seed(0)
    config = UNetConfig(base_channels=8, channel_multipliers=(1, 2), attention_heads=2, attention_head_channels=8)
    model = UNet(config, 1, 2, size).to(DEVICE, memory_format=CHANNELS_LAST[len(size)])
    model.activation_checkpointing = checkpointing
    x, timesteps = torch.randn(2, 1, *size, device=DEVICE), torch.tensor([3, 77], device=DEVICE)

    def outputs():
        model.zero_grad()
        out = model(x, timesteps)
        out.square().mean().backward()
        return [out.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    seen = outputs()
    with switched("on", False):
        wanted = outputs()
    assert_near(seen, [tensor.double() for tensor in wanted], 2e-4)
    assert all(layer.ready is None for layer in model.standardized)
    with torch.no_grad():
        torch.testing.assert_close(model(x, timesteps), seen[0], rtol=1e-5, atol=1e-5)


# --- CUDA graphs ---


def test_without_a_gpu_a_function_is_called():
    calls = []
    replayed = Replayed(lambda batches: calls.append(batches) or batches[0][0] + 1)
    for _ in range(WARM_UP + 2):
        assert replayed([(torch.zeros(2),)]).tolist() == [1, 1]
    assert len(calls) == WARM_UP + 2 and not replayed.graphs


@cuda
def test_replays_follow_their_inputs():
    calls = []
    replayed = Replayed(lambda batches: calls.append(1) or (batches[0][0] * batches[1][0]).sum())
    for count in range(1, WARM_UP + 4):
        inputs = [(torch.full((3,), float(count), device=DEVICE),), (torch.arange(3.0, device=DEVICE),)]
        assert replayed(inputs).item() == 3 * count
    assert len(calls) == WARM_UP + 1 and len(replayed.graphs) == 1
    for length in range(4, 4 + 2 * MOST_GRAPHS):
        for _ in range(WARM_UP + 1):
            replayed([(torch.ones(length, device=DEVICE),), (torch.ones(length, device=DEVICE),)])
    assert len(replayed.graphs) == MOST_GRAPHS


class Denoised(Regression):
    """A task with its randomness apart."""

    def draw(self, indices, generator):
        """Random images, as many as indices."""
        return torch.randn(len(indices), 1, 16, 16, generator=generator, device=DEVICE), torch.tensor(
            indices % 7, device=DEVICE)

    def loss_of(self, model, *drawn):
        """Mean square of the output's distance to the input."""
        return (model(*drawn).float() - drawn[0]).square().mean()


@cuda
@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_replayed_training_is_eager_training(precision):
    """Two micro-batches a step, of 4 and 4, at an epoch's end of 4 and 1; clipping, moving average; bit for bit."""
    runs = []
    config = UNetConfig(base_channels=8, channel_multipliers=(1, 2), attention_heads=2, attention_head_channels=8)
    for graphs in (True, False):
        torch.manual_seed(0)
        like = make_training(Denoised(), BatchPlan(13, 4, 2, "epoch", False, 0), ema_decay=0.9, precision=precision,
                             learning_rate=1e-3, device=DEVICE, cuda_graphs=graphs)
        training = Training(UNet(config, 1, 1, (16, 16)), like.task, like.plan, like.settings)
        losses = []
        for _ in range(14):
            training.optimiser_step()
            losses.append(training.pending[-1].item())
        runs.append([torch.tensor(losses), *training.model.parameters(), *training.averages])
        assert np.isfinite(losses).all() and len(set(losses)) == 14
    assert len(training.task.calls) == 0 and all(map(torch.equal, *runs))
