"""Settings of fine-tuning that change its result, each by what one step does: EMA, one-pixel target, fixed timestep."""

import pytest
import torch
from safetensors.torch import load_file

from core.networks.unet import UNet
from core.runs.places import Cell, ema_path
from landmarks_finetuning.inference import TrainedDetector
from landmarks_finetuning.train import finetune_cell

ONE_STEP = {"backbones": ["scratch"], "iterations": 1, "validation": "none", "scheduler": "constant", "ema_decay": None,
            "weight_decay": 0.0}


@pytest.fixture
def one_step(make_config, tmp_path):
    """one_step(setting=value) -> the weights after one step, as they are kept."""

    def run(**finetune):
        config = make_config(tmp_path, finetune={**ONE_STEP, **finetune})
        backbone = config.finetune.backbones[0]
        return finetune_cell(config, Cell(backbone, 2, 0, 0)) / "best.safetensors"

    return run


def test_the_average_of_the_weights_by_hand(one_step):
    """After a step: decay times the weights before it and the rest of those after it."""
    before, after, averaged = (load_file(one_step(**setting)) for setting in (
        {"learning_rate": {"scratch": 1e-30}}, {}, {"ema_decay": 0.75}))
    moved = 0
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * after[name], rtol=1e-5, atol=1e-7)
        moved += (after[name] - before[name]).abs().sum().item()
    assert moved > 0.01


def test_the_one_pixel_target_is_learned(one_step):
    usual, sharp = (load_file(one_step(**setting)) for setting in ({}, {"target": "pixel"}))
    assert any(not torch.equal(usual[name], sharp[name]) for name in usual)


def test_a_fixed_timestep_is_kept(one_step, tiny_study):
    """The detector is the network at that step, in training and afterwards; null is the network without time."""
    start = sorted(ema_path(tiny_study.parent / "runs" / "tiny", 1).parent.glob("*.safetensors"))[-1]
    fixed, free = (TrainedDetector(one_step(backbones=["ddpm"], checkpoint=str(start), timestep=timestep))
                   for timestep in (3, None))
    x = torch.rand(1, 1, *fixed.config.dataset.image_size)
    with torch.no_grad():
        torch.testing.assert_close(fixed.model(x), UNet.forward(fixed.model, x, torch.tensor([3])))
        torch.testing.assert_close(free.model(x), UNet.forward(free.model, x, None))
        assert not torch.allclose(fixed.model(x), UNet.forward(fixed.model, x, torch.tensor([4])))
