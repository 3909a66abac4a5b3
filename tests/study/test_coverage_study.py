"""A study whose labelled images its own pre-training chooses: planned before it, done after it, again after another."""

import json
import shutil

import pytest

from core.config.load import load_config
from core.runs.places import choosing_path
from landmarks_finetuning.report.build import build_report
from landmarks_finetuning.report.collect import aggregate, read_experiment
from landmarks_finetuning.report.findings import selection_sentence
from study.runs import study_runs
from tests.study.test_identity import (
    LAUNCH,
    STAGES,
    describe,
    finished,  # noqa: F401 (a fixture)
    home,  # noqa: F401
    write_config,
    write_images,
    write_labels,
)

COVERAGE = ("--set", "finetune.selection=coverage")


def cells(place, backbone):
    """The folders of the runs on images chosen by coverage."""
    return sorted(place.glob(f"runs/tiny/landmarks/{backbone}/*pick-coverage*/*"))


def trained_on(folder):
    return set(json.loads((folder / "inputs.json").read_text())["images"]["training"])


def order(place):
    return json.loads((place / "runs/tiny/ddpm/coverage.json").read_text())["order"]


def test_both_selections_side_by_side_and_again_after_another_pretraining(home, run_main):  # noqa: F811
    def launch(*more):
        status, out, err = run_main(LAUNCH, "--config", home / "study.json", *STAGES, *COVERAGE, *more)
        assert status == 0, err
        return out

    before = {path: path.read_bytes() for path in home.glob("runs/tiny/landmarks/*/*/*/metrics.json")}
    assert "3 runs, 0 done, 3 left" in launch()
    folders = [*cells(home, "ddpm"), *cells(home, "scratch"), *cells(home, "mean_shape")]
    assert len(folders) == 3 and all(trained_on(folder) == set(order(home)[:2]) for folder in folders)
    assert before == {path: path.read_bytes() for path in before}
    assert "3 runs, 3 done, 0 left" in launch()

    summary = aggregate(read_experiment(home / "runs/tiny").runs)
    summary["chosen"] = summary["variant"].str.contains("pick-coverage")
    assert sorted(zip(summary["backbone"], summary["chosen"], strict=True)) == [
        (start, chosen) for start in ("ddpm", "mean_shape", "scratch") for chosen in (False, True)]
    sentence = selection_sentence(summary)
    for start, name in (("ddpm", "diffusion pre-training"), ("scratch", "from scratch")):
        rows = summary[summary["backbone"] == start].set_index("chosen")["mre"]
        assert f"{name} at 2 labels {rows[True]:.2f} against {rows[False]:.2f}" in sentence
    assert "mean shape" not in sentence and selection_sentence(summary[~summary["chosen"]]) == ""
    html = build_report([home / "runs/tiny"]).read_text()
    assert "Variants named pick-coverage were trained on" in html

    shutil.rmtree(home / "runs/tiny/ddpm")
    out = launch("ddpm.learning_rate=0.01")
    assert out.count("set aside: ") == 3 and "are others than those that chose its images" in out, out
    assert all(trained_on(folder) == set(order(home)[:2]) for folder in folders)
    assert "3 runs, 3 done, 0 left" in launch("ddpm.learning_rate=0.01")


def test_a_plan_before_the_pretraining(tmp_path, make_values, run_main):
    write_labels(tmp_path / "data", write_images(tmp_path / "data", range(12)))
    describe(tmp_path / "data")
    path = write_config(tmp_path, make_values, finetune={"selection": "coverage", "backbones": ["scratch", "dino"]})
    values = json.loads(path.read_text())
    values["dataset"]["image_size"] = [64, 64]  # as the encoder needs
    path.write_text(json.dumps(values))
    status, out, err = run_main(LAUNCH, "--config", path, "--dry-run", "--stages", "pretrain", "ssl", "finetune")
    assert status == 0 and "pretrain  6 steps" in out and "3 runs, 0 done, 3 left" in out, err
    assert not (tmp_path / "runs/tiny/ddpm/coverage.json").exists()
    runs = study_runs(load_config(path), ("pretrain", "ssl", "finetune"))
    ddpm, dino = (tmp_path / "runs/tiny" / name for name in ("ddpm", "ssl/dino"))
    assert [run.needs for run in runs] == [(), (), (ddpm,), (ddpm,), (ddpm, dino)]


def test_all_starts_have_the_images_of_the_last_checkpoint(make_config, tmp_path):
    config = make_config(tmp_path, finetune={"selection": "coverage", "pretraining_iteration": 3})
    assert choosing_path(config).name == "ema_iter000006.safetensors"
    with pytest.raises(Exception, match="compares two"):
        make_config(tmp_path, finetune={"selection": "coverage", "transfer_from": "runs/other"})
