"""Reader of one DICOM file with a grey picture -> (1, H, W); folders with a series are in `core.formats.series`.

What a stored word means is decided here (PS3.3, C.7.6.3 and C.7.5.1.1.2): the stored bits wherever they stand in it,
their sign, the modality's rescaling or table, which end is white, and which pixels are padding.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image, UnidentifiedImageError
from pydicom.encaps import get_frame
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.misc import is_dicom
from pydicom.pixels import apply_modality_lut, get_decoder
from pydicom.pixels.decoders.base import Decoder
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from core.errors import UserError, damaged, note_once
from core.formats.geometry import Geometry

# What pydicom raises on damaged files, found by cutting and overwriting files.
DICOM_DAMAGE = (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError,
                OverflowError, MemoryError, RuntimeError, AssertionError, zlib.error, struct.error,
                BytesLengthException, UserWarning)  # fmt: skip
META_START = 132 + 12  # behind the mark and the element that says how long the file's own header is
MAX_INFLATED = 1 << 30  # bytes of a deflated data set
DETECTOR_NOTE = ("note: {path} and perhaps others give their spacing at the detector (ImagerPixelSpacing), without a "
                 "magnification factor: distances in the patient are smaller; set dataset.spacing_mm where it is known")
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


def has_mark(path: Path) -> bool:
    """Whether it is a file with DICOM's mark, DICM at byte 128."""
    try:
        return path.is_file() and is_dicom(path)
    except OSError:
        return False


def read_dicom(path: Path) -> np.ndarray:
    """(1, H, W) float32 of a 2D file, its modality's rescaling or table applied; MONOCHROME1 is turned over.

    Padding is as dark as the darkest other pixel. UserError: no DICOM, damaged, colour, several frames, a spacing of 0,
    a compression that cannot be decoded, bits that contradict each other.
    """
    dicom_geometry(path)
    pixels, padding = pixels_of(path)
    return darkened(pixels[None, None], {} if padding is None else {0: padding})[0]


