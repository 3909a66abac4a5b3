"""The self-supervised methods' losses, moving averages and signs of collapse, in float64, against independent truth."""

import math

import numpy as np
import pytest
import torch
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models.modules.heads import DINOProjectionHead
from torch import nn

from core.config.load import parse_config
from core.config.section import Clip
from core.training.batches import BatchPlan
from core.training.loop import LoopSettings, Training
from ssl_baselines.collapse import LEAST_ENTROPY, LEAST_SPREAD, alarm, effective_rank, embedding_spread
from ssl_baselines.dino import DINO, entropy
from ssl_baselines.heads import Pooled, Prototypes, normalised_mlp
from ssl_baselines.mocov3 import MoCoV3, contrast
from ssl_baselines.simclrv2 import SimCLRv2, nt_xent

SIZES = [(2, 3), (5, 16), (33, 8)]
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(autouse=True)
def double():
    """Tensors are float64 where nothing else is said, here and in the libraries compared with."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def method(kind, name, **settings):
    """`kind` (MoCoV3 ...) as a config makes it; settings of the whole `ssl` section and of its section `name`."""
    own = {key: settings.pop(key) for key in list(settings) if key not in ("iterations", "preset")}
    return kind(parse_config({"ssl": {**settings, name: own}}, "x"))


def random(*shape, seed=0, spread=3.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Centred(nn.Module):
    """What DINO's loss needs of a student."""

    def __init__(self, out):
        super().__init__()
        self.register_buffer("centre", torch.zeros(1, out))


# --- SimCLR v2 ---


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
@pytest.mark.parametrize("count, width", SIZES)
def test_nt_xent_is_lightlys(count, width, temperature):
    views = random(count, width), random(count, width, seed=1)
    torch.testing.assert_close(nt_xent(*views, temperature), NTXentLoss(temperature)(*views), **CLOSE)
    simclr = method(SimCLRv2, "simclrv2", temperature=temperature)
    torch.testing.assert_close(simclr.loss(None, views, 0), NTXentLoss(temperature)(*views), **CLOSE)


def test_nt_xent_gradient_is_lightlys():
    ours, theirs = ([random(6, 4).requires_grad_(), random(6, 4, seed=1).requires_grad_()] for _ in range(2))
    nt_xent(*ours, 0.5).backward()
    NTXentLoss(0.5)(*theirs).backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, **CLOSE)


# --- MoCo v3 ---


def info_nce(queries, keys, temperature):
    """The paper's ctr in plain numpy, without its 2 T."""
    total = 0.0
    for number, query in enumerate(queries):
        logits = [query @ key / np.linalg.norm(query) / np.linalg.norm(key) / temperature for key in keys]
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[number]
    return total / len(queries)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("count, width", SIZES)
def test_mocov3_loss(count, width, scaled, temperature):
    q1, q2, k1, k2 = (random(count, width, seed=seed) for seed in range(4))
    wanted = info_nce(q1.numpy(), k2.numpy(), temperature) + info_nce(q2.numpy(), k1.numpy(), temperature)
    moco = method(MoCoV3, "mocov3", temperature=temperature, scaled_loss=scaled)
    assert moco.loss(None, (q1, q2, k1, k2), 0).item() == pytest.approx(
        wanted * (2 * temperature if scaled else 1), abs=1e-6)


def test_contrast_by_hand():
    """Orthogonal pairs: cosines 1 at the own key, 0 elsewhere."""
    axes = torch.eye(4)
    assert contrast(axes, 7 * axes, 0.5).item() == pytest.approx(math.log(math.exp(2) + 3) - 2, abs=1e-12)
    assert contrast(axes, axes.roll(1, 0), 0.5).item() == pytest.approx(math.log(math.exp(2) + 3), abs=1e-12)


# --- DINO ---


