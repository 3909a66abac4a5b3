"""DICOM that would fill the memory, and spacings at the detector."""

import io
import re
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from core import errors
from core.errors import UserError
from core.formats import dicom
from core.formats.images import read_geometry, read_image
from tests.core.formats.test_dicom import STORED, picture, write


def packed(path, frame, syntax):
    dataset = picture(STORED[0], PixelData=encapsulate([frame]))
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax
    return write(path, dataset)


def refused(path, message):
    tracemalloc.start()
    with pytest.raises(UserError, match=message) as caught:
        read_image(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000_000 and path.name in str(caught.value) and "\n" not in str(caught.value)


def test_bombs_are_refused(tmp_path, monkeypatch):
    runs = b"\x81\x00" * 1_000_000  # 128 bytes each
    refused(packed(tmp_path / "rle.dcm", struct.pack("<16L", 2, 64, 64, *[0] * 13) + runs, RLELossless),
            "its runs unpack to more than its 24 pixels")
    large = io.BytesIO()
    Image.new("L", (3000, 3000)).save(large, format="JPEG2000", no_jp2=True)
    refused(packed(tmp_path / "j2k.dcm", large.getvalue(), JPEG2000Lossless), r"has \(3000, 3000\) pixels, its header")
    dataset = picture(STORED[0])
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = write(tmp_path / "deflated.dcm", dataset)
    assert np.array_equal(read_image(path)[0], STORED[0])
    content = path.read_bytes()
    monkeypatch.setattr(dicom, "MAX_INFLATED", 1 << 22)
    packer = zlib.compressobj(wbits=-15)
    start = 144 + struct.unpack_from("<L", content, 140)[0]
    path.write_bytes(content[:start] + packer.compress(bytes(1 << 23)) + packer.flush())
    refused(path, "is deflated and unpacks to more than 4 MiB")
    path.write_bytes(content[:start] + b"hello, no deflate")
    refused(path, "cannot be read")


@pytest.mark.parametrize("elements, spacing, noted", [
    ({"ImagerPixelSpacing": [0.3, 0.3], "EstimatedRadiographicMagnificationFactor": 1.5}, 0.2, False),
    ({"ImagerPixelSpacing": [0.3, 0.3]}, 0.3, True),
    ({"NominalScannedPixelSpacing": [0.1, 0.1]}, 0.1, False),
    ({"ImagerPixelSpacing": [0.3, 0.3], "PixelSpacing": [0.25, 0.25]}, 0.25, False),
])  # fmt: skip
def test_spacing_at_the_detector(tmp_path, capsys, monkeypatch, elements, spacing, noted):
    monkeypatch.setattr(errors, "_NOTED", set())
    path = write(tmp_path / "a.dcm", picture(STORED[0], **elements))
    assert read_geometry(path).spacing_mm == pytest.approx((spacing, spacing))
    assert bool(re.search("at the detector", capsys.readouterr().err)) is noted
