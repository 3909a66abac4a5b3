"""Runs of unlike data are never averaged or compared: they stand apart, with the reason, on the page as well."""

import json
import os

import pytest

from landmarks_finetuning.report.alike import set_apart
from landmarks_finetuning.report.build import build_report
from landmarks_finetuning.report.collect import read_experiment
from tests.landmarks_finetuning.report.test_report import write_run

IMAGES = {"training": {"a": ["1", "x"], "b": ["2", "y"]}, "validation": {"v": ["3", "z"]}}


def write(root, time, backbone, draw, errors, images=IMAGES, start=None, scored_on="t1", **finetune):
    """A scored run with what it was made from, as of `time` seconds."""
    folder = write_run(root, backbone, 10, draw, errors, scored_on=scored_on)
    weights = None if start is None else {"file": "x", "sha256": start, "size": 1, "mtime_ns": 1}
    (folder / "inputs.json").write_text(json.dumps({"images": images, "start": weights}))
    (folder / "config.json").write_text(json.dumps({"finetune": finetune}))
    os.utime(folder / "metrics.json", (time, time))
    return folder


@pytest.mark.parametrize("change, reason", [
    ({"images": {**IMAGES, "training": {"a": ["1", "x"], "b": ["2", "old"]}}},
     "it was made from other labels than newer runs of this draw: 1 image (b) with other labels in training since"),
    ({"images": {**IMAGES, "training": {"a": ["1", "x"]}}}, "1 image (b) added to training since"),
    ({"scored_on": "t0"}, "it was scored on other test images or labels than newer runs"),
    ({"start": "w0"}, "it started from other weights than newer runs of its kind"),
])
def test_an_older_run_of_other_data_stands_apart(tmp_path, change, reason):
    root = tmp_path / "study"
    old = write(root, 100, "ddpm", 0, [[9, 9], [9, 9]], **({"start": "w1"} | change))
    write(root, 200, "ddpm", 1, [[1, 1], [1, 1]], {**IMAGES, "training": {"c": ["5", "q"]}}, start="w1")
    write(root, 300, "scratch", 0, [[2, 2], [2, 2]])
    experiment = read_experiment(root)
    assert [(run.folder, run.reason.endswith(reason)) for run in experiment.apart] == [(old.resolve(), True)]
    means = experiment.runs.groupby("backbone")["mre"].mean()
    assert means.to_dict() == {"ddpm": 1.0, "scratch": 2.0}  # 9 would make 5 of it
    page = build_report([root]).read_text()
    assert "1 run is left out of every figure" in page and reason.partition(":")[0] in page


def test_runs_without_a_score_answer_other_images_once_there_are_more_labels(tmp_path):
    folders = [write(tmp_path / "study", time, "ddpm", draw, [[1, 1]], scored_on=images)
               for time, draw, images in ((100, 0, "t0"), (200, 1, "t1"))]
    for folder, time in zip(folders, (100, 200), strict=True):
        metrics = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps(metrics | {"split": "unlabelled"}))
        os.utime(folder / "metrics.json", (time, time))
    assert [(run.folder, run.reason) for run in set_apart(folders)] == [
        (folders[0], "it answered other unlabelled images than newer runs, as labels were added or changed since")]


def test_alike_and_unrecorded_runs_stay(tmp_path):
    """Other draws have other images; runs held out otherwise have other splits of the draw; old runs say nothing."""
    root = tmp_path / "study"
    folders = [write(root, 100, "ddpm", 0, [[1, 1]], start="w"), write(root, 200, "scratch", 0, [[2, 2]]),
               write(root, 300, "scratch", 1, [[2, 2]], {"training": {"z": ["1", "1"]}, "validation": {}}),
               write(root, 400, "imagenet", 0, [[2, 2]], {"training": {"a": ["1", "x"]}, "validation": {}},
                     validation=1),
               write_run(root, "random", 10, 0, [[3, 3]])]
    assert set_apart(folders) == []
