"""Predictions as files, against nibabel's mathematics; a whole tiny study of volumes, its crops and windows."""

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import landmarks_finetuning.pictures.cases
from core.config.dataset import Dataset
from core.config.load import parse_config
from core.data.dataset import load_images
from core.data.make_pack import write_pack
from core.data.records import Record
from core.data.source import load_source
from core.formats.images import read_geometry
from core.networks.weights import read_tensors
from core.runs.places import Cell
from core.training.run_log import read_metrics
from landmarks_finetuning.decoding import sigma_pixels
from landmarks_finetuning.detectors.registry import DETECTORS
from landmarks_finetuning.inference import TrainedDetector
from landmarks_finetuning.pictures.cases import draw_predictions
from landmarks_finetuning.predict import predict
from landmarks_finetuning.predictions import Predictions, find_landmarks, table_rows, write_slicer_files, write_table
from landmarks_finetuning.running import run_batched
from landmarks_finetuning.train import finetune_cell
from study.launch import DEFAULT_STAGES
from study.run import run_study
from tests.conftest import TINY, merged

NAN = float("nan")
OBLIQUE = np.array([[0.3, -0.8, 0, 5], [0.4, 0.6, 0, -7], [0, 0, -2, 90], [0, 0, 0, 1]])  # 0.5 x 1 x 2 mm, z down
LPS = np.array([-1.0, -1, 1])
SIZE = (24, 12, 6)  # x, y, z
VOXEL = (17, 4, 1)  # x, y, z: the bright one
CELL = "tiny/landmarks/ddpm/*/shots002_draw0_seed0"


# --- single functions ---


def write_nifti(path, size=SIZE):
    volume = np.zeros(size, np.float32)
    volume[VOXEL] = 100
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume, OBLIQUE), path)
    return path


def loaded(tmp_path, *paths, landmarks=None, spacing=None, patient=None, **dataset):
    records = [Record(path.name, path, landmarks, spacing, patient, read_geometry(path)) for path in paths]
    return load_images(records, Dataset(cache_dir=str(tmp_path / "cache"), **dataset))


def test_table_of_volumes(tmp_path):
    truth = np.array([[1.0, 2, 3], [NAN] * 3])
    images = loaded(tmp_path, write_nifti(tmp_path / "a.nii"), landmarks=truth, patient="p", image_size=(4, 4, 4))
    points = np.array([[[1.5, 2.25, 3.00004], [4, 5, 6]]])
    found = Predictions(images, ["tip", "base"], points, np.array([[0.5, 1]]), np.array([[1.25, 2]]), np.ones((1, 2)))
    write_table(tmp_path / "t/errors.csv", table_rows(found, np.array([[0.75, NAN]])))
    assert (tmp_path / "t/errors.csv").read_text().splitlines() == [
        "image,patient,landmark,x,y,z,truth_x,truth_y,truth_z,error,paper_error,expected_error,radius90",
        "a.nii,p,tip,3.0000,2.2500,1.5000,3.0000,2.0000,1.0000,0.7500,,0.5000,1.2500",
        "a.nii,p,base,6.0000,5.0000,4.0000,,,,,,1.0000,2.0000",
    ]
    write_table(tmp_path / "plain.csv", table_rows(found))
    assert (tmp_path / "plain.csv").read_text().splitlines()[:2] == [
        "image,patient,landmark,x,y,z,expected_error,radius90",
        "a.nii,p,tip,3.0000,2.2500,1.5000,0.5000,1.2500"]


def test_table_of_images(tmp_path):
    Image.new("L", (9, 7)).save(tmp_path / "a.png")
    images = loaded(tmp_path, tmp_path / "a.png", landmarks=np.array([[1.0, 2]]), image_size=(4, 4))
    found = Predictions(images, ["tip"], np.array([[[3.0, 4]]]), *np.full((3, 1, 1), NAN))
    write_table(tmp_path / "t.csv", table_rows(found, np.array([[2.5]]), np.array([[2.0]])))
    assert (tmp_path / "t.csv").read_text().splitlines() == [
        "image,patient,landmark,x,y,truth_x,truth_y,error,paper_error,expected_error,radius90",
        "a.png,,tip,4.0000,3.0000,2.0000,1.0000,2.5000,2.0000,,"]


