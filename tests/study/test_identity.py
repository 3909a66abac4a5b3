"""Data, splits and weights that change under a finished study: what is stale is named, set aside and done again."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from core.config.load import load_config
from core.runs.inputs import image_changes
from landmarks_finetuning.stages import Stage
from study import report_page
from study.run import run_study

LAUNCH, EVALUATING, PRETRAINING = "study.launch", "landmarks_finetuning.evaluate", "ddpm_pretraining.train"
STAGES = ("--stages", "pretrain", "finetune")
NAMES = ("left", "right", "top")
PLACES = np.array([[30, 12], [32, 36], [10, 24]])  # (y, x) of the landmarks, each a blob of its own size


def write_images(root, numbers):
    """Images of 48 x 48 with three blobs that move a little, as images/<number>.png; returns {id: points (x, y)}."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[:48, :48]
    points = {}
    for number in numbers:
        shift = np.random.default_rng(number).integers(-3, 4, size=2)
        image = np.random.default_rng(number + 1000).integers(0, 30, size=(48, 48)).astype(float)
        for (y, x), width in zip(PLACES + shift, (2, 4, 6), strict=True):
            image += 200 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / width**2)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / f"images/{number:02d}.png")
        points[f"{number:02d}"] = (PLACES + shift)[:, ::-1]
    return points


def write_labels(root, points):
    """landmarks.csv of {id: points (x, y)}."""
    with (root / "landmarks.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", *(f"{name}_{axis}" for name in NAMES for axis in "xy")])
        table.writerows([name, *places.reshape(-1).tolist()] for name, places in points.items())


def describe(root, names=NAMES, seed=0):
    """dataset.json with splits by shares."""
    (root / "dataset.json").write_text(json.dumps({
        "landmarks": names, "splits": {"train": 0.5, "validation": 0.2, "test": 0.3, "seed": seed}}))


@pytest.fixture(scope="module")
def finished(make_values, tmp_path_factory):
    """A finished study of twelve labelled images and two more: one pre-training, ddpm and scratch with two labels."""
    home = tmp_path_factory.mktemp("finished")
    points = write_images(home / "data", range(14))
    write_labels(home / "data", {name: points[name] for name in sorted(points)[:12]})
    describe(home / "data")
    run_study(load_config(write_config(home, make_values)), ("pretrain", "finetune"))
    return home


def write_config(home, make_values, **changes):
    """The study's config file, with everything below `home`."""
    values = make_values(home / "runs", dataset={"layout": "folder", "root": str(home / "data"), "spacing_mm": None,
                                                 "cache_dir": str(home / "cache"), "name": "blobs"}, **changes)
    (home / "study.json").write_text(json.dumps(values))
    return home / "study.json"


@pytest.fixture
def home(finished, make_values, tmp_path):
    """The finished study at another place, with its data, to be changed."""
    shutil.copytree(finished, tmp_path / "home")
    write_config(tmp_path / "home", make_values)
    return tmp_path / "home"


@pytest.fixture
def launch(home, run_main):
    """launch(...) -> (status, stdout, stderr) of the launcher."""
    return lambda *more: run_main(LAUNCH, "--config", home / "study.json", *STAGES, *more)


def labels_of(home):
    """{id: points (x, y)} of landmarks.csv."""
    with (home / "data/landmarks.csv").open() as file:
        return {row[0]: np.array(row[1:], dtype=float).reshape(-1, 2) for row in list(csv.reader(file))[1:]}


def cell(home, backbone="scratch"):
    """The folder of a fine-tuned cell."""
    return next(home.glob(f"runs/tiny/landmarks/{backbone}/*/shots002_draw0_seed0"))


def results(home):
    """{cell: bytes of its metrics.json}."""
    paths = home.glob("runs/tiny/landmarks/*/*/*/metrics.json")
    return {path.parent.relative_to(home): path.read_bytes() for path in paths}


