"""Synthetic head CTs whose 12 landmarks are known exactly, in the folder layout: the embedded data for volumes.

One head is drawn, in its own frame: mm, x right, y anterior, z superior, 160 mm from chin to vertex. `Head` bends it
into an individual and tilts it in the patient's frame (RAS mm); `Grid` samples it. Both maps have closed forms, so a
landmark is the vertex, tip or centre of something drawn, and its world coordinates do not depend on the grid.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from core.errors import UserError
from core.files import parse_json, write_atomically, write_json
from core.formats.geometry import RAS_TO_LPS, world_to_index
from core.formats.markups import write_markups

LANDMARKS: dict[str, tuple[float, float, float]] = {
    "left orbit": (-23, 51, -2),  # centre of the eyeball
    "right orbit": (23, 51, -2),
    "nasion": (0, 66, 1),  # upper end of the nasal bone
    "left zygion": (-57, 20, -20),  # most lateral place of the zygomatic arch
    "right zygion": (57, 20, -20),
    "left condyle": (-46, 6, -28),  # centre of the head of the mandible
    "right condyle": (46, 6, -28),
    "menton": (0, 60, -80),  # lowest place of the chin
    "upper incisors": (0, 65, -46),  # front of the upper row of teeth
    "foramen magnum": (0, -25, -35.3),  # centre of the hole in the base of the skull
    "vertex": (0, -8, 82),  # top of a bump on the skull
    "left parietal boss": (-49, -20, 47),  # centre of a bump that the right side does not have
}

_VERSION = 1
_MIN_SIZE, _MIN_COUNT = 16, 3
_FIELD_MM = 200.0  # nominal, along every axis
_MARGIN = 0.04  # landmarks keep this fraction of the field away from its sides
_SDR_THRESHOLDS = [3, 6, 9]  # mm
_ORIENTATIONS = ("LPS", "RAS", "oblique")  # in turn; landmark files are LPS and RAS in turn
_AIR, _FAT, _SOFT = -1000.0, -90.0, 45.0  # Hounsfield units
_FLAT = 80.0  # mm: half height of the head
_MIRROR = np.array([-1, 1, 1], dtype=np.float32)


class Part(NamedTuple):
    """An ellipsoid about one point with three radii, or a tube through points with a radius at each; mm."""

    name: str
    hounsfield: float
    points: np.ndarray  # (N, 3)
    radii: np.ndarray  # (3,) if N is 1, else (N,)

    def distance(self, places: np.ndarray) -> np.ndarray:
        """Signed distance (...) in mm of `places` (3, ...) from the surface, negative inside."""
        places = places.reshape(3, -1)
        if len(self.points) == 1:
            scaled = (places - self.points[0][:, None]) / self.radii[:, None]
            level = np.sqrt((scaled**2).sum(axis=0))
            steepness = np.sqrt(((scaled / self.radii[:, None]) ** 2).sum(axis=0))
            return level * (level - 1) / np.maximum(steepness, 1e-6)
        nearest = np.full(places.shape[1], np.inf, dtype=np.float32)
        for k in range(len(self.points) - 1):
            axis, rest = self.points[k + 1] - self.points[k], places - self.points[k][:, None]
            along = np.clip(axis @ rest / (axis @ axis), 0, 1)
            gap = np.sqrt(((rest - axis[:, None] * along) ** 2).sum(axis=0))
            nearest = np.minimum(nearest, gap - (self.radii[k] + along * (self.radii[k + 1] - self.radii[k])))
        return nearest


class Head(NamedTuple):
    """How the drawn head becomes one patient's: scaled and bent, its jaw shaped, then tilted and put in the scanner."""

    scale: np.ndarray  # (3,)
    bend: np.ndarray  # (3,) 1/mm: left against right, face against occiput, vault against face
    jaw: np.ndarray  # (2,) mm to the right and to the front, full at the chin and none at the vertex
    jaw_width: float
    shear: float  # of the front-back axis: one side of the head lies farther forward
    tilt: np.ndarray  # (3, 3) rotation
    position: np.ndarray  # (3,) mm

    def to_world(self, points: np.ndarray) -> np.ndarray:
        """(N, 3) mm in the frame of the drawing -> (N, 3) RAS mm in the patient's."""
        x, y, z = (self.scale * (points + self.bend * points**2)).T
        ramp = _jaw_ramp(z)
        front = y + self.jaw[1] * ramp + self.shear * x
        side = x * (1 + self.jaw_width * (ramp - 0.25)) + self.jaw[0] * ramp
        return np.stack([side, front, z], axis=1) @ self.tilt.T + self.position

    def from_patient(self, places: np.ndarray) -> np.ndarray:
        """The inverse of `to_world` for (3, ...) places that are already turned upright about the head's position."""
        side, front, z = places
        ramp = _jaw_ramp(z)
        x = (side - self.jaw[0] * ramp) / (1 + self.jaw_width * (ramp - 0.25))
        bent = np.stack([x, front - self.jaw[1] * ramp - self.shear * x, z])
        scale, bend = (values.astype(places.dtype).reshape(3, *[1] * z.ndim) for values in (self.scale, self.bend))
        bent /= scale
        return 2 * bent / (1 + np.sqrt(np.maximum(1 + 4 * bend * bent, 0.05)))  # 0.05: far corners, only air


