"""What killed processes leave is gone after the next launch; what running ones use stays; lost weights come back."""

import os
import time

import numpy as np
import pytest
from PIL import Image

from core.config.dataset import Dataset
from core.config.load import load_config
from core.data.cache import load_one
from core.data.records import Record
from core.files import atomic_file, clear_once, drop_left_behind
from core.runs.claims import LOCK, claim
from study.prepare import prepare
from study.run import run_study
from study.runs import study_runs
from tests.conftest import error_of

STAGES = ("pretrain", "finetune")
TMP = ".metrics.json.0123456789abcdef.tmp"


def old(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    os.utime(path, (time.time() - 5,) * 2)
    return path


@pytest.fixture
def study(config_file, capsys):
    """A finished study of its own, and its runs."""
    config = load_config(config_file(finetune={"backbones": ["ddpm"]}))
    run_study(config, STAGES)
    capsys.readouterr()
    return config, study_runs(config, STAGES)


def test_leftovers_go(study, tmp_path):
    config, runs = study
    cell = runs[-1].folder
    left = [old(cell / name) for name in (TMP, LOCK, "last.pt", "previous.pt", ".previous.tmp", f"overlays/{TMP}")]
    left += [old(config.experiment_dir / "ddpm" / LOCK), old(config.experiment_dir / "report" / TMP)]
    mine = [old(cell / "notes.tmp"), old(cell / ".hidden")]
    metrics = (cell / "metrics.json").stat().st_mtime_ns
    run_study(config, STAGES)
    assert not [path for path in left if path.exists()] and all(path.exists() for path in mine)
    assert (cell / "metrics.json").stat().st_mtime_ns == metrics
    assert (config.experiment_dir / "ddpm/last.pt").is_file()  # pre-training may be continued


def test_a_plan_clears_the_cache_though_all_is_done_and_nothing_is_read(study, tmp_path):
    config, _ = study
    dataset = config.dataset.model_copy(update={"cache_dir": str(tmp_path / "cache")})
    planned = config.model_copy(update={"dataset": dataset})
    prepare(planned, STAGES)  # a reader clears the cache once
    left = old(tmp_path / "cache" / TMP)
    prepare(planned, STAGES)
    assert not left.exists()


def test_what_is_in_use_stays(study, tmp_path):
    config, runs = study
    held = old(runs[-1].folder / "last.pt")
    with claim(runs[-1].folder):
        run_study(config, STAGES)
        assert held.exists() and (runs[-1].folder / LOCK).exists()
    with atomic_file(tmp_path / "a" / "file") as file:
        file.write(b"whole")
        file.flush()
        [temporary] = (tmp_path / "a").iterdir()
        os.utime(temporary, (0, 0))
        drop_left_behind(tmp_path / "a")
        assert temporary.exists()
    assert (tmp_path / "a" / "file").read_bytes() == b"whole"


def test_partial_phantoms_go(tmp_path):
    from core.phantoms.radiographs import write_phantom_radiographs

    part = tmp_path / ".ph.partial-0123456789abcdef"
    old(part / "jpg" / "001.jpg")
    os.utime(part, (0, 0))
    write_phantom_radiographs(tmp_path / "ph", 1, (96, 78))
    assert [path.name for path in tmp_path.iterdir()] == ["ph"]
    clear_once.cache_clear()  # as in another process
    old(part / "jpg" / "001.jpg")
    os.utime(part, (0, 0))
    write_phantom_radiographs(tmp_path / "ph", 1, (96, 78))  # is there already
    assert [path.name for path in tmp_path.iterdir()] == ["ph"]


def test_who_reads_the_cache_clears_it(tmp_path):
    """Also where every image is there, as for a plan after a plan that was killed."""
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    config = Dataset(cache_dir=str(tmp_path / "cache"), image_size=(8, 8))
    load_one(Record("a", tmp_path / "a.png", None, None), config)
    left = old(tmp_path / "cache" / TMP)
    clear_once.cache_clear()
    load_one(Record("a", tmp_path / "a.png", None, None), config)
    assert not left.exists() and len(list((tmp_path / "cache").iterdir())) == 1


def test_lost_weights_are_no_dead_end(study, capsys):
    config, runs = study
    last, earlier = runs[0].results[-1], runs[0].results[0]
    before = last.read_bytes()
    last.unlink()
    run_study(config, STAGES)
    assert last.read_bytes() == before
    earlier.unlink()
    with pytest.raises(Exception, match=r"1 of 3 runs failed.*") as caught:
        run_study(config, STAGES)
    assert f"{earlier} is gone" in str(caught.value) and "or delete" in str(caught.value)


def test_lost_detector_is_trained_again(study, capsys):
    config, runs = study
    cell = runs[-1].folder
    before, metrics = (cell / "best.safetensors").read_bytes(), (cell / "metrics.json").read_text()
    for name in ("best.safetensors", "metrics.json"):
        (cell / name).unlink()
    run_study(config, STAGES)
    assert (cell / "best.safetensors").read_bytes() == before
    state = cell / "last.pt"
    state_config = load_config(cell / "config.json")
    from landmarks_finetuning.train import finetune_cell

    (cell / "metrics.json").unlink()
    (cell / "best.safetensors").unlink()
    finetune_cell(state_config, runs[-1].arguments[0])  # leaves its state
    assert state.is_file()
    (cell / "best.safetensors").unlink()
    run_study(config, STAGES)
    assert (cell / "best.safetensors").read_bytes() == before and "trained again" in capsys.readouterr().out
    assert (cell / "metrics.json").read_text().split('"seconds"')[0] == metrics.split('"seconds"')[0]


def test_finetuning_without_pretraining_is_found_first(config_file):
    config = load_config(config_file(finetune={"backbones": ["ddpm"]}))
    line = error_of(run_study, config, ("finetune",))
    assert "ema_iter000006.safetensors, which is not there; run stage pretrain first" in line
    assert not config.experiment_dir.exists()


def test_a_device_that_is_not_there_is_found_first(config_file):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    config = load_config(config_file(experiment={"device": "cuda"}))
    assert 'experiment.device "cuda": no CUDA GPU is visible' in error_of(run_study, config, STAGES)
    assert not (config.experiment_dir / "landmarks").exists()


def test_pretraining_is_done_when_its_pictures_are(config_file, monkeypatch):
    from ddpm_pretraining.train import Denoising, pretrain

    config = load_config(config_file(finetune={"backbones": ["ddpm"]}))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Denoising, "_save_pictures", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    assert not study_runs(config, ("pretrain",))[0].done
    monkeypatch.undo()
    pretrain(config)
    assert study_runs(config, ("pretrain",))[0].done
    log = (config.experiment_dir / "ddpm/metrics.jsonl").read_text()
    assert '"validation_loss"' in log.splitlines()[-1] and list(config.experiment_dir.glob("ddpm/samples/*000006.png"))


def test_a_checkpoint_that_holds_no_weights_is_found_first(config_file, tmp_path):
    notes = tmp_path / "notes.safetensors"
    notes.write_text("no weights")
    config = load_config(config_file(finetune={"backbones": ["ddpm"], "checkpoint": str(notes)}))
    assert "notes.safetensors" in error_of(run_study, config, ("finetune",))
    assert not config.experiment_dir.exists()
