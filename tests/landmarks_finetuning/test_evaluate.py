"""Scoring of a whole run: the mean shape on images of unlike size, the paper's scorer, pictures, patients."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from core.config.load import parse_config
from core.config.starts import MEAN_SHAPE
from core.data.dataset import load_images
from core.data.source import load_source
from core.files import content_digest
from core.runs.places import Cell
from landmarks_finetuning.evaluate import evaluate_mean_shape, score
from landmarks_finetuning.pictures.cases import pictured_image
from landmarks_finetuning.predictions import Predictions
from landmarks_finetuning.report.build import build_report
from landmarks_finetuning.report.collect import error_matrix, read_experiment
from landmarks_finetuning.report.pictures import Pictures, embed_cases, worst_cases
from landmarks_finetuning.statistics import bootstrap_interval
from tests.conftest import TINY, merged

SIZES = {"a": (30, 24), "b": (44, 80), "c": (61, 36), "d": (90, 51), "e": (33, 29), "f": (47, 40)}  # height, width
CELL = Cell(MEAN_SHAPE, 2, 0, 0)


@pytest.fixture
def mean_shape(tmp_path):
    """mean_shape(points, section={...}) -> (folder, metrics.json) of the guess: trained on a and b, tested on the rest.

    `points` gives the landmarks (y, x) of an image's size, `patients` the patients of images, `names` other ids of
    images; pixels are of 0.5 mm.
    """
    def score(points, patients=None, names=None, **changes):
        root = tmp_path / "data"
        (root / "images").mkdir(parents=True)
        rows, called = [], {name: (names or {}).get(name, name) for name in SIZES}
        for key, size in SIZES.items():
            name = called[key]
            (root / f"images/{name}").parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)).save(
                root / f"images/{name}.png")
            rows.append(",".join([name, *(f"{value:.6f}" for point in points(size) for value in point[::-1])]))
        landmarks = [f"p{number}" for number in range(len(points((9, 9))))]
        columns = ",".join(f"{name}_x,{name}_y" for name in landmarks)
        (root / "landmarks.csv").write_text("\n".join([f"image,{columns}", *rows, ""]))
        (root / "dataset.json").write_text(json.dumps({
            "landmarks": landmarks, "spacing_mm": 0.5,
            "patients": patients or {},
            "splits": {"train": ["a", "b"], "validation": [], "test": [called[key] for key in "cdef"]}}))
        dataset = {"name": "sizes", "layout": "folder", "root": str(root), "cache_dir": str(tmp_path / "cache"),
                   "image_size": [16, 16], "spacing_mm": None}
        values = merged(merged(TINY, {"dataset": dataset, "experiment": {"output_dir": str(tmp_path / "runs")},
                                      "finetune": {"validation": "none"}}), changes)
        run_dir = evaluate_mean_shape(parse_config(values, "test"), CELL)
        return run_dir, json.loads((run_dir / "metrics.json").read_text())

    return score


def middle(size):
    return (np.array(size) - 1) / 2


@pytest.mark.parametrize("resample_mm", [0.5, 1.3, None])
def test_the_guess_of_every_images_centre_is_exact(mean_shape, resample_mm):
    _, metrics = mean_shape(lambda size: [middle(size)], dataset={"resample_mm": resample_mm})
    assert metrics["physical"]["mre"] == pytest.approx(0, abs=1e-3)  # 39 mm when the canvas counted twice


def test_the_guess_is_the_mean_in_mm_from_the_centres(mean_shape):
    """Landmark 5 mm below the centre where the image is low, 2 mm where it is high: 3.5 mm is guessed for all."""
    def points(size):
        return [middle(size) + [10.0 if size[0] == 30 else 4.0, 0]]

    _, metrics = mean_shape(points, dataset={"resample_mm": 0.8})
    assert metrics["physical"]["mre"] == pytest.approx(1.5, abs=1e-3)


def test_an_image_is_no_patient_of_the_same_name(mean_shape):
    """Image c without a patient and patient "c": four clusters, the fewest that have an interval."""
    run_dir, metrics = mean_shape(lambda size: [(3.0, 5.0)], {"d": "c"})
    low, high = metrics["physical"]["interval"]
    assert low < metrics["physical"]["mre"] < high
    assert error_matrix(run_dir)[1].nunique() == 4


def test_images_whose_names_look_alike_have_their_own_pictures(mean_shape):
    """Every id is read back from its picture, and the report puts the picture's own error below it."""
    deep = "/".join(["folder" * 5] * 10 + ["c"])  # longer than a file name may be
    names = {"c": "a/b", "d": "a-b", "e": "a%2Fb", "f": deep}
    run_dir, _ = mean_shape(lambda size: [(3.0, size[1] / 3)], names=names, evaluation={"overlays": 4})
    paths = sorted((run_dir / "overlays").iterdir())
    assert sorted(pictured_image(path) for path in paths) == sorted(names.values())
    for file in ("metrics.json", "config.json"):  # the report shows no pictures of the guess
        (run_dir / file).write_text((run_dir / file).read_text().replace('"mean_shape"', '"scratch"'))
    moved = run_dir.parents[2] / "scratch/default" / run_dir.name
    moved.parent.mkdir(parents=True)
    run_dir.rename(moved)
    experiment = read_experiment(moved.parents[3])
    [group] = worst_cases(experiment, "s", experiment.runs)
    embed_cases([group], Pictures(), experiment.path / "report")
    errors = error_matrix(moved)[0].mean(axis=1)
    assert [image["image"] for image in group["images"]] == list(errors.sort_values(ascending=False).index)
    assert [image["error"] for image in group["images"]] == sorted(errors, reverse=True)
    assert build_report([experiment.path]).is_file()


