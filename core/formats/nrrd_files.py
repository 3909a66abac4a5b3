"""Reader of NRRD with its pixels in the same file -> raw intensities, axes (z, y, x) as stored, and where they lie."""

from __future__ import annotations

import bz2
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import nrrd
import numpy as np

from core.errors import UserError, damaged
from core.formats.geometry import RAS_TO_LPS, Geometry, geometry_of

DAMAGE = (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError, RuntimeError,
          AttributeError, zlib.error, nrrd.NRRDError)  # fmt: skip
SPACES = {  # what its world axes are, as factors to RAS
    "left-posterior-superior": RAS_TO_LPS, "lps": RAS_TO_LPS, "right-anterior-superior": np.ones(3), "ras": np.ones(3),
    "left-anterior-superior": np.array([-1.0, 1.0, 1.0]), "las": np.array([-1.0, 1.0, 1.0]),
}  # fmt: skip
RAW, GZIP, BZIP2 = ("raw",), ("gzip", "gz"), ("bzip2", "bz2")
TYPES = {  # of NRRD's format description, and how NumPy calls them
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"), **dict.fromkeys(("uchar", "unsigned char", "uint8",
                                                                               "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64",
                     "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"),
    "float": "f4", "double": "f8",
}  # fmt: skip


def read_nrrd(path: Path) -> np.ndarray:
    """(1, D, H, W) or (1, H, W) float32 of a NRRD file. UserError: as `nrrd_geometry`, damaged pixels."""
    with _damage_told(path), path.open("rb") as file:
        header = _header(file)
        size = _geometry(path, header).size
        order = {"big": ">", "little": "<"}.get(header.get("endian", "little"), "<")
        kind = np.dtype(order + TYPES[header["type"]])
        expected = int(np.prod(size, dtype=object)) * kind.itemsize
        source = _pixels(file, header["encoding"])
        content = source.read(expected)
        if len(content) != expected or source.read(1):
            raise ValueError(f"it holds {'more than its' if len(content) == expected else f'{len(content)} of'} "
                             f"{expected} bytes of pixels")
        with np.errstate(over="ignore"):  # beyond float32 is infinite, reported as such
            return np.frombuffer(content, dtype=kind).reshape(size).astype(np.float32)[None]


def nrrd_geometry(path: Path) -> Geometry:
    """Size, spacing and affine of `read_nrrd(path)`, from its header.

    UserError: damaged, pixels in another file, not two or three axes of grey values, an encoding other than raw, gzip
    and bzip2, axes in an unknown space or at other than right angles.
    """
    with _damage_told(path), path.open("rb") as file:
        return _geometry(path, _header(file))


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise damaged(path, error) from error


def _header(file: IO[bytes]) -> dict[str, Any]:
    return dict(nrrd.read_header(file))


def _pixels(file: IO[bytes], encoding: str) -> IO[bytes]:
    packed: Any = gzip.GzipFile(fileobj=file) if encoding in GZIP else bz2.BZ2File(file) if encoding in BZIP2 else file
    return cast(IO[bytes], packed)


def _geometry(path: Path, header: dict[str, Any]) -> Geometry:
    sizes = [int(length) for length in np.atleast_1d(header["sizes"])]
    what = None
    if header["type"] not in TYPES:
        what = f"holds {header['type']}, not real numbers"
    elif len(sizes) not in (2, 3) or min(sizes) < 1:
        what = f"has axes of {' x '.join(map(str, sizes))}, not one picture or volume of grey values"
    elif {"data file", "datafile"} & header.keys():
        what = "has its pixels in another file"
    elif header["encoding"] not in (*RAW, *GZIP, *BZIP2) or {"line skip", "lineskip", "byte skip", "byteskip"} & {
            key for key in header if str(header[key]) != "0"}:
        what = f"is encoded as {header['encoding']}, or skips bytes"
    if what is not None:
        raise UserError(f"image {path} {what}; save it again as one NRRD or NIfTI file")
    size = tuple(reversed(sizes))
    directions = header.get("space directions")
    if directions is None or len(sizes) == 2:
        steps = np.atleast_1d(np.asarray(header.get("spacings", [np.nan] * len(sizes)), dtype=np.float64))
        known = bool(np.isfinite(steps).all() and (steps > 0).all()) and len(steps) == len(sizes)
        return Geometry(size, tuple(steps[::-1].tolist()) if known else None)
    space = str(header.get("space", "")).lower()
    if space not in SPACES or np.shape(directions) != (3, 3):
        raise UserError(f'image {path}: its space "{space}" is not one of {", ".join(SPACES)}, so the patient\'s axes '
                        "are not known; save it as NIfTI")
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(directions, dtype=np.float64).T
    affine[:3, 3] = np.asarray(header.get("space origin", np.zeros(3)), dtype=np.float64)
    affine[:3] *= SPACES[space][:, None]
    try:
        return geometry_of(size, affine)
    except ValueError as error:
        raise UserError(f"image {path} cannot be used: {error}") from error
