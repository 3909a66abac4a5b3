"""A made-up study of hundreds of runs, and what a run more costs its report."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import large_report
from benchmarks.large_report import write_study
from landmarks_finetuning.report import figures, pictures, run_files
from landmarks_finetuning.report.build import build_report
from landmarks_finetuning.report.collect import read_experiment

PER_RUN_BYTES = 5000  # of the page: a row of "Every run", a line of each of three measures
STARTS, SHOTS, IMAGES = 2, (1, 10, 25), 8


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three numbers of labels, and pictures of 60 x 64 pixels."""
    monkeypatch.setattr(large_report, "SHOTS", SHOTS)
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 64, 3), np.uint8)).save(buffer, "PNG")
    monkeypatch.setattr(large_report, "_picture", lambda rng: buffer.getvalue())


def test_a_run_more_costs_the_page_little_and_is_read_once(tmp_path, monkeypatch):
    """Of 6 and 18 runs; the largest figure has hundreds of lines in a 300-run study, so its points are rationed."""
    read: list[Path] = []
    whole = run_files.read_predictions
    monkeypatch.setattr(run_files, "read_predictions", lambda folder: read.append(folder) or whole(folder))
    sizes = []
    for draws in (1, 3):
        read.clear()
        count = write_study(tmp_path / f"draws{draws}", draws, STARTS, IMAGES)
        assert count == STARTS * len(SHOTS) * draws
        page = build_report([tmp_path / f"draws{draws}"]).read_text(encoding="utf8")
        assert len(read) == len(set(read)) == count
        assert page.count("data:image/jpeg") == len(SHOTS) * 4  # of the trained start's first draws, all of them
        sizes.append(len(re.sub("data:image/jpeg[^\"]*", "", page).encode()))
    added = STARTS * len(SHOTS) * 2
    assert 0 < (sizes[1] - sizes[0]) / added < PER_RUN_BYTES


def test_where_the_budget_ends_every_run_has_its_worst_image_first(tmp_path):
    """Budget for 4 of 12 pictures: one of each of 3 runs, then the second of one; the folder of the rest is named."""
    write_study(tmp_path / "study", 1, STARTS, IMAGES)
    study = read_experiment(tmp_path / "study")
    groups = pictures.worst_cases(study, "s", study.runs)
    one = len(pictures.Pictures().embed(groups[0]["files"][0], 640, 78).partition(",")[2])
    budget = pictures.Pictures(remaining_bytes=4 * one + 10)
    pictures.embed_cases(groups, budget, study.path / "report")
    assert [len(group["images"]) for group in groups] == [2, 1, 1] and budget.left_out == 8
    assert all(group["images"][0]["image"] == "000" for group in groups)
    assert groups[-1]["folder"] == f"../{groups[-1]['place']}" and "3 of 4 pictures" in groups[-1]["note"]


def test_rationed_points_keep_both_ends():
    points = np.stack([np.arange(1000.0), np.arange(1000.0) ** 2], axis=1)
    few = figures.thinned(points, 5)
    assert few[:, 0].tolist() == pytest.approx([0, 250, 500, 749, 999], abs=1)
    assert figures.thinned(points[:3], 5).tolist() == points[:3].tolist()