def positions(path):
    """Label -> (position, description) of a markup that counts in LPS."""
    [markup] = json.loads(path.read_text())["markups"]
    assert (markup["coordinateSystem"], markup["type"]) == ("LPS", "Fiducial")
    return {point["label"]: (point.get("position"), point["description"]) for point in markup["controlPoints"]}


def test_markups_only_where_voxels_have_a_place(tmp_path):
    volume = np.zeros(SIZE[::-1], np.float32)
    np.save(tmp_path / "bare.npy", volume)
    np.savez(tmp_path / "spaced.npz", image=volume, spacing=(0.5, 1, 2))
    paths = write_nifti(tmp_path / "a.nii"), tmp_path / "bare.npy", tmp_path / "spaced.npz"
    images = loaded(tmp_path, *paths, image_size=(4, 4, 4))
    points = np.broadcast_to(np.array([[1, 4, 17], [NAN] * 3, [0.5, 3, 2]]), (3, 3, 3))
    doubts = np.array([[[0.25, NAN, 1]] * 3] * 3)
    write_slicer_files(tmp_path / "m", Predictions(images, ["a", "b", "c"], points, *doubts, unit="mm"))
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["a.nii.mrk.json"]
    seen = positions(tmp_path / "m/a.nii.mrk.json")
    assert seen["b"] == (None, "") and [seen[n][1] for n in "ac"] == ["expected error 0.2 mm", "expected error 1.0 mm"]
    for label, voxel in (("a", VOXEL), ("c", (2, 3, 0.5))):
        assert seen[label][0] == pytest.approx(nib.affines.apply_affine(OBLIQUE, voxel) * LPS)


@pytest.fixture
def pictures(monkeypatch):
    """What is given to `draw_case`, in place of a picture."""
    given = []
    keys = ("pixels", "found", "truth", "names", "maps", "title", "spacing", "errors", "sides", "doubt", "contours")

    def draw_case(*arguments):
        given.append(SimpleNamespace(**dict(zip(keys, arguments, strict=True))))
        return Image.new("L", (2, 2))

    monkeypatch.setattr(landmarks_finetuning.pictures.cases, "draw_case", draw_case)
    return given


def upright_by_nibabel(path):
    """Voxels (z, y, x) whose axes run up, back and to the left, and their steps in mm."""
    image = nib.as_closest_canonical(nib.load(path))
    return image.get_fdata()[::-1, ::-1].T, image.header.get_zooms()[::-1]


def seeing_itself(**dataset):
    """A detector whose heatmap is its input: brightest where the image is."""
    size = dataset["image_size"]
    config = parse_config({"is_3d": True, "dataset": {**dataset, "image_size": list(size)},
                           "unet": {"channel_multipliers": [1]}}, "test")

    def outputs(images, chosen=None):
        return run_batched(lambda inputs: 20 * inputs, images, config.evaluation, torch.device("cpu"), "auto", chosen)

    return SimpleNamespace(config=config, recipe=config, kind=DETECTORS["unet"], outputs=outputs,
                               landmark_names=["a"], shape=None, second=None,
                           sigma=sigma_pixels(config.finetune.sigma, config.dataset))


@pytest.mark.parametrize("window", [4, 40], ids=["windows", "larger than the volumes"])
def test_points_of_resampled_volumes(tmp_path, window):
    """On one canvas, larger than two of the three volumes: the bright voxel is found, to half a network pixel."""
    sizes = SIZE, (40, 9, 3), (21, 6, 9)
    paths = [write_nifti(tmp_path / f"{number}.nii", size) for number, size in enumerate(sizes)]
    dataset = {"image_size": (window,) * 3, "resample_mm": 1.0}
    found = find_landmarks(seeing_itself(**dataset), loaded(tmp_path, *paths, **dataset), "argmax")
    assert found.points.shape == (3, 1, 3) and found.scorer_points is None
    assert np.abs((found.points[:, 0, ::-1] - VOXEL) * (0.5, 1, 2)).max() <= 0.5 + 1e-6  # mm


@pytest.mark.parametrize("dataset", [{"image_size": (6, 12, 24)}, {"image_size": (4, 4, 4), "resample_mm": 1.0}],
                         ids=["resized", "windows"])
