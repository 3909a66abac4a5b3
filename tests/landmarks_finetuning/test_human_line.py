"""Two annotators: their distance, what metrics.json and the report say of it, and packs that carry their points."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from core.config.dataset import Dataset
from core.config.load import parse_config
from core.data.dataset import load_images
from core.data.layouts import read_layout
from core.data.make_pack import write_pack
from core.data.source import load_source
from landmarks_finetuning.evaluate import score
from landmarks_finetuning.metrics import annotator_distances, share_within
from landmarks_finetuning.predictions import Predictions
from landmarks_finetuning.report.build import build_report
from landmarks_finetuning.report.collect import human_distances, read_experiment
from tests.conftest import DATA

real_data = pytest.mark.skipif(not DATA.is_dir(), reason="real data not found; set LANDMARK_DATA")
NAN = float("nan")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """152 cephalograms of 50 x 40 pixels; the doctors are 2.5 mm apart: (3, 4) pixels of 0.5 mm."""
    root = tmp_path_factory.mktemp("cephalo")
    for folder in ("jpg", "400_junior", "400_senior"):
        (root / folder).mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (152, 50, 40), dtype=np.uint8)
    for index in range(152):
        Image.fromarray(pixels[index]).save(root / f"jpg/{index + 1:03d}.jpg")
        for folder, point in (("400_junior", "10,20"), ("400_senior", "13,24")):
            (root / folder / f"{index + 1:03d}.txt").write_text(f"{point}\n" * 19)
    return Dataset(layout="cephalo", root=str(root), image_size=(32, 32), cache_dir=str(root / "cache"), spacing_mm=0.5)


def test_distances_by_hand():
    first, second = np.full((2, 2, 3), 9.0), np.full((2, 2, 3), 9.0)
    second[0, 0], second[1, 0], second[1, 1] = (10, 11, 11), (8, 7, 7), (NAN, 0, 0)
    found = annotator_distances(np.stack([first, second], axis=1), np.array([[1.0, 1, 1], [2, 2, 2]]))
    np.testing.assert_allclose(found, [[3, 0], [6, NAN]])
    assert annotator_distances(np.stack([first, second], axis=1))[1, 0] == 3
    errors = np.array([[3, 0.1], [5, 1]])
    assert share_within(errors, found) == pytest.approx(200 / 3)  # 3 of 3 counts, 0.1 of 0 does not, 5 of 6 does
    assert share_within(np.full((1, 1), NAN), np.ones((1, 1))) is None


def test_both_doctors_are_read(dataset):
    source = load_source(dataset)
    record = source.splits["test"][0]
    assert record.annotators.shape == (2, 19, 2)
    assert record.annotators[:, 0].tolist() == [[20, 10], [24, 13]] and record.landmarks[0].tolist() == [22, 11.5]
    assert all(record.annotators is None for record in source.pretraining_records())


def test_a_phantom_has_one_truth_and_no_doctors(phantom):
    assert all(record.annotators is None for record in read_layout("cephalo", phantom).labelled)


def test_packs_carry_both(dataset, tmp_path):
    write_pack(dataset, tmp_path / "pack.npz")
    packed = dataset.model_copy(update={"root": str(tmp_path / "pack.npz")})
    before, after = load_source(dataset).labelled, load_source(packed).labelled
    assert len(after) == 152
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(new.annotators, old.annotators)
    with np.load(tmp_path / "pack.npz") as file:
        told = json.loads(str(file["description"]))
        for entry in told["groups"]["test"]:
            del entry["annotators"]
        np.savez(tmp_path / "old.npz", **{**file, "description": np.array(json.dumps(told))})
    old = load_source(dataset.model_copy(update={"root": str(tmp_path / "old.npz")}))
    assert old.splits["test"][0].annotators is None and old.splits["train"][0].annotators is not None


@pytest.fixture(scope="module")
def experiment(dataset, tmp_path_factory):
    """A scored run on the two test images, off by 2 mm (4 pixels along x) in one and by 3 mm in the other."""
    folder = tmp_path_factory.mktemp("runs") / "study"
    config = parse_config({"experiment": {"name": "study", "output_dir": str(folder.parent)},
                           "dataset": json.loads(dataset.model_dump_json()), "evaluation": {"overlays": 0}}, "c.json")
    source = load_source(dataset)
    held = load_images(source.require("test"), dataset)
    points = held.original_points() + np.array([[[0, 4.0]], [[0, 6.0]]])
    run = folder / "landmarks/ddpm/default/shots001_draw0_seed0"
    identity = {"backbone": "ddpm", "variant": "default", "shots": 1, "draw": 0, "seed": 0, "validation_labels": 0,
                "decoder": None}
    score(run, config, source, Predictions(held, source.landmark_names, points, *np.ones((3, 2, 19))), identity)
    return run


def test_metrics_and_table(experiment):
    metrics = json.loads((experiment / "metrics.json").read_text())
    human = metrics["human"]
    assert (human["mre"], human["std"], human["count"]) == (pytest.approx(2.5), pytest.approx(0), 38)
    assert human["sdr"] == {"2": 0, "2.5": 100, "3": 100, "4": 100} and len(human["per_landmark"]["mre"]) == 19
    assert metrics["physical"]["mre"] == pytest.approx(2.5) and human["within"] == pytest.approx(50)
    assert pd.read_csv(experiment / "predictions.csv").human_distance.tolist() == [2.5] * 38


def test_report(experiment, dataset):
    root = experiment.parents[3]
    np.testing.assert_allclose(human_distances(read_experiment(root).runs), [2.5] * 38)
    html = build_report([root]).read_text(encoding="utf8")
    rows = [part for part in html.split("<tr") if '<td class="text">Two doctors</td>' in part]
    row, more = ([cell.partition(">")[2].partition("</td>")[0] for cell in part.split("<td")[4:]] for part in rows)
    assert row[:7] == ["2.50", "–", "2.50", "0.0", "100.0", "100.0", "100.0"]  # mean, between draws, median, rates
    assert more[:3] == ["–", "0.00", "2.50"]  # macro mean, SD, 95th percentile
    assert "≤ doctors" in html and "Thin line: the distance between the two doctors." in html
    assert html.count("Two doctors") >= 3  # the row, its explanation, the curves' legend


def test_runs_without_doctors_say_nothing(experiment, tmp_path):
    run = tmp_path / "study/landmarks/ddpm/default/shots001_draw0_seed0"
    run.mkdir(parents=True)
    metrics = json.loads((experiment / "metrics.json").read_text())
    for key in ("human", "leaked", "without_leaks", "predictions_sha256"):  # as they were written before
        del metrics[key]
    (run / "metrics.json").write_text(json.dumps(metrics))
    pd.read_csv(experiment / "predictions.csv").drop(columns="human_distance").to_csv(run / "predictions.csv")
    assert "octors" not in build_report([tmp_path / "study"]).read_text(encoding="utf8")


def test_the_report_says_what_leaks(experiment, tmp_path):
    metrics = json.loads((experiment / "metrics.json").read_text())
    assert metrics["without_leaks"] is None

    def page(name, **changes):
        run = tmp_path / name / "landmarks/ddpm/default/shots001_draw0_seed0"
        run.mkdir(parents=True)
        (run / "metrics.json").write_text(json.dumps({**metrics, **changes}))
        (run / "predictions.csv").write_text((experiment / "predictions.csv").read_text())
        return build_report([tmp_path / name]).read_text(encoding="utf8")

    rest = {"left_out": ["152"], "images": 1, "mre": 2.25, "median": 2, "sdr": {"2": 1}}
    assert ("1 test image has a twin among the training, validation or pre-training images; without it the mean errors "
            "in mm are: diffusion pre-training at 1 label 2.25 (with them 2.50).") in page("kept", without_leaks=rest)
    assert ("2 test images have a twin among the training, validation or pre-training images and are left out of all "
            "figures.") in page("dropped", leaked="drop", without_leaks={**rest, "left_out": ["151", "152"]})
    clean = page("none")
    assert "image has a twin" not in clean and "images have a twin" not in clean
    assert " a twin among" in page("all", without_leaks={**rest, "images": 0, "mre": None})


@real_data
def test_the_real_doctors():
    held = read_layout("cephalo", DATA / "cephalo").splits["test"]
    distances = annotator_distances(np.stack([r.annotators for r in held]), np.array([r.spacing for r in held]))
    assert distances.shape == (150, 19) and distances.mean() == pytest.approx(2.36, abs=0.005)