def images_by_use(home):
    """{use: ids} of what the scratch cell was made from and scored on."""
    record = json.loads((cell(home) / "inputs.json").read_text())["images"]
    return {use: set(images) for use, images in (record | json.loads((cell(home) / "scored.json").read_text())["images"]
                                                 ).items()}


def test_the_same_data_at_another_place_are_the_same(home, launch):
    before = results(home)
    status, out, _ = launch()
    assert status == 0 and "3 runs, 3 done, 0 left" in out and "stale" not in out and results(home) == before
    assert not (home / "runs/tiny/stale").exists()


def test_corrected_training_label(home, launch):
    """Cells that learned from it are named, set aside and done again; the pre-training saw no labels."""
    points, before = labels_of(home), results(home)
    [name] = sorted(images_by_use(home)["training"])[:1]
    points[name][0] += 9
    write_labels(home / "data", points)
    status, out, _ = launch("--dry-run")
    reason = re.escape(f"1 image ({name}) with other labels in training")
    assert status == 0 and re.search(f"stale  3 runs, to be set aside and done again: {reason}\n", out), out
    assert "pretrain  done" in out and "3 runs, 0 done, 3 left" in out and results(home) == before
    status, out, _ = launch()
    assert status == 0 and out.count("set aside: ") == 3, out
    after = results(home)
    assert after.keys() == before.keys() and not any(after[folder] == before[folder] for folder in after)
    aside = {path.read_bytes() for path in home.glob("runs/tiny/stale/*/landmarks/*/*/*/metrics.json")}
    assert aside == set(before.values())
    status, out, _ = launch()
    assert "3 runs, 3 done" in out and results(home) == after


def test_corrected_test_label_is_scored_again_without_training(home, launch):
    points, before = labels_of(home), results(home)
    [name] = sorted(images_by_use(home)["test"])[:1]
    points[name][0] += 5
    write_labels(home / "data", points)
    weights = (cell(home) / "best.safetensors").stat().st_mtime_ns
    status, out, _ = launch()
    assert status == 0, out
    assert f"scored on other images  3 runs, to be scored again: 1 image ({name}) with other labels in test" in out, out
    assert "optimiser steps to come: 0" in out and (cell(home) / "best.safetensors").stat().st_mtime_ns == weights
    for folder, old in before.items():
        new = json.loads((home / folder / "metrics.json").read_text())
        assert new["physical"]["mre"] != json.loads(old)["physical"]["mre"]


def test_added_labels_leave_every_image_where_it_was(home, launch):
    before = images_by_use(home)
    points = labels_of(home) | write_images(home / "data", range(14))
    assert len(points) == 14
    write_labels(home / "data", points)
    status, out, _ = launch()
    assert status == 0, out
    after = images_by_use(home)
    assert (after["test"], after["validation"]) == (before["test"], before["validation"])
    draws = json.loads((home / "data/dataset.splits.json").read_text())
    assert len(draws) == 1 and len(draws[0]["splits"]["train"]) == 6  # as drawn from twelve labels
    assert "6 train" not in out and "8 train, 2 validation, 4 test" in out


def test_swapped_names_do_not_move_points(home, launch, run_main):
    """A detector's landmarks are matched with the data set's by name, whatever their order."""
    before = json.loads((cell(home) / "metrics.json").read_text())
    describe(home / "data", names=("top", "left", "right"))
    assert run_main(EVALUATING, cell(home), "--set", f"dataset.root={home / 'data'}")[0] == 0
    after = json.loads((cell(home) / "metrics.json").read_text())
    assert after["landmark_names"] == list(NAMES) and after["physical"] == before["physical"]
    status, out, _ = launch()
    assert status == 0 and "3 runs, 3 done" in out and "stale" not in out
    describe(home / "data", names=("top", "left", "centre"))
    (home / "data/landmarks.csv").write_text((home / "data/landmarks.csv").read_text().replace("right", "centre"))
    status, _, error = run_main(EVALUATING, cell(home), "--set", f"dataset.root={home / 'data'}")
    assert status == 2 and "the detector alone knows right; the data set alone has centre" in error


