"""Readers of DICOM: one 2D file -> (1, H, W), a folder with one series -> (1, D, H, W), and where the pixels lie.

Slices are ordered and placed by ImagePositionPatient and ImageOrientationPatient alone, not by name or InstanceNumber:
with row cosines X, column cosines Y and position S, pixel (column i, row j) lies at S + X dx i + Y dy j in LPS mm
(DICOM PS3.3, equation C.7.6.2.1-1). Affines here are RAS, as everywhere in the program.
"""

from __future__ import annotations

import logging
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.misc import is_dicom
from pydicom.pixels import apply_modality_lut, get_decoder
from pydicom.pixels.decoders.base import Decoder

from core.errors import UserError, damaged
from core.formats.geometry import RAS_TO_LPS, Geometry, geometry_of

GAP_TOLERANCE = 0.01  # of the slice distance
COSINE_TOLERANCE = 1e-4  # between the orientations of two slices
SIDEWAYS_TOLERANCE = 0.1  # pixels that a slice may lie off the line through the first and the last
# What pydicom raises on damaged files, found by cutting and overwriting files.
DICOM_DAMAGE = (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError,
                OverflowError, MemoryError, RuntimeError, struct.error, BytesLengthException, UserWarning)  # fmt: skip
logging.getLogger("pydicom").addHandler(logging.NullHandler())  # it logs each warning that it also raises


@dataclass(frozen=True, eq=False)
class Slice:
    """Header of one grey, single-frame DICOM image: sizes and spacings (y, x), position and cosines in LPS, or None."""

    path: Path
    size: tuple[int, int]
    spacing_mm: tuple[float, float] | None
    position: np.ndarray | None
    cosines: np.ndarray | None  # (6,): direction of a row, then of a column
    series: str
    description: str


@dataclass(frozen=True, eq=False)
class PlacedSlice:
    """A slice whose place in space is known, as every one of a series must be."""

    path: Path
    size: tuple[int, int]
    spacing_mm: tuple[float, float]
    position: np.ndarray
    cosines: np.ndarray


def read_dicom(path: Path) -> np.ndarray:
    """(1, H, W) float32 of a 2D file, its modality's rescaling or table applied; MONOCHROME1 is turned over.

    UserError: no DICOM, damaged, colour, several frames, a spacing of 0, a compression that cannot be decoded.
    """
    dicom_geometry(path)
    return _pixels(path)[None]


def dicom_geometry(path: Path) -> Geometry:
    """Size of `read_dicom(path)`, and mm from PixelSpacing, else ImagerPixelSpacing (at the detector), else None."""
    header = _slice(path, ("PixelSpacing", "ImagerPixelSpacing"))
    return Geometry(header.size, header.spacing_mm)


def read_series(folder: Path) -> np.ndarray:
    """(1, D, H, W) float32 of a folder with the slices of one series, values as `read_dicom`.

    z grows along the cross product of a row's and a column's direction. UserError: as `read_dicom`; several series;
    missing, doubled, uneven or shifted slices; slices of several sizes, spacings or orientations or without them.
    """
    slices, geometry = _stack(folder)
    volume = np.empty((1, *geometry.size), dtype=np.float32)
    for index, header in enumerate(slices):
        volume[0, index] = _pixels(header.path)
    return volume


def series_geometry(folder: Path) -> Geometry:
    """Size, spacing and affine of `read_series(folder)`, from the headers. UserError: as `read_series`, skewed axes."""
    return _stack(folder)[1]


