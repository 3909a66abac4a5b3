"""Readers of volumes and arrays: NIfTI and NumPy -> raw intensities, axes (z, y, x) as stored, and where they lie.

A .npy holds a volume (z, y, x) or an image (y, x). A .npz holds it as `image`, with `spacing` (x, y[, z]) in mm and,
for a volume, `affine` (4, 4) from (i, j, k) = (x, y, z) to RAS mm, both optional. DICOM is in `core.formats.dicom`.
"""

from __future__ import annotations

import gzip
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import IO, Any, Literal, NamedTuple, cast

import nibabel as nib
import numpy as np

from core.errors import UserError, damaged, did_you_mean, note_once
from core.formats.geometry import SHEAR_TOLERANCE, Geometry, geometry_of

# What nibabel, zipfile and numpy.lib.format raise on damaged files, found by cutting and overwriting files.
NIFTI_DAMAGE = (OSError, EOFError, ValueError, KeyError, OverflowError, MemoryError, zlib.error,
                nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError)  # fmt: skip
ARRAY_DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, SyntaxError, OverflowError, MemoryError,
                NotImplementedError, RuntimeError, struct.error, tokenize.TokenError, zlib.error, lzma.LZMAError,
                zipfile.BadZipFile)  # fmt: skip
TO_MM = {"meter": 1000.0, "micron": 0.001}  # units of a NIfTI header; everything else is mm
ARRAY_KEYS = ("image", "spacing", "affine")  # of a .npz
PARSING = Lock()  # of .npy headers: CPython 3.11 counts the depth of its parser for all threads together
HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
SPACING_TOLERANCE = 1e-3  # relative
SCANNER = 1  # NIfTI's code of a place that is the scanner's own
SAME_PLACE = 0.1  # voxels that sform and qform may be apart
MAX_TRAILING = 1 << 16  # bytes behind the voxels


