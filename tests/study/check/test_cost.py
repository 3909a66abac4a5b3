"""What a study costs: arithmetic by hand, steps taken in a process of their own, and what a launch says."""

import pytest
from PIL import Image

from core.config.load import load_config, parse_config
from core.runs.places import Cell
from study.check import cost
from study.check.cost import Cost, Pace, cost_of
from study.runs import cell_run, study_runs


def test_the_total_is_steps_times_seconds_and_days_on_a_cpu_are_named():
    long = Cost("cpu", {"pretrain": 40000, "ddpm": 1000}, {"pretrain": 23.0, "ddpm": 8.0})
    assert long.total == 928000
    first, second = long.lines()
    assert "about 257.8 h" in first and "pretrain 40000 steps x 23 s" in first
    assert second.startswith("long  257.8 h on a CPU")
    assert len(long._replace(device="cuda").lines()) == 1
    assert "not timed: ddpm" in Cost("cpu", {"ddpm": 60}, {"ddpm": None}).lines()[0]


def test_a_busy_machine_is_told_apart_from_a_long_study():
    """100 steps of 2 s take 200 s, here 6 times as long, 20 min; a machine that is hardly busy says nothing."""
    busy = Cost("cpu", {"ddpm": 100}, {"ddpm": 2.0}, slowed=6.0)
    assert busy.lines() == ["cost  on this machine's cpu: about 3 min of training, ddpm 100 steps x 2 s = 3 min",
                            "busy  other programs run here: as now, steps take 6 times as long, in all 20 min"]
    assert len(busy._replace(slowed=1.4).lines()) == 1


@pytest.mark.parametrize("clock, computed, threads, device, seconds", [
    (10.0, 0.5, 1, "cpu", 0.5),  # it waited for its core
    (10.0, 8.0, 4, "cpu", 2.0),
    (1.0, 3.0, 2, "cpu", 1.0),  # threads of the data beside those that are counted
    (10.0, 0.5, 1, "cuda", 10.0)])
def test_a_step_alone(monkeypatch, clock, computed, threads, device, seconds):
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    assert cost.alone(clock, computed, device) == seconds


def test_paces_are_weighed_by_their_steps(config_file, monkeypatch):
    """60 steps of 1 s that took 2, 120 of 3 s that took 3: 420 s alone, 480 by the clock."""
    monkeypatch.setattr(cost, "timed_apart", lambda *_: {"pretrain": Pace(1.0, 2.0), "ddpm": Pace(3.0, 3.0)})
    config = load_config(config_file(ddpm={"iterations": 60, "checkpoint_iterations": [60]}, finetune={
        "iterations": 120, "backbones": ["ddpm"]}))
    stages = ("pretrain", "finetune")
    found = cost_of(config, stages, study_runs(config, stages))
    assert found.total == 420 and found.slowed == pytest.approx(480 / 420)


def test_steps_are_timed_in_a_process_of_their_own(config_file):
    config = load_config(config_file(ddpm={"iterations": 60, "checkpoint_iterations": [60]}, finetune={
        "iterations": 60, "backbones": ["ddpm", "scratch"]}))
    stages = ("pretrain", "finetune")
    found = cost_of(config, stages, study_runs(config, stages))
    assert found.steps == {"pretrain": 60, "ddpm": 60, "scratch": 60}
    seconds = [value for value in found.seconds.values() if value is not None]
    assert len(seconds) == 3 and all(0 < value < 60 for value in seconds)
    assert not config.experiment_dir.exists()


def test_a_short_study_is_not_timed(config_file, monkeypatch):
    monkeypatch.setattr(cost, "timed_apart", lambda *_: pytest.fail("timed"))
    config = load_config(config_file())
    assert set(cost_of(config, ("pretrain",), study_runs(config, ("pretrain",))).seconds.values()) == {None}


def test_the_command_writes_a_page_and_a_text(run_main, config_file, tmp_path):
    status, said, error = run_main("study.check.__main__", "--config", str(config_file()), "--no-timing", "--out",
                                   str(tmp_path / "out"))
    assert status == 0, error
    assert "130 train, 20 validation, 4 test" in said and "page: " in said
    page = (tmp_path / "out/index.html").read_text()
    assert "130 train" in page and (tmp_path / "out/check.txt").is_file()
    assert said.endswith(f"next: ./launch_experiments.sh --config {tmp_path / 'tiny.json'}\n")
    assert page.count("<figure>") == 12 and "labelled images, as they were read" in page
    assert "1 sella, 2 nasion, 3 orbitale" in " ".join(page.split()) and '<img alt="001, labelled"' in page


def test_images_without_labels_are_told(run_main, config_file, tmp_path):
    """A landmarks.csv that was forgotten, or is empty but for its header, is named."""
    for number in range(3):
        path = tmp_path / f"data/images/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 50 + number).save(path)
    path = config_file(dataset={"layout": "folder", "root": str(tmp_path / "data")})
    status, said, error = run_main("study.check.__main__", "--config", path, "--no-timing", "--out", tmp_path / "out")
    assert status == 0, error
    assert "labels" in said and "no landmarks.csv, or other file of this layout, has landmarks" in said


@pytest.mark.parametrize("backbone, shots, training, steps", [
    ("ddpm", 5, {}, 10 + 600),
    ("ddpm", 25, {}, 10 + 1500),
    ("ddpm", 5, {"rounds": 1}, 10 + 600 + 10 + 1500),
    ("ddpm", 1, {"rounds": 1, "matching": 1}, 2 * (10 + 1500)),
    ("ddpm", 1, {"rounds": None, "matching": None}, 2 * (10 + 1500)),
    ("ddpm", 5, {"rounds": None, "matching": None}, 10 + 600 + 10 + 1500),
    ("ddpm", 25, {"rounds": None, "matching": None}, 10 + 1500),
    ("scratch", 1, {"matching": 1}, 10 + 600),
])
def test_steps_of_all_stages_and_rounds(backbone, shots, training, steps):
    values = {"finetune": {"iterations": 10, "refine": {"zoom": 2}, "self_training": training}}
    assert cell_run(parse_config(values, "c.json"), Cell(backbone, shots, 0, 0)).steps == steps
