"""Pseudo-labels: which images may have them, what each counts, and the figures of the rounds."""

import json
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from core.config.load import load_config
from core.config.second_stage import second_stage
from core.config.self_training import SelfTraining
from core.data.dataset import load_images
from core.data.records import Record
from core.data.shots import cell_records, labelled_subset, unlabelled_training
from core.data.source import load_source
from core.networks.unet import UNet
from core.networks.weights import load_weights, save_tensors
from core.runs.places import Cell, round_dir
from landmarks_finetuning.calibration import calibrate
from landmarks_finetuning.inference import trained_detector
from landmarks_finetuning.losses import cross_entropy_channels, cross_entropy_pixels
from landmarks_finetuning.predictions import find_landmarks
from landmarks_finetuning.self_training import PseudoLabels, certainties, figures, mixed_order, round_figures
from landmarks_finetuning.shape import Shape
from study.prepare import with_inputs
from study.runs import cell_run
from tests.conftest import error_of
from tests.fake_gpu import fake_gpu, on_gpu

EVALUATE, PREDICT, LAUNCH = "landmarks_finetuning.evaluate", "landmarks_finetuning.predict", "study.launch"


def test_no_image_of_another_split_is_answered(make_config, tmp_path):
    config = make_config(tmp_path)
    source = load_source(config.dataset)
    training, validation = labelled_subset(source, config.finetune, 3, 0)
    labelled = {record.id for record in (*training, *validation)}
    records = unlabelled_training(source, labelled, config.dataset, 1000)
    ids = {record.id for record in records}
    assert len(ids) == 127 and ids == {record.id for record in source.splits["train"]} - labelled
    assert all(record.landmarks is None and record.annotators is None for record in records)
    few = unlabelled_training(source, labelled, config.dataset, 5)
    again = unlabelled_training(source, labelled, config.dataset, 5)
    assert len(few) == 5 and [record.id for record in few] == [record.id for record in again]


def test_copies_of_test_images_are_left_out(phantom, make_config, tmp_path):
    """A test image that also lies among the training images, brighter and of another name."""
    root = tmp_path / "data"
    shutil.copytree(phantom, root)
    source = load_source(make_config(tmp_path, dataset={"root": str(root)}).dataset)
    tested, trained = source.splits["test"][0], source.splits["train"][7]
    copy = Image.open(tested.image).point(lambda value: min(255, int(value * 0.9 + 8)))
    copy.save(trained.image)
    config = make_config(tmp_path, dataset={"root": str(root)})
    records = unlabelled_training(load_source(config.dataset), set(), config.dataset, 1000)
    ids = {record.id for record in records}
    assert trained.id not in ids and tested.id not in ids and len(ids) == 129


def test_a_split_that_shares_a_file_is_refused(make_config, tmp_path, monkeypatch):
    config = make_config(tmp_path)
    source = load_source(config.dataset)
    shared = Record("other name", source.splits["test"][0].image, None, None)
    monkeypatch.setattr("core.data.shots.find_leaks", lambda *_: ())  # where looking alike was not noticed
    sneaky = source.__class__(**{**vars(source), "unlabelled": (shared,)})
    with pytest.raises(ValueError, match="test image is among"):
        unlabelled_training(sneaky, set(), config.dataset, 10)


def test_rounds_without_unlabelled_images_are_refused(make_config, tmp_path):
    config = make_config(tmp_path, finetune={"self_training": {"rounds": 1}})
    message = error_of(cell_records, load_source(config.dataset), config, "scratch", 130, 0)
    assert "has none beside the 130 labelled ones" in message and "finetune.self_training" in message
    records = cell_records(load_source(config.dataset), config, "scratch", 129, 0)
    assert len(records["unlabelled"]) == 1


