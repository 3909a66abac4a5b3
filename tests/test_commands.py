"""The commands as people run them: bad input ends in one line and exit 2, good input in the files it promises."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes

from core.config.load import load_config
from core.networks.weights import load_weights
from core.runs.best import point_to_best
from core.runs.places import Cell, cell_dir
from landmarks_finetuning.pictures.heatmap_files import read_heatmaps
from study.run import run_study
from tests.conftest import PROJECT, unsealed_header

LAUNCH, PRETRAINING, SAMPLING = "study.launch", "ddpm_pretraining.train", "ddpm_pretraining.sample"
FINETUNING, EVALUATING, PREDICTING = (f"landmarks_finetuning.{name}" for name in ("train", "evaluate", "predict"))
STAGES = ("--stages", "pretrain", "finetune")
PUBLISHED = PROJECT / "tests/fixtures/official_ddpm_base8/ema_model_epoch800_step6000.pt"
CELL = ("--backbone", "scratch", "--shots", "2")


def snapshot(folder):
    """Content of every file below `folder`, and when it was written."""
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))
            if path.is_file()}


def copy_data(phantom, folder):
    """The phantom data set under another roof, to be damaged."""
    return shutil.copytree(phantom, folder / "data")


@pytest.fixture
def earlier_run(make_config, tmp_path):
    """Files that an earlier run left where the next one would write."""
    config = make_config(tmp_path / "runs")
    for folder in (config.experiment_dir / "ddpm", cell_dir(config, Cell("scratch", 2, 0, 0))):
        folder.mkdir(parents=True)
        for name in ("last.pt", "metrics.json", "metrics.jsonl", "best.safetensors", "ema_iter000003.safetensors"):
            (folder / name).write_text(f"{folder} {name}")
    return tmp_path / "runs"


@pytest.fixture
def refused(run_main, earlier_run):
    """refused(message, module, *arguments): exit 2, one matching line on stderr, an earlier run's files as before."""

    def check(message, module, *arguments):
        before = snapshot(earlier_run)
        status, _, error = run_main(module, *arguments)
        assert status == 2, error
        assert re.fullmatch(r"error: [^\r\n]+\n", error), error
        assert re.search(message, error), error
        after = snapshot(earlier_run)
        assert {name: after.get(name) for name in before} == before

    return check


# --- bad input ---


def test_missing_data_folder(config_file, refused, tmp_path):
    path = config_file(dataset={"root": str(tmp_path / "nowhere")})
    for arguments in ((LAUNCH,), (LAUNCH, "--dry-run"), (PRETRAINING,), (FINETUNING, *CELL)):
        refused(f"no cephalo data set at {tmp_path / 'nowhere'}: jpg is missing", *arguments, "--config", path)


