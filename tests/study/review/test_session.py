"""The state of a review: actions, their way back, and what a killed process, a second one or an editor leave."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.reviewing import saved_points, write_data_set
from core.data.labels import FolderLabels
from core.errors import UserError
from study.review.answers import read_answers
from study.review.session import Review, Stale
from tests.conftest import error_of

NAMES = ["tip", "base", "side"]


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "mine"
    (root / "images").mkdir(parents=True)
    for name in ("a", "b"):
        Image.fromarray(np.zeros((30, 40), np.uint8)).save(root / f"images/{name}.png")
    start = np.array([[10.0, 20], [30, 5], [60, 5]])  # the third lies outside
    write_data_set(root, NAMES, {"a": start, "b": start}, splits={"train": []})
    return root


class Killed(BaseException):
    """kill -9, in the middle of something."""


def review(root):
    labels = FolderLabels(root, root / "dataset.json")
    answers = read_answers(root.with_name("mine_run") / "predictions.csv", labels.records, labels.names)
    return Review(labels, answers, root / "review", "reader", "runs/mine")


def table(root):
    return {key: [tuple(each) if each[0] == each[0] else None for each in points.tolist()]
            for key, points in saved_points(root / "landmarks.csv").items()}


def entries(root):
    return [json.loads(line) for line in (root / "review/journal.jsonl").read_text().splitlines()]


def listed(root):
    return json.loads((root / "dataset.json").read_text())["splits"]["train"]


def test_actions_and_their_way_back(root):
    session = review(root)
    session.change("a", 0, "move", 0, (1.23456, 2))
    session.change("a", 1, "absent", 1)
    session.change("a", 2, "accept")  # what is open: the third, which lies outside and stays open
    assert session.images["a"].version == 2
    assert session.images["a"].marks == [(1.235, 2.0), "absent", None]
    assert table(root) == {"a": [(1.235, 2), None, None]}
    session.change("a", 2, "reset", 0)
    assert table(root) == {} and listed(root) == []
    session.change("a", 3, "accept", 0)
    assert table(root) == {"a": [(10, 20), None, None]} and listed(root) == ["a"]
    states = []
    for version in range(4, 9):
        states.append(list(session.images["a"].marks))
        session.change("a", version, "undo")
    assert session.images["a"].marks == [None, None, None] and session.images["a"].version == 8  # nothing left to undo
    for version in range(8, 12):
        session.change("a", version, "redo")
    assert session.images["a"].marks == states[0] == [(10.0, 20.0), "absent", None]
    assert [entry["action"] for entry in entries(root)] == ["move", "absent", "reset", "accept", *["undo"] * 4,
                                                            *["redo"] * 4]
    assert entries(root)[0] == entries(root)[0] | {
        "who": "reader", "image": "a", "version": 1, "run": "runs/mine",
        "landmarks": {"tip": {"before": None, "after": [1.235, 2], "predicted": [10, 20], "unit": "px",
                              "expected_error": 2.0, "radius90": 4.0}}}


def test_what_was_said_is_there_again_with_its_way_back(root):
    first = review(root)
    first.change("a", 0, "move", 0, (1, 2))
    first.change("a", 1, "absent", 1)
    first.change("a", 2, "undo")
    again = review(root)
    for key in ("a", "b"):
        assert vars(again.images[key]) == vars(first.images[key])
    again.change("a", 3, "redo")
    again.change("a", 4, "undo")
    again.change("a", 5, "undo")
    assert again.images["a"].marks == [None] * 3


def test_an_older_state_is_refused_and_a_repeated_change_is_made_once(root):
    session = review(root)
    session.change("a", 0, "move", 0, (1, 2), "one")
    session.change("a", 0, "move", 0, (1, 2), "one")  # its answer was lost
    with pytest.raises(Stale):
        session.change("a", 0, "move", 0, (3, 4), "two")
    assert session.images["a"].version == 1 and len(entries(root)) == 1
    review(root).change("a", 0, "move", 0, (1, 2), "one")  # the program was started again meanwhile
    assert len(entries(root)) == 1


@pytest.mark.parametrize("at", ["before the table", "before dataset.json", "before the table, undo"])
def test_a_kill_between_two_files(root, at, monkeypatch):
    """The journal has the change: the labels are written when the program starts again."""
    session = review(root)
    session.change("b", 0, "move", 0, (1, 2))
    method = "_list" if at == "before dataset.json" else "_write_row"

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(session.labels, method, killed)
        with pytest.raises(Killed):
            if "undo" in at:
                session.change("b", 1, "undo")
            else:
                session.change("a", 0, "move", 0, (5, 6))
    after = review(root)
    expected = {} if "undo" in at else {"b": [(1, 2), None, None], "a": [(5, 6), None, None]}
    assert table(root) == expected and sorted(listed(root)) == sorted(expected)
    assert after.images["a"].version + after.images["b"].version == 2 == len(entries(root))


def test_a_line_that_was_cut_off_is_no_change(root):
    review(root).change("a", 0, "move", 0, (5, 6))
    path = root / "review/journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-20])
    again = review(root)
    assert path.read_bytes() == whole and again.images["a"].version == 1
    path.write_bytes(b"x" + whole)
    assert "journal.jsonl, line 1 is damaged" in error_of(review, root)


def test_labels_that_an_editor_changed_are_what_counts(root):
    session = review(root)
    session.change("a", 0, "move", 0, (5, 6))
    session.change("a", 1, "absent", 1)
    text = (root / "landmarks.csv").read_text()
    (root / "landmarks.csv").write_text(text.replace("5.0,6.0", "7.5,6.0") + "b,,,,1,1,,,,\n")
    with pytest.raises(Stale):  # of the image that was changed; the tab looks at it again
        session.change("a", 2, "move", 1, (1, 1))
    assert session.images["a"].marks == [(7.5, 6.0), "absent", None] and session.images["a"].done == []
    session.change("a", 3, "move", 2, (2, 2))
    assert table(root) == {"a": [(7.5, 6), None, (2, 2)], "b": [(1, 1), None, None]}
    assert [entry["action"] for entry in entries(root)] == ["move", "absent", "outside", "outside", "move"]
    text = (root / "landmarks.csv").read_text()
    (root / "landmarks.csv").write_text(text.replace("2.0,2.0", "9,9"))  # while no program runs
    assert review(root).images["a"].marks == [(7.5, 6.0), "absent", (9.0, 9.0)]


def test_what_cannot_be_written_is_not_said(root, monkeypatch):
    session = review(root)
    session.change("a", 0, "move", 0, (5, 6))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(session.labels, "_write_row", full)
        with pytest.raises(UserError, match="not saved: .*No space left"):
            session.change("a", 1, "move", 0, (7, 8))
    assert session.images["a"].marks[0] == (5.0, 6.0) and len(entries(root)) == 1
    session.change("a", 1, "move", 0, (7, 8))
    assert table(root)["a"][0] == (7, 8) and review(root).images["a"].version == 2


@pytest.mark.parametrize("to", [(-0.6, 3), (39.6, 3), (3, 29.6), (1,), None, (float("nan"), 1)])
def test_a_place_outside_is_refused(root, to):
    session = review(root)
    assert "outside image a" in error_of(session.change, "a", 0, "move", 0, to)
    session.change("a", 0, "move", 0, (39.5, 29.5))


def test_the_first_table_is_kept(root):
    before = (root / "landmarks.csv").read_bytes()
    review(root).change("a", 0, "accept")
    review(root).change("b", 0, "accept")
    assert (root / "review/landmarks_before.csv").read_bytes() == before
