"""What the pictures say: grey values, sizes, twins, drift between groups, and labels that lie on other structures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from core.config.dataset import Dataset as DatasetConfig
from core.data.cache import load_one
from core.data.leaks import LARGEST_UNEXPLAINED, reduced, unexplained
from core.data.records import DataSource, Record
from core.errors import UserError
from core.formats.geometry import apply_maps
from study.check.findings import Alarm, robust
from study.check.labels import Labelled

MOST = 1000  # images looked at, spread evenly over the data set
FLAT = 0.02  # of the other images' spread of grey values: nothing to see
CLIPPED = 0.005  # of the range of grey values: what counts as its end, since resizing leaves fractions
SATURATED = 0.4  # of the pixels at the brightest or the darkest value, beyond what the other images have
NEGATIVE = -0.3  # correlation with the mean image, where the others' median is above 0.3
GROUP, DRIFT, APART = 5, 2.5, 0.75  # images at least; pooled deviations; of pairs that lie the same way round
ASPECT = 1.25  # of width and height, against the others
PATCH, CELLS = 0.3, 9  # of the shape's size on either side of a landmark; cells along each axis
LOW, BETTER = 4.0, 0.8  # spreads below the others' likeness; of that gap that another image's labels close


class Picture(NamedTuple):
    """What is kept of an image: grey values, its reduced copy, patches (N, cells) about its landmarks if it has any."""

    record: Record
    low: float
    high: float
    mean: float
    deviation: float
    clipped: tuple[float, float]  # shares of the pixels at the darkest and at the brightest value
    small: np.ndarray
    digest: str | None


def read_pictures(records: Sequence[Record], config: DatasetConfig) -> tuple[list[Picture], list[Alarm]]:
    """Up to MOST of the images, through the cache; an alarm for each that cannot be read."""
    chosen = records if len(records) <= MOST else [records[n * len(records) // MOST] for n in range(MOST)]
    pictures, alarms = [], []
    for record in chosen:
        try:
            loaded = load_one(record, config)
        except UserError as error:
            alarms.append(Alarm("cannot be read", (record.id,), str(error)))
            continue
        pixels = loaded.pixels
        low, high = float(pixels.min()), float(pixels.max())
        end = CLIPPED * (high - low)
        clipped = float((pixels <= low + end).mean()), float((pixels >= high - end).mean())
        pictures.append(Picture(record, low, high, float(pixels.mean()), float(pixels.std()), clipped,
                                reduced(pixels), loaded.digest))
    return pictures, alarms


def picture_alarms(pictures: Sequence[Picture]) -> list[Alarm]:
    """Images that show nothing, are clipped, or are negatives of the others."""
    if len(pictures) < 3:
        return []
    alarms = []
    spread = float(np.median([picture.deviation for picture in pictures]))
    usual = np.median([picture.clipped for picture in pictures], axis=0)
    small = np.stack([picture.small.ravel() for picture in pictures])
    small = small - small.mean(axis=1, keepdims=True)
    mean = small.mean(axis=0)
    length = np.linalg.norm(small, axis=1) * np.linalg.norm(mean)
    likeness = (small @ mean) / np.where(length > 0, length, 1)
    for picture, like in zip(pictures, likeness.tolist(), strict=True):
        name = picture.record.id
        if picture.deviation <= FLAT * spread:
            alarms.append(Alarm("blank image", (name,), f"{name}: hardly any contrast (grey values {picture.low:g} to "
                                f"{picture.high:g})"))
        elif (picture.clipped > usual + SATURATED).any():
            alarms.append(Alarm("clipped image", (name,), f"{name}: {max(picture.clipped):.0%} of its pixels have one "
                                "and the same extreme value"))
        elif like < NEGATIVE and np.median(likeness) > -NEGATIVE:
            alarms.append(Alarm("negative image", (name,), f"{name}: dark where the others are bright"))
    return alarms


def size_alarms(records: Sequence[Record]) -> list[Alarm]:
    """Flat images of another shape, and spacings far from the others'."""
    known = [record for record in records if record.geometry is not None]
    alarms: list[Alarm] = []
    if len(known) < 5:
        return alarms
    sizes = np.array([record.file_geometry().size for record in known], dtype=np.float64)
    if sizes.shape[1] == 2:
        aspect = np.log(sizes[:, 1] / sizes[:, 0])
        middle, spread = robust(aspect, 1e-6)
        limit = max(float(np.log(ASPECT)), 6 * spread)
        for n in np.flatnonzero(abs(aspect - middle) > limit).tolist():
            alarms.append(Alarm("another aspect", (known[n].id,), f"{known[n].id}: {sizes[n, 1]:.0f} x "
                                f"{sizes[n, 0]:.0f} pixels: turned or cut otherwise than the others"))
    given = [record for record in known if record.spacing is not None]
    if len(given) >= 5:
        spacing = np.log([record.spacing or (1.0,) for record in given]).mean(axis=1)
        extent = spacing + np.log(np.array([record.file_geometry().size for record in given])).mean(axis=1)
        middle, spread = robust(extent, 1e-6)
        for n in np.flatnonzero(abs(extent - middle) > max(np.log(2.5), 6 * spread)).tolist():
            alarms.append(Alarm("another spacing", (given[n].id,), f"{given[n].id}: {np.exp(spacing[n]):.4g} mm "
                                f"a pixel makes it {np.exp(extent[n] - middle):.3g} times the others' size in mm"))
    return alarms


