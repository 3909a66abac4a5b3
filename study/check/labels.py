"""Labels that do not fit the others: by their numbers, by the landmarks' common shape, by how it lies in the image.

A shape is compared after it is moved, turned and scaled (never mirrored) as fits it best, which one landmark in three
may contradict (landmarks_finetuning.shape). A distance is a share of the shape's size, the root mean square distance
of its landmarks from their centroid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from core.config.dataset import Dataset as DatasetConfig
from core.data.cache import load_one
from core.data.records import Record
from core.formats.geometry import index_to_world
from landmarks_finetuning.shape import Shape, mean_shape
from study.check.findings import Alarm, robust, some

LEAST_LABELS = 5  # fewer have no common shape to speak of
FAR, TIMES = 0.45, 8.0  # of the shape's size, and how many times the landmark's own median distance: an outlier
MANY = 0.34  # of a row's landmarks: then the row is wrong, not the landmark
MENDED = 0.5  # of the distance that is left when a row is read in another way, at most
SIZE_FACTOR, SIZE_SPREADS = 1.6, 6.0  # of shapes of one kind, in mm or in shares of the image
TURNED, ALIKE = 60.0, 30.0  # degrees: a shape that lies another way, where nine in ten lie within the second
SHIFTED, SHIFT_SPREADS = 0.15, 7.0  # of the image's size
RARE = 0.5  # of the labelled images: a landmark that fewer have


class Labelled(NamedTuple):
    """Labelled images: points (K, N, D) in stored pixels, sizes (K, D), shapes (K, N, D) in mm or pixels."""

    records: tuple[Record, ...]
    names: tuple[str, ...]
    points: np.ndarray
    sizes: np.ndarray
    shapes: np.ndarray

    @classmethod
    def of(cls, records: Sequence[Record], names: tuple[str, ...], config: DatasetConfig) -> Labelled:
        """The labels of `records`, which are one at least; what a pack holds has its size from there."""
        points = np.stack([record.truth for record in records])
        sizes = np.array([load_one(record, config).original_size if record.geometry is None else record.geometry.size
                          for record in records], dtype=np.float64)
        return cls(tuple(records), names, points, sizes, np.stack([_straight(record) for record in records]))

    def place(self, case: int, landmark: int) -> str:
        """Where a landmark of an image lies, (x, y[, z])."""
        return "(" + ", ".join(f"{value:.4g}" for value in self.points[case, landmark, ::-1]) + ")"


def _straight(record: Record) -> np.ndarray:
    """Landmarks (N, D) on square axes: mm where the file or the data set says them, else pixels; z, y, x or y, x."""
    affine = None if record.geometry is None else record.geometry.affine
    if affine is not None and record.truth.shape[1] == 3:
        return index_to_world(record.truth, affine)[:, ::-1]
    return record.truth * (1.0 if record.spacing is None else np.array(record.spacing))


def label_alarms(labels: Labelled) -> list[Alarm]:
    """All that is wrong with the labels' numbers and shapes; of an image only the first that explains it."""
    alarms = [*_rare_landmarks(labels), *_fractions(labels), *_zeros(labels), *_copied_rows(labels)]
    known = {name for alarm in alarms if alarm.kind != RARE_KIND for name in alarm.images}
    for alarm in (*_same_place(labels), *_shape_alarms(labels, known)):
        if not known.intersection(alarm.images):
            alarms.append(alarm)
            known.update(alarm.images)
    return alarms


RARE_KIND = "landmark seldom annotated"


def _rare_landmarks(labels: Labelled) -> Iterator[Alarm]:
    present = np.isfinite(labels.points).all(axis=2)
    for landmark, count in enumerate(present.sum(axis=0).tolist()):
        if count < RARE * len(present):
            yield Alarm(RARE_KIND, (), f'"{labels.names[landmark]}" has a label in {count} of {len(present)} images')


def _fractions(labels: Labelled) -> Iterator[Alarm]:
    for record, points in zip(labels.records, labels.points, strict=True):
        known = points[np.isfinite(points).all(axis=1)]
        if len(known) > 1 and (known >= 0).all() and known.max() <= 1 and len(np.unique(known, axis=0)) > 1:
            yield Alarm("fractions of the size", (record.id,),
                        f"{record.id}: every coordinate lies between 0 and 1; pixels are wanted")


def _zeros(labels: Labelled) -> Iterator[Alarm]:
    zero = (labels.points == 0).all(axis=2) | (labels.shapes == 0).all(axis=2)
    if zero.mean() > 0 and len(labels.records) > 1:
        for case in np.flatnonzero(zero.any(axis=1)).tolist():
            names = [labels.names[n] for n in np.flatnonzero(zero[case])]
            yield Alarm('(0, 0) as "missing"', (labels.records[case].id,),
                        f"{labels.records[case].id}: {some(names)} at exactly 0; leave the cell empty where a landmark "
                        "is missing")


