"""The plan of a study: its cells, their folders, what is done, and what the launcher prints."""

import json
import re

import pytest

from core.config.load import parse_config
from core.config.starts import MEAN_SHAPE
from core.data.source import load_source
from core.errors import UserError
from core.runs.cells import cells
from core.runs.identity import check_cell, check_unchanged
from core.runs.places import Cell, cell_dir, is_pretrained, is_scored, variant
from core.runs.record import write_run_config
from landmarks_finetuning.report.iterations import family
from study.plan import print_plan
from study.prepare import prepare
from study.runs import study_runs
from study.timing import duration, time_left

FINETUNE = {"iterations": 20, "shots": [1, 5], "draws": [0, 2], "seeds": [0, 3], "batch_size": 2}


def make(tmp_path, ddpm=None, **finetune):
    """A study of four pre-training steps on phantoms of 48x48 pixels."""
    return parse_config({
        "experiment": {"name": "tiny", "output_dir": str(tmp_path / "runs")},
        "dataset": {"name": "phantom", "layout": "cephalo", "root": str(tmp_path / "phantom"), "image_size": [16, 16],
                    "cache_dir": str(tmp_path / "cache"), "phantom": {"count": 153, "size": [48, 48]}},
        "unet": {"base_channels": 8},
        "ddpm": {"iterations": 4, "checkpoint_iterations": [2, 4], **(ddpm or {})},
        "finetune": {**FINETUNE, **finetune},
    }, "tiny")  # fmt: skip


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


def test_cells_in_order(tmp_path):
    assert cells(make(tmp_path, shots=[5], seeds=[0])) == [
        Cell(MEAN_SHAPE, 5, 0, 0), Cell(MEAN_SHAPE, 5, 2, 0),
        Cell("ddpm", 5, 0, 0), Cell("scratch", 5, 0, 0), Cell("ddpm", 5, 2, 0), Cell("scratch", 5, 2, 0),
    ]  # fmt: skip
    plan = cells(make(tmp_path))
    assert len(plan) == len(set(plan)) == 2 * 2 + 2 * 2 * 2 * 2  # shots x draws, and that x seeds x backbones
    assert [cell.backbone for cell in plan[:5]] == [MEAN_SHAPE] * 4 + ["ddpm"]
    assert [cell.shots for cell in plan[4:]] == [1] * 8 + [5] * 8
    assert {cell.draw for cell in cells(make(tmp_path, selection="first"))} == {0}  # the first k have one
    assert {cell.draw for cell in cells(make(tmp_path, selection="coverage"))} == {0}


def test_folds_come_before_what_joins_them(tmp_path):
    config = make(tmp_path, shots=[5], draws=[0], seeds=[0], backbones=["scratch"])
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"folds": 2})})
    assert cells(config) == [Cell(backbone, 5, 0, 0, fold) for backbone in (MEAN_SHAPE, "scratch")
                             for fold in (1, 2, None)]


def test_folder_of_a_cell(tmp_path):
    config = make(tmp_path, iterations=400, batch_size=8)
    place = cell_dir(config, Cell("ddpm", 10, 2, 1))
    assert place == tmp_path / "runs/tiny/landmarks/ddpm/default/shots010_draw2_seed1"
    assert cell_dir(config, Cell(MEAN_SHAPE, 1, 0, 0)).parent.parent.name == "mean_shape"


def readable(name):
    """A variant's name without the digest of a file's place."""
    return re.sub("-[0-9a-f]{6}$", "-?", name)