class Grid(NamedTuple):
    """Where a volume is sampled: its size (z, y, x) and NIfTI's affine."""

    size: tuple[int, ...]
    affine: np.ndarray


def _vary(rng: np.random.Generator, *limits: float) -> np.ndarray:
    """Normal variation with half the given limits as standard deviations, cut at the limits."""
    return np.clip(rng.standard_normal(len(limits)) / 2, -1, 1) * limits


def _jaw_ramp(z: np.ndarray) -> np.ndarray:
    return ((_FLAT - z) / (2 * _FLAT)) ** 2


def _part(name: str, hounsfield: float, points: ArrayLike, radii: ArrayLike) -> Part:
    return Part(name, hounsfield, np.array(points, dtype=np.float32), np.array(radii, dtype=np.float32))


def _both(name: str, hounsfield: float, points: ArrayLike, radii: ArrayLike) -> list[Part]:
    """A part of the right side (x > 0) and its mirror image."""
    right = _part(f"right {name}", hounsfield, points, radii)
    return [right, right._replace(name=f"left {name}", points=right.points * _MIRROR)]


def _skin_parts() -> list[Part]:
    """Soft tissue under a layer of fat."""
    hull = [
        _part("scalp", _FAT, [(0, -8, 18)], (65, 79, 65)),
        _part("vertex skin", _FAT, [(0, -8, 76)], (17, 21, 13)),
        _part("boss skin", _FAT, [(-49, -20, 47)], (16, 18, 16)),
        _part("face", _FAT, [(0, 18, -24)], (64, 54, 54)),
        _part("chin skin", _FAT, [(0, 50, -66)], (32, 24, 22)),
        _part("lips", _FAT, [(0, 48, -50)], (28, 26, 18)),
        _part("neck", _FAT, [(0, -12, -30), (0, -18, -180)], (46, 46)),
    ]
    muscle = [part._replace(name=f"{part.name} muscle", hounsfield=_SOFT, radii=part.radii - 5) for part in hull]
    return [*hull, *muscle, _part("nose", _SOFT, [(0, 66, 2), (0, 80, -22)], (6, 9)),
            *_both("ear", 0.0, [(66, -14, -8)], (4, 9, 17))]  # fmt: skip


def _vault_parts(bone: float, thick: float) -> list[Part]:
    """Skull cap, what is inside it, and the base with the hole of the spinal cord."""
    outer = np.array([58, 72, 58])
    return [
        _part("vertex bump", 1.1 * bone, [(0, -8, 76)], (10, 14, 6)),
        _part("skull", bone, [(0, -8, 18)], outer),
        _part("brain", 35.0, [(0, -8, 18)], outer - thick),
        _part("left parietal boss", 1.25 * bone, [(-49, -20, 47)], (10, 12, 10)),
        *_both("ventricle", 8.0, [(9, -28, 20), (7, 12, 24)], (5, 4)),
        *_both("petrous bone", 1.15 * bone, [(14, 2, -22), (48, -16, -22)], (4, 7)),
        *_both("mastoid", 0.6 * bone, [(46, -22, -34)], (8, 9, 13)),
        *_both("ear canal", _AIR, [(40, -10, -18), (66, -10, -16)], (2.5, 3.5)),
        _part("foramen", 35.0, [(0, -25, -20), (0, -26, -46)], (9, 9)),
    ]


