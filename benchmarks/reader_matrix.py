"""Every kind of TIFF and DICOM against what was written into it: read right, or refused in one line.

A bright blob on a ramp is written as each kind; right means that every pixel has its value, and that the brightest one
lies where the blob is. SimpleITK, an independent reader, says where it finds the brightest one.

    python -m benchmarks.reader_matrix
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK
import tifffile
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    generate_uid,
)

from core.errors import UserError
from core.formats.images import read_image

SHAPE, BLOB = (48, 32), (13, 21)  # (y, x)
PHOTOMETRIC_TAG = 262


class Kind(NamedTuple):
    """A file of one kind: how it is written, and the brightness of its pixels; `may_refuse`: for that there is none."""

    name: str
    write: Callable[[Path], object]
    truth: np.ndarray
    may_refuse: bool = False


class Outcome(NamedTuple):
    """What became of a kind: "right", "refused" or "WRONG", and in words; where SimpleITK finds its brightest pixel."""

    kind: str
    verdict: str
    words: str
    itk: str


def picture(low: float, high: float) -> np.ndarray:
    """(48, 32) float64: a ramp in the lower half of low..high, and the one brightest pixel at BLOB."""
    ramp = np.linspace(low, low + (high - low) / 2, SHAPE[0] * SHAPE[1]).reshape(SHAPE)
    ramp[BLOB] = high
    return ramp


def tiff_kinds() -> Iterator[Kind]:
    """Grey of every type, order, compression and layout; colours, palettes, transparency, packed bits; oddities."""
    for code in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"):
        yield from _grey_tiffs(code)
    for code, planar in ((c, p) for c in ("u1", "u2", "u4", "f4", "f8") for p in ("contig", "separate")):
        yield _colour_tiff(code, planar)
    for bits in (1, 2, 4, 10, 12, 14):
        yield from _packed_tiffs(bits)
    yield from _other_tiffs()


def _values(code: str) -> np.ndarray:
    kind = np.dtype(code)
    if kind.kind == "f":
        return picture(-0.5, 3.0).astype(kind)
    whole = np.iinfo(kind)
    return np.rint(picture(max(whole.min, -(2.0**52)), min(whole.max, 2.0**53))).clip(
        whole.min, min(whole.max, 2**53)).astype(kind)


def _tiff(values: np.ndarray, **options: Any) -> Callable[[Path], object]:
    options.setdefault("photometric", "minisblack")
    return lambda path: tifffile.imwrite(path, values, metadata=None, **options)


def _grey_tiffs(code: str) -> Iterator[Kind]:
    values, fraction = _values(code), np.dtype(code).kind == "f"
    truth = values.astype(np.float32)
    whole = None if fraction else np.iinfo(code)
    turned = values if whole is None else (whole.max - values.astype(object) + whole.min).astype(code)
    for order in "<>":
        name = f"TIFF grey {values.dtype.name} {'little' if order == '<' else 'big'}-endian"
        yield Kind(name, _tiff(values, byteorder=order), truth)
        yield Kind(f"{name} white is zero", _tiff(turned, byteorder=order, photometric="miniswhite"), truth,
                   may_refuse=fraction)
        yield Kind(f"{name} BigTIFF", _tiff(values, byteorder=order, bigtiff=True), truth)
        yield Kind(f"{name} tiles", _tiff(values, byteorder=order, tile=(32, 16)), truth)
        for compression, predictor in (("lzw", False), ("lzw", True), ("zlib", False), ("zlib", True),
                                       ("packbits", False), ("zstd", False), ("lzma", False)):
            options: dict[str, Any] = {"compression": compression, "rowsperstrip": 7, "predictor": predictor}
            if not predictor or (values.dtype.itemsize < 8 and code != "f2"):  # tifffile does not write those
                yield Kind(f"{name} {compression}{' predictor' * predictor}",
                           _tiff(values, byteorder=order, **options), truth)
    if not fraction:
        yield Kind(f"TIFF grey {values.dtype.name} and alpha",
                   _tiff(np.dstack((values, values[::-1])), extrasamples=["unassalpha"]), truth)
        yield Kind(f"TIFF grey {values.dtype.name} and a nameless channel",
                   _tiff(np.dstack((values, values[::-1])), extrasamples=["unspecified"]), truth, may_refuse=True)


def _colour_tiff(code: str, planar: str) -> Kind:
    values = _values(code)
    colours = np.stack((values, values // 2 if values.dtype.kind != "f" else values / 2, values), axis=-1)
    grey = (colours.astype(np.float64) @ (0.299, 0.587, 0.114)).astype(np.float32)
    stored = colours if planar == "contig" else np.moveaxis(colours, -1, 0)
    return Kind(f"TIFF RGB {values.dtype.name} {planar}", _tiff(stored, photometric="rgb", planarconfig=planar), grey)


def _packed_tiffs(bits: int) -> Iterator[Kind]:
    top = 2**bits - 1
    values = np.rint(picture(0, top)).astype(np.uint8 if bits <= 8 else np.uint16)
    values = np.minimum(values, max(top - 1, 0))
    values[BLOB] = top
    scale = 255 // top if bits < 8 else 1
    for meaning in ("minisblack", "miniswhite"):
        stored = values if meaning == "minisblack" else (top - values).astype(values.dtype)
        options: dict[str, Any] = {"photometric": meaning}
        if bits == 1:
            stored = stored.astype(bool)
        else:
            options["bitspersample"] = bits
        yield Kind(f"TIFF grey {bits} bit {meaning}", _tiff(stored, **options),
                   (values.astype(np.int64) * scale).astype(np.float32))


def _other_tiffs() -> Iterator[Kind]:
    grey = _values("u1")
    truth = grey.astype(np.float32)
    colours = np.stack((grey, grey, grey), axis=-1)
    alpha = np.full((*SHAPE, 1), 99, np.uint8)
    palette = np.stack([np.arange(255, -1, -1, dtype=np.uint16) * 257] * 3)
    yield Kind("TIFF palette", _tiff(255 - grey, photometric="palette", colormap=palette), truth)
    yield Kind("TIFF RGBA", _tiff(np.concatenate((colours, alpha), -1), photometric="rgb",
                                  extrasamples=["unassalpha"]), truth)
    yield Kind("TIFF CMYK", _tiff(np.concatenate((np.zeros_like(colours), 255 - grey[..., None]), -1),
                                  photometric="separated"), truth)
    for number, name in ((8, "CIE L*a*b*"), (32803, "raw camera"), (34892, "linear raw"), (4, "mask")):
        yield Kind(f"TIFF {name}", _retagged(grey if number != 8 else colours, PHOTOMETRIC_TAG, number), truth, True)
    yield Kind("TIFF YCbCr uncompressed", _retagged(colours, PHOTOMETRIC_TAG, 6), truth, True)
    yield Kind("TIFF complex", _tiff(grey.astype(np.complex64)), truth, True)
    yield Kind("TIFF of two pages", _tiff(np.stack((grey, grey))), truth, True)
    yield Kind("TIFF of three grey channels", _tiff(colours, planarconfig="contig", photometric="minisblack"), truth,
               True)
    yield Kind("TIFF stack of ImageJ", lambda path: tifffile.imwrite(path, np.stack((grey, grey)), imagej=True),
               truth, True)
    for orientation in range(1, 9):
        turned = truth.T if orientation > 4 else truth
        turned = turned[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]
        yield Kind(f"TIFF orientation {orientation}", _tiff(grey, extratags=[(274, 3, 1, orientation, True)]), turned)


def _retagged(values: np.ndarray, tag: int, number: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        colours = values.ndim == 3
        tifffile.imwrite(path, values, metadata=None, photometric="rgb" if colours else "minisblack")
        with tifffile.TiffFile(path, mode="r+") as file:
            file.pages.first.tags[tag].overwrite(number)
    return write


def dicom_kinds() -> Iterator[Kind]:
    """Words of each width, sign and place of the bits; both photometric interpretations; syntaxes; padding."""
    for allocated, stored, high in ((8, 8, 7), (8, 6, 5), (16, 16, 15), (16, 12, 11), (16, 10, 9), (16, 12, 15),
                                    (16, 12, 13), (16, 8, 15), (32, 32, 31), (32, 20, 31), (32, 20, 19)):
        for signed in (False, True):
            for meaning in ("MONOCHROME2", "MONOCHROME1"):
                yield _word_kind(allocated, stored, high, signed, meaning)
    for syntax in (ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless,
                   JPEG2000Lossless):
        yield _word_kind(16, 12, 11, False, "MONOCHROME2", syntax)
    yield _word_kind(16, 12, 15, False, "MONOCHROME2", RLELossless)
    for padding, signed, stored in ((65535, False, 16), (65535, False, 12), (-32768, True, 16), (0, False, 12),
                                    (4095, False, 12)):
        for meaning in ("MONOCHROME2", "MONOCHROME1"):
            yield _padded_kind(padding, signed, stored, meaning)
    yield from _fraction_kinds()


def _dataset(shape: tuple[int, int], meaning: str = "MONOCHROME2") -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = DigitalXRayImageStorageForPresentation, generate_uid()
    dataset.Modality, dataset.SeriesInstanceUID = "DX", generate_uid()
    dataset.Rows, dataset.Columns = shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, meaning
    return dataset


def _with_words(dataset: Dataset, words: np.ndarray, bits: tuple[int, int, int], signed: bool, syntax: UID) -> Dataset:
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits
    dataset.PixelRepresentation = int(signed)
    big = syntax == ExplicitVRBigEndian
    dataset.PixelData = words.astype(words.dtype.newbyteorder(">" if big else "<")).tobytes()
    dataset["PixelData"].VR = "OB" if bits[0] == 8 else "OW"
    if syntax == RLELossless:
        dataset.compress(syntax)
    elif syntax == JPEG2000Lossless:
        packed = io.BytesIO()
        Image.fromarray(words).save(packed, format="JPEG2000", no_jp2=True)
        dataset.PixelData = encapsulate([packed.getvalue()])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
    else:
        dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def _saved(dataset: Dataset) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        dataset.save_as(path, enforce_file_format=True)
    return write


def _word_kind(allocated: int, stored: int, high: int, signed: bool, meaning: str,
               syntax: UID = ExplicitVRLittleEndian) -> Kind:
    low = -(2 ** (stored - 1)) if signed else 0
    top = low + 2**stored - 1
    values = np.rint(picture(low, top)).astype(np.int64)
    turned = values if meaning == "MONOCHROME2" else low + top - values
    below = high + 1 - stored
    words = (turned & (2**stored - 1)) << below
    beside = (2**allocated - 1) ^ ((2**stored - 1) << below)  # bits that are no part of the value: set somewhere
    words[::3] |= beside if syntax != JPEG2000Lossless else 0
    name = f"DICOM {stored} of {allocated} bits up to bit {high}, {'signed' if signed else 'unsigned'} {meaning}"
    name += "" if syntax == ExplicitVRLittleEndian else f", {getattr(syntax, 'name', syntax)}"
    dataset = _with_words(_dataset(SHAPE, meaning), words.astype(f"u{allocated // 8}"), (allocated, stored, high),
                          signed, syntax)
    return Kind(name, _saved(dataset), values.astype(np.float32))


def _padded_kind(padding: int, signed: bool, stored: int, meaning: str) -> Kind:
    values = np.rint(picture(100, 3000)).astype(np.int64)
    lowest, highest = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if signed else (0, 2**stored - 1)
    words = values if meaning == "MONOCHROME2" else lowest + highest - values
    edge = np.zeros(SHAPE, bool)
    edge[:, :3] = True
    words = np.where(edge, padding, words)
    dataset = _with_words(_dataset(SHAPE, meaning), words.astype("i2" if signed else "u2"), (16, stored, stored - 1),
                          signed, ExplicitVRLittleEndian)
    dataset.add_new("PixelPaddingValue", "SS" if signed else "US", padding)
    truth = np.where(edge, values[~edge].min(), values).astype(np.float32)
    return Kind(f"DICOM padding {padding}, {stored} bits {meaning}", _saved(dataset), truth)


def _fraction_kinds() -> Iterator[Kind]:
    for code, key, bits in (("f4", "FloatPixelData", 32), ("f8", "DoubleFloatPixelData", 64)):
        for meaning in ("MONOCHROME2", "MONOCHROME1"):
            dataset = _dataset(SHAPE, meaning)
            dataset.BitsAllocated = bits
            setattr(dataset, key, picture(-1, 2).astype(code).tobytes())
            yield Kind(f"DICOM {key} {meaning}", _saved(dataset), picture(-1, 2).astype(np.float32),
                       may_refuse=meaning == "MONOCHROME1")


def judge(kind: Kind, path: Path) -> Outcome:
    """Write the kind to `path` and read it."""
    kind.write(path)
    itk = _itk(path)
    try:
        read = read_image(path)[0]
    except UserError as error:
        line = str(error)
        sound = kind.may_refuse and "\n" not in line and "damaged" not in line
        return Outcome(kind.name, "refused" if sound else "WRONG", line.replace(str(path), "FILE"), itk)
    if kind.may_refuse or read.shape != kind.truth.shape:
        return Outcome(kind.name, "WRONG", f"read as {read.shape}, where nobody can know its brightness", itk)
    alike = np.allclose(read, kind.truth, rtol=1e-6, atol=0)
    place = tuple(int(index) for index in np.unravel_index(read.argmax(), read.shape))
    return Outcome(kind.name, "right" if alike else "WRONG", f"brightest at {place}", itk)


def _itk(path: Path) -> str:
    """Where SimpleITK finds the brightest pixel, (y, x); it knows no padding and no orientation."""
    try:
        pixels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    except RuntimeError:
        return "not read"
    if pixels.size != SHAPE[0] * SHAPE[1]:
        return f"array {pixels.shape}"
    pixels = pixels.reshape(pixels.shape[-2:])
    return str(tuple(int(index) for index in np.unravel_index(pixels.argmax(), pixels.shape)))


def main() -> None:
    """Print the table, and how many of each verdict there are."""
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for suffix, kinds in ((".tif", tiff_kinds()), (".dcm", dicom_kinds())):
            for kind in kinds:
                outcome = judge(kind, Path(folder) / f"a{suffix}")
                counts[outcome.verdict] = counts.get(outcome.verdict, 0) + 1
                print(f"| {outcome.kind} | {outcome.verdict} | {outcome.words} | {outcome.itk} |")
    print(counts)


if __name__ == "__main__":
    main()