@pytest.mark.parametrize("settings, backbone, labels, rounds, matches", [
    ({}, "ddpm", 1, 0, False),
    ({"rounds": None, "matching": None}, "ddpm", 1, 1, True),
    ({"rounds": None, "matching": None}, "scratch", 1, 1, False),
    ({"rounds": None, "matching": None}, "ddpm", 2, 1, False),
    ({"rounds": None, "matching": None}, "ddpm", 19, 1, False),
    ({"rounds": None, "matching": None}, "ddpm", 20, 0, False),
    ({"rounds": 2, "matching": 5}, "ddpm", 5, 2, True),
])
def test_rounds_and_matches_by_the_number_of_labels(settings, backbone, labels, rounds, matches):
    training = SelfTraining(**settings)
    assert (training.rounds_of(labels), training.matches(backbone, labels)) == (rounds, matches)
    assert training.answers(backbone, labels) == (rounds > 0 or matches)
    assert training.insists(backbone, labels) == (training.rounds is not None and training.answers(backbone, labels))


def test_what_lies_elsewhere_than_the_shape_says_counts_less():
    shape = np.array([[0.0, 0.0], [0.0, 10.0], [10.0, 0.0], [10.0, 10.0], [5.0, 5.0]])  # size sqrt(40)
    points = np.stack([shape + 3, shape + 3])
    points[1, 4] += [0.0, 40**0.5]  # a whole size off: 1 / (1 + 10^2)
    sure = certainties(points, np.full((2, 5), 0.8), Shape(shape))
    np.testing.assert_allclose(sure[0], 0.8, rtol=1e-6)
    np.testing.assert_allclose(sure[1, 4], 0.8 / 101, rtol=0.05)
    assert certainties(points, np.array([[np.nan] * 5] * 2), None).sum() == 0


def test_labelled_images_make_their_share():
    order = mixed_order(4, 90, 0.5)
    assert np.bincount(order, minlength=94)[:4].tolist() == [22, 22, 22, 22] and (np.bincount(order)[4:] == 1).all()
    assert mixed_order(3, 0, 0.5).tolist() == [0, 1, 2]
    assert np.bincount(mixed_order(50, 10, 0.5)).tolist() == [1] * 60


def test_weights_by_hand():
    """Two landmarks of costs log 4 (one of 4 pixels) and log 4: weights 1 and 0.5 average to 0.75 log 4."""
    outputs, target = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    target[0, :, 0, 0] = 1
    weights = torch.tensor([[1.0, 0.5]])
    assert cross_entropy_pixels(outputs, target, weights=weights).item() == pytest.approx(0.75 * np.log(4))
    # over landmarks: two pixels' entries of log 2 each, of 4 pixels
    assert cross_entropy_channels(outputs, target, weights=weights).item() == pytest.approx(1.5 * np.log(2) / 4)


def test_figures_by_hand():
    records = [Record("a", None, None, (2.0, 1.0))]
    before = PseudoLabels(("a",), np.zeros((1, 2, 2)), np.ones((1, 2)))
    now = PseudoLabels(("a",), np.array([[[3.0, 8.0], [0.0, 0.0]]]), np.array([[0.5, 0.25]]))
    assert figures(now, before, records) == {"images": 1, "landmarks": 2, "certainty": 0.375, "moved": 5.0}
    assert figures(now, None, records)["moved"] is None


def test_damaged_answers_are_named(tmp_path):
    path = tmp_path / "pseudo_labels.npz"
    PseudoLabels(("a",), np.zeros((1, 2, 2)), np.ones((1, 2))).save(path)
    assert PseudoLabels.load(path).ids == ("a",)
    path.write_bytes(path.read_bytes()[:80])
    assert f"{path} is damaged" in error_of(PseudoLabels.load, path)


@pytest.fixture(scope="module")
def staged(make_values, tmp_path_factory):
    """A launched study of two stages and one round, of ddpm: (config file, run folder)."""
    from study.run import run_study

    folder = tmp_path_factory.mktemp("staged")
    path = folder / "study.json"
    path.write_text(json.dumps(make_values(folder / "runs", finetune={
        "backbones": ["ddpm"], "validate_every": 1,
        "refine": {"zoom": 2, "crop": 16, "iterations": 2, "start": "crops"},
        "self_training": {"rounds": 1, "images": 6}})))
    run_study(load_config(path), ("pretrain", "finetune"))
    return path, next(folder.glob("runs/tiny/landmarks/ddpm/*/shots002_draw0_seed0"))


