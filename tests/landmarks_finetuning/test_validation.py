"""Validation while a detector is fine-tuned: its figures, and that they seldom wait for the device."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.data.dataset import load_images
from core.data.source import load_source
from core.networks.unet import UNet
from core.training.device import autocast
from landmarks_finetuning.decoding import locate, sigma_pixels
from landmarks_finetuning.detectors.heatmaps import heatmap_loss
from landmarks_finetuning.detectors.registry import DETECTORS
from landmarks_finetuning.heatmaps import confidence, find_points, log_maps
from landmarks_finetuning.losses import LOSSES
from landmarks_finetuning.regression import LandmarkRegression, WeightedImages
from landmarks_finetuning.running import Outputs, joined


class CrossingsToTheCpu(TorchDispatchMode):
    """Notes every operation that has a tensor of the CPU among what it takes or gives, or asks for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
        if "_local_scalar_dense" in str(function) or any(each.device.type == "cpu" for each in tensors):
            self.operations.append(str(function))
        return result


@pytest.mark.parametrize("size", [(32, 32), (14, 18, 16)], ids=["2d", "3d"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("decoder", ["argmax", "local_expectation", "window_mass"])
def test_decoding_waits_for_no_gpu(size, loss, decoder):
    """Shapes and devices alone are followed, on tensors that a GPU would hold."""
    if decoder == "window_mass" and loss != "cross_entropy_pixels":
        pytest.skip("the config refuses window_mass with another loss")
    with FakeTensorMode(), CrossingsToTheCpu() as seen:
        outputs = torch.empty(2, 5, *size, device="cuda")
        maps = log_maps(outputs, loss)
        points = find_points(outputs, maps, decoder, loss, 3.0)
        sure = confidence(maps, points, loss, 3.0)
    assert seen.operations == [] and points.is_cuda and points.shape == (2, 5, len(size)) and sure.is_cuda


def test_a_copy_to_the_gpu_is_noticed():
    with FakeTensorMode(), CrossingsToTheCpu() as seen:
        torch.zeros(2).to("cuda")
    assert seen.operations


def batch(first, count, side):
    chosen = list(range(first, first + count))
    return Outputs(chosen, torch.full((count, 1, side, side), float(first)), np.full((count, 2, 3), float(first)))


def test_small_batches_are_joined():
    batches = [batch(0, 2, 4), batch(2, 2, 4), batch(4, 1, 4), batch(5, 1, 8), batch(6, 1, 4)]
    parts = list(joined(batches, most_bytes=4 * 16 * 4))  # four images of 4 x 4
    assert [each.chosen for each in parts] == [[0, 1, 2, 3], [4], [5], [6]]
    assert parts[0].outputs[:, 0, 0, 0].tolist() == parts[0].maps[:, 0, 0].tolist() == [0, 0, 2, 2]
    assert list(joined([])) == []


class Blobs(torch.nn.Module):
    """As many maps as landmarks, of the image blurred and shifted."""

    def forward(self, images):
        blurred = torch.nn.functional.avg_pool2d(images, 5, 1, 2)
        return torch.cat([blurred.roll((3 * n, 2 * n), (2, 3)) * (10 + n) for n in range(19)], dim=1)


@pytest.fixture
def task(make_config, tmp_path):
    """Validation of 20 phantoms in batches of 8, 8 and 4, with a shape prior."""
    config = make_config(tmp_path, evaluation={"batch_size": 8}, finetune={"shape_prior": 0.2})
    source = load_source(config.dataset)
    images = load_images(source.require("validation"), config.dataset)
    shape = images.truth[0].tolist()
    return LandmarkRegression(config, tmp_path, {"shape": shape, "backbone": "ddpm"},
                              WeightedImages(images, np.arange(20)), images, DETECTORS["unet"])


def test_figures_of_batches_that_are_joined(task):
    """As by hand, batch by batch: the loss is averaged over images, each having that of its batch."""
    figures = [task.validate(Blobs(), 0) for _ in range(2)]
    images, finetune = task.validation, task.config.finetune
    losses, errors = [], []
    sigma = sigma_pixels(finetune.sigma, task.config.dataset)
    for some in (slice(0, 8), slice(8, 16), slice(16, 20)):
        outputs = Blobs()(images.images[some])
        losses += [heatmap_loss(outputs, images.truth[some], task.config).item()] * len(outputs)
        points = locate(outputs, images.maps[some], finetune, sigma, shape=task.shape).points
        off = (points - images.original_points()[some]) * images.spacings()[some][:, None]
        errors.append(np.linalg.norm(off, axis=2))
    assert len(images.records) == 20
    assert figures[0] == figures[1]
    assert figures[0]["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert figures[0]["validation_mre"] == pytest.approx(np.nanmean(np.concatenate(errors)), rel=1e-9)


def test_where_graphs_are_replayed_outputs_are_copies(task):
    """Off a GPU a graph's function is simply called."""
    task.device = torch.device("cuda")
    model = Blobs()
    forward, images = task._replayed(model), task.validation.images
    first = forward(images[:4])
    assert torch.equal(first, model(images[:4])) and task._replayed(model)(images[4:8]) is not first
    assert list(task.validating.calls) == []
    task.device = torch.device("cpu")
    assert task._replayed(model) is model


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_replayed_validations_see_the_weights_of_now(make_config, tmp_path, precision):
    """Also within the autocast of the loop, which keeps casts of the weights that require gradients."""
    figures = []
    for graphs in (False, True):
        config = make_config(tmp_path, evaluation={"batch_size": 8}, experiment={
            "device": "cuda", "precision": precision, "cuda_graphs": graphs})
        source = load_source(config.dataset)
        images = load_images(source.require("validation"), config.dataset)
        training = WeightedImages(images, np.arange(20))
        task = LandmarkRegression(config, tmp_path, {"shape": images.truth[0].tolist(), "backbone": "ddpm"}, training,
                                  images, DETECTORS["unet"])
        torch.manual_seed(0)
        model = UNet(config.unet, 1, 19, config.dataset.image_size).cuda().to(memory_format=torch.channels_last)
        seen = []
        for _ in range(5):
            with torch.no_grad(), autocast(task.device, precision):
                seen.append(task.validate(model, 0))
                for parameter in model.parameters():
                    parameter.mul_(0.9)
        figures.append(seen)
        assert bool(task.validating and task.validating.graphs) == graphs
    assert figures[0] == figures[1] and figures[0][0] != figures[0][4]
