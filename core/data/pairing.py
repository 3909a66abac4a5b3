"""Whether images and landmarks of volumes belong together, before training: points inside, spacing, orientation.

`check_inside` looks at one case on its own, `check_against_others` at the cases of a data set side by side. World
points are RAS mm (core.formats.geometry); without an affine the axes are taken to be upright already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from math import comb
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.errors import UserError
from core.formats.geometry import RAS_TO_LPS, Geometry, index_to_world, world_to_index

SWITCH_OFF = "(set dataset.check_geometry to false if this is right)"
MIN_CASES, MIN_POINTS, MAX_OTHERS = 3, 4, 50
SIZE_FACTOR = 2.5  # sizes in mm of one kind of object stay within it
MIN_SPAN = 0.2  # of the volume: points that a change of units squeezes into less were not mended by it
GOOD_FIT = 0.25  # distance of two shapes of centroid size 1 that may still be the same object
FAR_BETTER = 2.0  # how many times closer the mended shape must be
CLEAR_OF_NOISE = 3.0  # how many times the others' own distances
TURNED, TILTED = 60.0, 40.0  # degrees from the others: more is no tilt; a tilt
CHANCE, NAMING_CHANCE = 1e-3, 0.05  # of the others lying so alike by accident: to raise an alarm, to name an axis


@dataclass(frozen=True, eq=False)
class Case:
    """One labelled volume: points (N, 3) voxels (z, y, x) of the file's own grid, NaN = not annotated."""

    name: str
    image: Path
    labels: Path
    geometry: Geometry
    points: np.ndarray


def check_inside(case: Case, names: Sequence[str]) -> None:
    """UserError where an annotated point lies outside [-0.5, size - 0.5]: which, where, and what would mend them all.

    Cannot see: points of another image that lie inside this one, nor exchanged axes that keep every point inside.
    """
    size = np.asarray(case.geometry.size, dtype=np.float64)
    outside = np.flatnonzero(~_inside(case.points, size) & np.isfinite(case.points).all(axis=1))
    if not len(outside):
        return
    place = ", ".join(f"{value:.1f}" for value in case.points[outside[0], ::-1])
    voxels = " x ".join(str(length) for length in case.geometry.size[::-1])
    annotated = int(np.isfinite(case.points).all(axis=1).sum())
    count = "all" if len(outside) == annotated else f"{len(outside)} of"
    more = f", as do {count} {annotated}" if len(outside) > 1 else f", the only one of {annotated}"
    mends = list(dict.fromkeys(mend for mend, points in _readings(case) if _lie_well(points, size)))
    unknown = "check that the two files belong together, and the units and axes of the landmarks"
    raise UserError(
        f'{case.labels}: landmark "{names[outside[0]]}" lies outside {case.image}: (x, y, z) = ({place}) in {voxels} '
        f"voxels{more}; {'; or '.join(mends[:2]) or unknown}"
    )


def _inside(points: np.ndarray, size: np.ndarray) -> np.ndarray:
    return np.all((points >= -0.5) & (points <= size - 0.5), axis=1)


def _lie_well(points: np.ndarray, size: np.ndarray) -> bool:
    """Whether all of them lie inside and are not squeezed into a corner."""
    points = points[np.isfinite(points).all(axis=1)]
    spans = np.ptp(points, axis=0) / size
    return bool(_inside(points, size).all() and (len(points) == 1 or spans.max() > MIN_SPAN))