def _spine_parts(bone: float) -> list[Part]:
    parts = [_part("pharynx", _AIR, [(0, 18, -28), (0, 9, -58), (0, 8, -180)], (6, 6, 8))]
    angle = np.linspace(0, 2 * np.pi, 9)
    for k in range(7):
        z = -50.0 - 15 * k
        ring = np.stack([15 * np.sin(angle), -27 + 12 * np.cos(angle), np.full(9, z)], axis=1)
        parts += [_part("vertebral arch", 0.7 * bone, ring, np.full(9, 3.5)),
                  _part("vertebra", 0.6 * bone, [(0, -12, z)], (12, 8, 6))]  # fmt: skip
    return parts


def _face_parts(bone: float) -> list[Part]:
    """Upper jaw with its air spaces, orbits, nasal bone and zygomatic arches."""
    eye, zygion = LANDMARKS["right orbit"], LANDMARKS["right zygion"]
    return [
        _part("maxilla", 0.6 * bone, [(0, 44, -30)], (31, 22, 17)),
        *_both("brow", bone, [(6, 63, 12), (34, 52, 13)], (4, 4)),
        *_both("orbit wall", 0.8 * bone, [(23, 46, -2)], (18, 20, 17)),
        *_both("orbit", _FAT, [(22, 46, -2)], (14, 22, 13)),
        *_both("eyeball", 20.0, [eye], (9.5, 9.5, 9.5)),
        *_both("sinus", _AIR, [(19, 42, -26)], (9, 13, 9)),
        *_both("nasal cavity", _AIR, [(5, 42, -22)], (4, 24, 12)),
        _part("nasal bone", 1.1 * bone, [(0, 56, 2), LANDMARKS["nasion"], (0, 73, -12)], (7, 4.5, 2.5)),
        *_both("zygoma", 0.9 * bone, [(41, 44, -22)], (9, 8, 8)),
        *_both("zygomatic arch", 0.9 * bone, [(43, 42, -22), zygion, (50, -6, -18)], (4, 4.5, 3)),
    ]


def _jaw_parts(bone: float) -> list[Part]:
    """Mandible, whose chin ends in menton, and both rows of teeth."""
    condyle, menton = LANDMARKS["right condyle"], np.array(LANDMARKS["menton"])
    row = np.array([(21, 32, 0), (18, 48, 0), (10, 60, 0), (0, 65, 0)], dtype=np.float64)
    body = [condyle, (45, 7, -38), (42, 9, -60), (33, 32, -67), (20, 52, -71), (0, 60, -72)]
    return [
        _part("tongue", _SOFT, [(0, 32, -56)], (18, 24, 11)),
        *_both("mandible", 0.9 * bone, body, (6.5, 4, 6, 6, 6, 6.5)),
        *_both("ramus", 0.8 * bone, [(44, 9, -48)], (4.5, 11, 15)),
        _part("chin", bone, [menton + (0, 0, 8)], (10, 7, 8)),
        *_both("upper teeth", 1200.0, row + (0, 0, LANDMARKS["upper incisors"][2]), np.full(4, 3.8)),
        *_both("lower teeth", 1200.0, row - (0, 2, 57), np.full(4, 3.5)),
    ]


def _sample_parts(rng: np.random.Generator) -> list[Part]:
    """All parts in the order of painting; density and thickness of the bone vary, no landmark does."""
    bone, thick = rng.uniform((750, 5), (950, 7))
    return [*_skin_parts(), *_vault_parts(bone, thick), *_spine_parts(bone), *_face_parts(bone), *_jaw_parts(bone)]


def _sample_head(rng: np.random.Generator) -> Head:
    """One patient: a smooth variation of 10 numbers, tilt up to 12 degrees about each axis, anywhere in the scanner."""
    scale = (1 + _vary(rng, 0.08)) * (1 + _vary(rng, 0.07, 0.07, 0.05))
    bend = _vary(rng, 0.08, 0.08, 0.08) / _FLAT
    jaw, jaw_width, shear = _vary(rng, 8, 9), *_vary(rng, 0.12, 0.08)
    tilt = Rotation.from_euler("xyz", _vary(rng, 12, 12, 12), degrees=True).as_matrix()
    return Head(scale, bend, jaw, jaw_width, shear, tilt, rng.uniform(-60, 60, 3))


