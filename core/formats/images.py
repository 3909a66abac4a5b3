"""One reader of images and volumes -> raw intensities, float32, channels first, and where the pixels lie.

PNG, JPEG, TIFF and BMP are read here, NIfTI and NumPy by `volumes`, DICOM by `dicom`. An image is a file whose suffix
`FORMATS` knows, or the folder of one DICOM series; an entry of `FORMATS` is all that a format needs.
"""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from core.errors import UserError, damaged
from core.files import walk
from core.formats.dicom import dicom_files, dicom_geometry, is_series, read_dicom, read_series, series_geometry
from core.formats.geometry import Geometry
from core.formats.volumes import nifti_geometry, npy_geometry, npz_geometry, read_nifti, read_npy, read_npz

LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, weights of R, G, B
EXIF_ORIENTATION = TIFF_ORIENTATION = 274
TIFF_PHOTOMETRIC, MIN_IS_WHITE = 262, 0
# What Pillow raises on damaged files, found by cutting and overwriting files of every format.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, MemoryError,
          struct.error, Image.DecompressionBombError, UserWarning)  # fmt: skip


class Format(NamedTuple):
    """How files of one suffix, or series folders, are read: all pixels (C, *size), or the header: where they lie."""

    read: Callable[[Path], np.ndarray]
    geometry: Callable[[Path], Geometry]


def read_image(path: str | Path) -> np.ndarray:
    """Read one image as float32 (1, H, W), a volume as (1, D, H, W), raw intensities: values stay as they are.

    Colour and palettes become luminance (BT.601, unrounded), alpha is ignored, fewer than 8 bits are spread over
    0..255, "white is zero" (TIFF, DICOM) is inverted so that larger is brighter. An EXIF or TIFF orientation tag, where
    present, is applied (in a PNG only one that stands before the pixels), so landmarks count pixels of the upright
    image. UserError: missing, empty, damaged or unsupported file, several pages, non-finite pixels.
    """
    path = Path(path)
    pixels = _format(path).read(path)
    finite = np.isfinite(pixels[0])
    if not finite.all():
        first = tuple(int(index) for index in np.argwhere(~finite)[0])
        axes = "(y, x)" if len(first) == 2 else "(z, y, x)"
        raise UserError(f"file {path} has {np.sum(~finite)} non-finite pixels, first at {axes}={first}")
    return pixels


def read_geometry(path: str | Path) -> Geometry:
    """Size, spacing and affine of `read_image(path)`, from the header alone.

    UserError as `read_image`, but for damage in the pixels.
    """
    path = Path(path)
    return _format(path).geometry(path)


def image_suffix(path: str | Path) -> str | None:
    """The image suffix that the name of `path` ends in, as written there (".png", ".JPG"), or None: a series folder."""
    name = path.name if isinstance(path, Path) else path.rstrip("/").rpartition("/")[2]
    lower = name.lower()
    if not lower.endswith(IMAGE_SUFFIXES):
        return None
    suffixes = [suffix for suffix in IMAGE_SUFFIXES if lower.endswith(suffix) and len(name) > len(suffix)]
    return name[-len(max(suffixes, key=len)) :] if suffixes else None


def is_picture(path: Path) -> bool:
    """Whether the name is that of a PNG, JPEG, TIFF or BMP: two axes and no spacing, whatever its header says."""
    return FORMATS.get((image_suffix(path) or "").lower()) is RASTER


def find_images(folder: Path, recursive: bool = False) -> list[Path]:
    """All images in `folder`, sorted by path; hidden files and folders (also of macOS archives) are skipped.

    A sub-folder whose first two DICOM files are of one series is one image, and the files in it are none.
    """
    files: list[tuple[str, ...]] = []  # the parts of their names below `folder`: sorted as paths are, in less time
    series: set[tuple[str, ...]] = set()
    skipped = len(str(folder).rstrip("/")) + 1
    for entry in walk(folder) if recursive else os.scandir(folder):
        parts = tuple(entry.path[skipped:].split("/"))
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            continue
        if entry.is_dir():
            series.update([parts] if is_series(Path(entry.path)) else ())
        elif image_suffix(entry.name):
            files.append(parts)
    return [folder.joinpath(*parts) for parts in sorted(series.union(f for f in files if f[:-1] not in series))]


