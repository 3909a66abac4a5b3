"""One reader of images and volumes -> raw intensities, float32, channels first, and where the pixels lie.

PNG, JPEG, BMP and WebP are read here, TIFF by `tiff`, NIfTI and NumPy by `volumes`, NRRD by `nrrd_files`, DICOM by
`dicom`. An image is a file whose suffix `FORMATS` knows, a file with DICOM's mark, or the folder of one DICOM series;
an entry of `FORMATS` is all that a format needs.
"""

from __future__ import annotations

import os
import struct
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from core.errors import UserError, damaged, note_once
from core.formats.colour import luminance
from core.formats.dicom import dicom_geometry, has_mark, read_dicom
from core.formats.geometry import Geometry
from core.formats.nrrd_files import nrrd_geometry, read_nrrd
from core.formats.png import SIGNATURE, picture_alone
from core.formats.series import dicom_files, is_series, may_be_slice, read_series, series_geometry
from core.formats.tiff import is_tiff, read_tiff, tiff_size
from core.formats.volumes import nifti_geometry, npy_geometry, npz_geometry, read_nifti, read_npy, read_npz

EXIF_ORIENTATION = 274
Image.MAX_IMAGE_PIXELS = None  # core.data.cache looks at sizes before pixels are read: dataset.max_megapixels
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
    0..255, "white is zero" (TIFF, DICOM) is inverted so that larger is brighter, padding (DICOM) is as dark as the
    darkest pixel. An EXIF or TIFF orientation tag, where present, is applied (in a PNG only one that stands before the
    pixels; never XMP's), so landmarks count pixels of the upright image. UserError: missing, empty, damaged or
    unsupported file, several pages, non-finite pixels.
    """
    path = Path(path)
    pixels = _format(path).read(path)
    check_finite(pixels, f"file {path}")
    return pixels


def check_finite(pixels: np.ndarray, name: str) -> None:
    """UserError, with the first place, where pixels (C, *size) of the image `name` are NaN or infinite."""
    finite = np.isfinite(pixels[0])
    if not finite.all():
        first = tuple(int(index) for index in np.argwhere(~finite)[0])
        axes = "(y, x)" if len(first) == 2 else "(z, y, x)"
        raise UserError(f"{name} has {np.sum(~finite)} non-finite pixels, first at {axes}={first}")


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


def image_id(name: str | Path) -> str:
    """The id of an image: its file name or relative path without its image suffix, with forward slashes.

    Names that differ only in their Unicode form (macOS takes letters with marks apart) are one name.
    """
    text = unicodedata.normalize("NFC", name.as_posix() if isinstance(name, Path) else name.replace("\\", "/"))
    suffix = image_suffix(text)
    return text[: -len(suffix)] if suffix else text


def is_picture(path: Path) -> bool:
    """Whether the name is that of a PNG, JPEG, TIFF, BMP or WebP: two axes and no spacing, whatever its header says."""
    return FORMATS.get((image_suffix(path) or "").lower()) is RASTER


def find_images(folder: Path, recursive: bool = False) -> list[Path]:
    """All images in `folder`, sorted by path; folders that are links are entered, each folder once.

    Passed over: hidden files and folders, those of file servers and systems (SYSTEM_FOLDERS), and the pictures beside a
    predictions.csv, which the program drew. A folder that `is_series` is one image, and the files in it are none.
    Without an image suffix a file with DICOM's mark is one.
    """
    images: list[tuple[str, ...]] = []  # the parts of their names below `folder`: sorted as paths are, in less time
    ahead, seen = [folder], {folder.resolve()}
    links: list[Path] = []
    while ahead or links:
        here = ahead.pop() if ahead else links.pop(0)  # links come last: an image has the name that it has without them
        below = here.parts[len(folder.parts) :]
        for entry in sorted(os.scandir(here), key=lambda entry: entry.name):
            if _passed_over(entry, here):
                continue
            if not entry.is_dir():
                if image_suffix(entry.name) or (may_be_slice(entry.name) and has_mark(here / entry.name)):
                    images.append((*below, entry.name))
                elif (target := _flattened_link(here / entry.name)) is not None:
                    note_once(f"flat {here / entry.name}", f'note: {here / entry.name} holds nothing but "{target}": a '
                                                           "copy made a file of a link, and what it led to is not read")
            elif is_series(here / entry.name):
                images.append((*below, entry.name))
            elif recursive and (real := (here / entry.name).resolve()) not in seen:
                if entry.is_symlink():
                    links.append(here / entry.name)
                    continue
                seen.add(real)
                ahead.append(here / entry.name)
        if not ahead:
            links = [link for link in links if link.resolve() not in seen]
            seen |= {link.resolve() for link in links[:1]}
    return [folder.joinpath(*parts) for parts in sorted(images)]


def _flattened_link(path: Path) -> str | None:
    """What a file holds that is nothing but the way to a file or folder that is there: git and copies leave such."""
    try:
        text = path.read_bytes().decode() if 0 < path.stat().st_size <= LONGEST_LINK else ""
        leads = "/" in text and "\n" not in text and (path.parent / text).exists()
    except (OSError, ValueError):
        return None
    return text if leads else None


def _passed_over(entry: os.DirEntry[str], folder: Path) -> bool:
    name = entry.name
    return (name.startswith(".") or name.casefold() in SYSTEM_FOLDERS or name.upper() == "DICOMDIR"
            or (name in DRAWN and (folder / "predictions.csv").is_file()))


def _format(path: Path) -> Format:
    """The format of a series folder or an existing, non-empty file; UserError otherwise."""
    if path.is_dir() and any(True for _ in dicom_files(path)):
        return SERIES
    suffix = image_suffix(path)
    if suffix is None and has_mark(path):
        return DICOM
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
    return damaged(path, "it is not a PNG, JPEG, TIFF, BMP or WebP" if unknown else error)


def _open(path: Path, file: BinaryIO) -> ImageFile.ImageFile:
    """Open the header of a PNG, JPEG, BMP or WebP: the content decides its kind, whatever of our suffixes it has."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Corrupt EXIF data", category=UserWarning)
        image = Image.open(file, formats=("PNG", "JPEG", "BMP", "WEBP"))
    pictures = getattr(image, "n_frames", 1) if image.format == "WEBP" else 1
    if pictures > 1:
        raise UserError(f"image {path} holds {pictures} pictures; save the one that is meant as a file of its own")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; that of XMP, which viewers do not look at, does not count in any format."""
    exif = Image.Exif()
    exif.load(image.info.get("exif") or b"")
    value = exif.get(EXIF_ORIENTATION, 1)
    return value if isinstance(value, int) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored (H, W) pixels upright: EXIF 2..8, where 5..8 swap the axes."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.T
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def _picture(file: BinaryIO, pixels: bool = True) -> BinaryIO:
    """`file`, and of a PNG what its picture needs."""
    return picture_alone(file, pixels) if _start(file) == SIGNATURE else file


def _start(file: BinaryIO) -> bytes:
    """The first bytes of a file, which is then as it was."""
    start = file.read(len(SIGNATURE))
    file.seek(0)
    return start


def _read_raster(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            if is_tiff(_start(file)):
                pixels, orientation = read_tiff(path, file)
            else:
                picture = _picture(file)
                with _open(path, picture) as image:
                    orientation = _orientation(image)
                    pixels = _brightness(path, image, picture)
    except DAMAGE as error:
        raise _unreadable(path, error) from error
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is reported as such
        return np.ascontiguousarray(_upright(pixels, orientation), dtype=np.float32)[None]


def _raster_geometry(path: Path) -> Geometry:
    try:
        with path.open("rb") as file:
            if is_tiff(_start(file)):
                size, orientation = tiff_size(path, file)
            else:
                with _open(path, _picture(file, pixels=False)) as image:
                    size, orientation = image.size[::-1], _orientation(image)
    except DAMAGE as error:
        raise _unreadable(path, error) from error
    return Geometry(size[::-1] if orientation in (5, 6, 7, 8) else size)


def _brightness(path: Path, image: ImageFile.ImageFile, file: BinaryIO) -> np.ndarray:
    """Pixels of an image opened from `file` as one (H, W) channel, not yet turned by EXIF."""
    deep_colour = image.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile.args) for tile in image.tile)
    image.load()
    if deep_colour:
        return _deep_colour(path, file)
    if image.mode.startswith(("I", "F")):
        return np.asarray(image)
    if image.mode in ("1", "L", "LA", "La"):
        return np.asarray(image.convert("L"))
    return luminance(np.asarray(image.convert("RGB")))


def _deep_colour(path: Path, file: BinaryIO) -> np.ndarray:
    """A PNG's 16-bit colour, which Pillow cuts to 8 bits, read by OpenCV."""
    file.seek(0)
    pixels = cv2.imdecode(np.frombuffer(file.read(), dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise UserError(f"image {path} cannot be read, it may be cut off or damaged: OpenCV cannot decode it")
    return pixels if pixels.ndim == 2 else luminance(pixels[..., 2::-1])


# of archives of macOS, of Synology's and QNAP's file servers, of Windows, of Unix disks
LONGEST_LINK = 1024  # bytes
SYSTEM_FOLDERS = ("__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin",
                  "recycler", "recycled", "system volume information", "lost+found")  # fmt: skip
DRAWN = ("overlays", "heatmaps", "markups")  # folders of pictures that belong to a table of predictions
RASTER = Format(_read_raster, _raster_geometry)
NIFTI = Format(read_nifti, nifti_geometry)
DICOM = Format(read_dicom, dicom_geometry)
SERIES = Format(read_series, series_geometry)
FORMATS: dict[str, Format] = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp"), RASTER),
    **dict.fromkeys((".nii", ".nii.gz"), NIFTI),
    ".nrrd": Format(read_nrrd, nrrd_geometry),
    ".npy": Format(read_npy, npy_geometry),
    ".npz": Format(read_npz, npz_geometry),
    **dict.fromkeys((".dcm", ".dicom", ".dic", ".ima"), DICOM),
}
IMAGE_SUFFIXES: tuple[str, ...] = tuple(FORMATS)