def test_another_split_seed_refuses_the_pretraining(home, launch):
    """Images that it saw would be test images."""
    before = results(home)
    describe(home / "data", seed=1)
    for more in ((), ("--dry-run",)):
        status, out, error = launch(*more)
        assert status == 2 and error.count("\n") == 1, error
        assert re.search(r"tiny/ddpm was pre-trained on other images than those there are now: \d image.* gone from "
                         r"pretraining; --redo-pretraining sets it aside", error)
    assert results(home) == before
    status, out, _ = launch("--redo-pretraining")
    assert status == 0 and "set aside: " in out
    trained = set(json.loads((home / "runs/tiny/ddpm/inputs.json").read_text())["images"]["pretraining"])
    assert not trained & images_by_use(home)["test"]
    assert list(home.glob("runs/tiny/stale/*/ddpm/last.pt"))
    describe(home / "data")  # the first draw is still written down
    assert "gone from pretraining" in launch("--dry-run")[2]


def test_unlabelled_images_may_be_added(home, launch):
    write_images(home / "data", [20])
    status, out, _ = launch()
    assert status == 0 and "pretrain  done" in out and "3 runs, 3 done" in out


def test_other_pixels_under_the_same_name(home, launch):
    """The same experiment name, other data."""
    [name] = sorted(images_by_use(home)["training"])[:1]
    shutil.copy(home / "data/images/13.png", home / f"data/images/{name}.png")
    status, _, error = launch()
    assert status == 2 and f"1 image ({name}) with other pixels in pretraining" in error


def test_redone_pretraining_makes_its_cells_stale(home, launch, make_values):
    """Another learning rate: other weights; from-scratch runs stay."""
    before = results(home)
    shutil.rmtree(home / "runs/tiny/ddpm")
    write_config(home, make_values, ddpm={"learning_rate": 0.003})
    status, out, _ = launch()
    assert status == 0 and out.count("set aside: ") == 1 and "are others than those it started from" in out, out
    after = results(home)
    changed = {folder.parts[3] for folder in after if after[folder] != before[folder]}
    assert changed == {"ddpm"}


