"""Shared by the tests: a tiny phantom data set, tiny configs, commands run in-process, and one tiny finished study."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path

import pytest

from core.errors import UserError

PROJECT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("LANDMARK_DATA", PROJECT / "../shared/data"))  # real images; tests skip where it is not
os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is first imported: in this process and below it

TINY = {
    "experiment": {"name": "tiny", "device": "cpu", "precision": "float32"},
    "dataset": {"name": "phantom", "layout": "cephalo", "image_size": [48, 48], "spacing_mm": 2.5},
    "unet": {"base_channels": 8, "channel_multipliers": [1, 2], "attention_heads": 1, "attention_head_channels": 8,
             "linear_attention": False},
    "ddpm": {"num_train_timesteps": 20, "iterations": 6, "checkpoint_iterations": [3, 6], "batch_size": 2,
             "log_every": 2, "validate_every": 3, "sample_every": 6, "save_every": 2, "sampling_steps": 2,
             "sample_count": 2},
    "finetune": {"iterations": 4, "sigma": 20.0, "shots": [2], "draws": [0], "batch_size": 2, "validate_every": 2,
                 "log_every": 1, "save_every": 2, "ema_decay": 0.5, "learning_rate": {"ddpm": 1e-4, "scratch": 1e-4}},
    "evaluation": {"overlays": 2},
}


def merged(base: dict, changes: dict) -> dict:
    """`base` with `changes` laid over it, section by section."""
    return {**base, **{key: merged(base.get(key, {}), value) if isinstance(value, dict) else value
                       for key, value in changes.items()}}


@pytest.fixture(scope="session")
def phantom(tmp_path_factory) -> Path:
    """154 phantom radiographs of 96 x 78 pixels: 130 to train, 20 to validate, 4 to test. Not to be changed."""
    from core.phantoms.radiographs import write_phantom_radiographs

    root = tmp_path_factory.mktemp("data") / "phantom"
    write_phantom_radiographs(root, 154, (96, 78), seed=0)
    return root


@pytest.fixture(scope="session")
def make_values(phantom, tmp_path_factory):
    """make_values(output_dir, section={...}) -> plain values of a tiny study on the phantom."""
    cache = tmp_path_factory.mktemp("cache")

    def make(output_dir: Path, **changes) -> dict:
        places = {"experiment": {"output_dir": str(output_dir)},
                  "dataset": {"root": str(phantom), "cache_dir": str(cache)}}
        return merged(merged(TINY, places), changes)

    return make


@pytest.fixture(scope="session")
def make_config(make_values):
    """make_config(output_dir, section={...}) -> Config of a tiny study on the phantom."""
    from core.config.load import parse_config

    return lambda output_dir, **changes: parse_config(make_values(output_dir, **changes), "tiny.json")


@pytest.fixture
def config_file(make_values, tmp_path):
    """config_file(section={...}) -> path of a tiny study's JSON, whose runs go below tmp_path/runs."""

    def write(name: str = "tiny.json", **changes) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(make_values(tmp_path / "runs", **changes)))
        return path

    return write


@pytest.fixture
def run_main(capsys, monkeypatch):
    """run_main(module, *arguments) -> (exit status, stdout, stderr), as `python -m module` would end."""
    from core.errors import run_command

    def run(module: str, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        capsys.readouterr()
        try:
            run_command(import_module(module).main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny_study(make_values, tmp_path_factory) -> Path:
    """The config file of a study that is pre-trained, fine-tuned (ddpm, 2 shots) and scored. Not to be changed."""
    from core.config.load import load_config
    from study.run import run_study

    folder = tmp_path_factory.mktemp("study")
    path = folder / "study.json"
    path.write_text(json.dumps(make_values(folder / "runs", finetune={"backbones": ["ddpm"]})))
    run_study(load_config(path), ("pretrain", "finetune"))
    return path


@pytest.fixture(scope="session")
def tiny_cell(tiny_study) -> Path:
    """The run folder of the study's fine-tuned and scored cell. Not to be changed."""
    return next(tiny_study.parent.glob("runs/tiny/landmarks/ddpm/*/shots002_draw0_seed0"))


def error_of(call, *arguments):
    """The one-line message of the UserError that `call` raises."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def unsealed_header(file):
    """The header of an open safetensors file without its checksum, to be written with changes."""
    header = json.loads(file.metadata()["header"])
    return {key: value for key, value in header.items() if key not in ("checked", "checksum")}