def test_pictures_show_the_stored_volume_upright(tmp_path, pictures, dataset):
    path = write_nifti(tmp_path / "a.nii")
    stored = np.array([VOXEL[::-1]], dtype=float)
    images = loaded(tmp_path, path, landmarks=stored, spacing=read_geometry(path).spacing_mm, **dataset)
    assert images.fits == ("resample_mm" not in dataset)
    detector = seeing_itself(**dataset)
    doubts = np.array([1.5, 3.0, 1]).reshape(3, 1, 1)
    found = Predictions(images, ["a"], stored[None] + (0, 2, 0), *doubts, detector=detector)
    draw_predictions(tmp_path / "out/a.png", found, 0, "title", np.array([3.0]))
    [seen] = pictures
    volume, steps = upright_by_nibabel(path)
    assert np.array_equal(seen.pixels[0], volume) and seen.spacing == pytest.approx(steps)
    place = tuple(seen.truth[0].astype(int))
    assert seen.pixels[0][place] == 100 and np.array_equal(seen.truth[0], place)
    # 2 voxels along the file's y: 2 mm of (-0.8, 0.6, 0), so mostly to the left, the picture's +x (of 1 mm)
    assert np.linalg.norm((seen.found - seen.truth) * seen.spacing) == pytest.approx(2)
    assert (seen.found - seen.truth)[0].tolist() == [0, 0, 2]
    assert seen.doubt.reach[0] * seen.spacing == pytest.approx([3, 3, 3])  # mm, along each axis
    assert list(seen.doubt.notes) == ["expected error 1.5 mm"]
    peak = np.unravel_index(seen.maps[0].argmax(), seen.maps[0].shape)
    scale = np.array(volume.shape) / seen.maps[0].shape
    assert np.abs((np.array(peak) + 0.5) * scale - 0.5 - place).max() <= scale.max() / 2 + 0.5
    assert (seen.title, seen.errors.tolist(), (tmp_path / "out/a.png").exists()) == ("title", [3], True)
    draw_predictions(tmp_path / "out/b.png", found, 0, "title")
    assert pictures[1].truth is None and pictures[1].errors is None
    detector.second = detector
    draw_predictions(tmp_path / "out/c.png", found, 0, "title")
    assert [each.contours for each in pictures[1:]] == ["half maximum", "half maximum, first stage"]


def test_pictures_of_a_pack_show_the_network_image(tmp_path, pictures):
    path = write_nifti(tmp_path / "data/images/a.nii")
    description = {"landmarks": ["tip_of it"], "splits": {"train": ["a"]}}
    (tmp_path / "data/dataset.json").write_text(json.dumps(description))
    (tmp_path / "data/landmarks.csv").write_text("image,tip_of it_x,tip_of it_y,tip_of it_z\na,17,4,1\n")
    config = Dataset(root=str(tmp_path / "data"), image_size=(6, 8, 10), cache_dir=str(tmp_path / "cache"))
    write_pack(config, tmp_path / "pack.npz")
    packed = config.model_copy(update={"root": str(tmp_path / "pack.npz")})
    images = load_images(load_source(packed).require("train"), packed)
    found = Predictions(images, ["tip_of it"], images.original_points(), *np.ones((3, 1, 1)))
    draw_predictions(tmp_path / "a.png", found, 0, "title", np.zeros(1))
    [seen] = pictures
    volume, steps = upright_by_nibabel(path)
    bright = np.array(np.unravel_index(volume.argmax(), volume.shape))
    assert seen.pixels.shape == (1, 6, 8, 10) and np.array_equal(seen.found, seen.truth)
    assert seen.truth[0] == pytest.approx((bright + 0.5) * (6, 8, 10) / volume.shape - 0.5)
    assert np.abs(np.unravel_index(seen.pixels[0].argmax(), (6, 8, 10)) - seen.truth[0]).max() <= 0.5
    assert seen.doubt.reach[0] * seen.spacing == pytest.approx([1, 1, 1])
    assert np.multiply(seen.spacing, (6, 8, 10)) == pytest.approx(np.multiply(steps, volume.shape))
    write_slicer_files(tmp_path / "m", found)
    assert not (tmp_path / "m").exists()