def _format(path: Path) -> Format:
    """The format of a series folder or an existing, non-empty file; UserError otherwise."""
    if path.is_dir() and any(True for _ in dicom_files(path)):
        return SERIES
    suffix = image_suffix(path)
    if path.exists() and not path.is_file():
        raise UserError(f"image {path} is not a file, nor a folder with the DICOM slices of one series")
    if suffix is None:
        raise UserError(f"image {path} has no supported suffix; choose from {', '.join(IMAGE_SUFFIXES)}")
    if not path.exists():
        raise UserError(f"image {path} does not exist")
    if path.stat().st_size == 0:
        raise UserError(f"image {path} is empty (0 bytes)")
    return FORMATS[suffix.lower()]


def _unreadable(path: Path, error: BaseException) -> UserError:
    unknown = isinstance(error, UnidentifiedImageError)
    return damaged(path, "it is not a PNG, JPEG, TIFF or BMP" if unknown else error)


def _open(path: Path, file: BinaryIO) -> ImageFile.ImageFile:
    """Open the header; the file's content decides its kind, whatever of our suffixes it has.

    From a file, not a path: of a path Pillow maps uncompressed pixels into memory and then scrambles a turned TIFF.
    """
    with warnings.catch_warnings():  # Pillow only warns of a cut TIFF directory, then reads with tags missing
        warnings.filterwarnings("error", message="Corrupt EXIF data", category=UserWarning)
        image = Image.open(file, formats=("PNG", "JPEG", "TIFF", "BMP"))
    pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    if pages > 1:
        raise UserError(f"image {path} holds {pages} pages; save the one that is meant as a file of its own")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 that is still to be applied (Pillow turns TIFFs itself)."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    return image.getexif().get(EXIF_ORIENTATION, 1)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored (H, W) pixels upright: EXIF 2..8, where 5..8 swap the axes."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.T
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def _read_raster(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file, _open(path, file) as image:
            orientation = _orientation(image)
            pixels = _upright(_luminance(path, image), orientation)
    except DAMAGE as error:
        raise _unreadable(path, error) from error
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is reported as such
        return np.ascontiguousarray(pixels, dtype=np.float32)[None]


def _raster_geometry(path: Path) -> Geometry:
    try:
        with path.open("rb") as file, _open(path, file) as image:
            width, height = image.size
            turned = _orientation(image) in (5, 6, 7, 8)
    except DAMAGE as error:
        raise _unreadable(path, error) from error
    return Geometry((width, height) if turned else (height, width))


def _luminance(path: Path, image: ImageFile.ImageFile) -> np.ndarray:
    """Pixels of an opened image as one (H, W) channel, not yet turned by EXIF."""
    deep_colour = image.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile.args) for tile in image.tile)
    tags = dict(image.tag_v2) if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    image.load()
    if deep_colour:
        return _deep_colour(path, tags.get(TIFF_ORIENTATION, 1))
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image)
        inverted = tags.get(TIFF_PHOTOMETRIC) == MIN_IS_WHITE and image.mode.startswith("I;16")
        return 65535 - pixels if inverted else pixels  # Pillow inverts 8-bit TIFFs itself
    if image.mode in ("1", "L", "LA", "La"):
        return np.asarray(image.convert("L"))
    return np.asarray(image.convert("RGB")) @ LUMINANCE


def _deep_colour(path: Path, tiff_orientation: int) -> np.ndarray:
    """16-bit colour, which Pillow cuts to 8 bits, read by OpenCV (which cannot turn it)."""
    if tiff_orientation != 1:
        raise UserError(f"image {path} is a 16-bit colour TIFF with an orientation tag; save it upright or in grey")
    pixels = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise UserError(f"image {path} cannot be read, it may be cut off or damaged: OpenCV cannot decode it")
    return pixels if pixels.ndim == 2 else pixels[..., 2::-1] @ LUMINANCE


RASTER = Format(_read_raster, _raster_geometry)
NIFTI = Format(read_nifti, nifti_geometry)
SERIES = Format(read_series, series_geometry)
FORMATS: dict[str, Format] = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"), RASTER),
    **dict.fromkeys((".nii", ".nii.gz"), NIFTI),
    ".npy": Format(read_npy, npy_geometry),
    ".npz": Format(read_npz, npz_geometry),
    ".dcm": Format(read_dicom, dicom_geometry),
}
IMAGE_SUFFIXES: tuple[str, ...] = tuple(FORMATS)