def _sample_grid(
    size: tuple[int, ...], orientation: str, position: np.ndarray, marks: np.ndarray, rng: np.random.Generator
) -> Grid:
    """A grid about the head at `position`, up to 8 % off; all `marks` (N, 3) RAS mm keep the margin."""
    field = _FIELD_MM * rng.uniform(1.0, 1.1, 3)
    count = np.array(size[::-1]) * rng.uniform(0.88, 1.12, 3)
    thick, factor = rng.uniform((0, 1.4), (1, 1.8))
    count[2] /= factor if thick < 0.4 else 1.0
    count = np.maximum(np.rint(count), 8).astype(int)
    turn, direction = np.eye(3), rng.standard_normal(3)
    signs = RAS_TO_LPS if orientation == "LPS" or (orientation == "oblique" and rng.uniform() < 0.5) else np.ones(3)
    if orientation == "oblique":
        turn = Rotation.from_rotvec(np.deg2rad(rng.uniform(5, 15)) * direction / np.linalg.norm(direction)).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn * (signs * field / count)
    affine[:3, 3] = position - affine[:3, :3] @ ((count - 1) / 2 + _vary(rng, 0.08, 0.08, 0.08) * count)
    placed = (world_to_index(marks, affine)[:, ::-1] + 0.5) / count
    push = np.maximum(_MARGIN - placed.min(axis=0), 0) - np.maximum(placed.max(axis=0) - (1 - _MARGIN), 0)
    affine[:3, 3] -= affine[:3, :3] @ (push * count)
    return Grid(tuple(count[::-1].tolist()), affine.astype(np.float32).astype(np.float64))  # as NIfTI stores it


def _draw(parts: Sequence[Part], head: Head, grid: Grid) -> np.ndarray:
    """Hounsfield units (D, H, W) float32 of the parts, each painted over those before it; edges are one voxel wide."""
    canvas = np.full(grid.size, _AIR, dtype=np.float32)
    edge = float(np.cbrt(abs(np.linalg.det(grid.affine[:3, :3]))) / np.cbrt(head.scale.prod()))
    matrix = head.tilt.T @ grid.affine[:3, :3]
    offset = head.tilt.T @ (grid.affine[:3, 3] - head.position)
    k, j, i = (np.arange(n, dtype=np.float32) for n in grid.size)
    matrix, offset = matrix.astype(np.float32), offset.astype(np.float32)
    upright = np.stack([
        (k * row[2] + start)[:, None, None] + (j * row[1])[None, :, None] + (i * row[0])[None, None, :]
        for row, start in zip(matrix, offset, strict=True)
    ])  # fmt: skip
    places = head.from_patient(upright)
    for part in parts:
        reach = (part.radii if len(part.points) == 1 else part.radii.max()) + edge + 3
        ends = np.stack([part.points.min(axis=0) - reach, part.points.max(axis=0) + reach]).astype(np.float64)
        corners = np.stack(np.meshgrid(*ends.T), axis=-1).reshape(-1, 3)
        box = world_to_index(head.to_world(corners), grid.affine)
        low = np.maximum(np.floor(box.min(axis=0)), 0).astype(int)
        high = np.minimum(np.ceil(box.max(axis=0)) + 1, grid.size).astype(int)
        if np.any(high <= low):
            continue
        window = tuple(slice(first, last) for first, last in zip(low, high, strict=True))
        inside = places[(slice(None), *window)]
        cover = np.clip(0.5 - part.distance(inside).reshape(inside.shape[1:]) / edge, 0, 1)
        canvas[window] += cover * (part.hounsfield - canvas[window])
    return canvas


