"""The command that a review ends with trains with the labels it left."""

from __future__ import annotations

import json
import shlex
import shutil

from core.formats.points import FolderRow, read_cephalo, write_folder_csv
from study.review.__main__ import command_line, opened, training_command


def test_labels_of_a_review_are_trained_with(make_values, phantom, tmp_path, run_main):
    """Four labels train a run; two more that a review accepted train the next one, of which they are part."""
    root = tmp_path / "mine"
    (root / "images").mkdir(parents=True)
    names = [f"point {number}" for number in range(19)]
    for number in range(1, 9):
        shutil.copy(phantom / f"jpg/{number:03d}.jpg", root / "images")
    keys = ["001", "002", "003", "004"]
    write_folder_csv(root / "landmarks.csv", names,
                     [FolderRow(key, read_cephalo(phantom / f"400_junior/{key}.txt")) for key in keys])
    (root / "dataset.json").write_text(json.dumps({
        "landmarks": names, "splits": {"train": keys[:2], "validation": keys[2:3], "test": keys[3:]}}))
    values = make_values(tmp_path / "runs", finetune={"backbones": ["scratch"]})
    values["dataset"] |= {"layout": "folder", "root": str(root)}
    (tmp_path / "mine.json").write_text(json.dumps(values))
    status, _, error = run_main("study.launch", "--config", tmp_path / "mine.json", "--stages", "finetune")
    assert status == 0, error
    run = next(tmp_path.glob("runs/tiny/landmarks/scratch/*/shots002_draw0_seed0"))
    with opened(command_line().parse_args([str(run), "--images", str(root), "--port", "0"])) as review:
        review.server.server_close()
        for key in ("006", "008"):
            review.session.change(key, 0, "accept")
        launcher, *words = shlex.split(training_command(run, review.config, review.labels))
    assert launcher == "./launch_experiments.sh"
    status, _, error = run_main("study.launch", *words, "--stages", "finetune")
    assert status == 0, error
    metrics = json.loads(next(tmp_path.glob("runs/tiny/landmarks/scratch/*/shots004_*/metrics.json")).read_text())
    assert metrics["training_images"] == ["001", "002", "006", "008"]
