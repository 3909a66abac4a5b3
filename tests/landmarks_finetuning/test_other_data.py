"""Another hospital's data set, all of it test, scored by a run: the figures, what counts of its config, mistakes."""

import csv
import json
import shutil

import pytest

from core.config.load import load_config
from core.data.source import load_source

EVALUATING = "landmarks_finetuning.evaluate"


@pytest.fixture
def hospital(tmp_path, tiny_study):
    """The phantom's test images as a folder data set without splits: all of it is test."""
    source, root = load_source(load_config(tiny_study).dataset), tmp_path / "hospital"
    (root / "images").mkdir(parents=True)
    header = ["image", *(f"{name}_{axis}" for name in source.landmark_names for axis in "xy")]
    with (root / "landmarks.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(header)
        for record in source.splits["test"]:
            shutil.copy(record.image, root / "images")
            table.writerow([record.image.name, *record.truth[:, ::-1].reshape(-1).tolist()])
    describe(root, landmarks=source.landmark_names[::-1], spacing_mm=2.5)
    return root


def describe(root, **values):
    (root / "dataset.json").write_text(json.dumps(values))


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_all_labels_are_scored_as_the_same_images_at_home(hospital, tiny_cell, tmp_path, run_main):
    """Same images, same labels, landmarks in another order: the run's own error. Its folder stays as it was."""
    own, before = json.loads((tiny_cell / "metrics.json").read_text()), files_of(tiny_cell)
    status, out, err = run_main(EVALUATING, tiny_cell, "--data", hospital, "--out", tmp_path / "score")
    assert status == 0 and "4 test images" in out and "files that the run" not in err
    metrics = json.loads((tmp_path / "score/metrics.json").read_text())
    assert metrics["physical"]["mre"] == pytest.approx(own["physical"]["mre"], rel=1e-9)
    assert (metrics["dataset"], metrics["layout"], metrics["images"]) == ("hospital", "folder", 4)
    with (tmp_path / "score/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 19 and all(row["truth_x"] for row in rows)
    assert {path: time for path, time in files_of(tiny_cell).items() if path.name != ".lock"} == {
        path: time for path, time in before.items() if path.name != ".lock"}


def test_a_config_says_where_the_data_lie_and_the_run_how_they_are_read(hospital, tiny_cell, tmp_path, run_main):
    """Of its dataset section the root, spacing and exclusions count; the size is the network's, the split its own."""
    names = [path.stem for path in sorted((hospital / "images").iterdir())]
    described = json.loads((hospital / "dataset.json").read_text())
    describe(hospital, **described, splits={"train": names[:1], "test": names[1:]})
    path = tmp_path / "there.json"
    path.write_text(json.dumps({"dataset": {"name": "there", "root": str(hospital), "image_size": [64, 64],
                                            "exclude": names[-1:], "spacing_mm": 5.0}}))
    status, out, err = run_main(EVALUATING, tiny_cell, "--data", path, "--out", tmp_path / "score")
    assert status == 0 and "2 test images" in out, err
    metrics = json.loads((tmp_path / "score/metrics.json").read_text())
    assert (metrics["image_size"], metrics["dataset"]) == ([48, 48], "there")
    with (tiny_cell / "predictions.csv").open() as file:
        own = [float(row["error"]) for row in csv.DictReader(file) if row["image"] in names[1:3]]
    assert metrics["physical"]["mre"] == pytest.approx(2 * sum(own) / len(own), rel=1e-4)  # pixels of 5 mm, not 2.5


def test_images_that_trained_the_run_are_named(hospital, tiny_cell, tiny_study, tmp_path, run_main):
    """By content, whatever they are called."""
    trained = json.loads((tiny_cell / "metrics.json").read_text())["training_images"][0]
    records = load_source(load_config(tiny_study).dataset).splits["train"]
    image = next(record.image for record in records if record.id == trained)
    shutil.copy(image, hospital / "images" / f"{sorted(p.name for p in (hospital / 'images').iterdir())[0]}")
    status, _, err = run_main(EVALUATING, tiny_cell, "--data", hospital, "--out", tmp_path / "score")
    assert status == 0 and "note: 1 image (" in err and "are files that the run was made from" in err


def test_mistakes(hospital, tiny_cell, tmp_path, run_main):
    for arguments, told in (
            (("--data", tmp_path / "nowhere"), "nowhere does not exist; give a folder with images/"),
            (("--data", hospital, "--out", tiny_cell), "is the run's own folder"),
            (("--data", hospital, "--set", "dataset.spacing_mm=1"), "--data says what the data set is")):
        status, _, err = run_main(EVALUATING, tiny_cell, *arguments)
        assert status == 2 and err.count("\n") == 1 and told in err
    describe(hospital, landmarks=["tip"])
    status, _, err = run_main(EVALUATING, tiny_cell, "--data", hospital)
    assert status == 2 and err.count("\n") == 1