@pytest.mark.parametrize("settings, ddpm, scratch", [
    ({}, "default", "default"),
    ({"loss": "cross_entropy_channels", "target": "disk", "sigma": 5.0, "shape_prior": None},) + (
        "loss-cross_entropy_channels_target-disk_sigma-5.0_prior-off",) * 2,
    ({"shape_prior": 0.1},) + ("prior-0.1",) * 2,
    ({"timestep": 10, "pretraining_iteration": 2}, "t-10_iter-2", "default"),
    ({"timestep": 0}, "t-0", "default"),
    ({"checkpoint": "runs/chest/ddpm/ema_iter000004.safetensors"}, "from-ema_iter000004-?", "default"),
    ({"learning_rate": {"ddpm": 1e-5, "scratch": 1e-3}}, "lr-1e-05", "default"),
    ({"encoder": "vgg19", "encoder_weights": {"imagenet": "a/b.pth"}, "learning_rate": {"random": 1.0}}, "default",
     "default"),
    ({"iterations": None, "epochs": 7}, "epochs-7", "epochs-7"),
    ({"weight_decay": 0.5, "seeds": [4], "shots": [3]}, "default", "default"),
])  # fmt: skip
def test_variant(tmp_path, settings, ddpm, scratch):
    config = make(tmp_path, **{"iterations": 400, "batch_size": 8, **settings})
    assert (readable(variant(config, "ddpm")), variant(config, "scratch")) == (ddpm, scratch)
    assert variant(config, MEAN_SHAPE) == "default"


@pytest.mark.parametrize("settings, imagenet, random", [
    ({"timestep": 10, "checkpoint": "x.pt", "learning_rate": {"ddpm": 1.0}}, "default", "default"),
    ({"encoder": "vgg19", "encoder_weights": {"imagenet": "files/vgg.pth"}}, "encoder-vgg19_weights-vgg-?",
     "encoder-vgg19"),
    ({"learning_rate": {"imagenet": 3e-4}}, "lr-0.0003", "default"),
])  # fmt: skip
def test_variant_of_encoders(tmp_path, settings, imagenet, random):
    config = make(tmp_path, **{"iterations": 400, "batch_size": 8, **settings})
    assert (readable(variant(config, "imagenet")), variant(config, "random")) == (imagenet, random)


def test_files_of_one_stem_are_told_apart(tmp_path, monkeypatch):
    """By folder or suffix; one file by two paths has one name, and the files of one folder are one family."""
    def name(checkpoint):
        return variant(make(tmp_path, checkpoint=checkpoint), "ddpm")

    monkeypatch.chdir(tmp_path)
    paths = ["a/ddpm/ema_iter000004.safetensors", "b/ddpm/ema_iter000004.safetensors", "a/ddpm/ema_iter000004.pt"]
    assert len({name(path) for path in paths}) == 3
    assert name(paths[0]) == name(str(tmp_path / "b/.." / paths[0])) and "from-ema_iter000004-" in name(paths[0])
    assert family(name(paths[0])) == family(name("a/ddpm/ema_iter000008.safetensors")) != family(name(paths[1]))


def test_folder_of_a_run_of_an_earlier_version(tmp_path):
    """It was called by the stem alone, and stays the folder of that file; of another one of the same stem it is not."""
    mine, other = (make(tmp_path, checkpoint=f"runs/{study}/ddpm/ema.pt") for study in ("chest", "hand"))
    earlier = tmp_path / "runs/tiny/landmarks/ddpm" / re.sub("(from-ema)-[0-9a-f]+", r"\1", variant(mine, "ddpm"))
    assert "from-ema" in earlier.name != variant(mine, "ddpm")
    write_run_config(earlier / "shots001_draw0_seed0", mine.plain(), {})
    assert variant(mine, "ddpm") == earlier.name != variant(other, "ddpm")
    write_run_config(earlier / "shots001_draw1_seed0", other.plain(), {})  # both were put into one
    assert earlier.name not in (variant(mine, "ddpm"), variant(other, "ddpm"))


def test_what_is_done(tmp_path):
    config, cell = make(tmp_path), Cell("ddpm", 1, 0, 0)
    touch(cell_dir(config, cell) / "predictions.csv")
    assert not is_scored(config, cell)
    touch(cell_dir(config, cell) / "metrics.json")
    assert is_scored(config, cell) and not is_scored(config, Cell("ddpm", 1, 0, 3))
    assert not is_scored(make(tmp_path, target="pixel"), cell)
    touch(config.experiment_dir / "ddpm/ema_iter000004.safetensors")
    assert not is_pretrained(config)  # of two
    touch(config.experiment_dir / "ddpm/ema_iter000002.safetensors")
    assert is_pretrained(config)


