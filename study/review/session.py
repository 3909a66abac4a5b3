"""The state of a review: what a person said of each landmark, kept on disk change by change, with a way back.

A landmark is open (None: only predicted), absent, or labelled at (x, y[, z]) in stored pixels. What is labelled is in
the data set's labels at once; the journal beside them says who changed what, when, and what was predicted. A change is
first a line of the journal, then the labels are written: a process that is killed in between does the second when it
starts again. Each image counts its changes: one that was made looking at an older state is refused.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from core.data.labels import FolderLabels
from core.errors import UserError
from core.files import write_atomically
from study.review.answers import Answer
from study.review.journal import Journal

ABSENT = "absent"
SAME_PIXELS = 1e-3  # world coordinates do not give pixels back to the last digit
Mark = tuple[float, ...] | str | None
Change = dict[int, tuple[Mark, Mark]]  # landmark: what it was, what it is


class Stale(Exception):
    """A change was made looking at a state of the image that is no longer the last one."""


@dataclass
class ImageReview:
    """What is said of one image; `version` counts its changes, `undone` are those that can be made again."""

    marks: list[Mark]
    version: int = 0
    done: list[Change] = field(default_factory=list)
    undone: list[Change] = field(default_factory=list)
    last_change: str | None = None

    def take(self, action: str, change: Change) -> None:
        """Apply `change`, the outcome of `action`."""
        for landmark, (_, after) in change.items():
            self.marks[landmark] = after
        self.version += 1
        if action == "undo":
            self.undone.append(self.done.pop())
        elif action == "redo":
            self.done.append(self.undone.pop())
        elif action == "outside":
            self.done.clear()
            self.undone.clear()
        else:
            self.done.append(change)
            self.undone.clear()


class Review:
    """The images of a data set under review. Its methods may be called from several threads."""

    def __init__(self, labels: FolderLabels, answers: Mapping[str, Answer], folder: Path, who: str, run: str) -> None:
        self.labels, self.answers, self.who, self.run = labels, answers, who, run
        self.lock = threading.Lock()
        self._keep_first(folder / "landmarks_before.csv")
        self.journal = Journal(folder / "journal.jsonl")
        self.images = {key: ImageReview([None] * len(labels.names)) for key in labels.records}
        self._replay()
        self.at_start = {key for key in self.images if self.is_done(key)}

    def _keep_first(self, copy: Path) -> None:
        """The table as it was before its first review."""
        if self.labels.table.exists() and not copy.exists():
            write_atomically(copy, self.labels.table.read_bytes())

    # ---- what was said before

    def _replay(self) -> None:
        """The state that the journal and the labels tell together; the last entry is carried out if it was not."""
        told: dict[str, set[int]] = {key: set() for key in self.images}
        last: tuple[str, Change] | None = None
        for entry in self.journal.entries:
            key = entry["image"]
            if key not in self.images:
                continue
            change = {self.labels.names.index(name): (_mark(each["before"]), _mark(each["after"]))
                      for name, each in entry["landmarks"].items() if name in self.labels.names}
            self.images[key].take(entry["action"], change)
            self.images[key].last_change = entry.get("change")
            told[key] |= change.keys()
            last = key, change
        self._stamp = self.labels.stamp()
        found = self.labels.read()
        if last is not None:
            key, change = last
            points = self._points_of(found.get(key))
            self._fill(key, points, told[key])
            if any(not _alike(points[n], after) and _alike(points[n], before) for n, (before, after) in change.items()):
                self._write(key)
                found = self.labels.read()
            elif all(_alike(points[n], after) for n, (_, after) in change.items()):
                self._write(key)  # the labels are there, dataset.json may not list them yet
        for key in self.images:
            self._fill(key, self._points_of(found.get(key)), told[key])
        self._take_outside(found)

    def _fill(self, key: str, points: list[Mark], told: set[int]) -> None:
        """Landmarks that no entry speaks of are as the labels have them."""
        for number, point in enumerate(points):
            if number not in told:
                self.images[key].marks[number] = point

    def _points_of(self, points: np.ndarray | None) -> list[Mark]:
        if points is None:
            return [None] * len(self.labels.names)
        return [None if math.isnan(point[0]) else tuple(point[::-1].tolist()) for point in points]

    def _take_outside(self, found: Mapping[str, np.ndarray]) -> None:
        """Labels that somebody else changed are what counts; what can be undone ends there."""
        for key, image in self.images.items():
            points = self._points_of(found.get(key))
            change = {n: (mark, point) for n, (mark, point) in enumerate(zip(image.marks, points, strict=True))
                      if not _alike(point, mark)}
            if change:
                self._note(key, "outside", change, None)
                image.take("outside", change)

    # ---- changes

    def change(self, key: str, version: int, action: str, landmark: int | None = None,
               to: tuple[float, ...] | None = None, change_id: str | None = None) -> None:
        """Do `action` on image `key` as it is in `version`; labels and journal are on disk when this returns.

        A change that is there already, by its id, is not made twice. Stale: the image has another version by now.
        UserError: a place outside the image, labels on disk that cannot be read or written.
        """
        with self.lock:
            if self.labels.stamp() != self._stamp:
                self._take_outside(self.labels.read())
                self._stamp = self.labels.stamp()
            image = self.images[key]
            if change_id is not None and change_id == image.last_change:
                return
            if version != image.version:
                raise Stale(key)
            change = ACTIONS[action](self, key, landmark, to)
            if not change:
                return
            self._note(key, action, change, change_id)
            marks = list(image.marks)
            for number, (_, after) in change.items():
                image.marks[number] = after
            try:
                self._write(key)
            except (OSError, UserError) as error:
                image.marks[:] = marks
                self.journal.drop_last()
                raise UserError(f"not saved: {error}") from error
            image.take(action, change)
            image.last_change = change_id

    def _note(self, key: str, action: str, change: Change, change_id: str | None) -> None:
        answer, landmarks = self.answers.get(key), {}
        for number, (before, after) in change.items():
            each: dict[str, Any] = {"before": before, "after": after}
            if answer is not None:
                each |= {"predicted": self.predicted(key, number), "unit": answer.unit,
                         "expected_error": _number(answer.expected_error[number]),
                         "radius90": _number(answer.radius90[number])}
            landmarks[self.labels.names[number]] = each
        self.journal.append({"time": datetime.now().astimezone().isoformat(timespec="milliseconds"), "who": self.who,
                             "image": key, "version": self.images[key].version + 1, "action": action,
                             "landmarks": landmarks, "run": self.run, "change": change_id})

    def _write(self, key: str) -> None:
        marks = self.images[key].marks
        empty = (math.nan,) * self.labels.dims
        self.labels.write(key, np.array([mark if isinstance(mark, tuple) else empty for mark in marks])[:, ::-1])
        self._stamp = self.labels.stamp()

    # ---- questions

    def predicted(self, key: str, landmark: int) -> tuple[float, ...] | None:
        """Where the detector sees a landmark: (x, y[, z]), to a thousandth of a pixel."""
        answer = self.answers.get(key)
        if answer is None or np.isnan(answer.points[landmark]).any():
            return None
        return tuple(round(value, 3) for value in answer.points[landmark][::-1].tolist())

    def inside(self, key: str, point: tuple[float, ...]) -> bool:
        """Whether (x, y[, z]) lies in the image, as labels must."""
        size = self.labels.records[key].file_geometry().size[::-1]
        return len(point) == len(size) and all(-0.5 <= value <= length - 0.5
                                               for value, length in zip(point, size, strict=True))

    def is_done(self, key: str) -> bool:
        """Whether something is said of every landmark of an image."""
        return all(mark is not None for mark in self.images[key].marks)

    def changed(self) -> list[str]:
        """Images that have been changed in reviews, by the journal."""
        return sorted({entry["image"] for entry in self.journal.entries} & set(self.images))


def _moved(review: Review, key: str, landmark: int | None, to: tuple[float, ...] | None) -> Change:
    place = tuple(round(float(value), 3) for value in to or ())
    if not review.inside(key, place):
        raise UserError(f"({', '.join(map(str, place))}) lies outside image {key}")
    return _one(review, key, landmark, place)


def _accepted(review: Review, key: str, landmark: int | None, _to: object) -> Change:
    """Open landmarks, or the one that is named, become labels where they are predicted; those outside stay open."""
    change: Change = {}
    for number, mark in enumerate(review.images[key].marks):
        place = review.predicted(key, number)
        if mark is None and landmark in (None, number) and place is not None and review.inside(key, place):
            change[number] = None, place
    return change


def _one(review: Review, key: str, landmark: int | None, mark: Mark) -> Change:
    if landmark is None or not 0 <= landmark < len(review.labels.names):
        raise UserError(f"there is no landmark {landmark}")
    before = review.images[key].marks[landmark]
    return {} if before == mark else {landmark: (before, mark)}


def _turned_back(review: Review, key: str, *_: object) -> Change:
    done = review.images[key].done
    return {n: (after, before) for n, (before, after) in done[-1].items()} if done else {}


def _again(review: Review, key: str, *_: object) -> Change:
    undone = review.images[key].undone
    return undone[-1] if undone else {}


ACTIONS: dict[str, Callable[..., Change]] = {
    "move": _moved,
    "accept": _accepted,
    "absent": lambda review, key, landmark, _to: _one(review, key, landmark, ABSENT),
    "reset": lambda review, key, landmark, _to: _one(review, key, landmark, None),
    "undo": _turned_back,
    "redo": _again,
}


def _mark(value: Any) -> Mark:
    return tuple(value) if isinstance(value, list) else value


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)


def _alike(point: Mark, mark: Mark) -> bool:
    """Whether the labels hold what `mark` says; of what is not annotated they do not say why."""
    if not isinstance(point, tuple) or not isinstance(mark, tuple):
        return not isinstance(point, tuple) and not isinstance(mark, tuple)
    return max(abs(a - b) for a, b in zip(point, mark, strict=True)) < SAME_PIXELS