# --- a whole study ---


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """volumes(name, section={...}) -> (folder of the runs, config) of a tiny study of phantom volumes."""
    root = tmp_path_factory.mktemp("volumes")

    def make(name, **changes):
        tiny = merged(TINY, {
            "is_3d": True, "experiment": {"output_dir": str(root / name)},
            "dataset": {"name": "volumes", "layout": "folder", "root": str(root / "data"), "spacing_mm": None,
                        "cache_dir": str(root / "cache"), "image_size": [16, 16, 16],
                        "phantom": {"count": 10, "size": [20, 20, 20]}},
            "ddpm": {"iterations": 2, "checkpoint_iterations": [2], "log_every": 1, "validate_every": 2,
                     "sample_every": 2},
            "finetune": {"iterations": 2, "backbones": ["ddpm"]}, "evaluation": {"overlays": 1},
        })
        return root / name, parse_config(merged(tiny, changes), "volumes.json")

    return make


@pytest.fixture(scope="module")
def study(volumes):
    """(runs, data, page) of a finished study. Not to be changed."""
    runs, config = volumes("runs")
    return SimpleNamespace(runs=runs, data=runs.parent / "data", page=run_study(config, DEFAULT_STAGES),
                           cell=next(runs.glob(CELL)), pretraining=runs / "tiny/ddpm")


def points_of(table, image):
    return table[table.image == image][["x", "y", "z"]].to_numpy()


def predicted_alone(cell, data, names, out):
    """The points (N, 3) of each volume, which `predict` gets as paths."""
    table = pd.read_csv(predict(cell, [data / f"images/{name}.nii.gz" for name in names], out))
    return {name: points_of(table, f"{name}.nii.gz") for name in names}


def test_study_of_volumes(study):
    table = pd.read_csv(study.cell / "predictions.csv")
    assert list(table.columns[:6]) == ["image", "patient", "landmark", "x", "y", "z"]
    cases = list(table.image.unique())
    assert cases == ["case_008", "case_009", "case_010"] and len(table) == 3 * 12
    for case in cases:
        affine = nib.load(study.data / f"images/{case}.nii.gz").affine
        world = nib.affines.apply_affine(affine, points_of(table, case))
        rounding = 5.1e-5 * nib.affines.voxel_sizes(affine).sum()  # four decimals of a voxel
        written = positions(study.cell / f"markups/{case}.mrk.json")
        assert list(written) == list(table.landmark[:12])
        assert np.abs([position for position, _ in written.values()] - world * LPS).max() < rounding
        [truth] = json.loads((study.data / f"landmarks/{case}.mrk.json").read_text())["markups"]
        signs = LPS if truth["coordinateSystem"] == "LPS" else 1
        annotated = np.array([point["position"] for point in truth["controlPoints"]]) * signs
        errors = np.linalg.norm(world - annotated, axis=1)
        assert table[table.image == case].error.to_numpy() == pytest.approx(errors, abs=2 * rounding)
    metrics = json.loads((study.cell / "metrics.json").read_text())
    assert metrics["physical"]["mre"] == pytest.approx(table.error.mean(), abs=1e-3) and metrics["unit"] == "mm"
    assert metrics["paper"] is None and metrics["image_size"] == [16, 16, 16]


def test_report_of_volumes(study):
    page = study.page.read_text()
    assert study.page.exists() and "mm" in page and "vertex" in page
    assert len(list((study.cell / "overlays").glob("rank001_case_0*.png"))) == 1
    assert list((study.pretraining / "samples").glob("*.png"))


def test_predict_gives_the_points_of_evaluate(study, tmp_path):
    table = pd.read_csv(study.cell / "predictions.csv")
    for name, points in predicted_alone(study.cell, study.data, ("case_010", "case_008"), tmp_path / "out").items():
        np.testing.assert_allclose(points, points_of(table, name), atol=1e-3)
        assert positions(tmp_path / f"out/markups/{name}.nii.gz.mrk.json").keys() == set(table.landmark)
        assert (tmp_path / f"out/overlays/{name}.nii.gz.png").exists()


