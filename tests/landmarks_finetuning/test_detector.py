"""The detector for Python programs against the table that `predict` writes, and the notebook that shows it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from core.config.load import parse_config
from core.runs.best import point_to_best
from core.runs.places import Cell
from landmarks_finetuning import Detector
from landmarks_finetuning.predict import predict
from landmarks_finetuning.train import finetune_cell
from tests.conftest import PROJECT, TINY, error_of, merged


@pytest.fixture(scope="module")
def runs(one_and_two_stages):
    """Run folders by what they are. Not to be changed."""
    return one_and_two_stages


@pytest.fixture
def pictures(phantom, tmp_path):
    """A folder of two phantom radiographs of unlike size, one below another folder."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    with Image.open(sorted(phantom.rglob("*.jpg"))[0]) as image:
        grey = image.convert("L")
    grey.save(folder / "a.png")
    grey.crop((4, 6, 70, 90)).save(folder / "more/b.png")
    return folder


def rows_of(table, name):
    found = pd.read_csv(table)
    return found[found.image == name]


def assert_same(landmarks, rows):
    """To the four decimals of the table."""
    assert list(landmarks.names) == list(rows.landmark)
    axes = list("xyz"[: landmarks.points.shape[1]])
    np.testing.assert_allclose(landmarks.points, rows[axes], atol=6e-5)
    np.testing.assert_allclose(landmarks.expected_error, rows.expected_error, atol=6e-5)
    np.testing.assert_allclose(landmarks.radius90, rows.radius90, atol=6e-5)
    assert ((landmarks.confidence >= 0) & (landmarks.confidence <= 1)).all()


@pytest.mark.parametrize("stages", ["one stage", "two stages"])
def test_it_answers_as_predict_does(runs, pictures, tmp_path, stages):
    run = runs[stages]
    table = predict(run, [pictures], tmp_path / "out", overlays=False)
    detector = Detector.load(str(run))
    first, second = detector(pictures)
    assert (first.image, second.image) == ("a.png", "more/b.png")
    assert_same(first, rows_of(table, "a.png"))
    assert_same(second, rows_of(table, "more/b.png"))
    alone = detector(pictures / "a.png")
    assert_same(alone, rows_of(table, "a.png"))
    assert (alone.unit, alone.calibrated, alone.spacing_mm) == ("mm", False, (2.5, 2.5))
    assert alone.names == detector.names
    assert alone[alone.names[2]].tolist() == alone.points[2].tolist()
    pixels = np.asarray(Image.open(pictures / "more/b.png"))
    in_memory, again = detector([pixels, pictures / "more/b.png"])
    assert in_memory.image == "array 0"
    for name in ("points", "expected_error", "radius90", "confidence"):
        np.testing.assert_array_equal(getattr(in_memory, name), getattr(again, name))


def test_an_array_with_a_spacing_or_in_colour_or_of_floats_is_the_same_image(runs, pictures):
    detector = Detector.load(runs["two stages"])
    pixels = np.asarray(Image.open(pictures / "a.png"))
    plain = detector(pixels, spacing_mm=2.5)  # what the run's config says of every image
    coloured = np.stack([pixels] * 3 + [np.zeros_like(pixels)], axis=2)
    for other in (coloured, pixels.astype(np.float64) * 256, np.asfortranarray(pixels)):
        np.testing.assert_allclose(detector(other).points, plain.points, atol=1e-3)
    wide = detector(pixels, spacing_mm=(5, 5.0))
    assert wide.spacing_mm == (5.0, 5.0)
    np.testing.assert_allclose(wide.expected_error, 2 * plain.expected_error, rtol=1e-6)


def test_an_ensemble_is_that_of_predict(runs, pictures, tmp_path):
    one, other = runs["two stages"], runs["another seed"]
    table = predict(one, [pictures / "a.png"], tmp_path / "out", False, (), [other])
    both = Detector.load(one, other)(pictures / "a.png")
    assert_same(both, rows_of(table, "a.png"))
    assert np.abs(both.points - Detector.load(one)(pictures / "a.png").points).max() > 0.01


def test_a_calibration_is_used(tiny_cell, phantom):
    image = sorted(phantom.rglob("*.jpg"))[0]
    detector = Detector.load(tiny_cell)
    bare = Detector(detector._trained, None)
    assert detector(image).calibrated and not bare(image).calibrated
    assert np.abs(detector(image).radius90 / bare(image).radius90 - 1).max() > 0.01


