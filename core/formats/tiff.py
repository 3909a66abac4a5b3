"""Reader of TIFF: every kind is read right, or refused in one line that says which kind it is.

Decoded by tifffile with imagecodecs; what the samples mean is decided here (TIFF 6.0, sections 3 to 8 and 16; tags by
their numbers there). Larger is brighter in what comes out.
"""

from __future__ import annotations

import logging
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tifffile

from core.errors import UserError, damaged
from core.formats.colour import luminance

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # both byte orders, TIFF and BigTIFF
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
PHOTOMETRIC = {4: "a mask", 8: "CIE L*a*b* colours", 9: "ICC L*a*b* colours", 10: "ITU L*a*b* colours",
               32803: "a camera's raw pixels", 34892: "a camera's raw pixels", 32844: "SGI LogL values",
               32845: "SGI LogLuv colours"}  # fmt: skip
JPEG, OLD_JPEG = 7, 6
UNSPECIFIED = 0  # of ExtraSamples: neither kind of transparency
NEEDED = frozenset((256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339,
                    347, 530))  # fmt: skip
# What tifffile and imagecodecs raise on damaged files, found by cutting and overwriting files.
DAMAGE = (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError,
          OverflowError, ZeroDivisionError, MemoryError, struct.error, zlib.error)  # fmt: skip
MAX_TILE_BYTES = 1 << 28  # of a tile that is larger than its image
logging.getLogger("tifffile").addHandler(logging.NullHandler())  # it logs what is also seen here


def is_tiff(start: bytes) -> bool:
    """Whether a file that begins so is a TIFF."""
    return start[:4] in MAGIC


def tiff_size(path: Path, file: BinaryIO) -> tuple[tuple[int, int], int]:
    """(H, W) as stored, and the orientation 1..8, from the header. UserError: as `read_tiff`, but for the pixels."""
    with _opened(path, file) as page:
        return (page.imagelength, page.imagewidth), _orientation(page)


def read_tiff(path: Path, file: BinaryIO) -> tuple[np.ndarray, int]:
    """(H, W) numbers as stored, and the orientation 1..8 that is still to be applied.

    UserError: damaged; several pages or a stack; a photometric interpretation, sample format or bit depth whose
    brightness is not known here.
    """
    with _opened(path, file) as page:
        _check_segments(path, page, file)
        samples = page.asarray(maxworkers=1).reshape(page.shaped)
        plane = np.moveaxis(samples, 0, -2)[0].reshape(page.imagelength, page.imagewidth, page.samplesperpixel)
        return _grey(path, page, plane), _orientation(page)


@contextmanager
def _opened(path: Path, file: BinaryIO) -> Iterator[tifffile.TiffPage]:
    """The only page of the file, checked to be of a kind that is read right."""
    try:
        with tifffile.TiffFile(file, name=path.name) as tiff:
            pages = len(tiff.pages)
            if pages != 1:
                raise UserError(f"image {path} holds {pages} pages; save the one that is meant as a file of its own")
            page = tiff.pages.first
            _check_directory(path, tiff, page)
            _check_stack(path, tiff, page)
            _check_kind(path, page)
            yield page
    except DAMAGE as error:
        raise damaged(path, error) from error


