"""The session of docs/own_data.md runs as written: from ten labels to corrected ones, and back from COCO."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import reviewing
from benchmarks.reviewing import WAIT_S, Page, browser, saved_points
from core.formats.images import read_image
from landmarks_finetuning import Detector
from tests.conftest import PROJECT, TINY, merged

pytestmark = pytest.mark.skipif(reviewing.BROWSER is None or reviewing.DRIVER is None,
                                reason="no chromium, chromium-browser or google-chrome with a chromedriver found")

HEADING = "## A session, from ten labels to corrected ones"
CORRECTED = 5
REVIEW = "python -m study.review"
SAID = ("to be set aside and done again", "or look, correct, label: ", "changed in reviews: 5 images", "no alarm",
        "every label is for training")  # what the page shows and the commands say


def section() -> str:
    """The text of the session."""
    page = (PROJECT / "docs/own_data.md").read_text(encoding="utf8")
    return page.split(f"{HEADING}\n")[1].split("\n## ")[0]


def steps(text: str) -> list[str]:
    """What is typed, in order: the programs of Python blocks and the lines of Bash blocks."""
    blocks = re.findall(r"^```(python|bash)\n(.*?)^```", text, re.S | re.M)
    return [step for kind, block in blocks for step in ([block] if kind == "python" else block.strip().splitlines())]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A checkout whose template of the session trains few steps of a small network; all else is as it is."""
    root = tmp_path_factory.mktemp("checkout")
    for path in PROJECT.iterdir():
        if path.name not in (".git", ".venv", "configs", "datasets", "runs"):
            (root / path.name).symlink_to(path)
    shutil.copytree(PROJECT / "configs", root / "configs")
    quick = json.loads((root / "configs/quick.json").read_text())
    tiny = {key: value for key, value in TINY.items() if key in ("unet", "ddpm")}
    tiny["finetune"] = {"iterations": 4, "validate_every": 2, "save_every": 2}
    small = {"dataset": {"image_size": [48, 48]}, "evaluation": {"overlays": 2}, "experiment": {"device": "cpu"}}
    (root / "configs/quick.json").write_text(json.dumps(merged(merged(quick, tiny), small)))
    (root / "datasets").mkdir()
    (root / ".venv/bin").mkdir(parents=True)
    shutil.copy(PROJECT / "requirements.txt", root / ".venv/.installed-requirements.txt")
    (root / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (root / ".venv/bin/python").chmod(0o755)
    return root


def corrected(command: str, home: Path, profile: Path, surroundings: dict[str, str]) -> str:
    """Run a review in `home`: drag a point of each of the first images in the browser, accept the others, Ctrl-C."""
    process = subprocess.Popen([*shlex.split(command), "--port", "0"], cwd=home, env=surroundings, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        said = ""
        for line in process.stdout:
            said += line
            if found := re.search(r"http://[\d.]+:\d+/", line):
                break
        with browser(profile) as driver:
            page = Page(driver, found[0])
            assert page.text("doubt").endswith("mm, not calibrated")
            for number in range(CORRECTED):
                page.wait_shown(number)
                page.settle()
                left, top, width, height = page.stage()
                page.drag(page.place(number), (left + width / 2 + 9 * number, top + height / 2))
                page.wait_saved()
                page.keys("a")
                page.wait_saved()
            page.wait_shown(CORRECTED)
            driver.get((home / "runs/quick/report/index.html").as_uri())
            assert not driver.execute_script("return document.getElementById('filters').checkVisibility()")
        process.send_signal(signal.SIGINT)
        return said + process.communicate(timeout=WAIT_S)[0]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def session(home, tmp_path_factory) -> dict[str, str]:
    """What each step of the page said, in a checkout of its own."""
    said = {}
    surroundings = {**os.environ, "PATH": f"{home / '.venv/bin'}:{os.environ['PATH']}"}
    for step in steps(section()):
        if step.startswith(REVIEW):
            said[step] = corrected(step, home, tmp_path_factory.mktemp("profile"), surroundings)
            continue
        command = ["python", "-c", step] if "\n" in step else ["bash", "-c", step]
        done = subprocess.run(command, cwd=home, env=surroundings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{step}\n{done.stdout}\n{done.stderr}"
        said[step] = done.stdout
    return said


def journal(home: Path) -> list[dict]:
    return [json.loads(line) for line in (home / "datasets/mine/review/journal.jsonl").read_text().splitlines()]


def test_what_the_page_shows_is_said(session):
    whole, text = "\n".join(session.values()), section()
    for words in SAID:
        assert words in whole and words in text, words


def test_corrected_labels_are_in_the_table_with_who_and_what_was_predicted(session, home):
    before = saved_points(home / "datasets/mine/review/landmarks_before.csv")
    after = saved_points(home / "datasets/mine/landmarks.csv")
    new = set(after) - set(before)
    assert len(before) == 10 and len(new) == CORRECTED and all(np.isfinite(after[image]).all() for image in new)
    assert all((after[image] == before[image]).all() for image in before)
    names = json.loads((home / "datasets/mine/dataset.json").read_text())["landmarks"]
    entries, moved = journal(home), []
    for entry in entries:
        assert entry["image"] in new and entry["who"] == "ada" and re.match(r"20\d\d-\d\d-\d\dT", entry["time"])
        assert entry["run"].endswith("/shots010_draw0_seed0")
        for name, each in entry["landmarks"].items():
            assert after[entry["image"]][names.index(name)].tolist() == pytest.approx(each["after"], abs=1e-9)
            assert each["predicted"] is not None and each["expected_error"] > 0
            if entry["action"] == "move":
                moved.append(entry["image"])
                assert each["after"] != each["predicted"]
            else:
                assert each["after"] == each["predicted"]
    assert sorted(moved) == sorted(new)


def test_the_runs_before_are_named_stale_and_the_next_ones_train_with_more(session, home):
    plans = [said for step, said in session.items() if "--dry-run" in step]
    assert len(plans) == 1 and "stale  2 runs, to be set aside and done again: " in plans[0]
    assert "added to training" in plans[0] and "15 train" in plans[0]
    runs = {shots: json.loads(next(home.glob(f"runs/quick/landmarks/ddpm/*/shots{shots}_*/metrics.json")).read_text())
            for shots in ("010", "015")}
    first, second = (set(runs[shots]["training_images"]) for shots in ("010", "015"))
    assert len(first) == 10 and second == first | {entry["image"] for entry in journal(home)}
    assert (home / "runs/quick/best").readlink().name == "shots015_draw0_seed0"


def test_the_command_that_the_review_prints_trains_the_same_runs(session, home):
    """After the session's own launch nothing is left of what it asks for."""
    [said] = [said for step, said in session.items() if step.startswith(REVIEW)]
    launch = re.search(r"^  (\./launch_experiments.sh .*)$", said, re.M)[1]
    done = subprocess.run(["bash", "-c", f"{launch} --dry-run"], cwd=home, capture_output=True, text=True, check=True)
    assert "finetune  2 runs, 2 done, 0 left" in done.stdout


def test_coco_and_back_loses_nothing(session, home):
    """The JSON read by hand, and the table made of it again: 15 images, to a millionth of a pixel."""
    labels = saved_points(home / "datasets/mine/landmarks.csv")
    coco = json.loads((home / "datasets/again/landmarks.json").read_text())
    files = {image["id"]: Path(image["file_name"]).stem for image in coco["images"]}
    found = {files[each["image_id"]]: np.reshape(each["keypoints"], (-1, 3)) for each in coco["annotations"]}
    names = json.loads((home / "datasets/mine/dataset.json").read_text())["landmarks"]
    assert coco["categories"][0]["keypoints"] == names
    again = saved_points(home / "back.csv")
    assert len(labels) == 15 and found.keys() == labels.keys() and {Path(key).stem for key in again} == labels.keys()
    for key, points in again.items():
        image = Path(key).stem
        assert (found[image][:, 2] == 2).all()
        assert np.abs(found[image][:, :2] - labels[image]).max() <= 1e-6
        assert np.abs(points - labels[image]).max() <= 1e-6
    read = next(said for step, said in session.items() if "dataset.root=datasets/again" in step)
    assert "at datasets/again: 15 train" in read


def test_errors_are_told_in_the_millimetres_of_dataset_json(home, session):
    detector = Detector.load(home / "runs/quick")
    found = detector(home / "datasets/mine/images/01.png")
    assert (found.unit, found.spacing_mm, detector(read_image(home / "datasets/mine/images/01.png")[0]).unit) == (
        "mm", (0.8, 0.8), "mm")


def test_predictions_of_the_unlabelled_images_go_to_coco(session, home):
    with (home / "after/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    coco = json.loads((home / "after/coco.json").read_text())
    files = {image["id"]: image["file_name"] for image in coco["images"]}
    names = coco["categories"][0]["keypoints"]
    points = {(files[each["image_id"]], name): each["keypoints"][3 * at: 3 * at + 2]
              for each in coco["annotations"] for at, name in enumerate(names)}
    assert len(rows) == len(points) == 60 * 5
    for row in rows:
        assert points[row["image"], row["landmark"]] == pytest.approx([float(row["x"]), float(row["y"])], abs=1e-4)