@pytest.mark.parametrize("count, out", [(2, 4), (5, 32)])
@pytest.mark.parametrize("student_temperature, teacher_temperature, momentum", [(0.1, 0.04, 0.9), (0.2, 0.5, 0.5)])
def test_dino_loss_is_lightlys(count, out, student_temperature, teacher_temperature, momentum):
    """Two global and six local views, two steps: the second one's centre has moved."""
    dino = method(DINO, "dino", student_temperature=student_temperature, teacher_temperature=teacher_temperature,
                  teacher_warmup_temperature=teacher_temperature, centre_momentum=momentum)
    theirs = DINOLoss(out, teacher_temp=teacher_temperature, student_temp=student_temperature, center_momentum=momentum)
    model = Centred(out)
    for step in range(2):
        student = random(8, count, out, seed=step, spread=0.3)
        teacher = random(2, count, out, seed=step + 9, spread=0.3) + 0.5
        loss = dino.loss(model, (student, teacher), step)
        torch.testing.assert_close(loss, theirs(list(teacher), list(student)), **CLOSE)
        torch.testing.assert_close(model.centre, theirs.center[0], **CLOSE)
    assert model.centre.abs().min() > 0.01


def test_centre_stays_while_not_training():
    dino, model = method(DINO, "dino"), Centred(3).eval()
    dino.loss(model, (random(4, 2, 3), random(2, 2, 3)), 0)
    assert not model.centre.any()
    dino.loss(model.train(), (random(4, 2, 3), random(2, 2, 3)), 0)
    assert model.centre.any()


def test_teacher_temperature_warms_up():
    dino = method(DINO, "dino", iterations=1000, teacher_warmup=0.1, teacher_warmup_temperature=0.04,
                  teacher_temperature=0.08)
    found = [dino.teacher_temperature(step) for step in (0, 25, 50, 100, 101, 999)]
    assert found == pytest.approx([0.04, 0.05, 0.06, 0.08, 0.08, 0.08], abs=1e-12)
    paper = method(DINO, "dino", preset="paper")
    assert {paper.teacher_temperature(step) for step in (0, 500, 9999)} == {0.5}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_head_is_lightlys():
    """Weight-normalised prototypes of length 1, as the authors'."""
    ours, theirs = Prototypes(6, 10, 4, 7, norm=False), DINOProjectionHead(6, 10, 4, 7)
    linear = [layer for layer in theirs.layers if isinstance(layer, nn.Linear)]
    for one, other in zip(ours.layers[::2], linear, strict=True):
        one.load_state_dict(other.state_dict())
    ours.prototypes.weight.data.copy_(5 * theirs.last_layer.weight_v.data)  # of any length
    pooled = random(9, 6)
    torch.testing.assert_close(ours(pooled), theirs(pooled), **CLOSE)
    assert ours(pooled).abs().max() <= 1


@pytest.mark.parametrize("last_norm", [True, False])
def test_normalised_mlp(last_norm):
    """Two layers by hand in numpy: normalised over the batch, ReLU, then normalised again or not."""
    head, inputs = normalised_mlp(3, 5, 2, last_norm=last_norm), random(8, 3)
    first, second = (layer.weight.detach().numpy() for layer in head if isinstance(layer, nn.Linear))

    def normal(values):
        return (values - values.mean(axis=0)) / np.sqrt(values.var(axis=0) + 1e-5)

    wanted = np.maximum(normal(inputs.numpy() @ first.T), 0) @ second.T
    np.testing.assert_allclose(head(inputs).detach().numpy(), normal(wanted) if last_norm else wanted, atol=1e-9)


@pytest.mark.parametrize("step, moves", [(0, False), (2, False), (3, True)])
def test_last_layer_is_frozen_at_first(step, moves):
    dino = method(DINO, "dino", freeze_last_layer=3, hidden=6, bottleneck=4, out=5)
    model, views = dino.network(Pooled(Encoder())), [random(4, 1, 8, 8, seed=seed) for seed in range(4)]
    student, teacher = dino.embed(model, model, views, step)
    assert student.shape == (4, 4, 5) and teacher.shape == (2, 4, 5) and not teacher.requires_grad
    torch.testing.assert_close(student[:2], teacher)
    torch.testing.assert_close(student[2:].flatten(0, 1), model(torch.cat(views[2:])), **CLOSE)  # one batch
    dino.loss(model, (student, teacher), step).backward()
    assert (model.projector.prototypes.weight.grad is not None) is moves
    assert model.projector.layers[0].weight.grad.abs().max() > 0


