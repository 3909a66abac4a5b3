"""The second stage's config: sizes by hand, and a file that can be written and read again."""

import pytest

from core.config.load import parse_config
from core.config.second_stage import second_stage
from tests.conftest import error_of

LOCAL = {"iterations": 7, "batch_size": 3, "zoom": 2.5, "crop": 16, "sigma": 2.0}


def study(**changes):
    dataset = {"layout": "cephalo", "image_size": [48, 40], **changes.pop("dataset", {})}
    unet = {"channel_multipliers": [1, 2], "full_attention_sizes": [24]}
    return parse_config({"experiment": {"name": "mine", "output_dir": "out"}, "dataset": dataset, "unet": unet,
                         "finetune": {"refine": LOCAL}, **changes}, "c.json")  # fmt: skip


def test_crops_of_zoomed_images():
    second = second_stage(study())
    assert second.dataset.image_size == (16, 16) and second.dataset.canvas_size == (120, 100)
    assert str(second.experiment_dir) == "out/mine/fine"
    finetune = second.finetune
    assert (finetune.iterations, finetune.batch_size, finetune.sigma, finetune.refine.zoom) == (7, 3, 2.0, None)
    assert second.unet.full_attention_sizes == ()  # no level of a crop is 24 pixels wide
    assert parse_config(second.plain(), "again.json").plain() == second.plain()


@pytest.mark.parametrize("labels, sigma, steps", [(1, 1.5, 600), (19, 1.5, 600), (20, 0.5, 1500), (150, 0.5, 1500)])
def test_many_labels_have_a_sharper_target_and_more_steps(labels, sigma, steps):
    """Unless the config says which."""
    finetune = second_stage(study(finetune={"refine": {"zoom": 2, "crop": 16}}), labels).finetune
    assert (finetune.sigma, finetune.iterations) == (sigma, steps)
    finetune = second_stage(study(), labels).finetune
    assert (finetune.sigma, finetune.iterations) == (2.0, 7)


def test_answers_of_a_round_before_ask_for_more_steps_and_for_no_sharper_target():
    finetune = second_stage(study(finetune={"refine": {"zoom": 2, "crop": 16}}), labels=5, answered=15).finetune
    assert (finetune.sigma, finetune.iterations) == (1.5, 1500)


def test_millimetres_shrink_by_the_zoom():
    second = second_stage(study(dataset={"resample_mm": 1.5}))
    assert second.dataset.resample_mm == pytest.approx(0.6) and second.dataset.canvas_size is None


def test_answers_weigh_in_the_second_stage_as_in_the_first():
    """What the study says of them, but the second stage makes no rounds of its own."""
    second = second_stage(study(finetune={"refine": LOCAL, "self_training": {"rounds": 2, "share": 0.25, "power": 3}}))
    weighing = second.finetune.self_training
    assert (weighing.rounds, weighing.share, weighing.power) == (0, 0.25, 3)


def test_no_canvas_is_smaller_than_a_crop():
    values = {"finetune": {"refine": {"zoom": 1.1, "crop": 64}}}
    assert second_stage(study(**values)).dataset.canvas_size == (64, 64)


def test_one_stage_has_no_second():
    with pytest.raises(ValueError, match="no second stage"):
        second_stage(study(finetune={}))


def test_a_crop_that_the_levels_do_not_divide():
    assert "finetune.refine.crop [15]: 2 levels need multiples of 2; nearest to 15: 14 or 16" in error_of(
        parse_config, {"unet": {"channel_multipliers": [1, 2]}, "finetune": {"refine": {"zoom": 2, "crop": 15}}}, "c")
