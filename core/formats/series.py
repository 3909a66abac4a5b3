"""Reader of a folder with the slices of one DICOM series -> (1, D, H, W), and which folders are such.

Slices are ordered and placed by ImagePositionPatient and ImageOrientationPatient alone, not by name or InstanceNumber:
with row cosines X, column cosines Y and position S, pixel (column i, row j) lies at S + X dx i + Y dy j in LPS mm
(DICOM PS3.3, equation C.7.6.2.1-1). Affines here are RAS, as everywhere in the program.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom

from core.errors import UserError, damaged
from core.formats.dicom import Slice, damage_told, darkened, has_mark, pixels_of, slice_header
from core.formats.geometry import RAS_TO_LPS, Geometry, geometry_of

UNEVEN = 0.05  # of the slice distance: how far a slice may lie from its place between the first and the last
ROUNDED_MM = 0.02  # the same for positions that are rounded to two decimals, which moves thin slices by more
UNEVEN_AT_MOST = 0.25  # of the slice distance, for a missing slice moves others by a half or more
COSINE_TOLERANCE = 1e-4  # between the orientations of two slices
SIDEWAYS_TOLERANCE = 0.1  # pixels that a slice may lie off the line through the first and the last
LISTED = 5  # series that a message names
VOLUMES = ("CT", "MR", "PT", "NM")  # modalities whose slices without a place are slices still
MARKS = ["SeriesInstanceUID", "ImagePositionPatient", "Modality"]
# files that may lie beside slices and are none, whatever their first bytes
NO_SLICES = frozenset((".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".nii", ".gz",
                       ".nrrd", ".npy", ".npz", ".csv", ".json", ".fcsv", ".txt", ".xml", ".pdf", ".zip"))  # fmt: skip


@dataclass(frozen=True, eq=False)
class PlacedSlice:
    """A slice whose place in space is known, as every one of a series must be."""

    path: Path
    size: tuple[int, int]
    spacing_mm: tuple[float, float]
    position: np.ndarray
    cosines: np.ndarray


def read_series(folder: Path) -> np.ndarray:
    """(1, D, H, W) float32 of a folder with the slices of one series, values as `read_dicom`.

    z grows along the cross product of a row's and a column's direction. UserError: as `read_dicom`; several series;
    missing, doubled, uneven or shifted slices; slices of several sizes, spacings or orientations or without them.
    """
    slices, geometry = _stack(folder)
    volume = np.empty((1, *geometry.size), dtype=np.float32)
    padding: dict[int, np.ndarray] = {}
    for index, header in enumerate(slices):
        volume[0, index], padded = pixels_of(header.path)
        if padded is not None:
            padding[index] = padded
    return darkened(volume, padding)


def series_geometry(folder: Path) -> Geometry:
    """Size, spacing and affine of `read_series(folder)`, from the headers. UserError: as `read_series`, skewed axes."""
    return _stack(folder)[1]


def dicom_files(folder: Path) -> Iterator[Path]:
    """Files right in `folder` named .dcm, and those with DICOM's mark whose suffix is not another format's."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if may_be_slice(entry.name) and entry.is_file() and (
                entry.name.lower().endswith(".dcm") or has_mark(folder / entry.name)):
            yield folder / entry.name


def may_be_slice(name: str) -> bool:
    """Whether a file may be DICOM, by its name."""
    dot, suffix = name.rpartition(".")[1:]
    return not (name.startswith(".") or name.upper() == "DICOMDIR" or dot + suffix.lower() in NO_SLICES)


def is_series(folder: Path) -> bool:
    """Whether two DICOM files in `folder` are slices of one series.

    Radiographs of one study often share a series; what has no place in the patient and is no tomography is a picture.
    Files whose header is damaged do not count: their damage is told when they are read.
    """
    seen: dict[str, bool] = {}
    for file in dicom_files(folder):
        try:
            with damage_told(file):
                header = pydicom.dcmread(file, specific_tags=MARKS, stop_before_pixels=True)
                name = str(header.get("SeriesInstanceUID") or "").strip()
                sliced = bool(header.get("ImagePositionPatient")) or header.get("Modality") in VOLUMES
        except UserError:
            continue
        if name and name in seen and (sliced or seen[name]):
            return True
        if name:
            seen[name] = sliced or seen.get(name, False)
    return False


def _stack(folder: Path) -> tuple[list[PlacedSlice], Geometry]:
    """The slices of the folder's only series in the order of their positions, and the geometry of their volume."""
    try:
        headers = [slice_header(file) for file in dicom_files(folder)]
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
        each = [f"{uid} ({files[0].description}, {len(files)} file{'s' * (len(files) > 1)})"
                for uid, files in series.items()]  # fmt: skip
        listed = ", ".join(each[:LISTED]) + (", .." if len(each) > LISTED else "")
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
    places = heights[0] + np.arange(len(heights)) * (heights[-1] - heights[0]) / (len(heights) - 1)
    allowed = max(UNEVEN * usual, min(ROUNDED_MM, UNEVEN_AT_MOST * usual))
    if np.abs(heights - places).max() > allowed:
        at = int(np.abs(gaps - usual).argmax())
        uneven = int((np.abs(gaps - usual) > allowed).sum())
        raise UserError(f"image {folder} has missing or uneven slices: {gaps[at]:.4g} mm between {names[at]} (after "
                        f"slice {at + 1} of {len(slices)}), usually {usual:.4g} mm, {uneven} such gaps in all; "
                        "add the missing slices or resample the series")  # fmt: skip