# --- the momentum network ---


class Encoder(nn.Module):
    """One convolution and batch normalisation for an encoder."""

    out_channels = (1, 4)

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))

    def forward(self, images):
        """(B, 1, H, W) -> [the images, their only features]."""
        return [images, self.layers(images)]


class Squares:
    """A task that pulls all outputs to 0; validation says nothing."""

    def loss(self, model, indices, generator):
        """Mean square of the outputs on the images `indices`."""
        return model(random(9, 1, 6, 6)[indices] + 1).square().mean()

    def validate(self, model, step):
        """Nothing, in evaluation mode."""
        assert not model.training
        return {}


def momentum_training(schedule, iterations=4, decay=0.9):
    """MoCo v3's network, small, and its momentum network."""
    torch.manual_seed(3)
    network = method(MoCoV3, "mocov3", hidden=5, out=3).network(Pooled(Encoder()))
    settings = LoopSettings(
        title="x", identity="x",
        iterations=iterations, seed=0, device=torch.device("cpu"), precision="float32", learning_rate=0.05,
        weight_decay=0.0, clip=Clip(), accumulation_reduction="mean", ema_decay=decay, ema_schedule=schedule,
        log_every=1, save_every=9, validate_every=1)
    return Training(network, Squares(), BatchPlan(9, 4, 1, "stream", True, 0), settings)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_momentum_network(schedule):
    """k <- m k + (1 - m) q for weights and batch statistics, m = 1 - (1 - m0)(1 + cos(pi t / T)) / 2 or constant."""
    training = momentum_training(schedule)
    start = {name: tensor.numpy().copy() for name, tensor in training.model.state_dict().items()}
    wanted = dict(start)
    for step in range(4):
        training.optimiser_step()
        decay = 0.9 if schedule == "constant" else 1 - 0.1 * (1 + math.cos(math.pi * step / 4)) / 2
        for name, tensor in training.model.state_dict().items():
            wanted[name] = wanted[name] * decay + tensor.numpy() * (1 - decay)
    for name, tensor in training.ema.state_dict().items():
        if tensor.is_floating_point():
            np.testing.assert_allclose(tensor.numpy(), wanted[name], atol=1e-12, err_msg=name)
    moved = [name for name in start if np.abs(wanted[name] - start[name]).max() > 1e-3]
    assert any("running_mean" in name for name in moved) and any("predictor" in name for name in moved)
    assert not any(tensor.requires_grad for tensor in training.ema.parameters())


def test_momentum_schedule():
    training = momentum_training("cosine", iterations=100, decay=0.996)
    for step, momentum in ((0, 0.996), (50, 0.998), (100, 1.0)):
        training.step = step
        assert 1 - training.averaging() == pytest.approx(momentum, abs=1e-12)
    training.step = 99
    assert training.averaging() == pytest.approx(0.004 * math.sin(math.pi / 200) ** 2, abs=1e-12)
    training = momentum_training("constant", iterations=100, decay=0.996)
    training.step = 99
    assert training.averaging() == pytest.approx(0.004, abs=1e-12)


def test_momentum_network_trains_on_after_a_look():
    """Keys are made with the batch's own statistics, before and after validation."""
    training = momentum_training("cosine")
    assert training.ema.training
    training.validate(None)
    assert training.ema.training and training.model.training


def test_pooled_features():
    """The spatial mean of the deepest of the encoder's maps."""
    pooled, images = Pooled(Encoder()).eval(), random(2, 1, 7, 5)
    assert pooled.width == 4
    torch.testing.assert_close(pooled(images), pooled.encoder.layers(images).flatten(2).sum(dim=2) / 15, **CLOSE)


