"""Scoring against figures known beforehand: clusters of the bootstrap, the guess without an image."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from core.config.load import parse_config
from core.data.dataset import load_images
from core.data.source import load_source
from core.runs.places import MEAN_SHAPE, Cell
from landmarks_finetuning.evaluate import evaluate_mean_shape, score
from landmarks_finetuning.predictions import Predictions
from landmarks_finetuning.statistics import bootstrap_interval


def write_dataset(root, sizes, splits, points, patients=None):
    """Images of `sizes` {id: (height, width)}, 1 mm a pixel; `points` {id: (N, 2) of (y, x)} are the landmarks."""
    (root / "images").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for name, size in sizes.items():
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(root / f"images/{name}.png")
        row = {"image": name} | ({"patient": patients[name]} if patients else {})
        for number, (y, x) in enumerate(points[name]):
            row |= {f"p{number}_x": x, f"p{number}_y": y}
        rows.append(row)
    pd.DataFrame(rows).to_csv(root / "landmarks.csv", index=False)
    names = [f"p{number}" for number in range(len(next(iter(points.values()))))]
    (root / "dataset.json").write_text(json.dumps({"landmarks": names, "spacing_mm": 1.0, "splits": splits}))


def study(tmp_path, **dataset):
    return parse_config({
        "experiment": {"name": "study", "output_dir": str(tmp_path / "runs"), "seed": 5},
        "dataset": {"name": "mine", "layout": "folder", "root": str(tmp_path / "data"), "image_size": [16, 16],
                    "cache_dir": str(tmp_path / "cache"), **dataset},
        "finetune": {"validation": "none", "selection": "first"}, "evaluation": {"overlays": 0},
    }, "study.json")


@pytest.mark.parametrize("named", [True, False], ids=["patients", "images alone"])
def test_the_interval_is_over_patients(tmp_path, named):
    """Six patients with two images each, whose errors (along x, in mm) are equal: six values and not twelve."""
    names = [f"{patient}{visit}" for patient in "abcdef" for visit in (1, 2)]
    errors = np.repeat([1.0, 1.5, 2.0, 3.0, 5.0, 8.0], 2)
    patients = {name: name[0] for name in ["t", *names]}
    write_dataset(tmp_path / "data", dict.fromkeys(patients, (20, 30)), {"train": ["t"], "test": names},
                  dict.fromkeys(patients, [(10.0, 10.0)]), patients if named else None)
    config = study(tmp_path)
    source = load_source(config.dataset)
    test_images = load_images(source.require("test"), config.dataset)
    order = [names.index(record.id) for record in test_images.records]
    points = test_images.original_points()
    points[:, 0, 1] += errors[order]
    metrics = score(tmp_path / "run", config, source,
                    Predictions(test_images, source.landmark_names, points, np.ones((12, 1))), {})
    each = errors[::2, None] if named else errors[order, None]
    expected = bootstrap_interval(each, range(len(each)), seed=5)
    assert metrics["physical"]["interval"] == pytest.approx(expected, rel=1e-9)
    assert metrics["physical"]["mre"] == pytest.approx(errors.mean())


def test_the_mean_shape_stands_about_the_centre_of_each_test_image(tmp_path):
    """Landmarks at the same place about every image's centre: the guess is exact, though test images are larger."""
    sizes = {**{f"train{n}": (40, 30) for n in range(3)}, **{f"test{n}": (64, 50) for n in range(4)}}
    offsets = np.array([[3.0, -5.0], [-8.0, 6.0], [0.0, 0.0]])
    points = {name: (np.array(size) - 1) / 2 + offsets for name, size in sizes.items()}
    splits = {"train": [n for n in sizes if "train" in n], "test": [n for n in sizes if "test" in n]}
    write_dataset(tmp_path / "data", sizes, splits, points)
    folder = evaluate_mean_shape(study(tmp_path, resample_mm=1.0), Cell(MEAN_SHAPE, 3, 0, 0))
    table = pd.read_csv(folder / "predictions.csv")
    assert len(table) == 4 * 3
    np.testing.assert_allclose(table["error"], 0, atol=1e-6)
    np.testing.assert_allclose(table[["y", "x"]].to_numpy().reshape(4, 3, 2), [points["test0"]] * 4, atol=1e-3)
