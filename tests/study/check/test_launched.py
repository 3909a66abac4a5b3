"""What a dry run says of the check: what a launch found in the same data, or how to look at them."""

from __future__ import annotations

import json

import pytest

from core.config.load import load_config
from study.check import launched
from study.prepare import prepare

LAUNCH, STAGES = "study.launch", ("--stages", "pretrain", "finetune")


def test_a_dry_run_repeats_the_check_of_the_same_data_and_never_looks_itself(config_file, run_main, monkeypatch,
                                                                             tmp_path):
    path = config_file(finetune={"shots": [2]})
    unsaid = f"check  not done: python -m study.check --config {path} looks at the data"
    monkeypatch.setattr(launched, "_look", lambda *_: pytest.fail("a dry run looked at the data"))
    assert unsaid in run_main(LAUNCH, "--config", path, *STAGES, "--dry-run")[1]
    config = load_config(path)
    runs = prepare(config, ("pretrain", "finetune"))

    def look(config, stages, runs, folder, stamp):
        folder.mkdir(parents=True)
        (folder / launched.TEXT).write_text("look at  1: 1 label\n")
        (folder / launched.STAMP).write_text(stamp)

    with monkeypatch.context() as patch:
        patch.setattr(launched, "_look", look)
        launched.check_launch(config, ("pretrain", "finetune"), runs)
    out = run_main(LAUNCH, "--config", path, *STAGES, "--dry-run")[1]
    assert out.endswith("look at  1: 1 label\n") and "check  not done" not in out
    longer = ("--set", "ddpm.iterations=7")  # its cost was not said
    out = run_main(LAUNCH, "--config", path, *STAGES, "--dry-run", *longer)[1]
    assert f"--config {path} --set ddpm.iterations=7 looks" in out and "look at  1" not in out
    out = run_main(LAUNCH, "--config", path, *STAGES, "--dry-run", "--shots", "2", "5")[1]
    assert f"--config {path} --set 'finetune.shots=[2, 5]' looks" in out
    other = json.loads(path.read_text())
    other["dataset"]["intensity"] = "percentile"
    path.write_text(json.dumps(other))
    assert unsaid in run_main(LAUNCH, "--config", path, *STAGES, "--dry-run")[1]
