"""What a step takes of memory, against tensors that autograd really keeps; and steps in parts against whole ones."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core.config.load import load_config
from core.config.unet import UNet as UNetConfig
from core.data.dataset import ImageSet, load_images
from core.data.source import load_source
from core.errors import UserError
from core.networks.unet import UNet
from core.training import memory
from core.training.batches import BatchPlan
from core.training.loop import Training
from core.training.memory import Fit, Step, fit, fit_step, parts_of, splits, step_bytes
from ddpm_pretraining.train import Denoising
from ddpm_pretraining.train import loop_settings as pretraining_settings
from landmarks_finetuning.detectors.registry import DETECTORS
from landmarks_finetuning.regression import LandmarkRegression, WeightedImages

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MIB = 2**20


def network(base=8, dims=2, side=32, **settings):
    return UNet(UNetConfig(base_channels=base, **settings), 1, 1, (side,) * dims)


def step_of(net, precision="float32", averaged=True, dims=2, side=32, loss=None):
    def inputs(images):
        return torch.empty(images, 1, *(side,) * dims), torch.zeros(images, dtype=torch.long)

    return Step(net, inputs, loss or (lambda outputs: outputs.float().square().mean()), precision, averaged)


# --- counting ---


class Noted(memory.LiveBytes):
    """Remembers the last one made."""

    last = None

    def __init__(self):
        super().__init__()
        Noted.last = self


@pytest.mark.parametrize("recomputing", [False, True])
@pytest.mark.parametrize("dims, side, images", [(2, 32, 3), (3, 16, 2)])
def test_what_is_kept_is_what_autograd_saves(monkeypatch, dims, side, images, recomputing):
    """When the forward pass has ended: each storage that a backward function holds, once, but for the weights."""
    net, kept, saved = network(dims=dims, side=side), [], {}

    def loss(outputs):
        kept.append(Noted.last.live)
        return outputs.float().square().mean()

    monkeypatch.setattr(memory, "LiveBytes", Noted)
    memory._counts.clear()
    step = step_of(net, dims=dims, side=side, loss=loss)
    memory.counted_pass(step, images, recomputing, CPU)

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    net.activation_checkpointing = recomputing
    x, times = torch.rand(images, 1, *(side,) * dims), torch.zeros(images, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x, times)
    own = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    real = sum(size for place, (size, _) in saved.items() if place not in own)
    assert kept[0] == pytest.approx(real, rel=0.05) and real > MIB / 2


def test_count_of_a_linear_layer_by_hand():
    """At the end the gradients of 4 x 10 outputs and of 10 x 10 weights are there, before them at most 3 x 40 more."""
    layer = torch.nn.Linear(10, 10, bias=False)
    step = Step(layer, lambda images: (torch.empty(images, 10),), lambda out: out.square().sum(), "float32", True)
    assert 40 + 100 <= memory.counted_pass(step, 4, False, CPU) / 4 <= 40 + 100 + 40


def test_bytes_of_a_step(monkeypatch):
    """Weights with AdamW's two averages, and the moving average where there is one."""
    net = network()
    weights = 4 * sum(parameter.numel() for parameter in net.parameters())
    monkeypatch.setattr(memory, "counted_pass", lambda *_: 1000)
    rest = 1300 + 2**30
    assert step_bytes(step_of(net, averaged=True), 2, False, GPU) == 4 * weights + rest
    assert step_bytes(step_of(net, averaged=False), 2, False, GPU) == 3 * weights + rest