def render_volume(
    size: tuple[int, ...], orientation: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One head: volume int16 (D, H, W) in Hounsfield-like units, its affine (4, 4), landmarks (12, 3) in RAS mm.

    `size` (z, y, x) is nominal: every axis varies by 12 %, and four volumes in ten have slices 1.4 to 1.8 times as
    thick, and fewer of them. `orientation` is "LPS", "RAS" or "oblique" (either of them, turned by 5 to 15 degrees).
    """
    head = _sample_head(rng)
    marks = head.to_world(np.array(list(LANDMARKS.values()), dtype=np.float64))
    parts = _sample_parts(rng)
    grid = _sample_grid(size, orientation, head.position, marks, rng)
    blur, noise = rng.uniform((0.35, 12), (0.6, 35))
    canvas = gaussian_filter(_draw(parts, head, grid), blur, mode="nearest", truncate=3)
    canvas += noise * rng.standard_normal(grid.size, dtype=np.float32)
    return np.rint(canvas).clip(-1024, 3071).astype(np.int16), grid.affine, marks


def _check_free(root: Path, recipe: dict[str, Any]) -> None:
    """UserError unless `root` is free (hidden files do not count) or holds this data set, whole or in part."""
    if not root.exists() or (root.is_dir() and all(path.name.startswith(".") for path in root.iterdir())):
        return
    try:
        other = parse_json((root / "phantom.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{root}: exists and is not a phantom data set; choose another folder or remove it") from None
    if other != recipe:
        raise UserError(f"{root}: holds phantom {json.dumps(other)}, not {json.dumps(recipe)}; choose another folder")


def _write_case(root: Path, index: int, size: tuple[int, ...], seed: int) -> None:
    """Volume and landmarks of one case, each of them whole or absent; a case that has both is left alone."""
    image, marks = root / "images" / f"case_{index:03d}.nii.gz", root / "landmarks" / f"case_{index:03d}.mrk.json"
    if image.exists() and marks.exists():
        return
    orientation = _ORIENTATIONS[(index - 1) % len(_ORIENTATIONS)]
    volume, affine, landmarks = render_volume(size, orientation, np.random.default_rng([seed, index]))
    nifti = nib.Nifti1Image(volume.T, affine)
    nifti.header.set_xyzt_units("mm")
    write_atomically(image, gzip.compress(nifti.to_bytes(), compresslevel=1, mtime=0))
    write_markups(marks, list(LANDMARKS), landmarks, coordinates=("LPS", "RAS")[(index - 1) % 2])


def _splits(count: int) -> dict[str, list[str]]:
    """By position: the first 60 % of the cases train, the next 10 % validate, the last 30 % test; each at least one."""
    names = [f"case_{index:03d}" for index in range(1, count + 1)]
    test, validation = max(1, round(0.3 * count)), max(1, round(0.1 * count))
    train = count - test - validation
    return {"train": names[:train], "validation": names[train : train + validation], "test": names[-test:]}


def write_phantom_volumes(root: Path, count: int, size: tuple[int, ...] = (64, 64, 64), seed: int = 0) -> None:
    """Write `count` volumes of about `size` (z, y, x) voxels, with landmarks, to `root` in the folder layout.

    Files: images/case_001.nii.gz ..., landmarks/case_001.mrk.json ..., phantom.json first and dataset.json last; all
    cases are labelled, the splits go by position (60 / 10 / 30 %). Case i, counted from 1, depends on `seed`, i and
    `size` only. Whatever is missing of the same data set is written, the rest left alone; other content is a UserError.
    """
    root, size = Path(root), tuple(int(side) for side in size)
    if count < _MIN_COUNT or len(size) != 3 or min(size) < _MIN_SIZE or seed < 0:
        raise UserError(f"phantom: count >= {_MIN_COUNT}, three sides >= {_MIN_SIZE} voxels, seed >= 0 needed, "
                        f"got {count}, {size}, {seed}")  # fmt: skip
    recipe = {"volumes": count, "size": list(size), "seed": seed, "version": _VERSION}
    _check_free(root, recipe)
    if not (root / "phantom.json").exists():
        write_json(root / "phantom.json", recipe)
    for index in range(1, count + 1):
        _write_case(root, index, size, seed)
    if not (root / "dataset.json").exists():
        description = {"landmarks": list(LANDMARKS), "splits": _splits(count), "sdr_thresholds": _SDR_THRESHOLDS}
        write_json(root / "dataset.json", description)