@contextmanager
def _damage_told(path: Path, kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        raise damaged(path, error) from error


def read_nifti(path: Path) -> np.ndarray:
    """(1, D, H, W) float32 of a NIfTI file, scaled by its slope and intercept. UserError: as `nifti_geometry`."""
    with _damage_told(path, NIFTI_DAMAGE), np.errstate(over="ignore"):  # beyond float32 is infinite, reported as such
        image, geometry = _open_nifti(path)
        proxy: Any = image.dataobj  # an ArrayProxy, which its stub does not say
        slope, intercept, kind = float(proxy.slope), float(proxy.inter), image.get_data_dtype()
        with (gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")) as file:
            content = _promised(cast(IO[bytes], file), int(proxy.offset), geometry.size, kind)
        stored = np.frombuffer(content, dtype=kind).reshape(geometry.size)
        voxels = np.empty((1, *geometry.size), dtype=np.float32)
        for index, plane in enumerate(stored):
            voxels[0, index] = plane if (slope, intercept) == (1, 0) else plane * slope + intercept
    return voxels


def _promised(file: IO[bytes], start: int, size: tuple[int, ...], kind: np.dtype) -> bytes:
    """The bytes of the voxels that a header promises, and the file's checksum looked at; ValueError for fewer or more.

    What follows the voxels is read no further than MAX_TRAILING, so that a small file cannot fill the memory.
    """
    expected = math.prod(size) * kind.itemsize
    file.read(start)
    content = file.read(expected)
    if len(content) != expected:
        raise ValueError(f"it holds {len(content)} of {expected} bytes of voxels")
    if len(file.read(MAX_TRAILING + 1)) > MAX_TRAILING:
        raise ValueError(f"it goes on behind the {expected} bytes of voxels that its header tells of")
    return content


def nifti_geometry(path: Path) -> Geometry:
    """Size, spacing and affine of `read_nifti(path)` from its header.

    UserError: damaged, skewed axes, colours or complex numbers, not one volume of three axes.
    """
    with _damage_told(path, NIFTI_DAMAGE):
        return _open_nifti(path)[1]


def _open_nifti(path: Path) -> tuple[nib.Nifti1Image, Geometry]:
    """The image, its voxels not yet read, and its geometry."""
    image = nib.load(path, mmap=False)
    if not isinstance(image, nib.Nifti1Image):  # or NIfTI-2, which is one
        raise UserError(f"image {path} holds a {type(image).__name__}, not a NIfTI volume")
    shape, dtype = image.shape, image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise UserError(f"image {path} holds {'colours' if dtype.names else dtype}, not grey values; save it in grey")
    if len(shape) < 3 or any(length != 1 for length in shape[3:]):
        counted = "x".join(map(str, shape))
        raise UserError(f"image {path} holds {counted} voxels, not one volume of three axes; save the one meant")
    if min(shape) < 1:
        raise damaged(path, f"its axes have {shape} voxels")
    affine = _place(path, image.header, shape[:3])
    affine[:3] *= TO_MM.get(image.header.get_xyzt_units()[0], 1.0)
    return image, _located(path, shape[2::-1], affine)


def _place(path: Path, header: nib.Nifti1Header, shape: tuple[int, ...]) -> np.ndarray:
    """The affine (4, 4), voxel (i, j, k) -> RAS in the header's unit, that ITK takes, and so 3D Slicer shows.

    A header may hold two places, and says by codes which of them count (NIfTI-1 standard, methods 2 and 3). With none
    of them ITK puts voxel (i, j, k) at LPS (i dx, j dy, k dz). With both it goes by the sform where that agrees with
    the qform or is the scanner's (code 1), and by the qform otherwise, or where the sform's axes are skewed or their
    steps not the voxels' sizes. nibabel always takes the sform, and for no place at all the volume's middle.
    """
    steps = np.abs(np.array(header["pixdim"][1:4], dtype=np.float64))
    qform, sform = (None if form is None else np.array(form, dtype=np.float64)
                    for form in (header.get_qform(coded=True)[0], header.get_sform(coded=True)[0]))
    if sform is None:
        return np.diag((-steps[0], -steps[1], steps[2], 1.0)) if qform is None else qform
    lengths = np.linalg.norm(sform[:3, :3], axis=0)
    scaled = np.allclose(lengths, steps, rtol=SPACING_TOLERANCE, atol=0)
    if qform is None:
        if not scaled and (lengths > 0).all():
            raise UserError(f"image {path}: its sform steps by {lengths.round(6).tolist()}, its voxels (pixdim) are "
                            f"{steps.round(6).tolist()} large, so readers place it differently; save it "
                            "again with both alike")
        return sform
    ends = np.stack(np.meshgrid(*((0, length - 1) for length in shape)), axis=-1).reshape(-1, 3)
    apart = float(np.abs(ends @ (sform - qform)[:3, :3].T + (sform - qform)[:3, 3]).max())
    axes = sform[:3, :3] / np.where(lengths > 0, lengths, 1)
    straight = scaled and np.abs(axes.T @ axes - np.eye(3)).max() < SHEAR_TOLERANCE
    alike = apart < SAME_PLACE * steps.min()
    if not alike:
        taken = "sform" if straight and int(header["sform_code"]) == SCANNER else "qform"
        note_once("two places", f"note: {path} and perhaps others have two places that differ by {apart:.3g} (sform "
                  f"and qform); this one is taken to lie where 3D Slicer shows it, by its {taken}")
        return sform if taken == "sform" else qform
    return sform if straight else qform


def _located(path: Path, size: tuple[int, ...], affine: np.ndarray) -> Geometry:
    try:
        return geometry_of(size, affine)
    except ValueError as error:
        raise UserError(f"image {path} cannot be used: {error}") from error


class ArrayHeader(NamedTuple):
    """Shape, memory order and type of an array in NumPy's format."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype


def read_npy(path: Path) -> np.ndarray:
    """(1, D, H, W) or (1, H, W) float32 of a .npy file. UserError: damaged, not 2D or 3D, not real numbers."""
    with _damage_told(path, ARRAY_DAMAGE), path.open("rb") as file:
        return _array(_grey_header(path, file), file)[None]


def npy_geometry(path: Path) -> Geometry:
    """Size of `read_npy(path)` from its header; no spacing. UserError: as there."""
    with _damage_told(path, ARRAY_DAMAGE), path.open("rb") as file:
        return Geometry(_grey_header(path, file).shape)


def read_npz(path: Path) -> np.ndarray:
    """(1, D, H, W) or (1, H, W) float32 of `image` in a .npz. UserError: as `npz_geometry`, damaged pixels."""
    with _damage_told(path, ARRAY_DAMAGE), zipfile.ZipFile(path) as archive:
        _npz_geometry(path, archive)
        with archive.open("image.npy") as file:
            return _array(_grey_header(path, file), file)[None]


def npz_geometry(path: Path) -> Geometry:
    """Size, spacing and affine of a .npz; of `image` only the header is read.

    UserError: damaged, `image` missing, not 2D or 3D, not real numbers, an unknown key, `spacing` and `affine` that are
    malformed or contradict each other.
    """
    with _damage_told(path, ARRAY_DAMAGE), zipfile.ZipFile(path) as archive:
        return _npz_geometry(path, archive)


def _npz_geometry(path: Path, archive: zipfile.ZipFile) -> Geometry:
    keys = [name.removesuffix(".npy") for name in archive.namelist()]
    if "image" not in keys:
        raise UserError(f"image {path} has no array `image`, only {', '.join(keys) or 'nothing'}; "
                        "save it with np.savez(path, image=.., spacing=(x, y, z))")  # fmt: skip
    for key in keys:
        if key not in ARRAY_KEYS:
            raise UserError(f"image {path}: unknown array `{key}`{did_you_mean(key, ARRAY_KEYS)}; "
                            f"arrays are {', '.join(ARRAY_KEYS)}")  # fmt: skip
    with archive.open("image.npy") as file:
        size = _grey_header(path, file).shape
    spacing, affine = (_small(path, archive, key) if key in keys else None for key in ("spacing", "affine"))
    if spacing is not None and not (spacing.shape == (len(size),) and np.isfinite(spacing).all() and min(spacing) > 0):
        raise UserError(f"image {path}: spacing must be {len(size)} numbers above 0, "
                        f"mm along ({'x, y, z'[: 3 * len(size) - 2]}), not {spacing.tolist()}")  # fmt: skip
    if affine is None:
        return Geometry(size, None if spacing is None else tuple(spacing[::-1].tolist()))
    if len(size) != 3 or affine.shape != (4, 4) or not np.allclose(affine[3], (0, 0, 0, 1)):
        raise UserError(f"image {path}: affine must be (4, 4) with the last row 0, 0, 0, 1, and belongs to a volume; "
                        f"it is {affine.shape} beside an image of {len(size)} axes")  # fmt: skip
    geometry = _located(path, size, affine)
    steps = geometry.spacing_mm
    if not (spacing is None or steps is None or np.allclose(spacing[::-1], steps, rtol=SPACING_TOLERANCE, atol=0)):
        raise UserError(f"image {path}: spacing {spacing.tolist()} contradicts the affine, whose axes x, y, z step by "
                        f"{[round(length, 6) for length in steps[::-1]]} mm")  # fmt: skip
    return geometry


def _header(file: IO[bytes]) -> ArrayHeader:
    version = np.lib.format.read_magic(file)
    if version not in HEADER_READERS:
        raise ValueError(f"NumPy's format {version} is for structured arrays")
    with PARSING:
        return ArrayHeader(*HEADER_READERS[version](file))


def _grey_header(path: Path, file: IO[bytes]) -> ArrayHeader:
    """The header of an image or volume; UserError unless it has 2 or 3 axes of real numbers."""
    header = _header(file)
    if header.dtype.kind not in "biuf":
        raise UserError(f"image {path} holds {header.dtype}, not real numbers; save it as integers or floats")
    if len(header.shape) not in (2, 3) or min(header.shape) < 1:
        raise UserError(f"image {path} has the shape {header.shape}; it must be a volume (z, y, x) or an image (y, x), "
                        "of one grey channel")  # fmt: skip
    return header


def _small(path: Path, archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """`spacing` or `affine` as float64."""
    with archive.open(f"{key}.npy") as file:
        header = _header(file)
        if header.dtype.kind not in "iuf" or np.prod(header.shape) > 16:
            raise UserError(f"image {path}: {key} must be a few real numbers, not {header.dtype} {header.shape}")
        return _array(header, file, np.float64)


def _array(header: ArrayHeader, file: IO[bytes], dtype: type = np.float32) -> np.ndarray:
    """The array whose header was just read, as `dtype`; ValueError unless its bytes are as many as the header says."""
    expected = int(np.prod(header.shape, dtype=object)) * header.dtype.itemsize
    content = file.read(expected)
    if len(content) != expected or file.read(1):
        held = f"more than {expected}" if len(content) == expected else f"{len(content)}"
        raise ValueError(f"it holds {held} of {expected} bytes of pixels")
    order: Literal["C", "F"] = "F" if header.fortran_order else "C"
    stored = np.frombuffer(content, dtype=header.dtype).reshape(header.shape, order=order)
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite and is reported as such
        return np.array(stored, dtype=dtype, order="C")