def test_changed_settings_are_named(tmp_path):
    before, keys = make(tmp_path), frozenset({"ddpm.learning_rate", "ddpm.log_every", "ddpm.clip.limit"})
    check_unchanged(tmp_path, before, keys)  # nothing there yet
    (tmp_path / "config.json").write_text(json.dumps({**before.plain(), "run": {"command": "x"}}))
    check_unchanged(tmp_path, before, keys)
    check_unchanged(tmp_path, make(tmp_path, shots=[7]), keys)  # not watched
    slower = make(tmp_path, ddpm={"learning_rate": 1e-5, "log_every": 3})
    with pytest.raises(UserError, match=r"was made with ddpm.learning_rate = 0.0001, now it is 1e-05 and 1 more; "
                                        r"choose another experiment.name, or delete that folder") as caught:
        check_unchanged(tmp_path, slower, keys)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match=r"ddpm.log_every = 20, now it is 3;"):
        check_unchanged(tmp_path, slower, keys - {"ddpm.learning_rate"})
    check_unchanged(tmp_path, slower, frozenset({"ddpm.clip.limit"}))
    with pytest.raises(UserError, match="ddpm.clip.limit"):  # sections within sections
        check_unchanged(tmp_path, make(tmp_path, ddpm={"clip": {"mode": "norm", "limit": 2}}), keys)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, load_source(make(folder).dataset)


def test_plan(phantom, tmp_path, capsys):
    source = phantom[1]
    everything = ("pretrain", "finetune", "report")
    config = make(tmp_path)
    print_plan(config, everything, source, study_runs(config, everything))
    out = capsys.readouterr().out
    assert "study tiny in" in out and "stages pretrain finetune report" in out
    assert "130 train, 20 validation, 3 test; 19 landmarks; 150 images for pre-training" in out
    assert "pretrain  4 steps; checkpoints found: none" in out
    assert "finetune  20 runs, 0 done, 20 left (320 steps at most)" in out  # 16 trained runs of 20 steps
    assert "optimiser steps to come: 324\na step takes, by the runs of this study: no run measured yet\n" in out
    assert out.endswith("time to come: 4 steps of pretrain, 160 steps of ddpm, 160 steps of scratch "
                        "(no run measured yet)\n")
    assert str(cell_dir(config, Cell("scratch", 5, 2, 3))) in out

    for cell in (Cell(MEAN_SHAPE, 1, 0, 0), Cell("ddpm", 1, 0, 0)):
        touch(cell_dir(config, cell) / "metrics.json")
    for iteration in (2, 4):
        touch(config.experiment_dir / f"ddpm/ema_iter{iteration:06d}.safetensors")
    print_plan(config, everything, source, study_runs(config, everything))
    out = capsys.readouterr().out
    assert "pretrain  done; checkpoints found: ema_iter000002.safetensors, ema_iter000004.safetensors" in out
    assert "finetune  20 runs, 2 done, 18 left (300 steps at most)" in out
    assert "optimiser steps to come: 300\n" in out
    assert f"{cell_dir(config, Cell('ddpm', 1, 0, 0))}\n" not in out

    print_plan(config, ("report",), source, [])
    out = capsys.readouterr().out
    assert "finetune  " not in out and "pretrain  " not in out and out.endswith("time to come: about 0 s\n")


def test_plan_in_epochs_and_without_pretraining(phantom, tmp_path, capsys):
    config = make(tmp_path, iterations=None, epochs=3, batch_size=2, accumulation=2, draws=[0], seeds=[0],
                  backbones=["scratch"])
    print_plan(config, ("pretrain", "finetune"), phantom[1], study_runs(config, ("pretrain", "finetune")))
    out = capsys.readouterr().out
    assert "pretrain  " not in out  # no cell starts from it
    assert "finetune  4 runs, 0 done, 4 left (9 steps at most)" in out  # 3 epochs x (1 + 2) groups of 4 images


