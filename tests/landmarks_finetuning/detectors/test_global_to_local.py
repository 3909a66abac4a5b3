"""Votes of patches: targets, loss and answers by hand, in two dimensions and in three, and windows that find dots."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from core.config.load import CONFIG_DIR, load_config, parse_config
from core.config.recipes import recipe
from core.config.second_stage import local_step
from core.data.records import Record
from landmarks_finetuning.detectors.global_to_local import (
    decode_patches,
    locate_patches,
    patch_loss,
    patch_of,
    patch_targets,
)
from landmarks_finetuning.local_step import refine_locally
from tests.conftest import error_of


def test_targets_by_hand():
    """Patches of 8 pixels have their centres at 3.5 and 11.5."""
    displacement, inside = patch_targets(torch.tensor([[[10.0, 3.0], [-2.0, 4.0]]]), (2, 2), 8)
    assert displacement.shape == (1, 2, 2, 2, 2)
    assert displacement[0, 0, :, 0, 0].tolist() == pytest.approx([math.log10(7.5), -math.log10(1.5)])
    assert displacement[0, 0, :, 1, 1].tolist() == pytest.approx([-math.log10(2.5), -math.log10(9.5)])
    assert inside[0, 0].tolist() == [[0, 0], [1, 0]]
    assert not inside[0, 1].any()  # outside the image: displacements all the same
    assert displacement[0, 1, 0, 0, 0].item() == pytest.approx(-math.log10(6.5))


def test_a_pixels_area_belongs_to_one_patch():
    _, inside = patch_targets(torch.tensor([[[-0.5, 7.49], [7.5, 15.49], [-0.51, 0.0]]]), (2, 2), 8)
    assert inside[0].tolist() == [[[1, 0], [0, 0]], [[0, 0], [0, 1]], [[0, 0], [0, 0]]]


def test_the_loss_by_hand():
    """Outputs of 0: the mean of the targets' sizes, and presence_weight times log 2; the second is not annotated."""
    points = torch.tensor([[[10.0, 3.0], [math.nan, math.nan]]])
    sizes = [math.log10(1 + abs(10 - row)) + math.log10(1 + abs(3 - column)) for row in (3.5, 11.5)
             for column in (3.5, 11.5)]
    expected = sum(sizes) / 8 + 20 * math.log(2)
    outputs = torch.zeros(1, 6, 2, 2)
    assert patch_loss(outputs, points, 8, 20.0).item() == pytest.approx(expected, rel=1e-5)
    weights = torch.tensor([[0.5, 1.0]])
    assert patch_loss(outputs, points, 8, 20.0, weights).item() == pytest.approx(expected / 2, rel=1e-5)


def votes_of(points, grid, patch, weights):
    """Outputs whose patches say where `points` (N, D) are, each with a presence of `weights` (*grid)."""
    displacement, _ = patch_targets(torch.as_tensor(points)[None], grid, patch)
    logits = torch.as_tensor(weights).logit().expand(1, len(points), *grid)
    return torch.cat((displacement.flatten(1, 2), logits), dim=1)


def test_answers_are_means_weighted_by_presence():
    outputs = votes_of([[10.0, 3.0]], (2, 2), 8, [[0.1, 0.2], [0.3, 0.4]])
    points, presence = decode_patches(outputs, 1, 8)
    assert points[0, 0].tolist() == pytest.approx([10.0, 3.0], abs=1e-4) and presence.item() == pytest.approx(0.4)
    outputs[0, 0, 1, 1] = -math.log10(5.5)  # that patch now says row 11.5 - 4.5 = 7 with a weight of 0.4
    assert decode_patches(outputs, 1, 8)[0][0, 0].tolist() == pytest.approx([10 - 0.4 * 3, 3.0], abs=1e-4)


def test_hopeless_patches_still_answer():
    outputs = votes_of([[10.0, 3.0]], (2, 2), 8, [[0.5, 0.5], [0.5, 0.5]])
    outputs[:, 2] = -1e4
    assert decode_patches(outputs, 1, 8)[0][0, 0].tolist() == pytest.approx([10.0, 3.0], abs=1e-4)