def _copied_rows(labels: Labelled) -> Iterator[Alarm]:
    first: dict[bytes, int] = {}
    for case, points in enumerate(labels.points):
        if np.isfinite(points).all(axis=1).sum() < 2:
            continue
        other = first.setdefault(points.tobytes(), case)
        if other != case:
            ids = labels.records[other].id, labels.records[case].id
            yield Alarm("labels copied", ids, f"{ids[1]} has exactly the labels of {ids[0]}")


def _same_place(labels: Labelled) -> Iterator[Alarm]:
    """Two landmarks of an image at one place, which hardly any other image has there."""
    for one, two in combinations(range(len(labels.names)), 2):
        same = (labels.points[:, one] == labels.points[:, two]).all(axis=1)
        if 0 < same.sum() <= max(1, 0.05 * len(same)) and len(same) > 1:
            for case in np.flatnonzero(same).tolist():
                yield Alarm("two landmarks at one place", (labels.records[case].id,),
                            f'{labels.records[case].id}: "{labels.names[one]}" and "{labels.names[two]}" both at '
                            f"{labels.place(case, one)}")


class Fit(NamedTuple):
    """The common shape `mean` (N, D), moved onto every image's (K, N, D), how far each lies off (K, N), its size."""

    mean: np.ndarray
    fitted: np.ndarray
    off: np.ndarray
    size: np.ndarray


def fit_shapes(shapes: np.ndarray) -> Fit:
    """The shapes (K, N, D) that agree make the mean; the others are only compared with it."""
    agreeing = np.ones(len(shapes), dtype=bool)
    for _ in range(3):
        mean = mean_shape(shapes[agreeing])
        fit = _fit(mean, shapes)
        typical = np.nanmean(np.where(np.isfinite(fit.off), fit.off, np.nan), axis=1)
        agreeing = ~(typical > 2 * np.nanmedian(typical))
    return fit


def _fit(mean: np.ndarray, shapes: np.ndarray) -> Fit:
    fitted = Shape(mean).fit(shapes, np.isfinite(shapes).all(axis=2).astype(np.float64))
    centred = fitted - np.nanmean(fitted, axis=1, keepdims=True)
    size = np.sqrt(np.nanmean((centred**2).sum(axis=2), axis=1))
    return Fit(mean, fitted, np.linalg.norm(fitted - shapes, axis=2) / size[:, None], size)


def _shape_alarms(labels: Labelled, known: set[str]) -> Iterator[Alarm]:
    """Rows and landmarks that contradict the common shape, or shapes that lie in their image as no other does."""
    use = [n for n, record in enumerate(labels.records) if record.id not in known
           and np.isfinite(labels.points[n]).all(axis=1).sum() > labels.points.shape[2] + 1]
    if len(use) < LEAST_LABELS:
        return
    chosen = Labelled(tuple(labels.records[n] for n in use), labels.names, labels.points[use], labels.sizes[use],
                      labels.shapes[use])
    fit = fit_shapes(chosen.shapes)
    limits = np.maximum(FAR, TIMES * np.nanmedian(fit.off, axis=0))
    outlying = fit.off > limits
    for case in np.flatnonzero(outlying.any(axis=1)).tolist():
        annotated = np.isfinite(fit.off[case]).sum()
        if outlying[case].sum() > MANY * annotated:
            yield _row_alarm(chosen, fit, case)
        else:
            yield _landmark_alarm(chosen, fit, case, np.flatnonzero(outlying[case]))
    if not outlying.any(axis=1).all():
        yield from _pose_alarms(chosen, fit, ~outlying.any(axis=1))


def _readings(labels: Labelled, case: int) -> Iterator[tuple[str, np.ndarray]]:
    """(what is wrong, the shape (N, D) read right) of the mistakes that leave a row's numbers plausible."""
    points, size = labels.points[case], labels.sizes[case]
    scale = np.nanmedian(labels.shapes[case] / np.where(points == 0, np.nan, points), axis=0)
    if points.shape[1] == 2:
        yield "x and y are swapped", points[:, ::-1] * scale
        mirrored = ("top and bottom are mirrored: y counted from the bottom", "left and right are mirrored")
        for axis, words in enumerate(mirrored):
            turned = points.copy()
            turned[:, axis] = size[axis] - 1 - turned[:, axis]
            yield words, turned * scale
    else:
        for one, two in combinations(range(3), 2):
            order = [0, 1, 2]
            order[one], order[two] = two, one
            yield f"{'zyx'[one]} and {'zyx'[two]} are swapped, or an axis is mirrored", labels.shapes[case][:, order]
    reverse = labels.shapes[case][::-1]
    yield "its landmarks are in the reverse order", reverse