def log(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_time_to_come(tmp_path, capsys):
    """By hand: pre-training 2 s a step, ddpm (6 + 9 + 15 s) / (10 + 20 steps) = 1 s a step, scratch unknown."""
    config = make(tmp_path, shots=[5])
    log(config.experiment_dir / "ddpm", {"step": 2, "loss": 1.0, "seconds": 3.0}, {"step": 3, "seconds": 3.0},
        {"step": 3, "validation_loss": 9.0})
    log(cell_dir(config, Cell("ddpm", 5, 0, 0)), {"step": 5, "seconds": 6.0}, {"step": 10, "seconds": 9.0})
    log(cell_dir(config, Cell("ddpm", 5, 2, 0)), {"step": 20, "seconds": 15.0})
    touch(cell_dir(config, Cell("ddpm", 5, 2, 0)) / "metrics.json")
    log(cell_dir(config, Cell("ddpm", 5, 2, 3)), {"step": 7, "validation_loss": 6.0})  # nothing timed yet
    stages = ("pretrain", "finetune")
    print_plan(config, stages, None, study_runs(config, stages))
    out = capsys.readouterr().out
    assert "optimiser steps to come: 131\n" in out  # 1 + 10 + 20 + 20 of ddpm + 4 x 20 of scratch
    assert "a step takes, by the runs of this study: pretrain 2 s, ddpm 1 s\n" in out
    assert out.endswith("time to come: about 52 s and 80 steps of scratch (no run measured yet)\n")

    log(cell_dir(config, Cell("scratch", 5, 0, 0)), {"step": 20, "seconds": 2400.0})
    touch(cell_dir(config, Cell("scratch", 5, 0, 0)) / "metrics.json")
    assert time_left(study_runs(config, stages)) == "about 2.0 h"  # 52 s + 3 x 20 x 120 s
    assert time_left([run for run in study_runs(config, stages) if run.done]) == "about 0 s"
    assert [duration(s) for s in (0.4, 99, 100, 5999, 6000)] == ["0 s", "99 s", "2 min", "100 min", "1.7 h"]


def test_runs_of_a_study(tmp_path):
    """Each once and after what it needs; the studies of encoders share the guesses of the mean shape."""
    config = make(tmp_path, shots=[5], draws=[0], seeds=[0])
    finetune = config.finetune.model_copy(update={"backbones": ("ddpm", "dino", "scratch")})
    config = config.model_copy(update={"finetune": finetune})
    runs, home = study_runs(config, ("pretrain", "ssl", "finetune", "encoders")), config.experiment_dir
    assert [run.kind for run in runs] == ["pretrain", "ssl dino", MEAN_SHAPE, "ddpm", "dino densenet161", "scratch",
                                          "imagenet vgg19", "imagenet densenet161", "imagenet resnext50_32x4d"]
    assert [run.needs for run in runs] == [(), (), (), (home / "ddpm",), (home / "ssl/dino",), (), (), (), ()]
    assert [run.steps for run in runs] == [4, config.ssl.iterations, 0, *[20] * 6]
    assert study_runs(make(tmp_path, checkpoint="x.pt"), ("finetune",))[-2].needs == ()


def test_encoders_are_for_images(tmp_path):
    values = make(tmp_path).plain()
    config = parse_config({**values, "is_3d": True, "dataset": {**values["dataset"], "layout": "folder",
                                                                 "image_size": [16] * 3, "phantom": None}}, "tiny")
    with pytest.raises(UserError, match='backbone "imagenet" is a 2D baseline; with is_3d choose'):
        prepare(config, ("encoders",))


def test_cells_of_another_checkpoint(tmp_path):
    """A longer pre-training does not go unnoticed where cells started from its last checkpoint."""
    before, after = make(tmp_path), make(tmp_path, ddpm={"iterations": 6, "checkpoint_iterations": [2, 6]})
    for backbone in ("ddpm", "scratch"):
        cell = Cell(backbone, 1, 0, 0)
        write_run_config(cell_dir(before, cell), before.plain(), {})
        check_cell(before, cell)
    check_cell(after, Cell("scratch", 1, 0, 0))
    with pytest.raises(UserError, match=r"was made with ddpm.checkpoint_iterations = \[2, 4\], now it is \[2, 6\]"):
        check_cell(after, Cell("ddpm", 1, 0, 0))