@pytest.mark.parametrize("links", [True, False], ids=["a link", "a file"])
def test_an_experiment_stands_for_its_best_run(tiny_cell, phantom, tmp_path, run_main, monkeypatch, links):
    """By the folder, its `best`, the run or its weights: the same calibrated answers, as those of predict."""
    experiment = tmp_path / "study"
    (experiment / "ddpm").mkdir(parents=True)
    assert "does not exist" in error_of(Detector.load, experiment)  # as landmarks/ with its ddpm/
    (experiment / "ddpm/config.json").write_text("{}")
    assert error_of(Detector.load, experiment).endswith("study has no best run: a launch ends by naming it (stage "
                                                        "report); it holds no trained run yet")
    run = experiment / Path(*tiny_cell.parts[-4:])
    shutil.copytree(tiny_cell, run)
    image = sorted(phantom.rglob("*.jpg"))[0]
    assert "study has no best run" in (said := error_of(Detector.load, experiment)) and str(run) in said
    if not links:
        monkeypatch.setattr(Path, "symlink_to", refuse_links)
    point_to_best(experiment, run)
    places = experiment, experiment / "best", run, run / "best.safetensors"
    for number, place in enumerate(places):
        found = Detector.load(place)(image)
        assert found.calibrated
        status, _, said = run_main("landmarks_finetuning.predict", place, image, "--out", tmp_path / str(number),
                                   "--no-overlays")
        assert status == 0 and "not calibrated" not in said
        assert_same(found, rows_of(tmp_path / f"{number}/predictions.csv", image.name))
    both = Detector.load(experiment, experiment / "best")(image)
    np.testing.assert_allclose(both.points, found.points, atol=1e-3)


def refuse_links(*_, **__):
    raise PermissionError("links are not permitted here")


def test_volumes(tmp_path):
    config = parse_config(merged(TINY, {
        "is_3d": True, "experiment": {"output_dir": str(tmp_path / "runs")},
        "dataset": {"name": "volumes", "layout": "folder", "root": str(tmp_path / "data"), "spacing_mm": None,
                    "cache_dir": str(tmp_path / "cache"), "image_size": [16, 16, 16],
                    "phantom": {"count": 10, "size": [20, 20, 20]}},
        "finetune": {"iterations": 2}, "evaluation": {"overlays": 1}}), "volumes.json")
    run = finetune_cell(config, Cell("scratch", 2, 0, 0))
    table = predict(run, [tmp_path / "data/images"], tmp_path / "out", overlays=False)
    detector = Detector.load(run)
    found = detector(tmp_path / "data/images")
    for each in found:
        assert_same(each, rows_of(table, each.image))
    assert found[0].points.shape[1] == 3 and len(found) == 10
    volume = np.random.default_rng(0).normal(size=(20, 18, 22))
    assert detector(volume, spacing_mm=(1, 1, 2)).points.shape == found[0].points.shape
    assert error_of(detector, volume[0]) == ("array has shape (18, 22); this detector takes (depth, height, width)")


def test_mistakes_are_one_line(runs, pictures, tmp_path):
    detector = Detector.load(runs["one stage"])
    assert "has shape (3, 4, 5)" in error_of(detector, np.zeros((3, 4, 5)))
    assert "holds <U1, no real numbers" in error_of(detector, np.full((4, 4), "a"))
    assert "1 non-finite pixels, first at (y, x)=(1, 2)" in error_of(
        detector, np.where(np.arange(12).reshape(3, 4) == 6, np.nan, 0.0))
    assert "spacing_mm is for arrays" in error_of(detector, pictures / "a.png", 0.1)
    assert "spacing_mm must be a number above 0" in error_of(detector, np.zeros((9, 9)), -1)
    assert "a numpy array or a path, not int" in error_of(detector, [3])
    assert "does not exist" in error_of(detector, tmp_path / "nowhere.png")
    assert "best.safetensors" in error_of(Detector.load, tmp_path)
    with pytest.raises(KeyError, match="nose; the landmarks are"):
        detector(pictures / "a.png")["nose"]


def test_importing_the_package_brings_in_no_torch():
    code = ("import sys, landmarks_finetuning; assert 'torch' not in sys.modules; "
            "from landmarks_finetuning import Detector; assert 'torch' in sys.modules; "
            "print(Detector.__module__, hasattr(landmarks_finetuning, 'Detectr'))")
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["landmarks_finetuning.detector", "False"]


def blocks(page: str) -> list[str]:
    """The Python code of a Markdown page."""
    return [part.split("```")[0] for part in page.split("```python\n")[1:]]


@pytest.fixture
def at_home(runs, pictures, tmp_path, monkeypatch):
    """A working folder where runs/mine, runs/mine_seed1 and new_images/ lie, as the page and the notebook have them."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(runs["two stages"])
    (tmp_path / "runs/mine_seed1").symlink_to(runs["another seed"])
    (tmp_path / "new_images").symlink_to(pictures)
    monkeypatch.chdir(tmp_path)


def test_the_page_runs_as_written(at_home, capsys):
    [code] = blocks((PROJECT / "docs/python.md").read_text())
    assert len(code.splitlines()) <= 10
    exec(compile(code, "docs/python.md", "exec"), {})
    assert "mm" in capsys.readouterr().out


def test_the_notebook_runs_as_written(at_home, capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads(Path(PROJECT / "docs/python.ipynb").read_text())["cells"]
    names: dict = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert capsys.readouterr().out.count("mm") >= 4
    assert len(names["landmarks"].points) == len(names["detector"].names)