def test_a_launched_study_with_stages_and_rounds(staged, run_main):
    path, run_dir = staged
    assert (path.parent / "runs/tiny/fine/ddpm/ema_iter000006.safetensors").is_file()
    metrics = json.loads((run_dir / "metrics.json").read_text())
    first, second = metrics["rounds"]
    assert first["round"] == 0 and "images" not in first and second["images"] == 6
    assert second["landmarks"] == 6 * 19 and 0 <= second["certainty"] <= 1
    assert metrics["validation_mre"] == pytest.approx(second["validation_mre"])
    assert not list(run_dir.rglob("last.pt"))  # of a scored run
    status, out, _ = run_main(LAUNCH, "--config", path, "--stages", "pretrain", "finetune")
    assert status == 0 and "0 left" in out
    inputs = json.loads((run_dir / "inputs.json").read_text())["images"]
    assert len(inputs["unlabelled"]) == 6 and not set(inputs["unlabelled"]) & set(inputs["validation"])


def test_other_weights_of_the_second_stage_make_a_run_stale(staged, make_values, tmp_path, run_main):
    path, _ = staged
    home = tmp_path / "copy"
    shutil.copytree(path.parent / "runs", home)
    config = json.loads(path.read_text())
    config["experiment"]["output_dir"] = str(home)
    other = tmp_path / "study.json"
    other.write_text(json.dumps(config))
    weights = home / "tiny/fine/ddpm"
    shutil.copy(weights / "ema_iter000003.safetensors", weights / "ema_iter000006.safetensors")
    status, out, _ = run_main(LAUNCH, "--config", other, "--stages", "finetune", "--dry-run")
    assert status == 0 and "1 run, to be set aside and done again: the weights in" in out and "fine/ddpm" in out


def test_predict_uses_the_last_round(staged, phantom, tmp_path, run_main, monkeypatch):
    _, run_dir = staged
    image = next(phantom.rglob("*.bmp"), None) or next(phantom.rglob("*.jpg"))
    status, _, error = run_main(PREDICT, run_dir, image, "--out", tmp_path / "a", "--no-overlays")
    assert status == 0, error
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    for stage in ("best.safetensors", "fine/best.safetensors"):  # the first round's fine weights are not asked for
        shutil.copy(round_dir(run_dir, 1) / stage, copy / stage)
    assert run_main(PREDICT, copy, image, "--out", tmp_path / "b", "--no-overlays")[0] == 0
    assert (tmp_path / "a/predictions.csv").read_bytes() == (tmp_path / "b/predictions.csv").read_bytes()
    shutil.rmtree(copy / "round1/fine")
    status, _, error = run_main(PREDICT, copy, image, "--out", tmp_path / "c", "--no-overlays")
    assert status == 2 and "round1/fine/best.safetensors does not exist" in error


def test_rounds_whose_logs_are_gone_have_no_error(staged, tmp_path):
    _, run_dir = staged
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("metrics.jsonl"))
    assert [row["validation_mre"] for row in round_figures(copy, 1)] == [None, None]
    assert all(row["validation_mre"] > 0 for row in round_figures(run_dir, 1))


def test_the_report_shows_every_round(staged, run_main):
    path, run_dir = staged
    home = path.parent / "runs/tiny"
    status, _, error = run_main("landmarks_finetuning.report.__main__", home)
    assert status == 0, error
    page, table = (home / "report/index.html").read_text(), pd.read_csv(home / "report/tables/rounds.csv")
    assert "Rounds of self-training" in page
    taught = json.loads((run_dir / "pseudo_labels.json").read_text())
    assert table["round"].tolist() == [0, 1] and table["images"].tolist()[1] == 6 and np.isnan(table["images"][0])
    assert table["certainty"][1] == pytest.approx(taught["certainty"], rel=1e-5)