def dicom_geometry(path: Path) -> Geometry:
    """Size of `read_dicom(path)`, and mm: of PixelSpacing, else ImagerPixelSpacing, else NominalScannedPixelSpacing.

    ImagerPixelSpacing is at the detector; it is divided by EstimatedRadiographicMagnificationFactor where the header
    has it (PS3.3, C.8.7.1.1.2 and 10.7.1.3), and noted on stderr where it has not.
    """
    header = slice_header(path, ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"))
    return Geometry(header.size, header.spacing_mm)


def darkened(volume: np.ndarray, padding: Mapping[int, np.ndarray]) -> np.ndarray:
    """`volume` (1, D, H, W), padding of its slices, {index: (H, W) bool}, put to its smallest other value, in place."""
    lowest = np.inf
    for index in range(volume.shape[1]) if padding else ():
        real = volume[0, index][~padding[index]] if index in padding else volume[0, index]
        lowest = min(lowest, float(real.min(initial=np.inf)))
    for index, padded in padding.items() if np.isfinite(lowest) else ():
        volume[0, index][padded] = lowest
    return volume


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Raise what pydicom raises of a damaged file as the UserError of `damaged`; a file that ends early is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # offences against the standard that leave the values readable
            warnings.filterwarnings("error", message="End of file reached", category=UserWarning)
            yield
    except InvalidDicomError as error:
        raise damaged(path, "it is not DICOM, the mark DICM is missing at byte 128") from error
    except DICOM_DAMAGE as error:
        raise damaged(path, error) from error


def slice_header(path: Path, spacing_keys: tuple[str, ...] = ("PixelSpacing",)) -> Slice:
    """The header of a file with one grey picture. UserError: as `read_dicom`, but for damage in the pixels."""
    with damage_told(path):
        dataset = _dataset(path, pixels=False)
        _check_kind(path, dataset)
        return Slice(
            path,
            (int(dataset.Rows), int(dataset.Columns)),
            _spacing(path, dataset, spacing_keys),
            _numbers(path, dataset, "ImagePositionPatient", 3),
            _numbers(path, dataset, "ImageOrientationPatient", 6),
            str(dataset.get("SeriesInstanceUID") or "without a UID"),
            " ".join(str(dataset.get("SeriesDescription") or "no description").split()),
        )


def _dataset(path: Path, pixels: bool) -> pydicom.FileDataset:
    """The file's elements, with or without its pixels; UserError for a deflated one that would fill the memory."""
    meta = read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:  # pydicom unpacks it as a whole
        with path.open("rb") as file:
            file.seek(META_START + int(meta.FileMetaInformationGroupLength))
            unpacker, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
            block: bytes = file.read(1 << 16)
            while block and size <= MAX_INFLATED:
                size += len(unpacker.decompress(block, 1 << 24))
                block = unpacker.unconsumed_tail or file.read(1 << 16)
        if size > MAX_INFLATED:
            raise UserError(f"image {path} is deflated and unpacks to more than {MAX_INFLATED >> 20} MiB; save it as "
                            "uncompressed DICOM")
    return pydicom.dcmread(path, stop_before_pixels=not pixels)


def _spacing(path: Path, dataset: pydicom.Dataset, keys: tuple[str, ...]) -> tuple[float, float] | None:
    """mm between rows and between columns, of the first of `keys` that the header has."""
    for key in keys:
        spacing = _numbers(path, dataset, key, 2)
        if spacing is None:
            continue
        if not (spacing > 0).all():
            raise UserError(f"image {path} has a pixel spacing of {spacing.tolist()} mm; it must be above 0")
        if key == "ImagerPixelSpacing":
            factor = _numbers(path, dataset, "EstimatedRadiographicMagnificationFactor", 1)
            if factor is None or not factor[0] > 0:
                note_once("ImagerPixelSpacing", DETECTOR_NOTE.format(path=path))
            else:
                spacing = spacing / factor
        return float(spacing[0]), float(spacing[1])
    return None


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
        kind = " ".join(dataset.SOPClassUID.name.split()) if dataset.get("SOPClassUID") else "of no known kind"
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
    _check_bits(path, dataset)
    return decoder


def _bits(dataset: pydicom.Dataset) -> tuple[int, int, int]:
    """Bits of a word, of a pixel's value in it, and of the word below that value."""
    allocated = int(dataset.BitsAllocated)
    stored = int(dataset.get("BitsStored") or allocated)
    high = dataset.get("HighBit")
    return allocated, stored, int(stored - 1 if high is None else high) + 1 - stored


def _check_bits(path: Path, dataset: pydicom.Dataset) -> None:
    allocated, stored, below = _bits(dataset)
    if allocated not in (1, 8, 16, 32, 64) or not 1 <= stored <= allocated - below or below < 0:
        raise UserError(f"image {path}: {stored} bits stored from bit {below} on in words of {allocated} "
                        "(BitsStored, HighBit, BitsAllocated) cannot be read; save it again")
    if below and not _words_stay(dataset):
        raise UserError(f"image {path} is compressed, with stored bits that do not start at bit 0 (HighBit "
                        f"{dataset.HighBit}, BitsStored {stored}); convert it to uncompressed DICOM")


def _words_stay(dataset: pydicom.Dataset) -> bool:
    """Whether what is decoded are the words as they were, and not the values in them."""
    syntax = dataset.file_meta.TransferSyntaxUID
    return syntax == RLELossless or not syntax.is_encapsulated


def _packages(decoder: Decoder) -> str:
    """What to install for a decoder of pydicom, from its "pylibjpeg - requires A>=1 and B>=2"."""
    needs = [need.split(" requires ")[-1] for need in decoder.missing_dependencies if need.startswith("pylibjpeg")]
    return f"pip install {needs[0].replace(' and ', ' ')}" if needs else "convert it to uncompressed DICOM"


def pixels_of(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """(H, W) float32 of one file, larger is brighter, and (H, W) bool where it is padding, None where nowhere."""
    with damage_told(path), np.errstate(over="ignore"):  # beyond float32 is infinite, and reported as such
        dataset = _dataset(path, pixels=True)
        decoder = _check_kind(path, dataset)
        inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
        fractions = next((name for name in ("FloatPixelData", "DoubleFloatPixelData") if name in dataset), None)
        if fractions and inverted:
            raise UserError(f"image {path} holds white-is-zero fractions, whose black has no number; save it as "
                            "MONOCHROME2")
        stored, padding = _fractions(dataset, fractions) if fractions else _words(path, dataset, decoder)
        values = _modality_values(path, stored, dataset)
        if inverted:  # white is zero: the ends of the range change places
            bits = _bits(dataset)[1]
            lowest = -(2 ** (bits - 1)) if dataset.PixelRepresentation else 0
            values = _modality_values(path, np.array([lowest, lowest + 2**bits - 1]), dataset).sum() - values
        return values.astype(np.float32), padding if padding is not None and padding.any() else None


def _fractions(dataset: pydicom.Dataset, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels that are stored as fractions, and which are padding."""
    stored = dataset.pixel_array
    ends = [dataset.get(name.replace("Data", key)) for key in ("PaddingValue", "PaddingRangeLimit")]
    if ends[0] is None:
        return stored, None
    low, high = sorted((float(ends[0]), float(ends[0] if ends[1] is None else ends[1])))
    return stored, (stored >= low) & (stored <= high)


def _words(path: Path, dataset: pydicom.Dataset, decoder: Decoder) -> tuple[np.ndarray, np.ndarray | None]:
    """The stored integers, cut out of their words and with their sign, and which are padding."""
    allocated, bits, below = _bits(dataset)
    signed = bool(dataset.get("PixelRepresentation", 0))
    _check_compressed(path, dataset)
    own = _words_stay(dataset)
    if own and allocated > 1:  # the words themselves: bits beside the stored ones may be overlays, or padding's
        dataset.BitsStored, dataset.HighBit = allocated, allocated - 1
    try:
        words = dataset.pixel_array
    except RuntimeError as error:  # every decoder that is here failed; another may know this variant
        raise damaged(path, f"{' '.join(str(error).split())} If the file is whole, {_packages(decoder)}") from error
    dataset.BitsStored, dataset.HighBit = bits, bits - 1 + below
    words = words.astype(words.dtype.newbyteorder("="), copy=False)
    stored = _in_words(words, bits, below, signed) if own and bits < allocated else words
    first, last = (_padding_value(dataset, key, allocated, signed) for key in
                   ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if first is None:
        return stored, None
    low, high = sorted((first, first if last is None else last))
    padding = (stored >= low) & (stored <= high)
    return stored, padding if below else padding | ((words >= low) & (words <= high))


def _in_words(words: np.ndarray, bits: int, below: int, signed: bool) -> np.ndarray:
    """The `bits` of each word that stand above its lowest `below` ones, as signed numbers or not."""
    unsigned = words.view(np.dtype(f"u{words.dtype.itemsize}"))
    kind = unsigned.dtype.type
    values = (unsigned >> kind(below)) & kind(2**bits - 1)
    if not signed:
        return values
    sign = kind(2 ** (bits - 1))
    return ((values ^ sign).astype(np.int64) - int(sign)).astype(words.dtype)


def _padding_value(dataset: pydicom.Dataset, key: str, allocated: int, signed: bool) -> int | None:
    """The number of a padding element as pixels have it: its own sign is often another one's."""
    value: Any = dataset.get(key)
    if isinstance(value, bytes):  # of an element whose kind is not known
        value = int.from_bytes(value[:2], "little") if value else None
    if value is None or value == "":
        return None
    number = int(value) % 2**allocated
    return number - 2**allocated if signed and number >= 2 ** (allocated - 1) else number


def _check_compressed(path: Path, dataset: pydicom.Dataset) -> None:
    """UserError for compressed pixels that would unpack to others than Rows x Columns, before they are unpacked."""
    syntax, size = dataset.file_meta.TransferSyntaxUID, (int(dataset.Columns), int(dataset.Rows))
    if not syntax.is_encapsulated:
        return
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    if syntax == RLELossless:
        _check_runs(path, frame, size[0] * size[1])
        return
    try:
        with Image.open(io.BytesIO(frame), formats=("JPEG", "JPEG2000")) as image:
            if image.size != size:
                raise damaged(path, f"its compressed picture has {image.size} pixels, its header says {size}")
    except UnidentifiedImageError:  # the decoder knows better
        return


def _check_runs(path: Path, frame: bytes, pixels: int) -> None:
    """UserError unless each segment of a run-length encoded frame (PS3.5, annex G) gives a byte a pixel, no more."""
    count = struct.unpack_from("<L", frame)[0]
    if not 1 <= count <= 15:
        raise damaged(path, f"its run-length header names {count} segments")
    ends = [*struct.unpack_from(f"<{count}L", frame, 4), len(frame)]
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        size, at = 0, start
        while at < end - 1:
            code = frame[at]
            run = code + 1 if code < 128 else 257 - code if code > 128 else 0
            size, at = size + run, at + (run + 1 if code < 128 else 1 + (code > 128))
            if size > pixels + 1:
                raise damaged(path, f"its runs unpack to more than its {pixels} pixels")


def _modality_values(path: Path, stored: np.ndarray, dataset: pydicom.Dataset) -> np.ndarray:
    """Stored integers -> float64 values of the modality (Hounsfield units, ..): its table, or slope and intercept."""
    if dataset.get("ModalityLUTSequence"):
        return apply_modality_lut(stored, dataset).astype(np.float64)
    slope, intercept = (_numbers(path, dataset, key, 1) for key in ("RescaleSlope", "RescaleIntercept"))
    return stored * (1.0 if slope is None else slope) + (0.0 if intercept is None else intercept)
