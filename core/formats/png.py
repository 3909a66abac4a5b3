"""The chunks of a PNG that make its picture: texts, colour profiles and the like are left out, however large."""

from __future__ import annotations

import io
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PICTURE = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # PNG, third edition, section 11
ORIENTATION = b"eXIf"
MAX_EXIF = 1 << 20  # bytes
HEADER_BYTES = 8  # of a chunk: its length and its kind; a checksum of four follows


def picture_alone(file: BinaryIO, pixels: bool = True) -> io.BytesIO:
    """A PNG with the chunks of `file` (at its beginning) that count, up to the first of the pixels without `pixels`.

    An EXIF chunk counts where it stands before the pixels. A cut file is cut in what comes out.
    """
    kept = io.BytesIO()
    kept.write(file.read(len(SIGNATURE)))
    before_pixels = True
    while len(header := file.read(HEADER_BYTES)) == HEADER_BYTES:
        length, kind = int.from_bytes(header[:4], "big"), header[4:]
        before_pixels = before_pixels and kind != b"IDAT"
        if kind == b"IDAT" and not pixels:
            kept.write(header)
            break
        if kind in PICTURE or (kind == ORIENTATION and before_pixels and length <= MAX_EXIF) or _must_be_known(kind):
            kept.write(header + file.read(length + 4))
        else:
            file.seek(length + 4, io.SEEK_CUR)
        if kind == b"IEND":
            break
    kept.seek(0)
    return kept


def _must_be_known(kind: bytes) -> bool:
    """Of an unknown critical chunk (its first letter is a capital) the decoder shall say what it thinks."""
    return kind[:1].isupper()