def _readings(case: Case) -> Iterator[tuple[str, np.ndarray]]:
    """(what mends it, the points then) for other readings of the same file, the likeliest first."""
    affine, points = case.geometry.affine, case.points
    if affine is not None:
        exchanged = world_to_index(index_to_world(points, affine) * RAS_TO_LPS, affine)
        yield "they lie inside when LPS and RAS are exchanged: correct the file's coordinateSystem", exchanged
    for order in list(permutations(range(3)))[:0:-1]:  # the reversed order first
        axes = ", ".join("zyx"[order.index(column)] for column in (2, 1, 0))
        mend = "the axes are swapped, or the two files do not belong together"
        yield f"they lie inside when axes (x, y, z) are read as ({axes}): {mend}", points[:, order]
    as_mm, as_voxels = (
        f"they lie inside when the file's numbers are {units}: correct its units"
        for units in ("voxels, not mm", "mm, not voxels")
    )
    if affine is not None:
        for signs in (RAS_TO_LPS, np.ones(3)):
            yield as_mm, (index_to_world(points, affine) * signs)[:, ::-1]
            yield as_voxels, world_to_index(points[:, ::-1] * signs, affine)
    elif case.geometry.spacing_mm is not None:
        yield as_mm, points * case.geometry.spacing_mm
        yield as_voxels, points / case.geometry.spacing_mm


def check_against_others(
    cases: Sequence[Case], unlabelled: Sequence[tuple[Path, Geometry]], names: Sequence[str]
) -> None:
    """UserError for the volume that differs most from the others in spacing, size of the shape, handedness, direction.

    Handedness (a flipped axis, two swapped ones) shows at any orientation of the specimens, from 3 cases on; which
    axis it is, only where the others lie alike, from 4 cases on. Turns (LPS and RAS exchanged, axes rotated) show only
    where the others lie alike: from 6 cases on tilted by 20 degrees or less, with fewer for smaller tilts.

    Cannot see: another case's landmarks of a like shape; a shift; a turn where specimens lie at any roll, or within a
    shape on a line; a flip across the plane of a flat shape; a wrong spacing of one axis; what is wrong in most cases;
    anything of shape in fewer than 3 cases or 4 common points.
    """
    _check_extents(cases, unlabelled)
    if len(cases) < MIN_CASES:
        return
    shapes = np.stack([_upright_mm(case) for case in cases])
    _check_shape_sizes(cases, shapes)
    findings = [finding for number in range(len(cases)) if (finding := _direction(number, shapes)) is not None]
    if findings:
        worst = max(findings, key=lambda finding: finding.ratio)
        raise UserError(_direction_line(worst, cases[worst.number], names))


def _check_extents(cases: Sequence[Case], unlabelled: Sequence[tuple[Path, Geometry]]) -> None:
    every = [*((case.image, case.geometry) for case in cases), *unlabelled]
    volumes = [(path, geometry.size, geometry.spacing_mm) for path, geometry in every
               if geometry.spacing_mm is not None]
    if len(volumes) < MIN_CASES:
        return
    spacings = np.array([spacing for _, _, spacing in volumes])
    voxels = np.log([size for _, size, _ in volumes]).mean(axis=1)  # mean of logs: geometric mean over axes
    number, factor = _misfit(voxels + np.log(spacings).mean(axis=1))
    if factor is None or abs(voxels[number] - np.median(np.delete(voxels, number))) > np.log(SIZE_FACTOR):
        return
    path, _, spacing = volumes[number]
    others = np.median(np.delete(spacings, number, axis=0), axis=0)
    raise UserError(
        f"image {path}: its spacing is {_xyz(spacing)} mm, that of the other {len(volumes) - 1} volumes "
        f"{_xyz(others)} mm (median) with about as many voxels: {_times(factor)} in mm; correct the spacing in its "
        f"header, or dataset spacing {SWITCH_OFF}"
    )


def _check_shape_sizes(cases: Sequence[Case], shapes: np.ndarray) -> None:
    """The centroid size (root mean square distance from the centroid) of the points that all have in common."""
    common = np.isfinite(shapes).all(axis=(0, 2))
    if common.sum() < MIN_POINTS or any(case.geometry.spacing_mm is None for case in cases):
        return
    sizes = np.sqrt(shapes[:, common].var(axis=1).sum(axis=1))
    number, factor = _misfit(np.log(sizes)) if (sizes > 0).all() else (0, None)
    if factor is None:
        return
    others = np.median(np.delete(sizes, number))
    raise UserError(
        f"{cases[number].labels}: its landmarks are {_times(factor)} than those of the other {len(cases) - 1} cases "
        f"({sizes[number]:.3g} mm from their middle, the others {others:.3g} mm); correct the spacing in the header of "
        f"{cases[number].image}, or the units of the landmarks {SWITCH_OFF}"
    )


