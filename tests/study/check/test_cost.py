"""What a study costs: arithmetic by hand, steps taken in a process of their own, and what a launch says."""

import pytest

from core.config.load import load_config
from study.check import cost
from study.check.cost import Cost, cost_of
from study.runs import study_runs


def test_the_total_is_steps_times_seconds_and_days_on_a_cpu_are_named():
    long = Cost("cpu", {"pretrain": 40000, "ddpm": 1000}, {"pretrain": 23.0, "ddpm": 8.0})
    assert long.total == 928000
    first, second = long.lines()
    assert "about 257.8 h" in first and "pretrain 40000 steps x 23 s" in first
    assert second.startswith("long  257.8 h on a CPU")
    assert len(long._replace(device="cuda").lines()) == 1
    assert "not timed: ddpm" in Cost("cpu", {"ddpm": 60}, {"ddpm": None}).lines()[0]


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
