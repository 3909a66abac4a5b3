"""GU2Net and global-to-local localisation as backbones of a study: trained, scored, shown, predicted, continued."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from core.config.load import load_config
from core.networks.gu2net import GU2Net
from core.networks.weights import read_tensors
from core.runs.places import Cell
from core.training.loop import Training
from landmarks_finetuning.inference import trained_detector
from landmarks_finetuning.train import finetune_cell
from study.run import run_study
from tests.conftest import error_of

LAUNCH, PREDICT, EVALUATE = "study.launch", "landmarks_finetuning.predict", "landmarks_finetuning.evaluate"
SMALL = {"patch": 16, "channels": 4, "local": {"iterations": 4, "window": 8, "zoom": 2.0, "channels": 4,
                                               "batch_size": 2}}
BACKBONES = ("gu2net", "global_to_local")


@pytest.fixture(scope="module")
def study(make_values, tmp_path_factory):
    """A launched study of both: (config file, {backbone: run folder}). Not to be changed."""
    folder = tmp_path_factory.mktemp("earlier")
    path = folder / "study.json"
    path.write_text(json.dumps(make_values(folder / "runs", finetune={
        "backbones": list(BACKBONES), "iterations": 2, "global_to_local": SMALL})))
    run_study(load_config(path), ("finetune",))
    return path, {name: next(folder.glob(f"runs/tiny/landmarks/{name}/*/shots002_draw0_seed0")) for name in BACKBONES}


def test_both_are_scored_like_every_other(study, run_main):
    path, runs = study
    for backbone, run_dir in runs.items():
        metrics = json.loads((run_dir / "metrics.json").read_text())
        assert metrics["backbone"] == backbone and np.isfinite(metrics["physical"]["mre"])
        assert metrics["paper"] is not None and np.isfinite(metrics["validation_mre"])
        table = pd.read_csv(run_dir / "predictions.csv")
        assert np.isfinite(table[["x", "y", "error"]]).all(axis=None)
        assert len(list((run_dir / "overlays").glob("*.png"))) == 2 and not list(run_dir.rglob("last.pt"))
    votes = runs["global_to_local"]
    assert not (votes / "heatmaps.npz").exists() and (runs["gu2net"] / "heatmaps.npz").is_file()
    assert pd.read_csv(votes / "predictions.csv")["expected_error"].isna().all()
    assert json.loads((votes / "metrics.json").read_text())["decoder"] is None
    status, out, _ = run_main(LAUNCH, "--config", path, "--stages", "finetune")
    assert status == 0 and "0 left" in out


def test_the_second_step_lies_below_the_first(study):
    _, runs = study
    tensors, header = read_tensors(runs["global_to_local"] / "fine/best.safetensors")
    assert header["kind"] == "second stage" and header["network"] == "local_networks" and header["spread_pixels"] > 0
    assert tensors["features.0.weight"].shape == (19 * 4, 1, 3, 3)
    assert not (runs["gu2net"] / "fine").exists()


def test_the_report_names_both(study, run_main):
    path, _ = study
    home = path.parent / "runs/tiny"
    status, _, error = run_main("landmarks_finetuning.report.__main__", home)
    assert status == 0, error
    page = (home / "report/index.html").read_text()
    assert "GU2Net" in page and "Global-to-local" in page


@pytest.mark.parametrize("backbone", BACKBONES)
def test_new_images_and_other_scores(study, backbone, phantom, tmp_path, run_main):
    _, runs = study
    image = next(iter(sorted(phantom.rglob("*.jpg"))))
    status, _, error = run_main(PREDICT, runs[backbone], image, "--out", tmp_path / "a")
    assert status == 0, error
    assert len(pd.read_csv(tmp_path / "a/predictions.csv")) == 19 and list((tmp_path / "a/overlays").glob("*.png"))
    status, _, error = run_main(EVALUATE, runs[backbone], "--decoder", "argmax", "--out", tmp_path / "b")
    heatmaps = backbone == "gu2net"
    assert status == (0 if heatmaps else 2)
    assert heatmaps or 'backbone "global_to_local" has no heatmaps' in error
    status, _, error = run_main(EVALUATE, runs[backbone], "--decoder", "contour_centroid", "--out", tmp_path / "c")
    assert status == 2 and error.count("\n") == 1


class Stopped(Exception):
    """In place of a killed process."""


@pytest.mark.parametrize("backbone, seen", [("gu2net", 3), ("global_to_local", 3), ("global_to_local", 7)])
def test_continued_runs_are_like_uninterrupted_ones(make_config, tmp_path, monkeypatch, backbone, seen):
    """Killed at the `seen`-th step, of the first stage's four and the second's four; states are saved every second."""
    cell, released = Cell(backbone, 2, 0, 0), {"preset": "released"}
    changes = {"backbones": [backbone], "gu2net": {}, "global_to_local": SMALL}
    changes[backbone] = {**changes[backbone], **released}
    if backbone != "global_to_local":
        del changes["global_to_local"]
    else:
        changes["global_to_local"]["local"] = {**SMALL["local"], "cycle_iterations": 3}
    whole = finetune_cell(make_config(tmp_path / "whole", finetune=changes), cell)
    step, steps = Training.optimiser_step, []

    def struck(training):
        steps.append(None)
        if len(steps) == seen:
            raise Stopped
        return step(training)

    config = make_config(tmp_path / "parts", finetune=changes)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "optimiser_step", struck)
        with pytest.raises(Stopped):
            finetune_cell(config, cell)
    parts = finetune_cell(config, cell)
    for path in whole.rglob("best.safetensors"):
        expected, found = (read_tensors(each)[0] for each in (path, parts / path.relative_to(whole)))
        assert all((expected[name] == found[name]).all() for name in expected), path
    assert trained_detector(parts).recipe.finetune.batch_size == 4


def test_settings_of_another_start_are_refused(make_values, tmp_path, config_file):
    both = {"global_to_local": {"presence_weight": 8.0}, "backbones": ["scratch"]}
    assert "finetune.global_to_local.presence_weight 8.0 acts for" in error_of(
        load_config, config_file("a.json", finetune=both))
    tuned = {"backbones": ["gu2net"], "gu2net": {"cycle_iterations": 100}}
    assert 'finetune.gu2net.preset is "tuned" and acts only with "released"' in error_of(
        load_config, config_file("b.json", finetune=tuned))
    alone = {"backbones": ["global_to_local"], "sigma": 2.5, "decoder": "argmax"}
    assert 'finetune.decoder "argmax" acts for' in error_of(load_config, config_file("c.json", finetune=alone))


# --- several networks, rounds


@pytest.mark.parametrize("backbone", BACKBONES)
def test_runs_of_a_kind_are_averaged(study, backbone, run_main, tmp_path):
    """With itself a run answers as alone; with another kind, or another grid, it is refused in one line."""
    _, runs = study
    run_dir = runs[backbone]
    status, _, error = run_main(EVALUATE, run_dir, "--with", run_dir, "--out", tmp_path / "twice")
    assert status == 0, error
    places = [pd.read_csv(folder / "predictions.csv")[["x", "y"]] for folder in (run_dir, tmp_path / "twice")]
    np.testing.assert_allclose(*places, atol=1e-3)
    assert json.loads((tmp_path / "twice/metrics.json").read_text())["averaged_with"] == [str(run_dir)]
    other = runs[BACKBONES[1 - BACKBONES.index(backbone)]]
    status, _, error = run_main(EVALUATE, run_dir, "--with", other, "--out", tmp_path / "mixed")
    assert status == 2 and error.count("\n") == 1 and f'has other outputs than "{backbone}"' in error


def test_outputs_of_other_grids_are_not_averaged(study, make_config, tmp_path, run_main):
    _, runs = study
    settings = {"backbones": ["global_to_local"], "iterations": 2}
    found = []
    for name, own in (("patch", {**SMALL, "patch": 8}), ("local", {**SMALL, "local": {**SMALL["local"], "zoom": 3.0}}),
                      ("alone", {**SMALL, "local": {"iterations": 0}})):
        config = make_config(tmp_path / name, finetune={**settings, "global_to_local": own})
        other = finetune_cell(config, Cell("global_to_local", 2, 0, 0))
        status, _, error = run_main(EVALUATE, runs["global_to_local"], "--with", other, "--out", tmp_path / "out")
        assert status == 2 and error.count("\n") == 1
        found.append(error)
    assert "patch is 8 there and 16 here" in found[0]
    assert 'images of the second stage is {"image_size": [8, 8], "canvas_size": [144, 144]' in found[1]
    assert "images of the second stage is null there" in found[2]


def test_presets_of_other_heatmaps_are_not_averaged(study, make_config, tmp_path, run_main):
    config = make_config(tmp_path, finetune={"backbones": ["gu2net"], "iterations": 2, "gu2net": {
        "preset": "released"}})
    other = finetune_cell(config, Cell("gu2net", 2, 0, 0))
    status, _, error = run_main(EVALUATE, study[1]["gu2net"], "--with", other, "--out", tmp_path / "out")
    assert status == 2 and "finetune.sigma is 16.0 there and 20.0 here" in error


def test_the_released_preset_is_scored_by_its_own_scorer_as_well(make_config, tmp_path, run_main):
    """Of images in its shape; where the pixels are not square one line says that it is left out."""
    own = {"backbones": ["gu2net"], "iterations": 2, "gu2net": {"preset": "released"}}
    for size, known in (((96, 78), True), ((48, 48), False)):
        config = make_config(tmp_path / str(size[0]), dataset={"image_size": list(size)}, finetune=own,
                             unet={"channel_multipliers": [1]})
        run_dir = finetune_cell(config, Cell("gu2net", 2, 0, 0))
        status, out, error = run_main(EVALUATE, run_dir)
        assert status == 0, error
        metrics = json.loads((run_dir / "metrics.json").read_text())
        assert (metrics["release"] is not None) == known == (metrics["release_left_out"] is None)
        assert ("by its release's own scorer: mean error" if known else "own scorer is left out: it takes pix") in out
        if known:  # both are rounded to pixels of 2.5 mm: two roundings of half a pixel's diagonal at most
            assert abs(metrics["release"]["mre"] - metrics["physical"]["mre"]) < 2.5 * 2**0.5


@pytest.mark.parametrize("backbone", BACKBONES)
def test_rounds_of_self_training(make_config, tmp_path, backbone):
    """The second round learns from the answers of the first, in both steps where there are two."""
    settings = {"backbones": [backbone], "iterations": 2, "self_training": {"rounds": 1, "images": 3}}
    if backbone == "global_to_local":
        settings["global_to_local"] = SMALL
    run_dir = finetune_cell(make_config(tmp_path, finetune=settings), Cell(backbone, 2, 0, 0))
    figures = json.loads((run_dir / "pseudo_labels.json").read_text())
    assert figures["images"] == 3 and figures["landmarks"] == 3 * 19 and 0 < figures["certainty"] < 1
    last = trained_detector(run_dir)
    assert last.path.parent == run_dir / "round1"
    assert (last.second is None) == (backbone == "gu2net")


# --- several data sets at once


@pytest.fixture
def other_study(config_file):
    """Another study's config: the same landmarks on larger images."""
    return config_file("other.json", dataset={"image_size": [64, 48]})


