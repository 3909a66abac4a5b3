"""The path of every detector on a GPU, followed without one: devices are right, and what becomes an array is copied."""

from functools import partial

import numpy as np
import pytest
import torch

from core.config.second_stage import second_of
from core.data.dataset import load_images
from core.data.source import load_source
from landmarks_finetuning.coverage import image_features
from landmarks_finetuning.detectors.registry import DETECTORS, kind_of
from landmarks_finetuning.refinement import FirstAnswers, first_errors
from landmarks_finetuning.regression import WeightedImages
from tests.fake_gpu import fake_gpu, features_on_gpu, on_gpu

MODULES = tuple(f"landmarks_finetuning.{name}" for name in (
    "regression", "refinement", "running", "local_step", "joint_training"))


class GpuGenerator(torch.Generator):
    """One that says that it lies there."""

    @property
    def device(self):
        return torch.device("cuda")


@pytest.mark.parametrize("weighted", [False, True], ids=["labels", "with answers"])
@pytest.mark.parametrize("backbone", ["scratch", "gu2net", "global_to_local"])
def test_steps_and_validation(make_config, tmp_path, monkeypatch, backbone, weighted):
    """Of both stages, where there are two."""
    refine = {} if backbone == "global_to_local" else {"refine": {"zoom": 2, "crop": 32}}
    config = make_config(tmp_path, dataset={"image_size": [64, 64]}, finetune={"backbones": [backbone], **refine})
    source = load_source(config.dataset)
    chosen = source.require("validation")[:4]
    images, second = load_images(chosen, config.dataset), second_of(config, backbone)
    tasks = [(kind_of(backbone), config, images, ())]
    if second is not None:
        crops, again = load_images(chosen, second.dataset), kind_of(backbone).second
        answers = crops.original_points() + 1
        kind = kind_of(backbone) if again.network is None else DETECTORS[again.network]
        tasks.append((kind, second, crops, (config, FirstAnswers(first_errors(answers, crops), answers))))
    header = {"shape": images.truth[0].tolist(), "backbone": backbone, "shots": 4, "draw": 0, "seed": 0}
    for kind, settings, seen, more in tasks:
        make = kind_of(backbone).second.task if more else kind.task
        training = WeightedImages(seen, np.arange(4), np.ones((4, 19)) if weighted else None)
        pairs = training.pairs()
        monkeypatch.setattr(WeightedImages, "pairs", lambda _, pairs=pairs: pairs)
        with fake_gpu(monkeypatch, *MODULES):
            task = make(settings, tmp_path, header, training, seen, kind, *more)
            model = on_gpu(partial(kind.start, settings, backbone, 1, 19))
            loss = task.loss(model, np.arange(4), GpuGenerator())
            assert loss.is_cuda and loss.shape == ()
            assert set(task.validate(model, 0)) == {"validation_loss", "validation_mre"}


def test_coverage(monkeypatch, make_config, tmp_path):
    """What selects images to label."""
    config = make_config(tmp_path)
    records = load_source(config.dataset).require("validation")[:4]
    images = load_images(records, config.dataset)
    monkeypatch.setattr("landmarks_finetuning.coverage.load_images", lambda *_: images)
    features_on_gpu(monkeypatch, config.unet)
    with fake_gpu(monkeypatch, "landmarks_finetuning.features"):
        assert image_features(config, records, tmp_path).shape[0] == 4