def _misfit(log_sizes: np.ndarray) -> tuple[int, float | None]:
    """(which, factor) of the size furthest from the median of the others, None within SIZE_FACTOR or others unlike."""
    off = np.array([log_sizes[i] - np.median(np.delete(log_sizes, i)) for i in range(len(log_sizes))])
    number = int(np.abs(off).argmax())
    others = np.delete(log_sizes, number)
    alike = np.abs(others - np.median(others)) < np.log(SIZE_FACTOR)
    wrong = abs(off[number]) > np.log(SIZE_FACTOR) and alike.mean() > 0.5
    return number, float(np.exp(off[number])) if wrong else None


def _times(factor: float) -> str:
    return f"{factor:.1f} times larger" if factor > 1 else f"{1 / factor:.1f} times smaller"


def _xyz(values: Sequence[float]) -> str:  # from (z, y, x)
    return " x ".join(f"{value:.3g}" for value in values[::-1])


def _upright_mm(case: Case) -> np.ndarray:
    """(N, 3) RAS mm (x, y, z); of bare arrays their own axes as LPS, in voxels where the spacing is unknown."""
    if case.geometry.affine is not None:
        return index_to_world(case.points, case.geometry.affine)
    return (case.points * (case.geometry.spacing_mm or 1.0))[:, ::-1] * RAS_TO_LPS


class _Fit(NamedTuple):
    """M shapes on one: rotations (M, 3, 3) with shape @ rotation on it, distances (M,) for centroid size 1."""

    usable: np.ndarray
    rotation: np.ndarray
    distance: np.ndarray
    mirrored_rotation: np.ndarray  # the best one of determinant -1
    mirrored_distance: np.ndarray
    aligned: np.ndarray  # (M, N, 3), shifted, scaled, turned


def _fit(shapes: np.ndarray, target: np.ndarray) -> _Fit:
    """Procrustes (Kabsch 1976) of (M, N, 3) on (N, 3) over the points that both have; usable: enough of them."""
    common = (np.isfinite(shapes) & np.isfinite(target)).all(axis=-1)[..., None]
    count = np.maximum(common.sum(axis=1, keepdims=True), 1)
    sides = []
    for points in (shapes, np.broadcast_to(target, shapes.shape)):
        centre = np.where(common, points, 0).sum(axis=1, keepdims=True) / count
        size = np.sqrt((np.where(common, points - centre, 0) ** 2).sum(axis=(1, 2), keepdims=True))
        sides.append((np.where(common, points - centre, 0) / np.where(size > 0, size, 1), centre, size))
    (moving, centre, size), (fixed, target_centre, target_size) = sides
    left, stretch, right = np.linalg.svd(np.swapaxes(moving, 1, 2) @ fixed)
    hand = np.sign(np.linalg.det(left @ right))
    rotations, distances = [], []
    for sign in (hand, -hand):
        turn = np.stack((np.ones_like(sign), np.ones_like(sign), sign), axis=-1)
        rotations.append((left * turn[:, None]) @ right)
        distances.append(np.sqrt(np.maximum(0, 2 - 2 * (stretch * turn).sum(axis=-1))))
    ratio = target_size / np.where(size > 0, size, 1)
    aligned = (shapes - centre) * ratio @ rotations[0] + target_centre
    usable = (common.sum(axis=(1, 2)) >= MIN_POINTS) & (size[:, 0, 0] > 0) & (target_size[:, 0, 0] > 0)
    return _Fit(usable, rotations[0], distances[0], rotations[1], distances[1], aligned)


