"""NRRD: against SimpleITK, an independent writer and reader, and one bad file per kind."""

import gzip

import numpy as np
import pytest
import SimpleITK

from core.errors import UserError
from core.formats.geometry import index_to_world
from core.formats.images import read_geometry, read_image

ZYX = np.random.default_rng(0).integers(-300, 300, (6, 5, 4)).astype(np.int16)
TURN = [0.6, -0.8, 0, 0.8, 0.6, 0, 0, 0, -1]


def written(path, values=ZYX, compressed=False):
    image = SimpleITK.GetImageFromArray(values)
    image.SetSpacing((0.5, 2.0, 3.0)[: values.ndim])
    if values.ndim == 3:
        image.SetOrigin((10, -20, 30))
        image.SetDirection(TURN)
    SimpleITK.WriteImage(image, str(path), useCompression=compressed)
    return image


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["u1", "i2", "u2", "i4", "f4", "f8"])
def test_voxels_and_places_are_itks(tmp_path, compressed, kind):
    values = (ZYX % 200).astype(kind)
    image = written(tmp_path / "a.nrrd", values, compressed)
    assert np.array_equal(read_image(tmp_path / "a.nrrd")[0], values)
    geometry = read_geometry(tmp_path / "a.nrrd")
    assert geometry.size == (6, 5, 4) and geometry.spacing_mm == pytest.approx((3, 2, 0.5))
    lps = np.array(image.TransformIndexToPhysicalPoint((3, 1, 5)))
    assert index_to_world(np.array([5.0, 1, 3]), geometry.affine) == pytest.approx(lps * (-1, -1, 1))


def test_a_flat_picture(tmp_path):
    written(tmp_path / "a.nrrd", ZYX[0])
    assert np.array_equal(read_image(tmp_path / "a.nrrd")[0], ZYX[0])
    assert read_geometry(tmp_path / "a.nrrd").affine is None


def bare(*lines, data=bytes(240)):
    return "\n".join(("NRRD0004", *lines, "", "")).encode() + data


GREY = ("type: short", "dimension: 3", "sizes: 4 5 6", "endian: little", "encoding: raw")


@pytest.mark.parametrize("content, message", [
    (bare(*GREY)[:-1], "it holds 239 of 240 bytes"),
    (bare(*GREY, data=bytes(300)), "more than its 240 bytes"),
    (bare(*GREY[:-1], "encoding: gzip", data=gzip.compress(bytes(10**7))), "more than its 240 bytes"),
    (bare(*GREY[:-1], "encoding: gzip", data=b"hello"), "cannot be read"),
    (bare(*GREY, "data file: other.raw"), "has its pixels in another file"),
    (bare(*GREY[:-1], "encoding: text"), "is encoded as text"),
    (bare("type: short", "dimension: 4", "sizes: 3 4 5 6", *GREY[3:]), "has axes of 3 x 4 x 5 x 6"),
    (bare("type: block", "block size: 4", *GREY[1:]), "holds block"),
    (bare(*GREY, "space: scanner-xyz", "space directions: (1,0,0) (0,1,0) (0,0,1)"), 'its space "scanner-xyz"'),
    (bare(*GREY, "space: lps", "space directions: (1,0,0) (0.5,1,0) (0,0,1)"), "axes are not at right angles"),
    (b"hello, this is no picture", "cannot be read"),
    (b"NRRD0004\ntype: short\n", "cannot be read"),
])  # fmt: skip
def test_refused(tmp_path, content, message):
    (tmp_path / "a.nrrd").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_image(tmp_path / "a.nrrd")
    assert "\n" not in str(caught.value) and "a.nrrd" in str(caught.value)
