"""Where pixels and voxels lie: sizes, spacings, tensor index <-> world coordinates, closest anatomical orientation.

Points are (.., D) float64 in tensor-axis order, (y, x) or (z, y, x), pixel centres at integers. World points are
(.., 3) in mm, (x, y, z) towards the patient's right, anterior and superior: RAS, as NIfTI counts them. LPS (DICOM, ITK,
3D Slicer's files) is the same with x and y negated. An affine is NIfTI's: (4, 4), from (i, j, k) = (x, y, z) to RAS mm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from nibabel.orientations import aff2axcodes, io_orientation

RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])
SHEAR_TOLERANCE = 1e-3  # cosine between two axes


@dataclass(frozen=True, eq=False)
class Geometry:
    """Size in tensor-axis order, mm per pixel along the same axes or None, and the affine or None (2D, bare arrays)."""

    size: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None = None
    affine: np.ndarray | None = None

    @property
    def axes(self) -> str:
        """Where x, y and z of the file point to, for example "LPS"; "unknown" without an affine."""
        return "unknown" if self.affine is None else "".join(aff2axcodes(self.affine))


def geometry_of(size: tuple[int, ...], affine: np.ndarray) -> Geometry:
    """The geometry of a volume of `size` (z, y, x) with an affine; ValueError where the affine is no grid's."""
    affine = np.asarray(affine, dtype=np.float64)
    columns = affine[:3, :3]
    lengths = np.linalg.norm(columns, axis=0)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not (lengths > 0).all():
        raise ValueError("its affine is not finite or has an axis of length 0")
    cosines = (columns / lengths).T @ (columns / lengths) - np.eye(3)
    if np.abs(cosines).max() > SHEAR_TOLERANCE:
        raise ValueError("its axes are not at right angles (a tilted gantry?); resample it to a straight grid first")
    return Geometry(size, tuple(lengths[::-1].tolist()), affine)


def index_to_world(points: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """(.., 3) voxels (z, y, x) -> (.., 3) RAS mm (x, y, z)."""
    return np.asarray(points, dtype=np.float64)[..., ::-1] @ affine[:3, :3].T + affine[:3, 3]


def world_to_index(points: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """(.., 3) RAS mm (x, y, z) -> (.., 3) voxels (z, y, x)."""
    return ((np.asarray(points, dtype=np.float64) - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T)[..., ::-1]


def upright_axes(geometry: Geometry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(order, signs): how to permute, then flip (-1), the tensor axes so that z, y, x run up, back and to the left.

    That is LPS in (x, y, z), the closest axes of a tilted volume; without an affine the axes stay as they are.
    """
    dims = len(geometry.size)
    if geometry.affine is None:
        return tuple(range(dims)), (1,) * dims
    world_axis, direction = io_orientation(geometry.affine).T  # per file axis: its world axis, +1 along RAS
    direction = direction * RAS_TO_LPS[world_axis.astype(int)]
    file_axes = [int(np.flatnonzero(world_axis == axis)[0]) for axis in (2, 1, 0)]  # for z, y, x
    return tuple(2 - axis for axis in file_axes), tuple(int(direction[axis]) for axis in file_axes)


def upright(pixels: np.ndarray, geometry: Geometry) -> np.ndarray:
    """(C, *size) as stored -> a view (C, *upright size) with the axes of `upright_axes`."""
    order, signs = upright_axes(geometry)
    turned = pixels.transpose(0, *(axis + 1 for axis in order))
    return turned[(slice(None), *(slice(None, None, sign) for sign in signs))]


def upright_map(geometry: Geometry) -> np.ndarray:
    """(D, D + 1) map from the file's pixels to those of the upright volume (`upright_axes`)."""
    order, signs = upright_axes(geometry)
    dims = len(order)
    affine = np.zeros((dims, dims + 1))
    for axis, (source, sign) in enumerate(zip(order, signs, strict=True)):
        affine[axis, source] = sign
        affine[axis, -1] = 0 if sign > 0 else geometry.size[source] - 1
    return affine


def resampling_map(old_size: tuple[int, ...], new_size: tuple[int, ...], ratio: tuple[float, ...]) -> np.ndarray:
    """(D, D + 1) map of a resampling about the centre, `ratio` old pixels to a new one: half-pixel exact."""
    old, new, step = (np.asarray(values, dtype=np.float64) for values in (old_size, new_size, ratio))
    offset = (0.5 - old / 2) / step + new / 2 - 0.5
    return np.concatenate((np.diag(1 / step), offset[:, None]), axis=1)


def compose(second: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The (D, D + 1) map that applies `first`, then `second`."""
    return np.concatenate((second[:, :-1] @ first[:, :-1], second[:, :-1] @ first[:, -1:] + second[:, -1:]), axis=1)


def inverse(maps: np.ndarray) -> np.ndarray:
    """The inverses of (.., D, D + 1) maps."""
    matrix = np.linalg.inv(maps[..., :-1])
    return np.concatenate((matrix, -matrix @ maps[..., -1:]), axis=-1)


def apply_maps(points: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """(M, N, D) points through (M, D, D + 1) maps; NaN stays NaN."""
    return np.asarray(points, dtype=np.float64) @ np.swapaxes(maps[..., :-1], -1, -2) + maps[..., None, :, -1]