def test_the_first_training_of_few_labels_has_matches(make_values, tmp_path, run_main):
    """Of ddpm with at most so many labels; what matched is kept, and the round after it has the detector's answers."""
    path = tmp_path / "study.json"
    path.write_text(json.dumps(make_values(tmp_path / "runs", finetune={
        "backbones": ["ddpm", "scratch"], "shots": [1, 2], "validate_every": 4,
        "self_training": {"matching": None, "rounds": None, "images": 5}})))
    status, _, error = run_main(LAUNCH, "--config", path, "--stages", "pretrain", "finetune")
    assert status == 0, error
    for backbone, shots in (("ddpm", 1), ("ddpm", 2), ("scratch", 1)):
        run_dir = next((tmp_path / "runs/tiny/landmarks").glob(f"{backbone}/*/shots00{shots}_draw0_seed0"))
        first, second = json.loads((run_dir / "metrics.json").read_text())["rounds"]
        matched = (backbone, shots) == ("ddpm", 1)
        assert (run_dir / "matches.npz").is_file() == matched and (first.get("images") == 5) == matched
        assert second["images"] == 5 and (run_dir / "pseudo_labels.npz").is_file()
    header = json.loads((run_dir / "inputs.json").read_text())
    assert len(header["images"]["unlabelled"]) == 5


def test_no_rounds_of_themselves_where_no_image_is_unlabelled(make_values, make_config, tmp_path, run_main):
    """It is noted, the plan counts no steps of them, and predictions come from the first training."""
    trained = [record.id for record in load_source(make_config(tmp_path).dataset).splits["train"]]
    path = tmp_path / "study.json"
    path.write_text(json.dumps(make_values(tmp_path / "runs", dataset={"exclude": trained[2:]}, finetune={
        "backbones": ["scratch"], "shots": [2], "validate_every": 4, "self_training": {"rounds": None}})))
    status, _, error = run_main(LAUNCH, "--config", path, "--stages", "finetune")
    assert status == 0 and "no self-training there" in error
    run_dir = next((tmp_path / "runs/tiny/landmarks/scratch").glob("*/shots002_draw0_seed0"))
    assert json.loads((run_dir / "metrics.json").read_text())["rounds"] == []
    assert load_weights(run_dir / "best.safetensors").header["rounds"] == 0
    source = load_source(load_config(path).dataset)
    assert "unlabelled" not in cell_records(source, load_config(path), "scratch", 2, 0)
    run, = with_inputs([cell_run(load_config(path), Cell("scratch", 2, 0, 0))], source)
    assert run.steps == load_config(path).finetune.iterations


@pytest.mark.parametrize("rounds", [-1, "1", 1.5])
def test_rounds_in_a_header_are_a_number(staged, tmp_path, rounds):
    weights = load_weights(staged[1] / "best.safetensors")
    header = weights.header | {"rounds": rounds}
    save_tensors(tmp_path / "best.safetensors", weights.tensors, header["config"], header)
    assert "rounds are" in error_of(trained_detector, tmp_path)


@pytest.mark.parametrize("views", [1, 2])
def test_two_stages_answer_on_a_gpu(staged, monkeypatch, views):
    """Every step has its tensors on one device, and what becomes an array is copied first."""
    detector = trained_detector(staged[1])
    stages = (detector, detector.second)
    source = load_source(detector.config.dataset)
    images = load_images(source.splits["validation"][:3], detector.config.dataset)
    crops = load_images(images.records, second_stage(detector.config).dataset)
    evaluation = detector.config.evaluation.model_copy(update={"views": views})
    detector.config = detector.config.model_copy(update={"evaluation": evaluation})
    monkeypatch.setattr("landmarks_finetuning.refinement.load_images", lambda *_: crops)
    with fake_gpu(monkeypatch, "landmarks_finetuning.refinement", "landmarks_finetuning.running"):
        for each in stages:
            unet, size = each.own_config.unet, each.own_config.dataset.image_size
            each.model, each.device = on_gpu(partial(UNet, unet, 1, 19, size)), torch.device("cuda")
        errors, calibration = calibrate(detector, images)
        answers = find_landmarks(detector, images, calibration=calibration)
    assert errors.shape == (3, 19) and answers.points.shape == (3, 19, 2) and answers.confidence.shape == (3, 19)
