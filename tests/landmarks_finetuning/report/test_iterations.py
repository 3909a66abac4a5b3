"""The choice of the pre-training iteration, the method that the report makes of it, and what training costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from core.config.unet import UNet
from core.training.run_log import read_metrics
from landmarks_finetuning.report.build import build_report
from landmarks_finetuning.report.collect import aggregate, loss_setting, main_variants, read_experiment
from landmarks_finetuning.report.compute import training_flops, training_images
from landmarks_finetuning.report.findings import comparisons, setting_sentence
from landmarks_finetuning.report.iterations import choice_sentence, family, iteration_means, main_family, with_chosen
from tests.landmarks_finetuning.report.test_report import write_run

TINY = UNet(base_channels=4, channel_multipliers=(1,), norm_groups=1, attention_heads=1, attention_head_channels=4)


def run(root: Path, backbone: str, variant: str, validation: float, test: float, shots: int = 10, draw: int = 0,
        iteration: int | None = None, checkpoint: str | None = None) -> Path:
    """A run with its validation and test errors; the log also holds a step that was not kept."""
    made = write_run(root / "made" / variant, backbone, shots, draw, [[test, test]] * 8, variant=variant)
    config = {"dataset": {"name": "cephalo", "image_size": [8, 8]}, "unet": TINY.model_dump(),
              "ddpm": {"checkpoint_iterations": [4000, 8000]},
              "finetune": {"pretraining_iteration": iteration, "checkpoint": checkpoint}}
    (made / "config.json").write_text(json.dumps(config))
    lines = [{"step": 5, "images_per_second": 10.0, "seconds": 2.0, "loss": 1.0},
             {"step": 5, "validation_loss": 9.0, "validation_mre": 0.0},
             {"step": 10, "images_per_second": 30.0, "seconds": 1.0, "loss": 1.0},
             {"step": 10, "validation_loss": 1.0, "validation_mre": validation}]
    (made / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = root / "landmarks" / backbone / variant / made.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    return made.rename(folder)


@pytest.fixture
def root(tmp_path) -> Path:
    """At 10 labels validation says 8000 (4 and 6 against 5 and 6), at 1 label 4000; the test errors the opposite."""
    root = tmp_path / "study"
    run(root, "ddpm", "iter-4000", 5.0, 1.0, iteration=4000)
    run(root, "ddpm", "iter-4000", 6.0, 1.0, draw=1, iteration=4000)
    run(root, "ddpm", "default", 4.0, 2.0)  # null: the last one
    run(root, "ddpm", "default", 6.0, 2.0, draw=1)
    run(root, "ddpm", "iter-4000", 7.0, 9.0, shots=1, iteration=4000)
    run(root, "ddpm", "default", 8.0, 3.0, shots=1)
    for shots, draw in ((10, 0), (10, 1), (1, 0)):
        run(root, "scratch", "default", 5.5, 4.0, shots, draw)
    return root


def chosen(means: pd.DataFrame) -> dict[int, int]:
    rows = means[means["chosen"]]
    return dict(zip(rows["shots"], rows["iteration"], strict=True))


def test_the_validation_error_chooses_and_the_test_error_does_not(root):
    means = iteration_means(read_experiment(root).runs)
    assert means[["shots", "iteration", "validation_mre", "mre", "runs"]].values.tolist() == [
        [1, 0, 5.5, 4.0, 1], [1, 4000, 7.0, 9.0, 1], [1, 8000, 8.0, 3.0, 1],
        [10, 0, 5.5, 4.0, 2], [10, 4000, 5.5, 1.0, 2], [10, 8000, 5.0, 2.0, 2]]
    assert chosen(means) == {1: 4000, 10: 8000}  # scratch is no choice, though best at 1 label


def test_the_chosen_runs_are_one_method_everywhere(root):
    runs = read_experiment(root).runs
    means = iteration_means(runs)
    method = with_chosen(runs, means)
    ours = method[method["backbone"] == "ddpm"].sort_values(["shots", "draw"])
    assert ours[["variant", "shots", "draw", "pretraining_iteration", "mre"]].values.tolist() == [
        ["iter-best", 1, 0, 4000, 9.0], ["iter-best", 10, 0, 8000, 2.0], ["iter-best", 10, 1, 8000, 2.0]]
    assert len(method[method["backbone"] == "scratch"]) == 3
    found = comparisons(method, aggregate(method)).set_index("shots")
    assert found.loc[1, ["method_mre", "rival_mre"]].tolist() == [9.0, 4.0]
    assert found.loc[10, ["method_mre", "rival_mre"]].tolist() == [2.0, 4.0]
    sentence = choice_sentence(main_family(method, means), "mm")
    assert "1 label 4000 (7.00 mm; 8000: 8.00); 10 labels 8000 (5.00 mm; 4000: 5.50)." in sentence


def test_the_report_shows_the_chosen_and_lists_all(root):
    page = build_report([root])
    tables, html = page.parent / "tables", page.read_text(encoding="utf8")
    summary = pd.read_csv(tables / "summary.csv")
    assert summary[summary["backbone"] == "ddpm"]["mre"].tolist() == [9.0, 2.0]
    assert len(pd.read_csv(tables / "runs.csv")) == 9
    table = pd.read_csv(tables / "table2_cephalo.csv")
    ours = table[(table["method"] == "Diffusion pre-training") & (table["metric"] == "MRE")]
    assert ours[["shots", "ours"]].values.tolist() == [[1, 9.0], [10, 2.0]]
    listed = pd.read_csv(tables / "pretraining_iterations.csv")
    assert chosen(listed) == {1: 4000, 10: 8000} and "paths" not in listed
    assert "10 labels 8000 (5.00 mm; 4000: 5.50)" in html and "Every run (9)" in html


def test_of_equal_errors_the_earliest_is_chosen(root):
    run(root, "ddpm", "iter-2000", 4.0, 1.0, iteration=2000)
    run(root, "ddpm", "iter-2000", 6.0, 1.0, draw=1, iteration=2000)
    assert chosen(iteration_means(read_experiment(root).runs)) == {1: 4000, 10: 2000}


def test_an_iteration_whose_runs_are_not_all_there_is_not_chosen(root):
    run(root, "ddpm", "iter-2000", 1.0, 1.0, iteration=2000)  # one draw of two
    runs = read_experiment(root).runs
    means = iteration_means(runs)
    assert chosen(means) == {1: 4000, 10: 8000}
    said = choice_sentence(main_family(with_chosen(runs, means), means), "mm")
    assert "2000: 1.00 over 1 of 2 runs, so not compared" in said


def test_the_same_iteration_twice_counts_once(root):
    """"default" and "iter-8000" start from the same file."""
    for draw, error in ((0, 4.0), (1, 6.0)):
        run(root, "ddpm", "iter-8000", error, 2.0, draw=draw, iteration=8000)
    runs = read_experiment(root).runs
    means = iteration_means(runs)
    assert means.set_index(["shots", "iteration"])["runs"].tolist() == [1, 1, 1, 2, 2, 2]
    assert len(with_chosen(runs, means)) == 3 + 3


def test_each_loss_chooses_for_itself_beside_its_own_scratch(root):
    for iteration, error in ((4000, 2.0), (8000, 3.0)):
        for draw in (0, 1):
            run(root, "ddpm", f"target-pixel_iter-{iteration}", error, 5.0, draw=draw, iteration=iteration)
    run(root, "scratch", "target-pixel", 1.0, 6.0)
    runs = read_experiment(root).runs
    means = iteration_means(runs)
    pixel = means[means["variant"] == "target-pixel_iter-best"]
    assert chosen(pixel) == {10: 4000} and pixel["validation_mre"].tolist() == [1.0, 2.0, 3.0]
    assert chosen(means[means["variant"] == "iter-best"]) == {1: 4000, 10: 8000}
    method = with_chosen(runs, means)
    assert main_variants(method) == {"ddpm": "iter-best", "scratch": "default"}
    assert set(main_family(method, means)["variant"]) == {"iter-best"}
    assert setting_sentence(method).startswith("2 settings of the loss were run (the default, target-pixel). Verdicts, "
                                               "bars and the curves by distance are about the default;")
    assert setting_sentence(read_experiment(root).runs.query("variant == 'default'")) == ""


def test_a_ddpm_from_another_study_chooses_for_itself_and_is_not_the_main_one(root):
    for iteration, error in ((3000, 1.0), (6000, 2.0)):
        for shots, draw in ((10, 0), (10, 1), (1, 0)):
            run(root, "ddpm", f"from-ema_iter00{iteration}", error, 5.0, shots, draw,
                checkpoint=f"runs/hand/ddpm/ema_iter00{iteration}.safetensors")
    runs = read_experiment(root).runs
    means = iteration_means(runs)
    away = means[means["pretraining_dataset"] == "hand"]
    assert chosen(away) == {1: 3000, 10: 3000} and set(away["variant"]) == {"from-ema_iter-best"} and away["away"].all()
    assert main_variants(with_chosen(runs, means))["ddpm"] == "iter-best"
    page = build_report([root])
    table = pd.read_csv(page.parent / "tables" / "table5.csv")
    ours = table[(table["method"] == "Diffusion pre-training") & (table["metric"] == "MRE")]
    assert ours[["shots", "ours", "pretraining_dataset"]].values.tolist() == [[1, 5.0, "hand"], [10, 5.0, "hand"]]


def test_methods_share_the_loss_that_most_runs_have(tmp_path):
    """Scratch has more runs of another loss: what is compared with the others is of the common one all the same."""
    for draw in (0, 1):
        run(tmp_path, "ddpm", "target-pixel", 1.0, 1.0, draw=draw)
        run(tmp_path, "mocov3", "target-pixel", 1.0, 1.0, draw=draw)
    for draw in (0, 1, 2):
        run(tmp_path, "scratch", "sigma-9.0_steps-7", 1.0, 1.0, draw=draw)
    run(tmp_path, "scratch", "target-pixel", 1.0, 1.0)
    run(tmp_path, "mean_shape", "default", 1.0, 1.0)
    variants = main_variants(read_experiment(tmp_path).runs)
    assert variants == {"ddpm": "target-pixel", "mocov3": "target-pixel", "scratch": "target-pixel",
                        "mean_shape": "default"}


@pytest.mark.parametrize("variant, name, setting", [
    ("default", "iter-best", ""), ("iter-500", "iter-best", ""), ("from-ema_iter008000", "from-ema_iter-best", ""),
    ("loss-cross_entropy_channels_target-disk_iter-500_lr-1e-05", "loss-cross_entropy_channels_target-disk_lr-1e-05_"
     "iter-best", "loss-cross_entropy_channels_target-disk"),
    ("decoder-window_mass_prior-off_t-10", "decoder-window_mass_prior-off_t-10_iter-best",
     "decoder-window_mass_prior-off"),
    ("ssl-paper_sigma-5.0_encoder-vgg19", "ssl-paper_sigma-5.0_encoder-vgg19_iter-best", "sigma-5.0"),
])  # fmt: skip
def test_names_of_variants(variant, name, setting):
    assert (family(variant), loss_setting(variant)) == (name, setting)


def test_flops_of_the_published_network():
    """The forward pass at 256x256 is known to take 3.49 TFLOP, of which ours saves some; training takes thrice that."""
    assert 0.9 < training_flops(UNet(base_channels=256), 1, (256, 256), True) / (3 * 3.49e12) < 1


def test_flops_of_an_output_channel():
    """By hand: a 1x1 convolution of 4 channels, 2 operations each at 8 * 8 pixels, forward, to inputs, to weights."""
    more, less = (training_flops(TINY, outputs, (8, 8), False) for outputs in (3, 1))
    assert more - less == 2 * (4 * 2 * 8 * 8) * 3


def test_compute_counts_the_images_of_the_logs(root):
    """By hand: a run saw 10 * 2 + 30 * 1 images, pre-training 100 a second for 2 s up to 4000 and 3 s up to 8000."""
    assert training_images([{"step": 1, "images_per_second": 4.0, "seconds": 2.5}, {"step": 1, "validation_loss": 1.0},
                        {"step": 2, "images_per_second": 4.0, "seconds": 1.0}], 1) == 10
    folder = root / "ddpm"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"dataset": {"image_size": [8, 8]}, "unet": TINY.model_dump()}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(
        {"step": step, "images_per_second": 100.0, "seconds": seconds, "loss": 1.0}) + "\n"
        for step, seconds in ((4000, 2.0), (8000, 1.0))))
    page = build_report([root])
    table = pd.read_csv(page.parent / "tables/pretraining_iterations.csv").set_index(["shots", "iteration"])["petaflop"]
    tuning = 50 * training_flops(TINY, 2, (8, 8), False) / 1e15
    image = training_flops(TINY, 1, (8, 8), True) / 1e15
    assert table[10, 0] == pytest.approx(tuning, rel=1e-5)
    assert table[10, 4000] == pytest.approx(tuning + 200 * image, rel=1e-5)
    assert table[1, 8000] == pytest.approx(tuning + 300 * image, rel=1e-5)
    (folder / "metrics.jsonl").unlink()
    build_report([root])
    table = pd.read_csv(page.parent / "tables/pretraining_iterations.csv").set_index(["shots", "iteration"])["petaflop"]
    assert np.isnan(table[10, 4000]) and table[10, 0] == pytest.approx(tuning, rel=1e-5)


def test_the_error_that_training_logs_is_that_of_scoring(tiny_cell):
    """By the decoder and under the shape prior that the test images are scored with."""
    lines = [line for line in read_metrics(tiny_cell / "metrics.jsonl") if "validation_loss" in line]
    kept = min(lines, key=lambda line: line["validation_loss"])
    metrics = json.loads((tiny_cell / "metrics.json").read_text())
    assert metrics["validation_mre"] == pytest.approx(kept["validation_mre"], abs=1e-3)