def _consensus(others: np.ndarray) -> np.ndarray:
    """(N, 3) median shape of (K, N, 3): of like shapes turned onto one of them, then onto their median, thrice."""
    target = others[np.isfinite(others).all(axis=-1).sum(axis=1).argmax()]
    for _ in range(4):
        fit = _fit(others, target)
        aligned = fit.aligned[fit.usable]
        seen = np.isfinite(aligned).all(axis=-1).sum(axis=0)
        target = np.full(target.shape, np.nan)
        enough = seen * 2 >= max(len(aligned), 2)
        if enough.any():
            target[enough] = np.nanmedian(aligned[:, enough], axis=0)
    return target


class _Finding(NamedTuple):
    """Shape `number` comes `ratio` times closer to the others' consensus by `mend` (points @ mend), None: a mirror."""

    number: int
    others: int
    ratio: float
    mend: np.ndarray | None
    point: int  # the landmark furthest off, and how far
    off_mm: float


def _direction(number: int, shapes: np.ndarray) -> _Finding | None:
    """What mirrors or turns shape `number` of (M, N, 3) into the others' consensus, where it is far from it."""
    others = np.delete(shapes, number, axis=0)
    others = others[np.unique(np.linspace(0, len(others) - 1, MAX_OTHERS).astype(int))]
    target = _consensus(others)
    fit, own, itself = (_fit(points, target) for points in (others, shapes[number][None], target[None]))
    count = int(fit.usable.sum())
    if count < MIN_CASES - 1 or not own.usable[0]:
        return None
    agreement = _agreement(fit.rotation[fit.usable])
    noise = float(np.median(fit.distance[fit.usable])) * np.sqrt((count + 1) / (count - 1))
    distance, mirrored = float(own.distance[0]), float(own.mirrored_distance[0])
    handed = min(distance, float(itself.mirrored_distance[0])) > max(CLEAR_OF_NOISE * noise, GOOD_FIT / 2)
    if mirrored < GOOD_FIT and distance > FAR_BETTER * mirrored and handed:
        mend = _mend(own.mirrored_rotation[0], agreement.pose, -1) if agreement.chance < NAMING_CHANCE else None
        off = np.linalg.norm(own.aligned[0] - target, axis=1) * _size(shapes[number], target) / _size(target, target)
        point = int(np.nanargmax(off))
        return _Finding(number, count, distance / max(mirrored, 1e-3), mend, point, float(off[point]))
    if distance > GOOD_FIT or agreement.chance * 3 * agreement.degrees / 180 > CHANCE:  # 3: quarter turns, half turn
        return None
    return _turned(number, count, shapes[number], target, own.rotation[0], agreement.pose)


def _turned(number: int, count: int, shape: np.ndarray, target: np.ndarray, rotation: np.ndarray,
            pose: np.ndarray) -> _Finding | None:
    """A case that lies a quarter or half turn from others that lie nearly as `pose`; None for points on a line."""
    mend = _mend(rotation, pose, +1)
    if _angles(rotation, pose) < TURNED or mend is None:
        return None
    there = target @ pose.T  # the consensus as the others lie
    size = _size(shape, there)
    off, mended = (_unturned_distances(points, there) for points in (shape, shape @ mend))
    total, total_mended = (np.sqrt(np.nansum(distances**2)) for distances in (off, mended))
    width = np.linalg.svd(_centred(there, shape)[np.isfinite(off)])[1][1] / _size(there, shape)
    if total < FAR_BETTER * total_mended or width < GOOD_FIT / 2:
        return None
    point = int(np.nanargmax(off))
    return _Finding(number, count, total / max(total_mended, 1e-3), mend, point, float(off[point]) * size)