def test_volumes_vote_as_their_slices_do():
    """The same votes in every slice: the loss of the two axes and the answer along them are those of the image."""
    flat = votes_of([[10.0, 3.0], [5.0, 9.0]], (2, 2), 8, [[0.1, 0.2], [0.3, 0.4]])
    deep = votes_of([[6.0, 10.0, 3.0], [2.0, 5.0, 9.0]], (2, 2, 2), 8, torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
    points, volumes = decode_patches(flat, 2, 8)[0], decode_patches(deep, 2, 8)[0]
    torch.testing.assert_close(volumes[..., 1:], points, atol=1e-4, rtol=1e-5)
    assert volumes[0, :, 0].tolist() == pytest.approx([6.0, 2.0], abs=1e-4)


def test_answers_in_stored_pixels():
    outputs = votes_of([[10.0, 3.0]], (2, 2), 8, [[0.1, 0.2], [0.3, 0.4]])
    maps = np.array([[[0.5, 0.0, 1.0], [0.0, 0.25, 0.0]]])  # from stored pixels
    located = locate_patches(outputs, maps, 8)
    assert located.points[0, 0].tolist() == pytest.approx([18.0, 12.0], abs=1e-3)
    assert np.isnan(located.expected_error).all()
    each = locate_patches(outputs, maps[:, None], 8)
    np.testing.assert_allclose(each.points, located.points)


class Bright(nn.Module):
    """Local networks that say: no displacement, and present where it is bright."""

    def forward(self, windows):
        seen = nn.functional.avg_pool2d(windows, 2)
        return torch.cat((torch.zeros_like(seen).repeat(1, 2, 1, 1), 60 * seen - 50), dim=1)


def dotted(tmp_path, **local):
    dots = np.array([[60.0, 50.0], [121.0, 98.0], [8.0, 150.0]])
    rows, columns = np.indices((200, 160))
    picture = sum(np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 8) for y, x in dots)
    Image.fromarray(np.rint(255 * picture.clip(0, 1)).astype(np.uint8)).save(tmp_path / "dots.png")
    values = {"dataset": {"image_size": [50, 40], "cache_dir": str(tmp_path / "cache")},
              "unet": {"channel_multipliers": [1, 2]}, "experiment": {"device": "cpu"},
              "finetune": {"backbones": ["global_to_local"], "global_to_local": {"local": {"window": 24, **local}}}}
    return parse_config(values, "c.json"), [Record("dots", tmp_path / "dots.png", dots, (0.5, 0.5))], dots


@pytest.mark.parametrize("local", [{"zoom": 4.0}, {"window_mm": 12.0}], ids=["zoom", "mm"])
def test_windows_about_answers_find_dots(tmp_path, local):
    """Pixels of a window are stored ones: 4 times finer than 50 x 40, or 12 mm in 24 of 0.5 mm."""
    config, records, dots = dotted(tmp_path, **local)
    answers = dots[None] + np.array([[5.0, -4.0], [-6.0, 3.0], [4.0, 6.0]])
    answers[0, 2] = np.nan
    located = refine_locally(Bright(), records, answers, 1.0, config)
    assert np.abs(located.points[0, :2] - dots[:2]).max() < 0.6
    assert np.isnan(located.points[0, 2]).all()


def test_the_second_steps_config():
    values = {"dataset": {"layout": "cephalo", "image_size": [48, 40]}, "unet": {"channel_multipliers": [1, 2]},
              "finetune": {"backbones": ["global_to_local"], "global_to_local": {"local": {"window_mm": 8.0}}}}
    second = local_step(parse_config(values, "c"))
    assert second.dataset.image_size == (16, 16) and second.dataset.resample_mm == 0.5
    assert second.finetune.iterations == 600 and second.finetune.optimizer == "adamw"
    values["finetune"]["global_to_local"] = {"preset": "released", "local": {"zoom": 2.0}}
    second = local_step(parse_config(values, "c"))
    assert second.dataset.canvas_size == (96, 80) and second.dataset.resample_mm is None
    assert (second.finetune.optimizer, second.finetune.scheduler, second.finetune.cycle_iterations) == (
        "amsgrad", "restarts", 10000)
    assert parse_config(second.plain(), "again").plain() == second.plain()


@pytest.mark.parametrize("changes, message", [
    ({"local": {"window": 15}}, "must be an even number from 4 on"),
    ({"patch": 12}, "finetune.global_to_local.patch"),
    ({"channels": 7}, "must be even: the stem has half"),
])
def test_impossible_sizes(changes, message):
    assert message in error_of(parse_config, {"finetune": {"global_to_local": changes}}, "c")


def test_millimetres_need_a_layout_that_has_them():
    values = {"dataset": {"layout": "chest"}, "finetune": {"backbones": ["global_to_local"],
                                                           "global_to_local": {"local": {"window_mm": 8.0}}}}
    message = error_of(parse_config, values, "c")
    assert 'window_mm needs images in mm: layout "folder" or "cephalo", not "chest"' in message


@pytest.mark.parametrize("name, patch, weight, window_mm", [
    ("cephalometric", 32, 20, 1.6), ("ccta", 8, 8, 24.0), ("olfactory", 8, 2, 7.5)])
def test_templates_have_the_published_settings(name, patch, weight, window_mm):
    config = load_config(CONFIG_DIR / f"global_to_local/{name}.json")
    own, second = config.finetune.global_to_local, local_step(config)
    assert (own.preset, patch_of(config), own.presence_weight) == ("released", patch, weight)
    assert second.dataset.resample_mm == pytest.approx(window_mm / 16) == config.dataset.resample_mm
    assert recipe(config, "global_to_local").finetune.optimizer == "amsgrad" == second.finetune.optimizer