def dicom_files(folder: Path) -> Iterator[Path]:
    """Files right in `folder` named .dcm, and those without a suffix (or a number for one) with DICOM's mark."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name.upper() == "DICOMDIR":
            continue
        suffix = entry.name.rpartition(".")[2].lower() if "." in entry.name else ""
        may_be = suffix in ("", "dcm") or suffix.isdigit()
        if may_be and entry.is_file() and (suffix == "dcm" or is_dicom(folder / entry.name)):
            yield folder / entry.name


def is_series(folder: Path) -> bool:
    """Whether the first two DICOM files in `folder` with a readable header are of one series."""
    series = []
    for file in dicom_files(folder):
        try:
            with _damage_told(file):
                dataset = pydicom.dcmread(file, specific_tags=["SeriesInstanceUID"], stop_before_pixels=True)
                series.append(str(dataset.get("SeriesInstanceUID", file)))
        except UserError:  # its damage is told when the series is read
            continue
        if len(series) == 2:
            return series[0] == series[1]
    return False


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # offences against the standard that leave the values readable
            warnings.filterwarnings("error", message="End of file reached", category=UserWarning)
            yield
    except InvalidDicomError as error:
        raise damaged(path, "it is not DICOM, the mark DICM is missing at byte 128") from error
    except DICOM_DAMAGE as error:
        raise damaged(path, error) from error


def _slice(path: Path, spacing_keys: tuple[str, ...] = ("PixelSpacing",)) -> Slice:
    with _damage_told(path):
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        _check_kind(path, dataset)
        spacings = (_numbers(path, dataset, key, 2) for key in spacing_keys)
        spacing = next((value for value in spacings if value is not None), None)
        if spacing is not None and not (spacing > 0).all():
            raise UserError(f"image {path} has a pixel spacing of {spacing.tolist()} mm; it must be above 0")
        return Slice(
            path,
            (int(dataset.Rows), int(dataset.Columns)),
            None if spacing is None else tuple(spacing.tolist()),
            _numbers(path, dataset, "ImagePositionPatient", 3),
            _numbers(path, dataset, "ImageOrientationPatient", 6),
            str(dataset.get("SeriesInstanceUID", "without a UID")),
            " ".join(str(dataset.get("SeriesDescription") or "no description").split()),
        )


def _numbers(path: Path, dataset: pydicom.Dataset, key: str, count: int) -> np.ndarray | None:
    """(count,) float64 of an element, None where it is missing or empty."""
    value = dataset.get(key)
    if value is None or value == "":
        return None
    numbers = np.atleast_1d(np.array(value, dtype=np.float64))
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise UserError(f"image {path}: {key} must be {count} finite number{'s' * (count > 1)}, not {value}")
    return numbers


def _check_kind(path: Path, dataset: pydicom.Dataset) -> Decoder:
    """The decoder of its pixels; UserError unless the file holds one grey picture that can be decoded here."""
    if not dataset.get("Rows") or not dataset.get("Columns"):
        kind = dataset.SOPClassUID.name if dataset.get("SOPClassUID") else "of no known kind"
        raise UserError(f"image {path} holds no picture ({kind}) or its header is cut off")
    frames, colour = int(dataset.get("NumberOfFrames") or 1), dataset.get("PhotometricInterpretation")
    if frames > 1:
        raise UserError(f"image {path} holds {frames} frames; convert it to NIfTI or to one file per slice (dcm2niix)")
    if colour not in ("MONOCHROME1", "MONOCHROME2") or dataset.get("SamplesPerPixel", 1) != 1:
        raise UserError(f"image {path} holds colours ({colour}), not grey values; save it in grey")
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        raise damaged(path, "it names no transfer syntax")
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise UserError(f"image {path}: {syntax.name} cannot be decoded; convert it to uncompressed DICOM") from error
    if not decoder.is_available:
        raise UserError(f"image {path} is compressed with {syntax.name}; to read it, {_packages(decoder)}")
    return decoder


def _packages(decoder: Decoder) -> str:
    """What to install for a decoder of pydicom, from its "pylibjpeg - requires A>=1 and B>=2"."""
    needs = [need.split(" requires ")[-1] for need in decoder.missing_dependencies if need.startswith("pylibjpeg")]
    return f"pip install {needs[0].replace(' and ', ' ')}" if needs else "convert it to uncompressed DICOM"


def _pixels(path: Path) -> np.ndarray:
    """(H, W) float32 of one file, larger is brighter."""
    with _damage_told(path), np.errstate(over="ignore"):  # beyond float32 is infinite, and reported as such
        dataset = pydicom.dcmread(path)
        decoder = _check_kind(path, dataset)
        try:
            stored = dataset.pixel_array
        except RuntimeError as error:  # every decoder that is here failed; another may know this variant
            raise damaged(path, f"{' '.join(str(error).split())} If the file is whole, {_packages(decoder)}") from error
        values = _modality_values(path, stored, dataset)
        if dataset.PhotometricInterpretation == "MONOCHROME1":  # white is zero: the ends of the range change places
            lowest = -(2 ** (dataset.BitsStored - 1)) if dataset.PixelRepresentation else 0
            ends = np.array([lowest, lowest + 2**dataset.BitsStored - 1])
            values = _modality_values(path, ends, dataset).sum() - values
        return values.astype(np.float32)


def _modality_values(path: Path, stored: np.ndarray, dataset: pydicom.Dataset) -> np.ndarray:
    """Stored integers -> float64 values of the modality (Hounsfield units, ..): its table, or slope and intercept."""
    if dataset.get("ModalityLUTSequence"):
        return apply_modality_lut(stored, dataset).astype(np.float64)
    slope, intercept = (_numbers(path, dataset, key, 1) for key in ("RescaleSlope", "RescaleIntercept"))
    return stored * (1.0 if slope is None else slope) + (0.0 if intercept is None else intercept)


def _stack(folder: Path) -> tuple[list[PlacedSlice], Geometry]:
    """The slices of the folder's only series in the order of their positions, and the geometry of their volume."""
    try:
        headers = [_slice(file) for file in dicom_files(folder)]
    except OSError as error:
        raise damaged(folder, error) from error
    _check_one_series(folder, headers)
    slices = _same_grid(folder, headers)
    first = slices[0]
    across, down = first.cosines[:3], first.cosines[3:]
    heights = np.array([header.position @ np.cross(across, down) for header in slices])
    order = np.argsort(heights, kind="stable")
    slices, heights = [slices[index] for index in order], heights[order]
    positions = np.array([header.position for header in slices])
    _check_gaps(folder, slices, heights)
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    line = positions[0] + np.outer((heights - heights[0]) / (heights[-1] - heights[0]), positions[-1] - positions[0])
    sideways = np.linalg.norm(positions - line, axis=1)
    if sideways.max() > SIDEWAYS_TOLERANCE * min(first.spacing_mm):
        worst = slices[int(sideways.argmax())].path.name
        raise UserError(f"image {folder}: slice {worst} is shifted sideways by {sideways.max():.3g} mm; resample it")
    affine = np.eye(4)  # in LPS: pixel spacing is (between rows, between columns)
    affine[:3] = np.stack((across * first.spacing_mm[1], down * first.spacing_mm[0], step, positions[0]), axis=1)
    affine[:3] *= RAS_TO_LPS[:, None]
    try:
        return slices, geometry_of((len(slices), *first.size), affine)
    except ValueError as error:
        raise UserError(f"image {folder} cannot be used: {error}") from error