def test_through_a_real_process(config_file, tmp_path):
    """The same as a process of its own: status 2, nothing on stdout, one line and no traceback on stderr."""
    path = config_file(dataset={"root": str(tmp_path / "nowhere")})
    done = subprocess.run([sys.executable, "-m", LAUNCH, "--config", str(path)], cwd=PROJECT, capture_output=True,
                          text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: no cephalo data set at \S+/nowhere: [^\n]+\n", done.stderr)


@pytest.mark.parametrize("arguments, message", [
    ((LAUNCH, "--stages", "pretrian"), r"argument --stages: invalid choice: 'pretrian' \(choose from .*report"),
    ((FINETUNING, "--shots", "ten"), r"argument --shots: invalid int value: 'ten'"),
    ((FINETUNING,), r"the following arguments are required: --backbone, --shots")])
def test_wrong_options(refused, arguments, message):
    refused(f"{message}.*; see .* --help", *arguments)


def test_image_without_its_label(config_file, refused, phantom, tmp_path):
    data = copy_data(phantom, tmp_path)
    (data / "400_senior/007.txt").unlink()
    for module in (LAUNCH, PRETRAINING):
        refused(r"image \S+007.jpg has no label file \S+400_senior/007.txt", module, "--config",
                config_file(dataset={"root": str(data)}))


def test_empty_test_split(config_file, refused, phantom, tmp_path):
    data = copy_data(phantom, tmp_path)
    for image in sorted((data / "jpg").iterdir())[150:]:
        image.unlink()
    refused(f"test split of cephalo at {data} is empty: .* 130 train, 20 validation, 0 test", LAUNCH, "--config",
            config_file(dataset={"root": str(data)}))


def test_label_file_with_a_point_missing(config_file, refused, phantom, tmp_path):
    data = copy_data(phantom, tmp_path)
    label = data / "400_junior/003.txt"
    label.write_text("".join(label.read_text().splitlines(keepends=True)[:18]))
    refused(r"400_junior/003.txt.*18.*19|400_junior/003.txt.*19.*18", LAUNCH, "--config",
            config_file(dataset={"root": str(data)}))


@pytest.mark.parametrize("remains, reason", [(0.6, "may be cut off or damaged"), (0, r"is empty \(0 bytes\)")])
def test_damaged_image(config_file, refused, phantom, tmp_path, remains, reason):
    data = copy_data(phantom, tmp_path)
    image = data / "jpg/140.jpg"
    content = image.read_bytes()
    image.write_bytes(content[: int(len(content) * remains)])
    for experiment, module in (("tiny2", PRETRAINING), ("tiny3", FINETUNING)):
        path = config_file(dataset={"root": str(data)}, experiment={"name": experiment})
        refused(f"image {image} .*{reason}", module, "--config", path, *(CELL if module == FINETUNING else ()))
    assert not (tmp_path / "runs/tiny2/ddpm/last.pt").exists()


def folder_data(root, pixels=None):
    """Eight 20 x 20 float images in the folder layout; the first is `pixels`."""
    (root / "images").mkdir(parents=True)
    names = [f"f{index}" for index in range(8)]
    for index, name in enumerate(names):
        content = np.random.default_rng(index).random((20, 20), dtype=np.float32)
        Image.fromarray(pixels if pixels is not None and index == 0 else content).save(root / f"images/{name}.tif")
    rows = [f"{name},{index + 2},{index + 3},9,{index}" for index, name in enumerate(names)]
    (root / "landmarks.csv").write_text("\n".join(["image,tip_x,tip_y,base_x,base_y", *rows]))
    splits = {"train": names[:4], "validation": names[4:6], "test": names[6:]}
    (root / "dataset.json").write_text(json.dumps({"landmarks": ["tip", "base"], "splits": splits}))
    return {"layout": "folder", "root": str(root), "spacing_mm": None}


def test_pixel_that_is_no_number(config_file, refused, tmp_path):
    pixels = np.ones((20, 20), np.float32)
    pixels[3, 5] = np.nan
    path = config_file(dataset=folder_data(tmp_path / "mine", pixels), experiment={"name": "fresh"})
    refused(r"images/f0.tif has 1 non-finite pixels, first at \(y, x\)=\(3, 5\)", PRETRAINING, "--config", path)


def test_two_images_of_one_id(config_file, refused, tmp_path):
    dataset = folder_data(tmp_path / "mine")
    Image.new("L", (20, 20)).save(tmp_path / "mine/images/f1.png")
    refused(r'two images have the id "f1": \S+f1.png and \S+f1.tif', LAUNCH, "--config", config_file(dataset=dataset))


def test_unknown_key(config_file, refused):
    refused(r'tiny.json: unknown key ddpm.iteratoins \(did you mean "iterations"\?\)', PRETRAINING, "--config",
            config_file(ddpm={"iteratoins": 5}))
    refused(r'unknown key finetune.shot \(did you mean "shots"\?\)', LAUNCH, "--config", config_file(), "--set",
            "finetune.shot=[1]")


def test_wrong_values(config_file, refused, tmp_path):
    path = config_file()
    refused("ddpm.iterations", PRETRAINING, "--config", path, "--set", "ddpm.iterations=many")
    refused("dataset.image_size .*multiples of 2; nearest to 15: 14 or 16", LAUNCH, "--config", path, "--set",
            "dataset.image_size=[15,16]")
    refused('experiment.device "tpu" is not supported', PRETRAINING, "--config",
            config_file(experiment={"device": "tpu", "name": "fresh"}))
    refused(f"config file {tmp_path / 'no.json'} does not exist", LAUNCH, "--config", tmp_path / "no.json")


def test_more_shots_than_labels(config_file, refused):
    message = "finetune.shots 131 is above the training split's 130 labelled images"
    refused(message, LAUNCH, "--config", config_file(finetune={"shots": [2, 131]}))
    refused(message, FINETUNING, "--config", config_file(), "--backbone", "scratch", "--shots", 131)


def test_shots_that_leave_nothing_to_train_on(config_file, refused):
    path = config_file(finetune={"validation": 2, "shots": [5]})
    message = r"--shots 2 .*at least 3 shots are needed \(finetune.validation is 2\)"
    refused(message, FINETUNING, "--config", path, *CELL)
    path = config_file()
    refused("at least 1 shots are needed .* draws count from 0", FINETUNING, "--config", path, "--backbone", "scratch",
            "--shots", 0)
    refused("--draw -1: draws count from 0", FINETUNING, "--config", path, "--backbone", "scratch", "--shots", 2,
            "--draw", -1)
    refused("--seed -1: seeds count from 0", FINETUNING, "--config", path, *CELL, "--seed", -1)


def test_unknown_backbone(config_file, refused):
    refused('backbone "resnet" is unknown; choose from ddpm, scratch, imagenet, random', FINETUNING, "--config",
            config_file(), "--backbone", "resnet", "--shots", 2)


def test_checkpoint_of_another_width(config_file, refused, tiny_study):
    weights = tiny_study.parent / "runs/tiny/ddpm/ema_iter000006.safetensors"
    path = config_file(unet={"base_channels": 16}, finetune={"checkpoint": str(weights)})
    refused(f"{weights} holds a network with base_channels 8, the config asks unet.base_channels 16", FINETUNING,
            "--config", path, "--backbone", "ddpm", "--shots", 2)


def test_missing_weights(config_file, refused, tmp_path, phantom):
    refused("ddpm/ema_iter000006.safetensors does not exist", FINETUNING, "--config", config_file(), "--backbone",
            "ddpm", "--shots", 2)
    refused("ema_iter000005.safetensors does not exist", SAMPLING, "--config", config_file(), "--iteration", 5)
    refused(f"run folder {tmp_path / 'gone'} does not exist", EVALUATING, tmp_path / "gone")
    refused("gone/best.safetensors does not exist", PREDICTING, tmp_path / "gone", phantom / "jpg", "--out",
            tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_to_predict(refused, tiny_cell, tmp_path):
    (tmp_path / "empty").mkdir()
    for images, message in (("empty", f"no image in {tmp_path / 'empty'}; supported: .bmp"),
                            ("gone", f"{tmp_path / 'gone'} does not exist")):
        refused(message, PREDICTING, tiny_cell, tmp_path / images, "--out", tmp_path / "out")


# --- the launcher ---


def test_dry_run(config_file, run_main, tmp_path):
    path = config_file(finetune={"shots": [2, 5], "draws": [0, 1]})
    status, out, error = run_main(LAUNCH, "--config", path, *STAGES, "--dry-run")
    assert (status, error) == (0, "") and not (tmp_path / "runs").exists()
    for text in ("130 train, 20 validation, 4 test; 19 landmarks; 150 images for pre-training",
                 "pretrain  6 steps; checkpoints found: none", "finetune  12 runs, 0 done, 12 left (32 steps at most)",
                 "optimiser steps to come: 38", "landmarks/mean_shape/default/shots005_draw1_seed0",
                 str(cell_dir(load_config(path), Cell("scratch", 2, 0, 0)))):
        assert text in out
    _, out, _ = run_main(LAUNCH, "--config", path, *STAGES, "--shots", 2, "--seeds", 3, 4, "--dry-run")
    assert "finetune  10 runs" in out and "shots002_draw1_seed4" in out and "shots005" not in out


def test_finished_study_is_not_done_again(tiny_study, run_main):
    before = snapshot(tiny_study.parent)
    assert sum(name.endswith("metrics.json") for name in before) == 2
    status, out, _ = run_main(LAUNCH, "--config", tiny_study, *STAGES)
    assert status == 0 and snapshot(tiny_study.parent) == before
    assert "pretrain  done" in out and "2 runs, 2 done, 0 left (0 steps" in out and "steps to come: 0" in out


@pytest.mark.parametrize("key, new", [
    ("ddpm.learning_rate", "0.5"), ("unet.norm_groups", "2"), ("dataset.spacing_mm", "1.5"), ("experiment.seed", "1"),
    ("finetune.weight_decay", "0.5"), ("finetune.augmentation.scale", "0.5"), ("evaluation.split", '"validation"'),
])  # fmt: skip
def test_changed_key_of_a_finished_study_is_refused(tiny_study, run_main, key, new):
    before, old = snapshot(tiny_study.parent), json.loads(load_config(tiny_study).model_dump_json())
    for part in key.split("."):
        old = old[part]
    old = json.dumps(old)
    commands = [(LAUNCH, *STAGES), (LAUNCH, *STAGES, "--dry-run")]
    commands += [] if key.startswith("ddpm") else [(FINETUNING, "--backbone", "ddpm", "--shots", 2)]
    for module, *more in commands:
        status, out, error = run_main(module, "--config", tiny_study, "--set", f"{key}={new}", *more)
        assert (status, out) == (2, "") and f"was made with {key} = {old}, now it is {new}" in error
    assert snapshot(tiny_study.parent) == before


@pytest.mark.parametrize("change", [
    "ddpm.log_every=1", "finetune.save_every=9", "evaluation.overlays=0", "dataset.cache_dir=elsewhere",
    'finetune.learning_rate={"ddpm": 1e-4, "scratch": 0.5}',
])  # fmt: skip
def test_key_that_changes_no_result_is_free(tiny_study, run_main, change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where "elsewhere" is made
    status, out, _ = run_main(LAUNCH, "--config", tiny_study, *STAGES, "--set", change, "--dry-run")
    assert status == 0 and "optimiser steps to come: 0" in out


def test_key_of_another_backbone_is_free(config_file, run_main):
    """A second variant of the pre-trained start shares the scratch runs of the first."""
    alone = ("--stages", "finetune", "--set", 'finetune.backbones=["scratch"]')
    assert run_main(LAUNCH, "--config", config_file(finetune={"iterations": 1}), *alone)[0] == 0
    for change in ({"timestep": 3}, {"pretraining_iteration": 3}, {"learning_rate": {"ddpm": 0.5, "scratch": 1e-4}}):
        path = config_file("other.json", finetune={"iterations": 1, **change})
        status, out, _ = run_main(LAUNCH, "--config", path, *alone, "--dry-run")
        assert status == 0 and "2 runs, 2 done" in out


@pytest.mark.parametrize("module", [LAUNCH, PRETRAINING, SAMPLING, FINETUNING, EVALUATING, PREDICTING,
                                    "landmarks_finetuning.report.__main__", "core.data.make_pack",
                                    "study.review.__main__"])
def test_help(run_main, module):
    status, out, error = run_main(module, "--help")
    assert (status, error) == (0, "") and re.search(r"example: (python -m|\./launch_experiments\.sh) ", out)


# --- what the commands leave ---


def test_evaluate(tiny_cell, run_main, tmp_path, phantom):
    """metrics.json follows from predictions.csv, which follows from the label files; a second call changes nothing."""
    run_dir = shutil.copytree(tiny_cell, tmp_path / "cell")
    for name in ("predictions.csv", "metrics.json"):
        (run_dir / name).unlink()
    status, out, _ = run_main(EVALUATING, run_dir)
    table = pd.read_csv(run_dir / "predictions.csv", dtype={"image": str})
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert status == 0 and "4 test images: mean error" in out and len(table) == 4 * 19
    assert table["image"].unique().tolist() == ["151", "152", "153", "154"]
    lines = (phantom / "400_junior/152.txt").read_text().split()
    truth = np.array([line.split(",") for line in lines], dtype=float)
    assert np.allclose(table.query("image == '152'")[["truth_x", "truth_y"]], truth, atol=1e-4)
    errors = np.hypot(table["x"] - table["truth_x"], table["y"] - table["truth_y"]) * 2.5
    assert np.allclose(table["error"], errors, atol=1e-3)
    physical = metrics["physical"]
    assert physical["mre"] == pytest.approx(errors.mean(), abs=1e-3)
    assert physical["median"] == pytest.approx(errors.median(), abs=1e-3)
    for threshold in (2, 2.5, 3, 4):
        assert physical["sdr"][f"{threshold:g}"] == pytest.approx(100 * (errors <= threshold).mean())
    assert metrics["paper"]["mre"] == pytest.approx(table["paper_error"].mean(), abs=1e-3)
    assert (metrics["unit"], metrics["split"], metrics["backbone"], metrics["shots"]) == ("mm", "test", "ddpm", 2)
    assert len(metrics["training_images"]) == 2 and not {"151", "152"} & set(metrics["training_images"])
    worst = table.groupby("image")["error"].mean().sort_values(ascending=False).index[:2]
    assert sorted(p.name for p in (run_dir / "overlays").iterdir()) == [f"rank00{i + 1}_{worst[i]}.png" for i in (0, 1)]
    examples = read_heatmaps(run_dir / "heatmaps.npz")
    assert list(examples) == ["151", "153"]  # the first and the middle one, drawn at 400 / 300 of the stored rows
    truth = np.array([line.split(",") for line in (phantom / "400_junior/153.txt").read_text().split()], dtype=float)
    height, width = Image.open(phantom / "jpg/153.jpg").size[::-1]
    scale = np.array(examples["153"].picture.shape) / (height, width)
    assert np.allclose(examples["153"].truth, (truth[:, ::-1] + 0.5) * scale - 0.5, atol=0.6)
    for name in ("predictions.csv", "metrics.json"):
        assert (run_dir / name).read_bytes() == (tiny_cell / name).read_bytes()
    status, _, _ = run_main(EVALUATING, run_dir, "--decoder", "argmax", "--set", "evaluation.split=validation")
    other = run_dir / "evaluations/split-validation_decoder-argmax"  # the study's own result stays
    metrics = json.loads((other / "metrics.json").read_text())
    assert (status, metrics["split"], metrics["decoder"], metrics["images"]) == (0, "validation", "argmax", 20)
    assert (run_dir / "metrics.json").read_bytes() == (tiny_cell / "metrics.json").read_bytes()


@pytest.mark.parametrize("setting, message", [
    ("experiment.device=cuda:77", 'experiment.device "cuda:77": .* visible; choose auto or cpu'),
    ("finetune.iterations=3", "--set finetune.iterations=3: finetune.iterations has no effect on a trained detector; "
                              "the keys that have one are dataset., evaluation., .*finetune.decoder"),
    ('unet={"base_channels":8}', "unet.base_channels has no effect on a trained detector"),
    ("evaluation.window_overlap=0.1", "evaluation.window_overlap 0.1 has no effect: .* are null"),
    ("dataset.image_size=[64,64]", r"--set dataset.image_size: .*best.safetensors was trained with \[\d+, \d+\]"),
    ("dataset.canvas_size=[512,512]", "--set dataset.canvas_size: .*best.safetensors was trained with null"),
])  # fmt: skip
def test_overrides_of_a_trained_detector_act_or_are_refused(tiny_cell, refused, phantom, tmp_path, setting, message):
    refused(message, EVALUATING, tiny_cell, "--set", setting)
    refused(message, PREDICTING, tiny_cell, phantom / "jpg/151.jpg", "--out", tmp_path / "out", "--set", setting)


def test_mean_shape_cell(tiny_study):
    metrics = json.loads(next(tiny_study.parent.glob("runs/tiny/landmarks/mean_shape/*/*/metrics.json")).read_text())
    trained = json.loads(next(tiny_study.parent.glob("runs/tiny/landmarks/ddpm/*/*/metrics.json")).read_text())
    assert metrics["training_images"] == trained["training_images"] and metrics["physical"]["mre"] > 0


def test_predict(tiny_cell, run_main, tmp_path, phantom):
    """A folder of files of two sizes: the same points as in evaluation, in the pixels of each file."""
    images = tmp_path / "new images"
    (images / "more").mkdir(parents=True)
    shutil.copy(phantom / "jpg/151.jpg", images / "one.jpg")
    Image.open(phantom / "jpg/152.jpg").resize((156, 192), Image.Resampling.NEAREST).save(images / "more/two.png")
    status, out, _ = run_main(PREDICTING, tiny_cell, images, "--out", tmp_path / "out")
    table = pd.read_csv(tmp_path / "out/predictions.csv")
    assert status == 0 and str(tmp_path / "out/predictions.csv") in out
    assert table.groupby("image").size().to_dict() == {"more/two.png": 19, "one.jpg": 19}
    scored = pd.read_csv(tiny_cell / "predictions.csv", dtype={"image": str})
    one, two = (scored.query(f"image == '{name}'")[["x", "y"]].to_numpy() for name in ("151", "152"))
    assert np.allclose(table.query("image == 'one.jpg'")[["x", "y"]], one, atol=1e-3)
    doubled = table.query("image == 'more/two.png'")[["x", "y"]].to_numpy()
    assert np.median(np.abs(doubled - ((two + 0.5) * 2 - 0.5))) < 4  # the same place, found in twice as many pixels
    assert "truth_x" not in table
    for figure in ("expected_error", "radius90"):  # calibrated as in evaluation, in mm by dataset.spacing_mm
        in_mm = scored.query("image == '151'")[figure]
        assert np.allclose(table.query("image == 'one.jpg'")[figure], in_mm, atol=0.01)
    pictures = tmp_path / "out/overlays"
    overlays = sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("*.png"))
    assert overlays == ["more/two.png", "one.png"]
    status, _, _ = run_main(PREDICTING, tiny_cell, images / "one.jpg", "--out", tmp_path / "bare", "--no-overlays")
    assert status == 0 and [path.name for path in (tmp_path / "bare").iterdir()] == ["predictions.csv"]


def test_answers_are_computed_by_the_threads_that_are_fastest(tiny_cell, run_main, tmp_path, phantom, monkeypatch):
    """As in training: beside a busy process two threads may take ten times as long as one."""
    asked = []
    for module in ("predict", "evaluate"):
        monkeypatch.setattr(f"landmarks_finetuning.{module}.use_threads", lambda module=module: asked.append(module))
    assert run_main(PREDICTING, tiny_cell, phantom / "jpg/151.jpg", "--out", tmp_path / "out")[0] == 0
    assert run_main(EVALUATING, tiny_cell, "--out", tmp_path / "scored")[0] == 0
    assert asked == ["predict", "evaluate"]


def test_predict_without_the_data_set(tiny_cell, run_main, tmp_path, phantom):
    """The run folder alone is enough: its config.json and the training data may be gone."""
    run_dir = tmp_path / "moved"
    run_dir.mkdir()
    shutil.copy(tiny_cell / "best.safetensors", run_dir)
    status, _, error = run_main(PREDICTING, run_dir, phantom / "jpg/151.jpg", "--out", tmp_path / "out")
    assert status == 0, error


def test_an_experiment_stands_for_its_best_run(tiny_cell, phantom, run_main, tmp_path):
    """Its folder and its link give what the run itself gives; without a best run one line says so."""
    image = phantom / "jpg/151.jpg"
    (tmp_path / "study/landmarks").mkdir(parents=True)
    status, _, error = run_main(PREDICTING, tmp_path / "study", image, "--out", tmp_path / "none")
    assert status == 2 and re.fullmatch("error: .*study has no best run: .*\n", error)
    pointer = point_to_best(tmp_path / "study", tiny_cell)
    for name, place in (("run", tiny_cell), ("study", tmp_path / "study"), ("link", pointer)):
        status, _, error = run_main(PREDICTING, place, image, "--out", tmp_path / name, "--no-overlays")
        assert status == 0, error
    tables = {(tmp_path / name / "predictions.csv").read_bytes() for name in ("run", "study", "link")}
    assert len(tables) == 1


def test_sample(tiny_study, run_main, tmp_path):
    arguments = (SAMPLING, "--config", tiny_study, "--iteration", 3, "--count", 5, "--out")
    pictures = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for picture, seed in zip(pictures, (0, 0, 1), strict=True):
        assert run_main(*arguments, picture, "--seed", seed)[0] == 0
    first, again, other = (np.asarray(Image.open(picture)) for picture in pictures)
    assert first.shape == (2 * 48, 4 * 48) and (first == again).all() and (first != other).any()
    status, _, error = run_main(SAMPLING, "--config", tiny_study, "--count", 0)
    assert status == 2 and "--count 0: must be 1 or more" in error


def test_published_weights_from_file_to_score(config_file, run_main, tmp_path):
    """A published .pt as finetune.checkpoint: no pre-training, its tensors in the detector before the first step."""
    unet = {"base_channels": 8, "channel_multipliers": [1, 2, 4, 8], "linear_attention": True, "attention_heads": 4,
            "attention_head_channels": 32}
    path = config_file(unet=unet, finetune={"backbones": ["ddpm"], "checkpoint": str(PUBLISHED), "iterations": 1,
                                            "validate_every": 1, "learning_rate": {"ddpm": 1e-6}, "ema_decay": None})
    status, out, error = run_main(LAUNCH, "--config", path, *STAGES)
    assert status == 0, error
    run_dir = next((tmp_path / "runs/tiny/landmarks/ddpm").glob("*/shots002_draw0_seed0"))
    assert "ema_model_epoch800_step6000" in run_dir.parent.name and not (tmp_path / "runs/tiny/ddpm").exists()
    assert json.loads((run_dir / "metrics.json").read_text())["images"] == 4
    before, after = load_weights(PUBLISHED), load_weights(run_dir / "best.safetensors")
    assert after.out_channels == 19 and after.header["kind"] == "detector"
    body = [name for name in before.tensors if not name.startswith("final_conv.")]
    assert len(body) > 100 and all((before.tensors[name] - after.tensors[name]).abs().max() < 1e-5 for name in body)


def test_scratch_differs_from_pretrained(config_file, run_main, tiny_study, tmp_path):
    """The detector of a study starts from the chosen iteration's weights, the scratch one does not."""
    pretrained = tiny_study.parent / "runs/tiny/ddpm/ema_iter000003.safetensors"
    path = config_file(experiment={"seed": 5}, finetune={
        "checkpoint": str(pretrained), "iterations": 1, "validate_every": 1, "ema_decay": None,
        "learning_rate": {"ddpm": 1e-6, "scratch": 1e-6}})
    held = load_weights(pretrained).tensors
    for backbone, near in (("ddpm", True), ("scratch", False)):
        assert run_main(FINETUNING, "--config", path, "--backbone", backbone, "--shots", 2)[0] == 0
        found = load_weights(next((tmp_path / f"runs/tiny/landmarks/{backbone}").glob("*/*/best.safetensors"))).tensors
        name = "downs.0.0.block1.proj.weight"
        assert bool((found[name] - held[name]).abs().max() < 1e-5) is near


def test_disks_too_small_for_the_papers_scorer(make_config, tmp_path):
    """The physical scores do not depend on it; the paper's are left out."""
    config = make_config(tmp_path, dataset={"image_size": [16, 16]}, finetune={"backbones": ["scratch"]})
    run_study(config, ("finetune",))
    for path in tmp_path.glob("tiny/landmarks/*/*/*/metrics.json"):
        metrics = json.loads(path.read_text())
        assert metrics["paper"] is None and metrics["physical"]["mre"] > 0
        assert pd.read_csv(path.with_name("predictions.csv"))["paper_error"].isna().all()


def test_study_without_validation(make_config, tmp_path):
    """A fixed schedule leaves its last weights as best.safetensors, and they are scored."""
    config = make_config(tmp_path, finetune={"backbones": ["scratch"], "validation": "none", "iterations": 3})
    run_study(config, ("finetune",))
    run_dir = next((tmp_path / "tiny/landmarks/scratch").glob("*/shots002_draw0_seed0"))
    assert load_weights(run_dir / "best.safetensors").header["iteration"] == 3
    assert json.loads((run_dir / "metrics.json").read_text())["validation_labels"] == 0


def rewritten(path, change):
    """The safetensors file `path` with another header: `change` alters the one it has."""
    with safe_open(path, framework="pt") as file:
        header = unsealed_header(file)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    change(header)
    path.write_bytes(safetensors_bytes(tensors, metadata={"header": json.dumps(header)}))


def test_weights_of_a_later_version(tiny_cell, run_main, tmp_path):
    """Keys that nobody knows today are a record; in what rebuilds the network they are refused."""
    run_dir = tmp_path / tiny_cell.name
    shutil.copytree(tiny_cell, run_dir)

    def later(header):
        header["mood"] = "new"
        header["config"] |= {"telepathy": {"range": 3}, "evaluation": header["config"]["evaluation"] | {"tta": 4}}
        header["config"]["finetune"]["augmentation"]["plasticity"] = 1.0

    rewritten(run_dir / "best.safetensors", later)
    status, out, error = run_main(EVALUATING, run_dir)
    assert status == 0, error
    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in (tiny_cell, run_dir))
    assert after["physical"] == before["physical"]
    rewritten(run_dir / "best.safetensors", lambda header: header["config"]["unet"].update(gates=True))
    status, _, error = run_main(EVALUATING, run_dir)
    assert status == 2 and "best.safetensors holds a network of a later version: it has unet.gates" in error


@pytest.mark.parametrize("option", ["--seed", "--draw"])
@pytest.mark.parametrize("number", ["-1", "99999999999999999999"])
def test_numbers_that_no_generator_takes(config_file, run_main, option, number):
    status, _, err = run_main("landmarks_finetuning.train", "--config", config_file(), "--backbone", "scratch",
                              "--shots", "2", option, number)
    assert status == 2 and err.startswith(f"error: {option} ") and err.count("\n") == 1


@pytest.mark.parametrize("which", ["last", "previous"])
def test_nothing_to_resume(config_file, run_main, tmp_path, which):
    """--resume where nothing was begun does not begin anew without a word."""
    status, _, err = run_main("landmarks_finetuning.train", "--config", config_file(), "--backbone", "scratch",
                              "--shots", "2", "--resume", which)
    assert status == 2 and f"--resume {which}: " in err and "no state to continue from" in err
    assert not list((tmp_path / "runs").rglob("best.safetensors"))


def test_a_detector_draws_no_samples(tiny_study, tiny_cell, run_main):
    status, _, err = run_main("ddpm_pretraining.sample", "--config", tiny_study, "--weights",
                              tiny_cell / "best.safetensors", "--count", "1")
    assert status == 2 and err.startswith(f"error: {tiny_cell / 'best.safetensors'} draws no images: it has 19 outputs")