def _check_directory(path: Path, tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> None:
    """UserError where an entry of the directory could not be read: tifffile goes on without it."""
    handle, form = tiff.filehandle, tiff.tiff
    handle.seek(page.offset)
    count = struct.unpack(form.tagnoformat, handle.read(form.tagnosize))[0]
    entries = handle.read(count * form.tagsize)
    codes = {struct.unpack_from(f"{tiff.byteorder}H", entries, n * form.tagsize)[0] for n in range(count)}
    lost = sorted(code for code in codes & NEEDED if code not in page.tags)
    if lost:
        raise damaged(path, f"its tag {lost[0]} cannot be read")
    if page.imagelength < 1 or page.imagewidth < 1 or page.dtype is None and page.sampleformat in (1, 2, 3):
        raise damaged(path, f"it has {page.imagewidth} x {page.imagelength} pixels of {page.bitspersample} bits")


def _check_stack(path: Path, tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> None:
    """UserError where more pixels follow than the one directory tells of (ImageJ, tifffile, SGI)."""
    images = (tiff.imagej_metadata or {}).get("images", 1) if tiff.is_imagej else 1
    if tiff.is_shaped and tiff.shaped_metadata:
        images = max(images, math.prod(tiff.shaped_metadata[0].get("shape", ())) // max(page.size, 1))
    planes = page.tags.get(33629)  # UIC2, of MetaMorph
    images = max(images, page.imagedepth, planes.count if planes is not None else 1)
    if images > 1:
        raise UserError(f"image {path} holds a stack of {images} images; save the one that is meant as a file of its "
                        "own, or the volume as NIfTI")


def _check_kind(path: Path, page: tifffile.TiffPage) -> None:
    """UserError unless the brightness of the samples is known."""
    meaning, kind, bits = page.tags.valueof(262), page.sampleformat, page.bitspersample
    colours = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3}
    what = None
    if meaning is None:
        what = "does not say whether 0 is black or white"
    elif meaning not in colours:
        what = f"holds {PHOTOMETRIC.get(meaning, f'pixels of photometric interpretation {meaning}')}"
    elif isinstance(kind, tuple) or isinstance(bits, tuple):
        what = "holds samples of several kinds or depths"
    elif kind not in (1, 2, 3):
        what = f"holds {'complex numbers' if kind in (5, 6) else 'numbers of an undefined kind'}"
    elif meaning == WHITE_IS_ZERO and kind == 3:
        what = "holds white-is-zero fractions, whose black has no number"
    elif meaning in (PALETTE, CMYK, YCBCR) and (kind != 1 or bits > (16 if meaning == PALETTE else 8)):
        what = f"holds {bits}-bit {'palette indices' if meaning == PALETTE else 'CMYK or YCbCr colours'}"
    elif meaning == YCBCR and page.compression != JPEG or page.compression == OLD_JPEG:
        what = "holds YCbCr colours that are not compressed as JPEG" if meaning == YCBCR else "is old-style JPEG"
    elif meaning == CMYK and page.compression == JPEG:
        what = "holds CMYK colours compressed as JPEG"
    elif meaning == CMYK and page.tags.valueof(332, 1) != 1:
        what = "holds inks other than CMYK"
    elif page.compression == 1 and page.predictor != 1:
        what = "holds differences (a predictor) without compression, which readers take in two ways"
    elif meaning == PALETTE and page.colormap is None:
        what = "has a palette without colours"
    else:
        what = _extra_samples(page, colours[meaning])
    if what is not None:
        raise UserError(f"image {path} {what}; save it as grey TIFF (8 or 16 bit or float, black is zero) or PNG")


def _extra_samples(page: tifffile.TiffPage, colours: int) -> str | None:
    """What is wrong with the samples beside the `colours`: transparency is ignored, another channel is not."""
    extra = page.samplesperpixel - colours
    kinds = [int(kind) for kind in page.extrasamples]
    if extra < 0:
        return f"has {page.samplesperpixel} samples a pixel, and its colours need {colours}"
    if extra > 1 or (extra == 1 and colours == 1 and (not kinds or kinds[0] == UNSPECIFIED)):
        return f"holds {page.samplesperpixel} channels"
    return None


def _check_segments(path: Path, page: tifffile.TiffPage, file: BinaryIO) -> None:
    """UserError where a strip or tile is missing, lies outside the file, or would unpack to far more than the image."""
    size = file.seek(0, 2)
    pixel = page.samplesperpixel * np.dtype(page.dtype).itemsize
    image = page.imagelength * page.imagewidth * pixel
    tile = (page.tilelength, page.tilewidth) if page.is_tiled else (0, 0)
    if tile[0] * tile[1] * pixel > max(4 * image, MAX_TILE_BYTES):
        raise damaged(path, f"its tiles of {tile[1]} x {tile[0]} pixels are far larger than the image")
    rows = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
    across = math.ceil(page.imagewidth / page.tilewidth) if page.is_tiled else 1
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    wanted = math.ceil(page.imagelength / max(rows, 1)) * across * planes
    offsets, counts = page.dataoffsets, page.databytecounts
    if len(offsets) < wanted or len(counts) < wanted:
        raise damaged(path, f"it names {min(len(offsets), len(counts))} of {wanted} strips or tiles")
    for number, (offset, count) in enumerate(zip(offsets, counts, strict=False)):
        if offset <= 0 or count <= 0:
            raise damaged(path, f"its strip or tile {number} is missing")
        if offset + count > size:
            raise damaged(path, f"its strip or tile {number} is cut off")


def _orientation(page: tifffile.TiffPage) -> int:
    value = page.tags.valueof(274, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _grey(path: Path, page: tifffile.TiffPage, plane: np.ndarray) -> np.ndarray:
    """(H, W, samples) as decoded -> (H, W) brightness."""
    meaning, bits = int(page.tags.valueof(262)), int(page.bitspersample)
    integer = page.sampleformat in (1, 2)
    if meaning == PALETTE:
        return luminance(_palette(page)[plane[..., 0]])
    if meaning == CMYK:
        black = 255.0 - plane[..., 3:4]
        return luminance((255.0 - plane[..., :3]) * black / 255)
    if plane.dtype == bool:
        plane = plane.astype(np.uint8)
    if meaning == WHITE_IS_ZERO and integer:  # all ones are black; of signed numbers -1 - v, the bits turned over
        plane = -1 - plane.astype(np.int64) if page.sampleformat == 2 else np.array(2**bits - 1, plane.dtype) - plane
    grey = luminance(plane[..., :3]) if meaning in (RGB, YCBCR) else plane[..., 0]
    return grey * (255 // (2**bits - 1)) if integer and bits in (1, 2, 4) else grey


def _palette(page: tifffile.TiffPage) -> np.ndarray:
    """(2**bits, 3) in 0..255; 16 bits in the file, though some programs write 8 of them."""
    colours = np.asarray(page.colormap).T
    return colours >> 8 if colours.max() > 255 else colours
