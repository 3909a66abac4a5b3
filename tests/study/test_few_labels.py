"""A study with few labels, or none: what it asks for, what it trains on, and what it shows."""

import json

from core.runs.places import ema_path
from tests.study.test_identity import LAUNCH, write_config, write_images, write_labels


def test_pretraining_needs_no_label(tmp_path, make_values, run_main):
    """Images alone are pre-trained on and reported; what trains a detector ends before anything is run."""
    write_images(tmp_path / "data", range(6))
    path = write_config(tmp_path, make_values)
    status, out, err = run_main(LAUNCH, "--config", path, "--stages", "pretrain", "report")
    assert status == 0, err
    assert "0 train, 0 validation, 0 test; 0 landmarks; 6 images for pre-training" in out
    assert ema_path(tmp_path / "runs/tiny", 6).is_file() and (tmp_path / "runs/tiny/report/index.html").is_file()
    status, out, err = run_main(LAUNCH, "--config", path)
    assert status == 2 and err.count("\n") == 1 and "has no labelled image: add labels" in err


def test_shots_above_the_labels_are_named_once(tmp_path, make_values, run_main):
    """With the numbers that can be had, all labels among them, before anything is run."""
    points = write_images(tmp_path / "data", range(14))
    write_labels(tmp_path / "data", {name: points[name] for name in sorted(points)[:12]})
    (tmp_path / "data/dataset.json").write_text(json.dumps({"landmarks": ["left", "right", "top"]}))
    for shots, told in (([1, 5, 10, 25, 50], "25, 50 are above the training split's 12 labelled images; "
                                             "set finetune.shots to [1, 5, 10, 12]"),
                        ([13], "13 is above the training split's 12 labelled images; set finetune.shots to [12]")):
        path = write_config(tmp_path, make_values, finetune={"shots": shots})
        status, _, err = run_main(LAUNCH, "--config", path)
        assert status == 2 and err.count("\n") == 1 and f"finetune.shots {told}" in err
    assert not (tmp_path / "runs").exists()