def _unturned_distances(shape: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(N,) from shape to target, centred, scaled to centroid size 1, not turned; NaN where one of them is."""
    scaled = _centred(shape, target) / _size(shape, target)
    return np.linalg.norm(scaled - _centred(target, shape) / _size(target, shape), axis=1)


def _centred(points: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N, 3) about the centroid of those that `other` has too."""
    return points - points[np.isfinite(points + other).all(axis=1)].mean(axis=0)


def _size(points: np.ndarray, other: np.ndarray) -> float:
    """The centroid size of the points that `other` has too."""
    return float(np.linalg.norm(_centred(points, other)[np.isfinite(points + other).all(axis=1)]))


class _Agreement(NamedTuple):
    """`chance`: that specimens at a random roll each lie within `degrees` of the rotation `pose` as these do."""

    chance: float
    degrees: float
    pose: np.ndarray


def _agreement(poses: np.ndarray) -> _Agreement:
    """Of (K, 3, 3): binomial, m - 1 of the other K - 1 close to one, for any one; the m > K / 2 that surprises most."""
    angles = np.sort(_angles(poses[:, None], poses[None]), axis=1)
    count, agreements = len(poses), []
    for members in range(count // 2 + 1, count + 1):
        centre = int(angles[:, members - 1].argmin())
        degrees = max(float(angles[centre, members - 1]), 5.0)
        share, rest = degrees / 180, count - 1
        tail = sum(comb(rest, m) * share**m * (1 - share) ** (rest - m) for m in range(members - 1, count))
        agreements.append(_Agreement(min(1.0, count * tail), degrees, poses[centre]))
    return min(agreements, key=lambda agreement: agreement.chance)


def _angles(rotation: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Degrees between rotations (.., 3, 3)."""
    trace = (rotation * others).sum(axis=(-1, -2))
    return np.degrees(np.arccos(np.clip((trace - 1) / 2, -1, 1)))


def _mend(rotation: np.ndarray, pose: np.ndarray, hand: int) -> np.ndarray | None:
    """The signed permutation of determinant `hand` after which a case lies as the others do but for a tilt."""
    mend = min(_mends(hand), key=lambda mend: float(_angles(mend.T @ rotation, pose)))
    return mend if _angles(mend.T @ rotation, pose) < TILTED else None


def _mends(hand: int) -> list[np.ndarray]:
    """The (3, 3) signed permutations of determinant `hand` but the identity."""
    orders_and_signs = product(permutations(range(3)), product((1.0, -1.0), repeat=3))
    matrices = [np.eye(3)[:, order] * signs for order, signs in orders_and_signs]
    return [m for m in matrices if round(np.linalg.det(m)) == hand and not np.array_equal(m, np.eye(3))]


MIRRORED = ("left and right are mirrored", "front and back are mirrored", "top and bottom are mirrored")


def _direction_line(finding: _Finding, case: Case, names: Sequence[str]) -> str:
    seen, mend = _in_words(finding.mend)
    unit = "voxels" if case.geometry.spacing_mm is None else "mm"
    return (
        f"{case.labels}: its landmarks fit the other {finding.others} cases {finding.ratio:.1f} times better {seen} "
        f'(landmark "{names[finding.point]}" is {finding.off_mm:.3g} {unit} off): {mend} {SWITCH_OFF}'
    )


def _in_words(mend: np.ndarray | None) -> tuple[str, str]:
    """What helps, and what mends it, of points (x, y, z) @ mend."""
    files = "in its landmarks or its image's affine"
    if mend is None:
        return "mirrored", f"one axis is flipped or two are swapped {files}"
    negated, swapped = (np.flatnonzero(test).tolist() for test in (np.diag(mend) < 0, np.diag(mend) == 0))
    if not swapped:
        seen = "with " + " and ".join("xyz"[axis] for axis in negated) + " negated"
        if negated == [0, 1]:
            return seen, "LPS and RAS are exchanged: correct its coordinateSystem, or its image's affine"
        if len(negated) == 1:
            return seen, f"{MIRRORED[negated[0]]} {files}"
        return seen, f"two axes are flipped {files}" if len(negated) == 2 else f"all axes are flipped {files}"
    columns = ", ".join(("-" if mend[:, to].sum() < 0 else "") + "xyz"[np.abs(mend[:, to]).argmax()] for to in range(3))
    seen = f"with (x, y, z) read as ({columns})"
    if len(swapped) == 2 and mend[tuple(swapped)] == mend[tuple(swapped[::-1])] and not negated:
        return seen, f"axes {' and '.join('xyz'[axis] for axis in swapped)} are swapped {files}"
    return seen, f"its axes are permuted or flipped {files}"