# --- collapse ---


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_effective_rank(rank):
    """Plus and minus each of k equal orthogonal directions; scale and a common part do not count."""
    axes = torch.linalg.qr(random(12, 12))[0][:rank]
    assert effective_rank(torch.cat((axes, -axes)) * 5 + random(12)) == pytest.approx(rank, abs=1e-6)
    assert effective_rank(torch.cat((axes, -axes)).float()) == pytest.approx(rank, abs=1e-3)


def test_effective_rank_of_unequal_directions():
    """Singular values 3 : 1, so exp(-(3/4) log(3/4) - (1/4) log(1/4)) = 4 / 3^(3/4)."""
    points = torch.tensor([[3.0, 0, 0], [-3, 0, 0], [0, 1, 0], [0, -1, 0]])
    assert effective_rank(points) == pytest.approx(4 / 3**0.75, abs=1e-9)


@pytest.mark.parametrize("same", [torch.full((5, 3), 0.5), torch.zeros(4, 3)])
def test_alike(same):
    assert effective_rank(same) == 0 and embedding_spread(same) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_alike_but_for_rounding(kind):
    """The mean of equal numbers may differ from them by their last bit."""
    same = random(1, 64).to(kind).repeat(7, 1)
    assert effective_rank(same) == pytest.approx(0, abs=1e-6)
    assert embedding_spread(same) == pytest.approx(0, abs=1e-6)


def test_embedding_spread():
    assert embedding_spread(random(5000, 32)) == pytest.approx(1, abs=0.01)
    assert embedding_spread(random(5000, 32) * torch.rand(5000, 1)) == pytest.approx(1, abs=0.01)  # lengths: nothing
    assert embedding_spread(torch.tensor([[2.0, 0], [0, 9]])) == pytest.approx(0.5 * 2**0.5, abs=1e-9)


def test_entropy():
    assert entropy(torch.tensor([[0.5, 0.5, 0], [1.0, 0, 0]])).tolist() == pytest.approx([math.log(2), 0], abs=1e-12)


@pytest.mark.parametrize("teacher, expected, information", [
    (torch.eye(8)[3].expand(2, 4, 8), 0, 0),  # one prototype, the same for all
    (torch.zeros(2, 4, 8), 1, 0),  # all alike
    (torch.eye(8)[:4].expand(2, 4, 8), 0, math.log(4) / math.log(8)),  # each image its own
    (torch.eye(8).expand(2, 8, 8), 0, 1),
])  # fmt: skip
def test_information(teacher, expected, information):
    figures = method(DINO, "dino").figures(Centred(8), (None, 5.0 * teacher), 0)
    assert figures == pytest.approx({"teacher_entropy": expected, "teacher_information": information}, abs=1e-9)


WELL = {"embedding_spread": 0.5, "teacher_entropy": 0.5, "teacher_information": 0.5}


@pytest.mark.parametrize("change, words", [
    ({"embedding_spread": LEAST_SPREAD - 1e-6}, ["embedding_spread 0.02: all images get nearly one embedding"]),
    ({"embedding_spread": 0.0, "teacher_entropy": 0.0}, ["embedding_spread 0: ", "; teacher_entropy 0: "]),
    ({"teacher_entropy": LEAST_ENTROPY - 1e-6}, ["(teacher_entropy 0.01: the teacher answers with one prototype)"]),
    ({"teacher_information": -1e-9}, ["(teacher_information -1e-09: the teacher answers alike to all images)"]),
    ({"embedding_spread": math.nan}, ["embedding_spread nan"]),
])  # fmt: skip
def test_alarm(change, words):
    line = alarm({**WELL, **change, "effective_rank": 0.0})
    assert "collapsing" in line and "ssl.dino.teacher_temperature" in line and "\n" not in line
    assert all(word in line for word in words) and line.count(": ") == len(change) and "rank" not in line


def test_no_alarm():
    least = {"embedding_spread": LEAST_SPREAD, "teacher_entropy": LEAST_ENTROPY, "teacher_information": 0.01}
    assert alarm(WELL) is None and alarm(least) is None and alarm({"embedding_spread": 0.5}) is None
    line = alarm({"embedding_spread": 0.0})
    assert "larger batches" in line and "teacher" not in line