def _row_alarm(labels: Labelled, fit: Fit, case: int) -> Alarm:
    """A whole row that fits no more: how to read it so that it does, where there is a way."""
    name = labels.records[case].id
    now = np.nanmean(fit.off[case])
    usual = np.nanmedian(labels.shapes, axis=0)
    tries = []
    for words, shape in _readings(labels, case):
        off = np.nanmean(_fit(fit.mean, shape[None]).off)
        moved = shape - usual
        away = float(np.nanmean(np.linalg.norm(moved - np.nanmean(moved, axis=0), axis=1)))  # a turn counts
        if off < MENDED * now:
            tries.append((away, words))
    if tries:
        return Alarm(min(tries)[1].split(":")[0], (name,), f"{name}: its landmarks fit the others' common shape when "
                     f"{min(tries)[1]}")
    return Alarm("another shape", (name,), f"{name}: its landmarks are not the others' common shape (mean distance "
                 f"{now:.2f} of its size; the others' {np.nanmedian(fit.off):.2f})")


def _landmark_alarm(labels: Labelled, fit: Fit, case: int, landmarks: np.ndarray) -> Alarm:
    name, shape = labels.records[case].id, labels.shapes[case]
    for one, two in combinations(landmarks.tolist(), 2):
        crossed = np.linalg.norm(fit.fitted[case, [one, two]] - shape[[two, one]], axis=1) / fit.size[case]
        if (crossed < MENDED * fit.off[case, [one, two]]).all():
            return Alarm("two landmarks exchanged", (name,), f'{name}: "{labels.names[one]}" and "{labels.names[two]}" '
                         "lie where the common shape has each other")
    worst = int(landmarks[fit.off[case, landmarks].argmax()])
    more = f" (and {len(landmarks) - 1} more)" if len(landmarks) > 1 else ""
    return Alarm("landmark far from the common shape", (name,), f'{name}: "{labels.names[worst]}" at '
                 f"{labels.place(case, worst)}, {fit.off[case, worst]:.2f} of the shape's size from where the others "
                 f"put it; the median is {np.nanmedian(fit.off[:, worst]):.2f}{more}")


def _pose_alarms(labels: Labelled, fit: Fit, good: np.ndarray) -> Iterator[Alarm]:
    """Shapes of another size, that lie another way (flat images alone), or elsewhere in their image."""
    metric = all(record.spacing is not None for record in labels.records)
    size = fit.size if metric else fit.size / np.linalg.norm(labels.sizes, axis=1)
    middle, spread = robust(np.log(size[good]), 1e-6)
    limit = max(float(np.log(SIZE_FACTOR)), SIZE_SPREADS * spread)
    unit = "in mm" if metric else "of the image"
    centre = np.nanmean(labels.points, axis=1) / labels.sizes
    turned = _turns(fit) if labels.points.shape[2] == 2 else np.zeros(len(size))
    for case in np.flatnonzero(good).tolist():
        name = labels.records[case].id
        factor = float(np.exp(np.log(size[case]) - middle))
        if abs(np.log(factor)) > limit:
            yield Alarm("another size", (name,), f"{name}: its shape is {factor:.3g} times the others' size {unit}: "
                        "labels of an image of another size, or a wrong spacing")
        elif abs(turned[case]) > TURNED:
            yield Alarm("turned", (name,), f"{name}: its shape is turned by {abs(turned[case]):.0f} degrees "
                        "against the others'")
    if labels.points.shape[2] == 2:
        for axis in range(2):
            middle, spread = robust(centre[good, axis], 1e-6)
            for case in np.flatnonzero(good & (abs(centre[:, axis] - middle) >
                                               max(SHIFTED, SHIFT_SPREADS * spread))).tolist():
                name = labels.records[case].id
                yield Alarm("elsewhere in the image", (name,), f"{name}: its landmarks lie "
                            f"{centre[case, axis] - middle:+.2f} of the image's {('height', 'width')[axis]} from where "
                            "the others' do")


def _turns(fit: Fit) -> np.ndarray:
    """(K,) degrees by which each shape is turned from the middle one; 0 where they lie anyhow."""
    base = fit.mean - np.nanmean(fit.mean, axis=0)
    moved = fit.fitted - np.nanmean(fit.fitted, axis=1, keepdims=True)
    places, own = base[:, 1] + 1j * base[:, 0], moved[..., 1] + 1j * moved[..., 0]
    turn = np.nansum(own * places.conj(), axis=1)
    turn = turn / np.abs(turn)
    middle = np.median(turn.real) + 1j * np.median(turn.imag)
    angles = np.degrees(np.angle(turn / middle))
    return angles if np.quantile(abs(angles), 0.9) < ALIKE else np.zeros(len(turn))
