"""The last lines of a launch, from the tables of a built report, against hand-made numbers."""

import json
from pathlib import Path

import pytest

from core.runs.best import run_folder
from landmarks_finetuning.report.best import best_run
from landmarks_finetuning.report.build import build_report
from study.ending import ending, table_lines
from tests.landmarks_finetuning.report.test_report import write_run


@pytest.fixture
def experiment(tmp_path):
    """ddpm at 10 labels: validation errors 1.0 and 3.0, mean 2; scratch: 1.9 in one run, which so is the best start.

    Test errors say the opposite: ddpm 2, scratch 9.
    """
    root = tmp_path / "my study"
    for backbone, draw, errors, validation in (("ddpm", 0, [[1, 3], [2, 2]], 1.0), ("ddpm", 1, [[1, 3], [2, 2]], 3.0),
                                               ("scratch", 0, [[9, 9], [9, 9]], 1.9)):
        run = write_run(root, backbone, 10, draw, errors, validation_mre=validation)
        (run / "best.safetensors").touch()
        (run / "inputs.json").write_text(json.dumps({"images": {"training": {"t": ["a", "b"]}, "validation": {
            "v1": ["a", "b"], "v2": ["c", "d"]}}, "start": None}))
    bare = write_run(root, "mean_shape", 10, 0, [[20, 20], [20, 20]], validation_mre=0.1)  # has no weights
    assert not (bare / "best.safetensors").exists()
    return root


def test_the_lines(experiment, monkeypatch):
    page = build_report([experiment])
    monkeypatch.setattr("sys.executable", str(Path.cwd() / ".venv/bin/python"))
    best = "landmarks/scratch/default/shots010_draw0_seed0"
    assert ending(experiment, page) == [
        "cephalo, test images:",
        "  who         labels     error  95 % interval",
        "  ddpm            10   2.00 mm              -",
        "  scratch         10   9.00 mm              -",
        "  mean_shape      10  20.00 mm              -",
        f"report: {page}",
        f"best run: {experiment}/best -> {best}",
        "  From scratch, 10 labels: lowest of 3 by the error on the 2 validation images, not on test images: 1.90 mm",
        f"next: .venv/bin/python -m landmarks_finetuning.predict '{experiment}' NEW_IMAGES --out predictions",
    ]
    assert ending(experiment, page, Path("my data"))[-1] == (
        f"or look, correct, label: .venv/bin/python -m study.review '{experiment}' --images 'my data'")
    assert run_folder(experiment).samefile(experiment / best)
    assert f"<code>{best}</code> (From scratch, 10 labels: lowest of 3" in page.read_text(encoding="utf8")


def test_the_better_start_then_its_better_run(experiment):
    metrics = experiment / "landmarks/scratch/default/shots010_draw0_seed0/metrics.json"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"validation_mre": 2.1}))
    best = best_run(experiment)
    assert best.folder.parts[-3:] == ("ddpm", "default", "shots010_draw0_seed0")
    assert best.reason.endswith("not on test images: 1.00 mm; mean of the 2 runs alike 2.00")
    assert best_run(experiment, {best.folder}).folder.parts[-3] == "scratch"  # left: ddpm at 3.0 and scratch at 2.1


def test_validation_images_that_differ_are_told(experiment):
    record = experiment / "landmarks/ddpm/default/shots010_draw1_seed0/inputs.json"
    record.write_text(record.read_text().replace("v2", "v3"))
    assert "error on its own validation images, which differ between runs, not on test" in best_run(experiment).reason


def test_without_validation_no_error_chooses(tmp_path):
    for backbone, shots, mean in (("scratch", 10, 1), ("ddpm", 10, 5), ("ddpm", 5, 1)):
        run = write_run(tmp_path / "s", backbone, shots, 0, [[mean, mean], [mean, mean]])
        (run / "best.safetensors").touch()
        (run / "metrics.jsonl").write_text('{"step": 10, "loss": 2.0}\n')
    best = best_run(tmp_path / "s")
    assert best.folder.parts[-3:] == ("ddpm", "default", "shots010_draw0_seed0") and "no error chose it" in best.reason


def test_nothing_to_choose(tmp_path):
    write_run(tmp_path / "s", "ddpm", 10, 0, [[1, 1]])
    page = build_report([tmp_path / "s"])
    assert best_run(tmp_path / "s") is None and not (tmp_path / "s/best").exists()
    assert ending(tmp_path / "s", page)[-1] == f"report: {page}"


def test_a_long_table_is_cut():
    row = {"backbone": "ddpm", "variant": "default", "unit": "mm", "interval_low": "1", "interval_high": "2.5"}
    lines = table_lines([{**row, "shots": str(n), "mre": "1.5"} for n in range(1, 16)])
    assert lines[1].split() == ["ddpm", "15", "1.50", "mm", "1.00", "to", "2.50"] and len(lines) == 14
    assert lines[-1].startswith("  and 3 more: ")
