"""What is shown and in which order, and how the command finds its data set."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmarks.reviewing import write_data_set
from core.data.folder_layout import read_folder
from core.formats.geometry import Geometry
from core.runs.best import point_to_best
from study.review.__main__ import command_line, opened
from study.review.answers import Answer, order_of_doubt, suggested
from study.review.pixels import panes, picture

REVIEW = "study.review.__main__"


def answer(*errors):
    return Answer(np.zeros((len(errors), 2)), np.array(errors), np.array(errors), "mm", (1.0, 1.0))


def test_the_order_of_doubt():
    """Suggested ones first, then the largest mean expected error; without one later, finished ones last."""
    answers = {"sure": answer(1, np.nan), "unsure": answer(1, 5), "none": answer(np.nan, np.nan), "done": answer(9, 9),
               "named": answer(0.1, 0.1)}
    keys = [*answers, "unseen"]
    assert order_of_doubt(keys, answers, ["gone", "named"], {"done"}) == ["named", "unsure", "sure", "none", "unseen",
                                                                         "done"]


def test_suggestions_are_those_of_the_study(tmp_path):
    run = tmp_path / "mine/landmarks/ddpm/default/shots010_draw0_seed0"
    run.mkdir(parents=True)
    assert suggested(run) == []
    (tmp_path / "mine/suggest").mkdir()
    (tmp_path / "mine/suggest/suggest.csv").write_text("rank,image,file,covers_percent,mean_distance\n"
                                                       "1,b,x,1,1\n2,a,x,1,1\n")
    assert suggested(run) == ["b", "a"]


@pytest.mark.parametrize("values, stored, window", [
    (np.array([[0, 3], [255, 7]], np.uint8), [[0, 3], [255, 7]], (0, 255)),
    (np.array([[0, 1000], [4000, 2000]], np.uint16), [[0, 16384], [65535, 32768]], None),
])  # fmt: skip
def test_pictures_keep_their_numbers(tmp_path, values, stored, window):
    Image.fromarray(values).save(tmp_path / "a.png")
    found = picture(tmp_path / "a.png")
    assert found.pixels.tolist() == stored and found.pixels.dtype.itemsize == values.dtype.itemsize
    assert found.window == (window or found.window) and found.window[0] < found.window[1]


def test_views_of_a_volume_lie_as_radiologists_look():
    """RAS: x to the right, y to the front, z up. On the screen the patient's left is on the right, the front above."""
    axial, coronal, sagittal = panes(Geometry((4, 5, 6), (1, 1, 1), np.eye(4)))
    assert axial == {"fixed": 2, "across": 0, "down": 1, "flip_across": True, "flip_down": True, "name": "axial"}
    assert coronal == {"fixed": 1, "across": 0, "down": 2, "flip_across": True, "flip_down": True, "name": "coronal"}
    assert sagittal == {"fixed": 0, "across": 1, "down": 2, "flip_across": True, "flip_down": True, "name": "sagittal"}
    turned = np.array([[0, 0, -1, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])  # i to the back, j up, k left
    axial = panes(Geometry((4, 5, 6), (1, 1, 1), turned))[0]
    assert (axial["fixed"], axial["across"], axial["down"]) == (1, 2, 0)
    assert not axial["flip_across"] and not axial["flip_down"]
    flat = panes(Geometry((4, 5)))
    assert flat == [{"fixed": None, "across": 0, "down": 1, "flip_across": False, "flip_down": False, "name": ""}]


def arguments(*given):
    return command_line().parse_args([*map(str, given), "--port", "0"])


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine/images/clinic").mkdir(parents=True)
    for name in ("one", "clinic/two"):
        Image.fromarray(np.zeros((30, 40), np.uint8)).save(tmp_path / f"mine/images/{name}.png")
    start = np.array([[1.0, 2], [3, 4]])
    write_data_set(tmp_path / "mine", ["tip", "base"], {"one.png": start, "clinic/two.png": start})
    return tmp_path / "mine"


def test_the_data_set_is_the_one_the_images_lie_in(mine):
    run = mine.with_name("mine_run")
    for images, keys in ((mine, ["clinic/two", "one"]), (mine / "images", ["clinic/two", "one"]),
                         (mine / "images/clinic", ["clinic/two"])):
        with opened(arguments(run, "--images", images, "--predictions", run / "predictions.csv")) as found:
            assert sorted(found.keys) == keys and found.labels.root.resolve() == mine.resolve()
            found.server.server_close()


@pytest.mark.parametrize("given, message", [
    (("no_run", "--images", "mine"), "no_run/config.json cannot be read"),
    (("mine_run", "--images", "nowhere"), "--images nowhere is not a folder"),
    (("mine_run", "--images", "mine", "--predictions", "none.csv"), "none.csv does not exist"),
    (("mine_run", "--images", "mine", "--port", "70000"), "--port 70000 cannot be listened on"),
    (("mine_run", "--images", "mine", "--labels", "cephalo"), "cephalo is in layout cephalo, whose labels"),
])  # fmt: skip
def test_mistakes_are_one_line(mine, given, message, run_main, monkeypatch):
    monkeypatch.chdir(mine.parent)
    if "cephalo" in given:
        (mine.parent / "mine_run/config.json").write_text(json.dumps({"dataset": {"layout": "cephalo",
                                                                                  "root": "cephalo"}}))
    more = () if "--predictions" in given else ("--predictions", "mine_run/predictions.csv")
    status, out, error = run_main(REVIEW, *given, *more)
    assert status == 2 and message in error and error.count("\n") == 1, error


def test_a_run_answers_and_is_not_asked_again(tiny_cell, tmp_path, phantom, capsys):
    """Images that lie in no data set get one; answers are those of `predict`, and kept."""
    from landmarks_finetuning.predict import predict

    images = tmp_path / "scans"
    images.mkdir()
    for name in ("151.jpg", "152.jpg"):
        (images / name).write_bytes((phantom / "jpg" / name).read_bytes())
    with opened(arguments(tiny_cell, "--images", images)) as found:
        session, root = found.session, tmp_path / "scans_labels"
        found.server.server_close()
        table = pd.read_csv(predict(tiny_cell, [images], tmp_path / "out", overlays=False), dtype={"image": str})
        one = table[table["image"] == "152.jpg"]
        assert np.allclose(session.answers["152"].points[:, ::-1], one[["x", "y"]], atol=1e-3)
        session.change("152", 0, "accept")
        assert np.allclose(found.labels.read()["152"][:, ::-1], one[["x", "y"]], atol=1e-3)
        state = found.server.app.test_client().get("/state", headers={"Host": "127.0.0.1"}).json
        assert state["calibrated"]
    made = (root / "review/predictions.csv").stat().st_mtime_ns
    with opened(arguments(tiny_cell, "--images", images)) as found:
        found.server.server_close()
        assert found.keys and (root / "review/predictions.csv").stat().st_mtime_ns == made
        assert list(found.session.at_start) == ["152"]
    source = read_folder(root, None, root / "dataset.json", ())
    assert [record.id for record in source.labelled] == ["152"]


def test_an_experiment_stands_for_its_best_run_which_may_not_be_calibrated(tiny_cell, tmp_path, phantom):
    """The command that trains names the run itself: `best` may lead to another one later."""
    run = shutil.copytree(tiny_cell, tmp_path / "study/landmarks/ddpm/default" / tiny_cell.name)
    (run / "calibration.json").unlink()
    pointer = point_to_best(tmp_path / "study", run)
    (tmp_path / "scans").mkdir()
    shutil.copy(phantom / "jpg/151.jpg", tmp_path / "scans")
    for place in (tmp_path / "study", pointer):
        with opened(arguments(place, "--images", tmp_path / "scans")) as found:
            found.server.server_close()
            state = found.server.app.test_client().get("/state", headers={"Host": "127.0.0.1"}).json
        assert not state["calibrated"] and f"--config {run}/config.json " in state["train"]
        assert found.session.run == str(run)
