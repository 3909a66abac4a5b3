"""One reader of images: PNG, JPEG, TIFF and BMP -> raw intensities, float32, channels first.

Volumes join by suffix: a new entry of `FORMATS` is all that a further file format needs.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from core.errors import UserError

LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, weights of R, G, B
EXIF_ORIENTATION = TIFF_ORIENTATION = 274
TIFF_PHOTOMETRIC, MIN_IS_WHITE = 262, 0
# What Pillow raises on damaged files, found by cutting and overwriting files of every format.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, MemoryError,
          struct.error, Image.DecompressionBombError, UserWarning)  # fmt: skip


class Format(NamedTuple):
    """How files of one suffix are read: all pixels (C, *size), and the size alone."""

    read: Callable[[Path], np.ndarray]
    size: Callable[[Path], tuple[int, ...]]


def read_image(path: str | Path) -> np.ndarray:
    """Read one image as float32 (1, H, W), raw intensities: 8- and 16-bit values and floats stay as they are.

    Colour and palettes become luminance (BT.601, unrounded), alpha is ignored, fewer than 8 bits are spread over
    0..255, a "white is zero" TIFF is inverted so that larger is brighter. An EXIF or TIFF orientation tag, where
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


def read_size(path: str | Path) -> tuple[int, ...]:
    """(H, W) of `read_image(path)`, from the header alone. UserError as `read_image`, but for damage in the pixels."""
    path = Path(path)
    return _format(path).size(path)


def image_suffix(path: str | Path) -> str | None:
    """The image suffix that `path` ends in, as written there (".png", ".JPG"), or None."""
    name = Path(path).name
    found = [suffix for suffix in FORMATS if name.lower().endswith(suffix) and len(name) > len(suffix)]
    return name[-len(max(found, key=len)) :] if found else None


def find_images(folder: Path, recursive: bool = False) -> list[Path]:
    """All image files in `folder`, sorted by path; hidden files and folders (also of macOS archives) are skipped."""
    files = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(file for file in files if image_suffix(file) and not _hidden(file.relative_to(folder)))


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in relative.parts)


def _format(path: Path) -> Format:
    """The format of an existing, non-empty file; UserError otherwise."""
    suffix = image_suffix(path)
    if suffix is None:
        raise UserError(f"image {path} has no supported suffix; choose from {', '.join(IMAGE_SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"image {path} {'is not a file' if path.exists() else 'does not exist'}")
    if path.stat().st_size == 0:
        raise UserError(f"image {path} is empty (0 bytes)")
    return FORMATS[suffix.lower()]


def _damaged(path: Path, error: BaseException) -> UserError:
    if isinstance(error, PermissionError):
        return UserError(f"image {path} cannot be read: permission denied")
    unknown = isinstance(error, UnidentifiedImageError)
    reason = "it is not a PNG, JPEG, TIFF or BMP" if unknown else " ".join(str(error).split()) or type(error).__name__
    return UserError(f"image {path} cannot be read, it may be cut off or damaged: {reason}")


def _open(path: Path, file: BinaryIO) -> Image.Image:
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
        raise _damaged(path, error) from error
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is reported as such
        return np.ascontiguousarray(pixels, dtype=np.float32)[None]


def _raster_size(path: Path) -> tuple[int, int]:
    try:
        with path.open("rb") as file, _open(path, file) as image:
            width, height = image.size
            turned = _orientation(image) in (5, 6, 7, 8)
    except DAMAGE as error:
        raise _damaged(path, error) from error
    return (width, height) if turned else (height, width)


def _luminance(path: Path, image: Image.Image) -> np.ndarray:
    """Pixels of an opened image as one (H, W) channel, not yet turned by EXIF."""
    deep_colour = image.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile.args) for tile in image.tile)
    tags = dict(image.tag_v2) if image.format == "TIFF" else {}
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


FORMATS: dict[str, Format] = dict.fromkeys(
    (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"), Format(_read_raster, _raster_size)
)
IMAGE_SUFFIXES: tuple[str, ...] = tuple(FORMATS)