def _check_one_series(folder: Path, slices: list[Slice]) -> None:
    series: dict[str, list[Slice]] = {}
    for header in slices:
        series.setdefault(header.series, []).append(header)
    if len(series) > 1:
        listed = ", ".join(f"{uid} ({files[0].description}, {len(files)} file{'s' * (len(files) > 1)})"
                           for uid, files in series.items())  # fmt: skip
        raise UserError(f"image {folder} holds {len(series)} series: {listed}; give each a folder of its own")
    if len(slices) < 2:
        raise UserError(f"image {folder} holds {len(slices)} DICOM slice, a volume needs two or more; "
                        "name the file itself if it is a 2D image")  # fmt: skip


def _same_grid(folder: Path, headers: list[Slice]) -> list[PlacedSlice]:
    """The slices; UserError unless all have a place in space, and the first one's size, pixel spacing, orientation."""
    slices: list[PlacedSlice] = []
    for header in headers:
        slices.append(_placed(folder, header))
        last, first = slices[-1], slices[0]
        grids: tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...] = (
            ("size (rows, columns)", last.size, first.size),
            ("pixel spacing", last.spacing_mm, first.spacing_mm),
            ("orientation", tuple(last.cosines.tolist()), tuple(first.cosines.tolist())),
        )
        for what, mine, other in grids:
            if not np.allclose(mine, other, rtol=0, atol=COSINE_TOLERANCE * (1 if what == "orientation" else 0.1)):
                raise UserError(f"image {folder}: slice {header.path.name} has another {what} than {first.path.name}: "
                                f"{mine} and {other}; leave only the slices of one volume there")  # fmt: skip
    frame = slices[0].cosines.reshape(2, 3)
    if np.abs(frame @ frame.T - np.eye(2)).max() > 10 * COSINE_TOLERANCE:
        raise UserError(f"image {folder}: ImageOrientationPatient {slices[0].cosines.tolist()} is no pair of "
                        "directions at right angles")  # fmt: skip
    return slices


def _placed(folder: Path, header: Slice) -> PlacedSlice:
    """The slice in space; UserError that names the element of its header that is missing."""
    if header.position is None:
        missing = "ImagePositionPatient"
    elif header.cosines is None:
        missing = "ImageOrientationPatient"
    elif header.spacing_mm is None:
        missing = "PixelSpacing"
    else:
        return PlacedSlice(header.path, header.size, header.spacing_mm, header.position, header.cosines)
    raise UserError(f"image {folder}: slice {header.path.name} has no {missing}, so its place is not known; "
                    "export the series again or convert it to NIfTI")  # fmt: skip


def _check_gaps(folder: Path, slices: list[PlacedSlice], heights: np.ndarray) -> None:
    """UserError unless the slices, in order of `heights` (mm along their normal), are evenly apart."""
    gaps = np.diff(heights)
    usual = np.sort(gaps)[(len(gaps) - 1) // 2]
    names = [f"{before.path.name} and {after.path.name}"
             for before, after in zip(slices[:-1], slices[1:], strict=True)]  # fmt: skip
    doubled = np.flatnonzero(gaps < 1e-4)
    if doubled.size:
        raise UserError(f"image {folder}: slices {names[doubled[0]]} lie at the same place ({doubled.size} such pairs; "
                        "several phases or echoes?); leave only the slices of one volume there")  # fmt: skip
    uneven = np.flatnonzero(np.abs(gaps - usual) > GAP_TOLERANCE * usual)
    if uneven.size:
        at = int(uneven[0])
        raise UserError(f"image {folder} has missing or uneven slices: {gaps[at]:.4g} mm between {names[at]} (after "
                        f"slice {at + 1} of {len(slices)}), usually {usual:.4g} mm, {uneven.size} such gaps in all; "
                        "add the missing slices or resample the series")  # fmt: skip
