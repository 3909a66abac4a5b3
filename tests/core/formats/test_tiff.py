"""TIFF beside the matrix of benchmarks/reader_matrix.py: what libtiff (Pillow) writes, and damage in every part."""

import struct

import numpy as np
import pytest
import tifffile
from PIL import Image

from core.errors import UserError
from core.formats.images import read_geometry, read_image

GREY = np.random.default_rng(0).integers(0, 256, (37, 29), dtype=np.uint8)


@pytest.mark.parametrize("compression", ["raw", "group3", "group4", "tiff_ccitt", "packbits", "tiff_lzw"])
@pytest.mark.parametrize("meaning", [0, 1])
def test_bilevel_of_libtiff(tmp_path, compression, meaning):
    Image.fromarray(GREY > 128).save(tmp_path / "a.tif", compression=compression, tiffinfo={262: meaning})
    expected = np.asarray(Image.open(tmp_path / "a.tif").convert("L"))
    assert np.array_equal(read_image(tmp_path / "a.tif")[0], expected)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_of_libtiff(tmp_path, mode):
    smooth = Image.fromarray(np.add.outer(np.arange(64), np.arange(48)).astype(np.uint8)).convert(mode)
    smooth.save(tmp_path / "a.tif", compression="jpeg")
    assert np.abs(read_image(tmp_path / "a.tif")[0] - np.asarray(smooth.convert("L"), dtype=float)).max() <= 4


def test_cmyk_is_what_pillow_shows(tmp_path):
    inks = Image.merge("CMYK", [Image.fromarray(np.roll(GREY, shift, axis=0)) for shift in range(4)])
    inks.save(tmp_path / "a.tif")
    shown = np.asarray(inks.convert("RGB")) @ (0.299, 0.587, 0.114)
    assert np.abs(read_image(tmp_path / "a.tif")[0] - shown).max() <= 1


def test_every_byte_of_the_directory_may_be_damaged(tmp_path):
    """Right, or one line; never other pixels because a tag was lost."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, GREY, compression="zlib", rowsperstrip=10, metadata=None)
    content = bytearray(path.read_bytes())
    directory = struct.unpack_from("<L", content, 4)[0]
    refused = 0
    for at in range(directory, directory + 2 + 12 * struct.unpack_from("<H", content, directory)[0], 3):
        path.write_bytes(bytes(content[:at]) + bytes([content[at] ^ 0x55]) + bytes(content[at + 1 :]))
        try:
            read_image(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 10


@pytest.mark.parametrize("tag, value, message", [
    (273, [0] * 4, "strip or tile 0 is missing"),
    (279, [0] * 4, "strip or tile 0 is missing"),
    (273, [10**6] * 4, "strip or tile 0 is cut off"),
])  # fmt: skip
def test_strips_that_are_not_there(tmp_path, tag, value, message):
    """Readers fill them with zeros, as if that were the picture."""
    tifffile.imwrite(tmp_path / "a.tif", GREY, compression="zlib", rowsperstrip=10, metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        file.pages.first.tags[tag].overwrite(value)
    with pytest.raises(UserError, match=message):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("tag, value", [(256, 60000), (257, 60000), (322, 1 << 20)])
def test_sizes_that_the_file_does_not_hold(tmp_path, tag, value):
    """No memory is taken for them first."""
    tifffile.imwrite(tmp_path / "a.tif", np.pad(GREY, 16), compression="zlib", tile=(16, 16), metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        file.pages.first.tags[tag].overwrite(value)
    with pytest.raises(UserError, match="strip|tile"):
        read_image(tmp_path / "a.tif")


def test_predictor_without_compression_is_refused(tmp_path):
    """libtiff passes it over, tifffile does not."""
    tifffile.imwrite(tmp_path / "a.tif", GREY, metadata=None, compression="lzw", predictor=True)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as file:
        file.pages.first.tags[259].overwrite(1)
    for read in (read_image, read_geometry):
        with pytest.raises(UserError, match="differences"):
            read(tmp_path / "a.tif")