def test_several_data_sets_train_one_network(make_config, other_study, tmp_path):
    """The other one's kernels and norms move as well; the weights answer for the run's own."""
    config = make_config(tmp_path, finetune={"backbones": ["gu2net"], "gu2net": {"together": [str(other_study)]}})
    run_dir = finetune_cell(config, Cell("gu2net", 2, 0, 0))
    assert "_with-other-" in run_dir.parent.name
    tensors, header = read_tensors(run_dir / "best.safetensors")
    assert header["landmarks"] == [19, 19] and header["data_set"] == 0
    for number in (0, 1):  # each data set's norms have seen its images
        assert tensors[f"local_branch.down.0.first.norms.{number}.running_mean"].abs().min() > 0
    groups = json.loads((run_dir / "inputs.json").read_text())["images"]
    assert len(groups["together 1"]) == 2 and groups["together 1"] != groups["validation"]
    assert trained_detector(run_dir).model.out_channels == 19


def test_losses_of_data_sets_are_added(make_config, other_study, tmp_path):
    """As by hand, each with the network set to its data set; without another one it is the own loss."""
    from core.data.dataset import load_images
    from core.data.source import load_source
    from landmarks_finetuning.detectors.gu2net import gu2net_loss
    from landmarks_finetuning.detectors.registry import DETECTORS
    from landmarks_finetuning.joint_training import JointRegression
    from landmarks_finetuning.regression import WeightedImages

    config = make_config(tmp_path, finetune={"backbones": ["gu2net"], "gu2net": {"together": [str(other_study)]}})
    images = load_images(load_source(config.dataset).require("train")[:2], config.dataset)
    header = {"backbone": "gu2net", "shots": 2, "draw": 0, "shape": None}
    task = JointRegression(config, tmp_path, header, WeightedImages(images, np.arange(2)), None, DETECTORS["gu2net"])
    torch.manual_seed(0)
    model = GU2Net(2, 1, (19, 19)).eval()
    drawn = task.draw(np.arange(2), torch.Generator().manual_seed(0))
    assert [tuple(each.shape) for each in drawn] == [(2, 1, 64, 48), (2, 19, 2), (2, 1, 48, 48), (2, 19, 2)]
    with torch.no_grad():
        total = task.loss_of(model, *drawn)
        assert model.data_set == 0
        own = gu2net_loss(model(drawn[2]), drawn[3], task.config)
        model.data_set = 1
        other = gu2net_loss(model(drawn[0]), drawn[1], load_config(other_study))
    assert total.item() == pytest.approx((own + other).item(), rel=1e-5)


def test_other_dimensions_are_refused(make_config, config_file, tmp_path):
    deep = config_file("deep.json", is_3d=True, dataset={"layout": "folder", "image_size": [16, 16, 16],
                                                         "spacing_mm": None})
    config = make_config(tmp_path, finetune={"backbones": ["gu2net"], "gu2net": {"together": [str(deep)]}})
    assert "is_3d is true there, and false here" in error_of(finetune_cell, config, Cell("gu2net", 2, 0, 0))
