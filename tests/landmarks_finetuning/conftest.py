"""Tiny runs on the phantom that several test files predict with: one stage, two stages, and another seed."""

import pytest

from core.runs.places import Cell
from landmarks_finetuning.train import finetune_cell


@pytest.fixture(scope="session")
def finished_runs(make_config, tmp_path_factory):
    """finished_runs(name, seed=0, backbone="scratch", section={...}) -> a trained run's folder."""
    root = tmp_path_factory.mktemp("runs")

    def make(name, seed=0, backbone="scratch", **changes):
        return finetune_cell(make_config(root / name, **changes), Cell(backbone, 2, 0, seed))

    return make


@pytest.fixture(scope="session")
def one_and_two_stages(finished_runs):
    """Run folders: of one stage and of two, and of the same with another seed. Not to be changed."""
    sharp = {"iterations": 12, "sigma": 12.0, "learning_rate": {"scratch": 1e-2}, "shape_prior": 0.3,
             "validate_every": 12, "save_every": 12}
    small = {"blocks_per_level": 1}
    two = {**sharp, "refine": {"zoom": 2.0, "crop": 32, "iterations": 8, "batch_size": 4}}
    return {"one stage": finished_runs("one", unet=small, finetune=sharp),
            "one stage, another seed": finished_runs("one", 1, unet=small, finetune=sharp),
            "two stages": finished_runs("two", unet=small, finetune=two),
            "another seed": finished_runs("two", 1, unet=small, finetune=two)}