def test_more_iterations_train_on(home, launch, make_values):
    """From the state that is there, in the launcher as in the stage's command; cells stay."""
    before = results(home)
    write_config(home, make_values, ddpm={"iterations": 8, "checkpoint_iterations": [3, 6]})
    status, out, _ = launch()
    assert status == 0 and "optimiser steps to come: 2" in out, out
    steps = [json.loads(line)["step"] for line in (home / "runs/tiny/ddpm/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 8 and results(home) == before


def test_stage_commands_refuse_other_inputs(home, run_main):
    points = labels_of(home)
    [name] = sorted(images_by_use(home)["training"])[:1]
    points[name][0] += 9
    write_labels(home / "data", points)
    status, _, error = run_main("landmarks_finetuning.train", "--config", home / "study.json", "--backbone", "scratch",
                                "--shots", 2)
    assert status == 2 and f"was made from other inputs: 1 image ({name}) with other labels in training" in error
    describe(home / "data", seed=1)
    status, _, error = run_main(PRETRAINING, "--config", home / "study.json")
    assert status == 2 and "was made from other inputs" in error


def test_other_data_set_is_scored_apart(home, run_main, tmp_path):
    other = tmp_path / "other"
    write_labels(other, write_images(other, range(30, 40)))
    describe(other)
    before = results(home)
    status, out, _ = run_main(EVALUATING, cell(home), "--set", f"dataset.root={other}", "dataset.name=other")
    assert status == 0 and "evaluations/data-other" in out and results(home) == before
    status, out, _ = run_main(EVALUATING, cell(home), "--set", f"dataset.root={other}", "--out", tmp_path / "here")
    assert status == 0 and (tmp_path / "here/metrics.json").is_file() and results(home) == before


def test_state_of_another_cell_is_refused(home, run_main, make_values):
    """A last.pt that belongs to another seed, copied or left: never continued."""
    write_config(home, make_values, finetune={"seeds": [1]})
    arguments = ("--config", home / "study.json", "--backbone", "scratch", "--shots", 2, "--seed")
    assert run_main("landmarks_finetuning.train", *arguments, 1)[0] == 0
    one = next(home.glob("runs/tiny/landmarks/scratch/*/shots002_draw0_seed1"))
    two = one.with_name("shots002_draw0_seed2")
    two.mkdir()
    shutil.copy(one / "last.pt", two)
    status, _, error = run_main("landmarks_finetuning.train", *arguments, 2)
    assert status == 2 and "is the state of scratch, 2 shots, draw 0, seed 1" in error and "delete it" in error


def test_image_changes_in_words():
    """By hand: one added, two gone, pixels and labels of others changed; a pack without digests says nothing."""
    before = {"training": {"a": ["1", "l"], "b": ["2", "l"], "c": ["3", "l"], "d": ["4", "l"], "e": [None, "l"]}}
    now = {"training": {"c": ["9", "l"], "d": ["4", "m"], "e": ["5", "l"], "f": ["6", "l"]}}
    assert image_changes(before, now) == [
        "1 image (f) added to training", "2 images (a, b) gone from training",
        "1 image (c) with other pixels in training", "1 image (d) with other labels in training"]
    assert image_changes(before, before) == [] and len(image_changes(before, now, may_grow=True)) == 3


@pytest.mark.parametrize("content", ["{", "[]", '{"start": null}'])
def test_damaged_record_is_one_line(home, launch, content):
    (cell(home) / "inputs.json").write_text(content)
    status, _, error = launch()
    assert status == 2 and "inputs.json is damaged" in error and error.count("\n") == 1


def test_a_missing_weights_file_is_in_the_plan(home, launch):
    """Not first in the list of failures."""
    status, _, error = launch("--dry-run", "--set", "finetune.checkpoint=/nowhere/x.pt")
    assert status == 2 and "ddpm starts from /nowhere/x.pt, which does not exist; correct finetune.checkpoint" in error


# ---- studies whose result is little


@pytest.fixture
def no_memory(monkeypatch):
    """Every training fails."""
    def run(*_):
        raise MemoryError("too little for this network")

    monkeypatch.setattr(Stage, "run", run)


def test_a_report_of_the_guess_alone(home, make_values, run_main, no_memory):
    """Every trained run fails: the list of failures, exit 1, and a page of what there is."""
    shutil.rmtree(home / "runs")
    write_config(home, make_values, finetune={"backbones": ["scratch"]})
    status, _, error = run_main(LAUNCH, "--config", home / "study.json", "--stages", "finetune", "report")
    assert status == 1 and "1 of 2 runs failed" in error and "too little for this network" in error
    assert "Mean shape" in (home / "runs/tiny/report/index.html").read_text()


def test_a_report_that_fails_does_not_hide_the_failures(home, make_values, monkeypatch, capsys, no_memory):
    shutil.rmtree(home / "runs")
    write_config(home, make_values, finetune={"backbones": ["scratch"]})

    def build(_folder):
        raise ZeroDivisionError

    monkeypatch.setattr(report_page, "build", build)
    with pytest.raises(ZeroDivisionError):
        run_study(load_config(home / "study.json"), ("finetune", "report"))
    assert "1 of 2 runs failed" in capsys.readouterr().err


def test_a_report_where_the_guess_errs_nowhere(home, make_values, run_main):
    """The landmarks lie at one place in all images: no share of its error can be said."""
    shutil.rmtree(home / "runs")
    write_labels(home / "data", dict.fromkeys(labels_of(home), np.array([[12, 30], [36, 32], [24, 10]])))
    write_config(home, make_values, finetune={"backbones": ["scratch"]})
    status, out, error = run_main(LAUNCH, "--config", home / "study.json", "--stages", "finetune", "report")
    assert status == 0, error
    assert "against 0.00 px (mean shape)" in (home / "runs/tiny/report/index.html").read_text()