@pytest.mark.parametrize("base, images, measured_mib", [(64, 8, 4849), (256, 8, 27230)])
def test_estimates_hold_what_a_gpu_held(base, images, measured_mib):
    """One H100's peaks of pre-training steps at 256x256 in bf16: the estimate is above, by no more than a third."""
    with torch.device("meta"):
        net = network(base, side=256)
    step = step_of(net, "bf16", side=256, loss=lambda outputs: F.mse_loss(outputs.float(), torch.empty(outputs.shape)))
    assert measured_mib < step_bytes(step, images, False, GPU) / MIB < 1.36 * measured_mib


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recomputing", [False, True])
def test_a_gpu_holds_no_more_than_the_estimate(recomputing):
    """Of weights, gradients and activations; the optimiser's averages are left away."""
    net, images = network(32, side=128), 8
    step = step_of(net, "bf16", averaged=False, side=128)
    counted = memory.counted_pass(step, images, recomputing, GPU)
    net = net.cuda().to(memory_format=torch.channels_last)
    net.activation_checkpointing = recomputing
    x, times = torch.rand(images, 1, 128, 128, device=GPU), torch.zeros(images, dtype=torch.long, device=GPU)
    for _ in range(2):
        net.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = net(x, times).float().square().mean()
        loss.backward()
    assert 0.7 * counted < torch.cuda.max_memory_allocated() - before < memory.MARGIN * counted


def test_counts_of_one_network_are_kept(monkeypatch):
    net = network()
    first = memory.counted_pass(step_of(net), 2, False, GPU)
    monkeypatch.setattr(memory, "fake_copy", None)
    assert memory.counted_pass(step_of(network()), 2, False, GPU) == first


# --- choosing ---


def needed(images, recomputing):
    """10 a weight, and 8 an image, or 3 where it is recomputed."""
    return 10 + images * (3 if recomputing else 8)


@pytest.mark.parametrize("setting, free, wanted", [
    ("auto", 74, Fit(8, False, 74)), ("auto", 73, Fit(4, False, 42)), ("auto", 41, Fit(3, False, 34)),
    ("auto", 33, Fit(2, False, 26)), ("auto", 25, Fit(4, True, 22)),
    ("auto", 13, Fit(1, True, 13)), ("auto", 12, None), (False, 25, Fit(1, False, 18)), (False, 17, None),
    (True, 74, Fit(8, True, 34)), (True, 33, Fit(4, True, 22))])
def test_the_fastest_way_that_fits(setting, free, wanted):
    assert fit(needed, 8, setting, free) == wanted


def test_even_parts():
    assert splits(8) == [8, 4, 3, 2, 1] and splits(1) == [1]


@pytest.fixture
def counted(monkeypatch):
    """A step takes what `needed` says, in GiB."""
    monkeypatch.setattr(memory, "step_bytes", lambda step, images, recomputing, device:
                        needed(images, recomputing) * 2**30)


@pytest.mark.parametrize("setting, free, images, recomputing, said", [
    ("auto", 80, 8, False, "memory: a step takes about 74.0 GiB of 80.0 GiB\n"),
    ("auto", 30, 2, False, "memory: a step takes about 26.0 GiB of 30.0 GiB, 2 of 8 images at a time\n"),
    ("auto", 13, 1, True, "memory: a step takes about 13.0 GiB of 13.0 GiB, 1 of 8 images at a time, activations "
                          "recomputed\n"),
    (True, 80, 8, True, "memory: a step takes about 34.0 GiB of 80.0 GiB, activations recomputed\n")])
def test_what_is_chosen_is_said(counted, capsys, setting, free, images, recomputing, said):
    net = network()
    assert fit_step(step_of(net), 8, setting, GPU, "ddpm.batch_size", free * 2**30) == images
    assert net.activation_checkpointing is recomputing and capsys.readouterr().out == said


def test_what_does_not_fit(counted):
    with pytest.raises(UserError) as error:
        fit_step(step_of(network()), 8, "auto", GPU, "ddpm.batch_size", 12 * 2**30)
    assert str(error.value) == (
        "ddpm.batch_size 8: a training step needs about 13.0 GiB of the GPU's memory even for one image at a time, and "
        "12.0 GiB are free; choose a smaller dataset.image_size or unet.base_channels, or end what else uses the GPU")
    with pytest.raises(UserError, match='18.0 GiB .* set experiment.activation_checkpointing to "auto"'):
        fit_step(step_of(network()), 8, False, GPU, "ddpm.batch_size", 12 * 2**30)