def twin_alarms(pictures: Sequence[Picture]) -> list[Alarm]:
    """The same picture twice, wherever: the pairs across a split are leaks, too."""
    if len(pictures) < 2:
        return []
    small = np.stack([picture.small for picture in pictures])
    same = unexplained(small, small) <= LARGEST_UNEXPLAINED
    blank = small.reshape(len(small), -1).std(axis=1) < 1e-3
    alarms = []
    for one, two in np.argwhere(np.triu(same, 1)).tolist():
        if blank[one] or blank[two]:
            continue
        ids = pictures[one].record.id, pictures[two].record.id
        identical = pictures[one].digest is not None and pictures[one].digest == pictures[two].digest
        words = "are the same file" if identical else "show the same picture"
        differing = _label_difference(pictures, one, two)
        alarms.append(Alarm("twin images", ids, f"{ids[0]} and {ids[1]} {words}{differing}"))
    return alarms


def _label_difference(pictures: Sequence[Picture], one: int, two: int) -> str:
    """How far the labels of two copies lie apart, where both have some."""
    points = [pictures[n].record.landmarks for n in (one, two)]
    if points[0] is None or points[1] is None or not np.isfinite(points[0] - points[1]).any():
        return ""
    apart = np.linalg.norm(points[0] - points[1], axis=1)
    return f" (their labels differ by up to {np.nanmax(apart):.3g} px)"


def drift_alarms(source: DataSource, pictures: Sequence[Picture]) -> list[Alarm]:
    """Groups of images, by split or by folder, whose grey values are of another kind than all the others'."""
    split_of = {record.id: split for split, records in source.splits.items() for record in records}
    groups: dict[str, list[int]] = {}
    for n, picture in enumerate(pictures):
        groups.setdefault(f"split {split_of.get(picture.record.id, 'unlabelled')}", []).append(n)
        groups.setdefault(f"folder {Path(picture.record.image).parent.name}", []).append(n)
    measures = {"mean grey value": np.array([picture.mean for picture in pictures]),
                "contrast": np.array([picture.deviation for picture in pictures])}
    alarms = []
    for group, members in groups.items():
        inside = np.isin(np.arange(len(pictures)), members)
        if min(inside.sum(), (~inside).sum()) < GROUP:
            continue
        for words, values in measures.items():
            ours, others = values[inside], values[~inside]
            one, two = robust(ours, 1e-9), robust(others, 1e-9)
            if abs(one[0] - two[0]) > DRIFT * np.hypot(one[1], two[1]):
                alarms.append(Alarm("drift between groups", (), f"{group} ({len(ours)} images): {words} {one[0]:.4g}, "
                                    f"of the other {len(others)} images {two[0]:.4g}; another scanner or export?"))
                break
    return alarms


def blurred(record: Record, config: DatasetConfig) -> tuple[np.ndarray, np.ndarray]:
    """The image as networks see it, blurred, and the map (D, D + 1) from stored pixels into it."""
    loaded = load_one(record, config)
    return gaussian_filter(loaded.pixels.mean(axis=0), 1.0), loaded.map


def cut_about(record: Record, points: np.ndarray, config: DatasetConfig) -> np.ndarray:
    """Patches (N, cells) about points (N, D) in stored pixels."""
    image, to_image = blurred(record, config)
    return cut(image, apply_maps(points[None], to_image[None])[0])


def cut(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Patches (N, cells) of `image` about `points` (N, D) in its pixels, each of mean 0 and length 1; NaN without."""
    known = points[np.isfinite(points).all(axis=1)]
    size = np.sqrt(((known - known.mean(axis=0)) ** 2).sum(axis=1).mean())
    steps = np.linspace(-PATCH, PATCH, CELLS) * size
    grid = np.stack(np.meshgrid(*[steps] * image.ndim, indexing="ij")).reshape(image.ndim, -1)
    places = points.T[:, :, None] + grid[:, None]
    cells = map_coordinates(image, np.nan_to_num(places), order=1, mode="nearest")
    cells = cells - cells.mean(axis=1, keepdims=True)
    cells = cells / np.maximum(np.linalg.norm(cells, axis=1, keepdims=True), 1e-9)
    return np.where(np.isfinite(points).all(axis=1)[:, None], cells, np.nan)


def exchange_alarms(labels: Labelled, config: DatasetConfig) -> Iterator[Alarm]:
    """Labels under which an image looks unlike all the others, where the labels of another image fit it better."""
    if len(labels.records) < 8 or len(labels.names) < 3:
        return
    patches = np.stack([cut_about(record, points, config)
                        for record, points in zip(labels.records, labels.points, strict=True)])
    usual = np.nanmedian(patches, axis=0)
    usual = usual / np.maximum(np.linalg.norm(usual, axis=1, keepdims=True), 1e-9)
    likeness = np.nanmean((patches * usual).sum(axis=2), axis=1)
    middle, spread = robust(likeness, 0.02)
    shares = labels.points / labels.sizes[:, None]
    for case in np.flatnonzero(likeness < middle - LOW * spread).tolist():
        image, to_image = blurred(labels.records[case], config)
        fits = np.full(len(shares), -1.0)
        for other in np.flatnonzero(np.arange(len(shares)) != case).tolist():
            points = apply_maps((shares[other] * labels.sizes[case])[None], to_image[None])[0]
            fits[other] = np.nanmean((cut(image, points) * usual).sum(axis=1))
        best = int(np.nanargmax(fits))
        if fits[best] - likeness[case] > BETTER * (middle - likeness[case]):
            name, other_name = labels.records[case].id, labels.records[best].id
            yield Alarm("labels of another image", (name,), f"{name}: what lies under its landmarks is unlike the "
                        f"other images' (likeness {likeness[case]:.2f}, of the others {middle:.2f}); the labels of "
                        f"{other_name} fit it better ({fits[best]:.2f})")