def test_a_killed_predict_leaves_no_half_table(study, tmp_path, monkeypatch):
    """Struck at the third of three batches; a whole one then writes each row once."""
    paths = sorted((study.data / "images").glob("*.nii.gz"))[:3]
    one_by_one, written = ("evaluation.batch_size=1",), []

    def struck(records, config):
        if records[0].image == paths[-1]:
            raise KeyboardInterrupt
        return load_images(records, config)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("landmarks_finetuning.predict.load_images", struck)
        predict(study.cell, paths, tmp_path / "out", overlays=False, overrides=one_by_one)
    assert len(list((tmp_path / "out/markups").iterdir())) == 2 and not list((tmp_path / "out").glob("*.csv"))
    to_csv = pd.DataFrame.to_csv
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda self, **how: written.append(len(self)) or to_csv(self, **how))
    table = predict(study.cell, paths, tmp_path / "out", overlays=False, overrides=one_by_one)
    assert written == [12, 12, 12]
    assert list(pd.read_csv(table).image.unique()) == [path.name for path in paths]
    assert table.read_text().count("image,patient,landmark") == 1


def test_crops_and_windows(volumes, study, tmp_path):
    """Voxels of 9 mm where the heads measure 20 cm: larger than the network's 16, on every axis."""
    runs, config = volumes("crops", dataset={"resample_mm": 9.0}, finetune={"sigma": 1.25})
    held = load_images(load_source(config.dataset).require("test"), config.dataset)
    assert not held.fits and (held.sizes.numpy() > 16).all()
    run_study(config, ("pretrain", "finetune"))
    cell = next(runs.glob(CELL))
    table = pd.read_csv(cell / "predictions.csv")
    size = dict(zip([record.id for record in held.records], held.original_sizes[:, ::-1], strict=True))
    alone = predicted_alone(cell, study.data, ("case_009",), tmp_path / "out")  # on a canvas of its own
    np.testing.assert_allclose(alone["case_009"], points_of(table, "case_009"), atol=1e-3)
    for case in size:
        points = points_of(table, case)
        assert ((points >= -1.5) & (points <= size[case] + 0.5)).all()  # or in the network pixel about the border
        world = nib.affines.apply_affine(nib.load(study.data / f"images/{case}.nii.gz").affine, points) * LPS
        written = [position for position, _ in positions(cell / f"markups/{case}.mrk.json").values()]
        assert np.abs(written - world).max() < 3e-3


def test_a_detector_keeps_the_sigma_that_it_was_trained_with(volumes, tmp_path):
    """One without the header's sigma_pixels was trained when crops scaled it: 20 of 256 pixels are 1.25 of 16."""
    _, config = volumes("sigma", dataset={"resample_mm": 9.0}, finetune={"sigma": 20.0, "backbones": ["scratch"]})
    run_dir = finetune_cell(config, Cell("scratch", 2, 0, 0))
    assert TrainedDetector(run_dir / "best.safetensors").sigma == 20
    tensors, header = read_tensors(run_dir / "best.safetensors")
    del header["sigma_pixels"]
    save_file(tensors, tmp_path / "old.safetensors", {"header": json.dumps(header)})
    old = TrainedDetector(tmp_path / "old.safetensors")
    assert old.sigma == 1.25
    (tmp_path / "config.json").write_text((run_dir / "config.json").read_text())
    assert TrainedDetector(tmp_path / "old.safetensors", ("evaluation.window_overlap=0",)).sigma == 1.25


def losses(folder):
    lines = read_metrics(folder / "metrics.jsonl")
    return [value for line in lines for key, value in line.items() if "loss" in key]


def test_activation_checkpointing_changes_no_loss(volumes, study, monkeypatch):
    import core.networks.unet

    runs, config = volumes("checkpointing", experiment={"activation_checkpointing": True})
    used, checkpoint = [], core.networks.unet.checkpoint
    monkeypatch.setattr(core.networks.unet, "checkpoint",
                        lambda *rest, **how: used.append(1) or checkpoint(*rest, **how))
    run_study(config, ("pretrain",))
    assert used
    used.clear()
    run_study(config, ("finetune",))
    assert used
    for folder in ("tiny/ddpm", str(study.cell.relative_to(study.runs))):
        expected = losses(study.runs / folder)
        assert len(expected) >= 3 and losses(runs / folder) == pytest.approx(expected, rel=1e-6)