@pytest.mark.parametrize("setting, recomputing", [("auto", False), (True, True), (False, False)])
def test_a_cpu_is_not_asked(setting, recomputing, capsys):
    net = network()
    assert fit_step(step_of(net), 8, setting, CPU, "ddpm.batch_size") is None
    assert net.activation_checkpointing is recomputing and capsys.readouterr().out == ""


def test_the_setting(config_file):
    for value, wanted in (("auto", "auto"), ("true", True), ("false", False)):
        override = f"experiment.activation_checkpointing={value}"
        assert load_config(config_file(), [override]).experiment.activation_checkpointing is wanted or value == "auto"
    assert load_config(config_file(), []).experiment.activation_checkpointing == "auto"
    with pytest.raises(UserError, match="activation_checkpointing"):
        load_config(config_file(), ["experiment.activation_checkpointing=sometimes"])


# --- steps in parts ---


def test_parts_are_even():
    drawn = torch.arange(7), torch.arange(14).view(7, 2)
    assert [part[0].tolist() for part in parts_of(drawn, 3)] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [part[1][:, 0].tolist() for part in parts_of(drawn, 3)] == [[0, 2, 4], [6, 8], [10, 12]]
    assert parts_of(drawn, None) == parts_of(drawn, 7) == [drawn]


def gradients(model, task, plan, settings):
    """Of one step's micro-batches, and their loss."""
    training = Training(copy.deepcopy(model), task, plan, settings)
    loss = training.accumulate(plan.groups(0))
    return loss.item(), [parameter.grad for parameter in training.parameters if parameter.grad is not None]


def assert_alike(whole, parts):
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    for one, other in zip(whole[1], parts[1], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5 * float(one.abs().max()) + 1e-9)


def most(settings, images):
    return replace(settings, most_images=images)


@pytest.fixture
def images(make_config, tmp_path):
    config = make_config(tmp_path)
    source = load_source(config.dataset)
    return load_images(source.require("train")[:10], config.dataset)


def test_pretraining_in_parts_is_the_step_of_whole_batches(make_config, tmp_path, images):
    config = make_config(tmp_path, ddpm={"batch_size": 5, "accumulation": 2})
    task, settings = Denoising(config, tmp_path, images, None), pretraining_settings(config)
    model = UNet(config.unet, 1, 1, config.dataset.image_size)
    plan = BatchPlan(10, 5, 2, "stream", True, 0)
    whole = gradients(model, task, plan, settings)
    assert_alike(whole, gradients(model, task, plan, most(settings, 2)))
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    gradients(model, task, plan, most(settings, 2))
    assert seen == [2, 2, 1, 2, 2, 1]


@pytest.mark.parametrize("loss", ["cross_entropy_pixels", "cross_entropy_channels"])
def test_finetuning_in_parts_is_the_step_of_whole_batches(make_config, tmp_path, images, loss, monkeypatch):
    """Also where landmarks are missing, unevenly, which the softmax over pixels averages over."""
    config = make_config(tmp_path, finetune={"loss": loss, "shape_prior": None})
    truth = images.truth.clone()
    truth[:3, 4:] = np.nan
    training = WeightedImages(images, np.arange(10))
    task = LandmarkRegression(config, tmp_path, {"shape": truth[5].tolist(), "backbone": "ddpm"}, training, None,
                              DETECTORS["unet"])
    monkeypatch.setattr(ImageSet, "truth", property(lambda _: truth))
    settings = pretraining_settings(config)
    model = UNet(config.unet, 1, truth.shape[1], config.dataset.image_size)
    plan = BatchPlan(10, 10, 1, "epoch", False, 0)
    whole = gradients(model, task, plan, settings)
    assert_alike(whole, gradients(model, task, plan, most(settings, 3)))