@pytest.mark.parametrize("named", [True, False], ids=["patients", "images alone"])
def test_the_interval_is_over_patients(tmp_path, named):
    """Six patients with two images each, whose errors (along x, in mm) are equal: six values and not twelve."""
    errors = dict(zip([f"{patient}{visit}" for patient in "abcdef" for visit in (1, 2)],
                      np.repeat([1.0, 1.5, 2.0, 3.0, 5.0, 8.0], 2).tolist(), strict=True))
    (tmp_path / "images").mkdir()
    for name in ("train", *errors):
        Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / f"images/{name}.png")
    (tmp_path / "landmarks.csv").write_text("".join(["image,p_x,p_y\n", *(f"{n},9,5\n" for n in ("train", *errors))]))
    (tmp_path / "dataset.json").write_text(json.dumps({
        "landmarks": ["p"], "spacing_mm": 1.0, "splits": {"train": ["train"], "validation": [], "test": list(errors)},
        "patients": {name: name[0] for name in errors} if named else {}}))
    config = parse_config({"experiment": {"seed": 5}, "evaluation": {"overlays": 0},
                           "dataset": {"layout": "folder", "root": str(tmp_path), "image_size": [16, 16],
                                       "cache_dir": str(tmp_path / "cache")}}, "test")
    source = load_source(config.dataset)
    test_images = load_images(source.require("test"), config.dataset)
    points = test_images.original_points()
    points[:, 0, 1] += [errors[record.id] for record in test_images.records]
    predictions = Predictions(test_images, source.landmark_names, points, *np.ones((3, 12, 1)))
    metrics = score(tmp_path / "run", config, source, predictions, {"backbone": "scratch", "decoder": "argmax"})
    values = np.array(list(errors.values()))[::2 if named else 1, None]
    expected = bootstrap_interval(values, range(len(values)), seed=5)
    assert metrics["physical"]["interval"] == pytest.approx(expected, rel=1e-9)
    assert metrics["physical"]["mre"] == pytest.approx(np.mean(list(errors.values())))


# ---- the paper's scorer


@pytest.mark.parametrize("dataset, reason", [
    ({}, None),
    ({"resample_mm": 5.0, "image_size": [24, 24]}, "dataset.resample_mm or canvas_size crops them"),
    ({"image_size": [48, 40]}, "dataset.image_size is 48 x 40"),
    ({"image_size": [32, 32]}, "its disk is a single pixel"),
    ({"spacing_mm": 2.0}, "240 x 193.5 mm"),
], ids=["defined", "resampled", "not square", "small", "of another size in mm"])
def test_the_papers_scorer_is_left_out_with_a_reason(config_file, run_main, tmp_path, dataset, reason):
    """In metrics.json, on the console and on the page; where it is defined it says what it said."""
    path = config_file(dataset=dataset, finetune={"backbones": ["scratch"]}, unet={"channel_multipliers": [1, 2]})
    status, _, error = run_main("study.launch", "--config", path, "--stages", "finetune", "report")
    assert status == 0, error
    run_dir = next(tmp_path.glob("runs/tiny/landmarks/scratch/*/*"))
    metrics = json.loads((run_dir / "metrics.json").read_text())
    page = (tmp_path / "runs/tiny/report/index.html").read_text()
    status, out, _ = run_main("landmarks_finetuning.evaluate", run_dir)
    said = "scorer is left out: "
    if reason is None:
        assert metrics["paper"]["mre"] > 0 and metrics["paper_left_out"] is None
        assert said not in out and said not in page
    else:
        assert metrics["paper"] is None and reason in metrics["paper_left_out"]
        assert said + metrics["paper_left_out"] in out and said + metrics["paper_left_out"] in page


# ---- what a report has to bear


def test_a_report_beside_a_guess_without_an_error(mean_shape):
    """Landmarks that lie at one place in all images: what is 0 mm can be missed by any share."""
    run_dir, _ = mean_shape(lambda size: [middle(size)])
    other = run_dir.parents[2] / "scratch/default" / run_dir.name
    shutil.copytree(run_dir, other)
    table = pd.read_csv(other / "predictions.csv")
    table.assign(error=table["error"] + 2).to_csv(other / "predictions.csv", index=False)
    for file in ("metrics.json", "config.json"):
        (other / file).write_text((other / file).read_text().replace('"mean_shape"', '"scratch"'))
    metrics = json.loads((other / "metrics.json").read_text())
    metrics["physical"]["mre"] += 2
    metrics["predictions_sha256"] = content_digest(other / "predictions.csv")
    (other / "metrics.json").write_text(json.dumps(metrics))
    page = build_report([run_dir.parents[3]])
    assert "mean shape by 0.00 mm. It is 2.00 mm (ratio not defined) worse" in page.read_text()
