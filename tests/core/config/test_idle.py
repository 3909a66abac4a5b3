"""A setting that is given and cannot act is refused in one line that names it; what a parent file gave is not."""

import json
import re

import pytest

from core.config.load import load_config, parse_config
from core.errors import UserError

PACK = "dataset.root=x.npz"
VOLUMES = ["is_3d=true", "dataset.image_size=[32,32,32]", "finetune.augmentation.rotation_degrees=5"]


def write(path, **values):
    path.write_text(json.dumps(values))
    return path


def message(path, *overrides, **options):
    """The one line in which loading `path` must end."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("setting, because, beside", [
    ("finetune.plateau_factor=0.3", 'finetune.scheduler is "cosine" and acts only with "plateau"', []),
    ("finetune.plateau_patience=3", 'finetune.scheduler is "cosine"', []),
    ("finetune.shape_prior=0.1", 'finetune.decoder is "contour_centroid"', ["finetune.decoder=contour_centroid"]),
    ("finetune.clip.limit=2", 'finetune.clip.mode is "none"', []),
    ("ddpm.clip.limit=2", 'ddpm.clip.mode is "none"', ["ddpm.clip.mode=none"]),
    ("ssl.clip.limit=2", 'ssl.clip.mode is "none"', ["ssl.clip.mode=none"]),
    ("finetune.accumulation_reduction=sum", "finetune.accumulation is 1", []),
    ("ddpm.accumulation_reduction=sum", "ddpm.accumulation is 1", []),
    ("finetune.augmentation.scale=0.3", "finetune.augmentation.probability is 0",
     ["finetune.augmentation.probability=0"]),
    ("ddpm.augmentation.rotation_degrees=9", "ddpm.augmentation.probability is 0", ["ddpm.augmentation.probability=0"]),
    ("finetune.pretraining_iteration=4000", 'finetune.checkpoint is "w.pt" and acts only with null',
     ["finetune.checkpoint=w.pt"]),
    ("ddpm.beta_start=0.001", 'ddpm.schedule is "cosine"', ["ddpm.schedule=cosine"]),
    ("ddpm.beta_end=0.01", 'ddpm.schedule is "cosine"', ["ddpm.schedule=cosine"]),
    ("ddpm.sampling_steps=20", 'ddpm.sampler is "ddpm" and acts only with "ddim"', ["ddpm.sampler=ddpm"]),
    ("ssl.dino.local_size=0.5", "ssl.dino.local_crops is 0", ["ssl.dino.local_crops=0"]),
    ("ssl.dino.local_area=[0.1,0.2]", "ssl.dino.local_crops is 0", ["ssl.dino.local_crops=0"]),
    ("ssl.dino.teacher_warmup_temperature=0.01", "ssl.dino.teacher_warmup is 0", ["ssl.dino.teacher_warmup=0"]),
    ("ssl.mocov3.views.jitter=0.5", "ssl.mocov3.views.jitter_strength is 0", ["ssl.mocov3.views.jitter_strength=0"]),
    ("ssl.dino.views.jitter_strength=0.5", "ssl.dino.views.jitter is 0", ["ssl.dino.views.jitter=0"]),
    ("dataset.percentiles=[5,95]", 'dataset.intensity is "minmax"', []),
    ("dataset.window=[0,9]", 'dataset.intensity is "percentile"', ["dataset.intensity=percentile"]),
    ("dataset.check_geometry=false", "is_3d is false", []),
    ("dataset.check_geometry=false", 'dataset.root is "x.npz"', [PACK, *VOLUMES]),
    ("dataset.spacing_mm=0.2", 'dataset.root is "x.npz"; a pack is as it was made: pack the data again', [PACK]),
    ("dataset.spacing_mm=0.2", 'dataset.layout is "chest"', ["dataset.layout=chest"]),
    ('dataset.unlabelled_dirs=["more"]', 'dataset.root is "x.npz"', [PACK]),
    ("dataset.resample_mm=1.0", 'dataset.root is "x.npz"', [PACK]),
    ("dataset.description=d.json", 'dataset.root is "x.npz"', [PACK]),
    ("evaluation.window_overlap=0.25", "dataset.resample_mm and dataset.canvas_size are null", []),
    ("finetune.refine.crop=32", "finetune.refine.zoom is null", []),
    ("finetune.refine.augmentation.scale=0.3", "finetune.refine.zoom is null", []),
    ("dataset.canvas_size=[512,512]", "dataset.resample_mm is 0.5", ["dataset.resample_mm=0.5"]),
])  # fmt: skip
def test_settings_that_cannot_act(tmp_path, setting, because, beside):
    path = write(tmp_path / "c.json")
    text = message(path, setting, *beside)
    key = setting.partition("=")[0]
    assert re.match(rf"{path}: {key} \S.* has no effect: ", text) and because in text


@pytest.mark.parametrize("overrides", [
    ["finetune.plateau_factor=0.3", "finetune.scheduler=plateau"], ["finetune.plateau_factor=0.5"],
    ["finetune.shape_prior=null", "finetune.decoder=contour_centroid"], ["dataset.spacing_mm=null", PACK],
    ["finetune.clip.limit=2", "finetune.clip.mode=norm"], ["ddpm.clip.limit=2"],
    ["dataset.percentiles=[5,95]", "dataset.intensity=percentile"], ['dataset.exclude=["a"]', PACK],
    ["evaluation.window_overlap=0.25", "dataset.resample_mm=1.0"], ["dataset.check_geometry=false", *VOLUMES],
    ["finetune.warmup_iterations=5", "finetune.scheduler=plateau"],
    ["finetune.validate_every=7", "finetune.validation=none"],
])  # fmt: skip
def test_settings_that_act_or_say_nothing(tmp_path, overrides):
    load_config(write(tmp_path / "c.json"), overrides)


@pytest.mark.parametrize("setting, starts", [
    ("finetune.encoder=vgg19", "imagenet"), ("finetune.encoder_weights.dino=x.pt", "dino"),
    ("finetune.timestep=10", "ddpm"), ("finetune.checkpoint=x.pt", "ddpm"),
    ("finetune.pretraining_iteration=4000", "ddpm"),
])  # fmt: skip
def test_settings_of_starts_that_are_not_compared(tmp_path, setting, starts):
    path = write(tmp_path / "c.json", finetune={"backbones": ["scratch"]})
    assert f'acts for "{starts}"' in message(path, setting) and "finetune.backbones" in message(path, setting)
    load_config(path, [setting], backbones=[starts])  # what a single command runs
    load_config(path, [setting, f'finetune.backbones=["scratch", "{starts}"]'])
    load_config(path, ["finetune.learning_rate.dino=0.5", "unet.base_channels=8", "ssl.iterations=5"])  # may wait


def test_each_file_answers_for_what_it_gives(tmp_path):
    """A child's choice may leave its parent's setting idle; its own may not be, nor may the parent's in itself."""
    write(tmp_path / "parent.json", finetune={"scheduler": "plateau", "plateau_factor": 0.3})
    child = write(tmp_path / "child.json", extends="parent.json", finetune={"scheduler": "cosine"})
    load_config(child)
    load_config(tmp_path / "parent.json", ["finetune.scheduler=constant"])
    load_config(write(tmp_path / "other.json", finetune={"plateau_factor": 0.3}), ["finetune.scheduler=plateau"])
    assert "plateau_patience 3 has no effect" in message(child, "finetune.plateau_patience=3")
    write(tmp_path / "parent.json", finetune={"plateau_factor": 0.3})
    assert "plateau_factor 0.3 has no effect" in message(child)


def test_a_run_s_record_is_read_as_it_is(tmp_path):
    """It holds every setting, idle ones too."""
    values = {"finetune": {"plateau_factor": 0.3}}
    assert load_config(write(tmp_path / "c.json", **values, run={"stage": "finetune"})).finetune.plateau_factor == 0.3
    assert parse_config(values, "weights").finetune.plateau_factor == 0.3


def test_entries_of_losses(tmp_path):
    path = write(tmp_path / "c.json", finetune={"decoder": "argmax"})
    assert 'finetune.losses: finetune.shape_prior 0.1 has no effect: finetune.decoder is "contour_centroid"' in message(
        path, 'finetune.losses=[{}, {"decoder": "contour_centroid", "shape_prior": 0.1}]')
    load_config(path, ['finetune.losses=[{}, {"decoder": "contour_centroid"}]'])
