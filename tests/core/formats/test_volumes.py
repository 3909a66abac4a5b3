"""NIfTI and NumPy files: against nibabel, hand-made arrays and hand-computed places, and one bad file per damage."""

import gzip
import io
import mmap
import pickle
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from core import errors
from core.errors import UserError
from core.formats import volumes
from core.formats.geometry import index_to_world
from core.formats.images import read_geometry, read_image
from tests.conftest import DATA

real_data = pytest.mark.skipif(not (DATA / "mouse_ct").is_dir(), reason="real data not found; set LANDMARK_DATA")
XYZ = np.random.default_rng(0).integers(-300, 300, (4, 5, 6)).astype(np.int16)  # as nibabel holds it
ZYX = XYZ.transpose(2, 1, 0)
# x steps 0.5 mm along (0.6, 0.8, 0), y 2 mm along (-0.8, 0.6, 0), z 3 mm downwards
OBLIQUE = np.array([[0.3, -1.6, 0, 10], [0.4, 1.2, 0, -20], [0, 0, -3, 30], [0, 0, 0, 1.0]])


def save(path, values=XYZ, affine=OBLIQUE, kind=nib.Nifti1Image):
    nib.save(kind(values, affine), path)
    return path


def refuses(path, message, readers=(read_image, read_geometry)):
    for read in readers:
        with pytest.raises(UserError, match=message) as caught:
            read(path)
        assert "\n" not in str(caught.value) and path.name in str(caught.value)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_oblique_nifti(tmp_path, name, kind):
    path = save(tmp_path / name, kind=kind)
    volume, geometry = read_image(path), read_geometry(path)
    assert volume.dtype == np.float32 and volume.flags.c_contiguous and volume.flags.writeable
    assert np.array_equal(volume, ZYX[None])
    assert geometry.size == (6, 5, 4) and geometry.spacing_mm == pytest.approx((3, 2, 0.5))
    # voxel x, y, z = 2, 1, 4 by hand: 10 + 0.6 - 1.6, -20 + 0.8 + 1.2, 30 - 12
    assert index_to_world(np.array([[4.0, 1, 2]]), geometry.affine) == pytest.approx(np.array([[9.0, -18, 18]]))


PLACES = {  # sforms beside a qform of OBLIQUE's kind
    "same": np.eye(4), "mirrored": np.diag([-1.0, 1, 1, 1]),
    "shifted": np.eye(4) + 10 * np.eye(4)[:, [3]] * np.eye(4)[3],
    "hardly shifted": np.eye(4) + 1e-3 * np.eye(4)[:, [0]] * np.eye(4)[3],
    "skewed": np.eye(4) + 0.2 * np.eye(4)[:, [0]] * np.eye(4)[1],
    "hardly skewed": np.eye(4) + 0.005 * np.eye(4)[:, [0]] * np.eye(4)[1],
}  # fmt: skip


def itk_affine(path):
    """(4, 4) RAS of what SimpleITK, an independent reader, says."""
    image = SimpleITK.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1.0, -1, 1, 1]) @ affine


@pytest.mark.parametrize("sform_code", range(5))
@pytest.mark.parametrize("qform_code", range(5))
@pytest.mark.parametrize("place", PLACES)
def test_a_volume_lies_where_itk_and_so_3d_slicer_puts_it(tmp_path, place, sform_code, qform_code):
    qform = np.diag([0.5, 2.0, 3.0, 1.0])
    qform[:3, 3] = 1, 2, 3
    image = nib.Nifti1Image(XYZ, qform)
    image.set_qform(qform, qform_code)
    image.set_sform(PLACES[place] @ qform, sform_code)
    image.header["qform_code"], image.header["sform_code"] = qform_code, sform_code
    image.header["pixdim"][1:4] = 0.5, 2, 3
    nib.save(image, tmp_path / "a.nii")
    if "skewed" in place and sform_code and not qform_code:  # ITK refuses it too
        refuses(tmp_path / "a.nii", "axes are not at right angles|its sform steps by")
        return
    geometry = read_geometry(tmp_path / "a.nii")
    assert geometry.affine == pytest.approx(itk_affine(tmp_path / "a.nii"), abs=2e-3)
    stored = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "a.nii")))
    assert np.array_equal(read_image(tmp_path / "a.nii")[0], stored)


def test_two_places_are_noted_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(errors, "_NOTED", set())
    for name in ("a.nii", "b.nii"):
        image = nib.Nifti1Image(XYZ, OBLIQUE)
        image.set_qform(OBLIQUE, 1)
        image.set_sform(np.diag([-1.0, 1, 1, 1]) @ OBLIQUE, 2)
        nib.save(image, tmp_path / name)
        assert read_geometry(tmp_path / name).affine == pytest.approx(image.header.get_qform())
    noted = capsys.readouterr().err
    assert noted.count("\n") == 1 and "a.nii and perhaps others have two places" in noted and "by its qform" in noted


def test_steps_that_contradict_the_voxels_are_refused(tmp_path):
    image = nib.Nifti1Image(XYZ, OBLIQUE)
    image.set_qform(OBLIQUE, 0)
    image.set_sform(OBLIQUE, 1)
    image.header["pixdim"][1:4] = 1, 1, 1
    nib.save(image, tmp_path / "a.nii")
    refuses(tmp_path / "a.nii", r"its sform steps by \[0.5, 2.0, 3.0\], its voxels \(pixdim\) are \[1.0, 1.0, 1.0\]")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.npz", "a.npy"])
def test_nothing_is_read_far_past_what_the_header_says(tmp_path, name):
    """A hundred million zeros behind the voxels, as a small file can hold them."""
    more = bytes(100_000_000)
    if name.startswith("a.nii"):
        save(tmp_path / "b.nii")
        content = (tmp_path / "b.nii").read_bytes() + more
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    else:
        plain = io.BytesIO()
        np.save(plain, ZYX)
        (tmp_path / name).write_bytes(plain.getvalue() + more)
        if name == "a.npz":
            with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("image.npy", plain.getvalue() + more)
    del more
    content = None
    tracemalloc.start()
    refuses(tmp_path / name, "goes on behind the|more than", [read_image])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize("unit, scale", [("meter", 1000), ("mm", 1), ("micron", 0.001), (0, 1)])
def test_units_become_mm(tmp_path, unit, scale):
    image = nib.Nifti1Image(XYZ, OBLIQUE)
    image.header.set_xyzt_units(unit, "sec")
    nib.save(image, tmp_path / "a.nii")
    geometry = read_geometry(tmp_path / "a.nii")
    assert geometry.spacing_mm == pytest.approx((3 * scale, 2 * scale, 0.5 * scale))
    assert geometry.affine[:3, 3] == pytest.approx(np.array([10, -20, 30]) * scale)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_slope_and_intercept(tmp_path, name):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(XYZ.shape)
    header.set_zooms((0.5, 2, 3))
    header.set_sform(OBLIQUE, 1)
    header.set_slope_inter(0.5, -1000)
    header["vox_offset"] = 352
    content = header.binaryblock + bytes(4) + XYZ.tobytes(order="F")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert np.array_equal(read_image(tmp_path / name)[0], ZYX * 0.5 - 1000)


@pytest.mark.parametrize("dtype", ["u1", ">i2", "f4", ">f8", "i8"])
def test_stored_types(tmp_path, dtype):
    header = nib.Nifti1Header(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(np.dtype(dtype))
    values = np.abs(XYZ) // 2
    nib.save(nib.Nifti1Image(values.astype(dtype), OBLIQUE, header), tmp_path / "a.nii.gz")
    assert np.array_equal(read_image(tmp_path / "a.nii.gz")[0], np.abs(ZYX) // 2)


def test_voxels_do_not_hang_on_the_file(tmp_path):
    volume = read_image(save(tmp_path / "a.nii", XYZ.astype(np.float32)))
    while volume is not None:
        assert not isinstance(volume, (np.memmap, mmap.mmap))
        volume = getattr(volume, "base", None)


def test_one_volume_of_four_axes_is_a_volume(tmp_path):
    path = save(tmp_path / "a.nii", XYZ[..., None])
    assert np.array_equal(read_image(path), ZYX[None]) and read_geometry(path).size == (6, 5, 4)


@pytest.mark.parametrize(
    "values, message",
    [
        (np.stack([XYZ, XYZ], axis=-1), "holds 4x5x6x2 voxels, not one volume of three axes"),
        (XYZ[..., 0], "holds 4x5 voxels, not one volume"),
        (np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]), "holds colours"),
        (XYZ.astype(np.complex64), "holds complex64, not grey values"),
    ],
)
def test_refused_nifti(tmp_path, values, message):
    refuses(save(tmp_path / "a.nii.gz", values), message)


def test_skewed_or_flat_axes(tmp_path):
    skewed = OBLIQUE.copy()
    skewed[0, 2] = 0.3  # z leans by about 6 degrees
    refuses(save(tmp_path / "a.nii", affine=skewed), "a.nii cannot be used: its axes are not at right angles")
    image = nib.Nifti1Image(XYZ, OBLIQUE)
    image.header["srow_x"] = image.header["srow_y"] = image.header["srow_z"] = 0
    image.to_file_map({"image": nib.FileHolder(tmp_path / "b.nii")})
    raw = bytearray((tmp_path / "b.nii").read_bytes())
    raw[280:328] = bytes(48)  # srow_x, srow_y, srow_z
    (tmp_path / "b.nii").write_bytes(raw)
    refuses(tmp_path / "b.nii", "affine is not finite or has an axis of length 0")


@pytest.mark.filterwarnings("error")
def test_non_finite_voxels(tmp_path):
    values = np.ones((4, 5, 6))
    values[3, 2, 1] = np.nan
    path = save(tmp_path / "a.nii", values)
    refuses(path, r"1 non-finite pixels, first at \(z, y, x\)=\(1, 2, 3\)", [read_image])
    values[3, 2, 1] = 1e300  # beyond float32
    refuses(save(tmp_path / "b.nii.gz", values), "1 non-finite pixels", [read_image])


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kept", [0.02, 0.4, 0.7, 0.99])
def test_cut_nifti(tmp_path, name, kept):
    path = save(tmp_path / name, np.random.default_rng(1).integers(0, 999, (20, 20, 20)).astype(np.int16))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    refuses(path, "cannot be read, it may be cut off or damaged", [read_image])


def test_damaged_voxels_are_told_and_do_not_trouble_the_header(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.random.default_rng(1).integers(0, 999, (40, 40, 40)).astype(np.int16))
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # the checksum
    path.write_bytes(content)
    refuses(path, "a.nii.gz cannot be read.*CRC", [read_image])
    path.write_bytes(content[: len(content) // 2])
    assert read_geometry(path).size == (40, 40, 40)
    plain = save(tmp_path / "a.nii")
    plain.write_bytes(plain.read_bytes()[:352])
    assert read_geometry(plain).size == (6, 5, 4)
    refuses(plain, "cannot be read", [read_image])


def test_files_that_are_no_nifti(tmp_path):
    contents = {"empty.nii": b"", "text.nii": b"hello" * 200, "plain.nii.gz": save(tmp_path / "p.nii").read_bytes(),
                "packed.nii": gzip.compress(save(tmp_path / "p.nii").read_bytes()), "void.nii.gz": gzip.compress(b""),
                "short.nii.gz": gzip.compress(b"n+1"), "text.nii.gz": b"hello"}  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        refuses(tmp_path / name, "is empty" if not content else "cannot be read, it may be cut off or damaged")


@real_data
def test_real_volume_equals_nibabel():
    path = DATA / "mouse_ct/images/129S1_SVLMJ.nii.gz"
    image = nib.load(path)
    geometry = read_geometry(path)
    assert np.array_equal(read_image(path)[0], image.get_fdata().T)
    assert geometry.axes == "LPS" and geometry.affine == pytest.approx(image.affine)
    assert geometry.spacing_mm == pytest.approx((0.1406611, 0.1411134, 0.1411134))


@pytest.mark.parametrize("values", [ZYX, ZYX[0], np.asfortranarray(ZYX), ZYX.astype(">f4"), ZYX > 0, ZYX.astype("f2")])
def test_npy(tmp_path, values):
    np.save(tmp_path / "a.npy", values)
    pixels, geometry = read_image(tmp_path / "a.npy"), read_geometry(tmp_path / "a.npy")
    assert pixels.dtype == np.float32 and pixels.flags.writeable and np.array_equal(pixels[0], values)
    assert (geometry.size, geometry.spacing_mm, geometry.affine) == (values.shape, None, None)


@pytest.mark.parametrize(
    "values, message",
    [
        (np.zeros((2, 3, 4, 5)), r"shape \(2, 3, 4, 5\); it must be a volume \(z, y, x\) or an image \(y, x\)"),
        (np.zeros(7), r"has the shape \(7,\)"),
        (np.float64(3), r"has the shape \(\)"),
        (np.zeros((0, 3)), r"has the shape \(0, 3\)"),
        (np.zeros((3, 3), dtype=complex), "holds complex128, not real numbers"),
        (np.array([["a", "b"]]), "holds <U1, not real numbers"),
        (np.array([[None, 1]], dtype=object), "holds object, not real numbers"),
        (np.zeros((2, 2), dtype=[("a", "f4")]), "not real numbers"),
    ],
)
def test_refused_arrays(tmp_path, values, message):
    np.save(tmp_path / "a.npy", values)
    refuses(tmp_path / "a.npy", message)
    np.savez(tmp_path / "a.npz", image=values)
    refuses(tmp_path / "a.npz", message)


def test_damaged_npy(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, ZYX)
    content = path.read_bytes()
    for changed in (content[:-1], content + b"x", content[:130]):
        path.write_bytes(changed)
        refuses(path, "cannot be read.*of 240 bytes of pixels", [read_image])
        assert read_geometry(path).size == (6, 5, 4)
    for changed in (content[:60], b"hello" * 100, pickle.dumps(ZYX), content.replace(b"(6, 5", b"(((6,"), b"\x93NUMPY"):
        path.write_bytes(changed)
        refuses(path, "a.npy cannot be read, it may be cut off or damaged")


@pytest.mark.parametrize("save_npz", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save_npz):
    path = tmp_path / "a.npz"
    save_npz(path, image=ZYX, spacing=(0.5, 2, 3), affine=OBLIQUE)
    assert np.array_equal(read_image(path), ZYX[None].astype(np.float32)) and read_image(path).dtype == np.float32
    geometry = read_geometry(path)
    assert geometry.size == (6, 5, 4) and geometry.spacing_mm == pytest.approx((3, 2, 0.5))
    assert index_to_world(np.array([[4.0, 1, 2]]), geometry.affine) == pytest.approx(np.array([[9.0, -18, 18]]))
    save_npz(path, image=ZYX, spacing=np.array([1, 2, 3]))
    geometry = read_geometry(path)
    assert (geometry.size, geometry.spacing_mm, geometry.affine) == ((6, 5, 4), (3, 2, 1), None)
    save_npz(path, image=ZYX[0], spacing=(0.5, 2))
    assert read_image(path).shape == (1, 5, 4) and read_geometry(path).spacing_mm == (2, 0.5)
    save_npz(path, image=ZYX)
    assert read_geometry(path).spacing_mm is None


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"volume": ZYX}, "has no array `image`, only volume"),
        ({"image": ZYX, "spacings": (1, 1, 1)}, r'unknown array `spacings` \(did you mean "spacing"\?\)'),
        ({"image": ZYX, "spacing": (1, 2)}, r"spacing must be 3 numbers above 0, mm along \(x, y, z\), not"),
        ({"image": ZYX, "spacing": (1, 2, 0)}, "spacing must be 3 numbers"),
        ({"image": ZYX, "spacing": 1.0}, "spacing must be 3 numbers"),
        ({"image": ZYX[0], "spacing": (1, np.nan)}, r"spacing must be 2 numbers above 0, mm along \(x, y\), not"),
        ({"image": ZYX, "spacing": ("a", "b", "c")}, "spacing must be a few real numbers"),
        ({"image": ZYX, "affine": np.eye(3)}, r"affine must be \(4, 4\)"),
        ({"image": ZYX, "affine": OBLIQUE.T}, r"affine must be \(4, 4\) with the last row 0, 0, 0, 1"),
        ({"image": ZYX[0], "affine": OBLIQUE}, "belongs to a volume.*image of 2 axes"),
        ({"image": ZYX, "affine": OBLIQUE + np.eye(4, k=2)}, "axes are not at right angles"),
        ({"image": ZYX, "affine": OBLIQUE, "spacing": (3, 2, 0.5)},
         r"spacing \[3.0, 2.0, 0.5\] contradicts the affine, whose axes x, y, z step by \[0.5, 2.0, 3.0\] mm"),
    ],
)  # fmt: skip
def test_refused_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    refuses(tmp_path / "a.npz", message)


def test_damaged_npz(tmp_path):
    path = tmp_path / "a.npz"
    values = np.random.default_rng(2).integers(0, 999, (20, 21, 22))  # longer than what zipfile reads ahead
    np.savez(path, image=values, spacing=(1.0, 1, 1))
    content = bytearray(path.read_bytes())
    at = bytes(content).index(values.tobytes())
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    refuses(path, "cannot be read.*CRC", [read_image])
    assert read_geometry(path).size == (20, 21, 22)
    for changed in (content[:-5], content[: at + 9], b"hello" * 100):
        path.write_bytes(changed)
        refuses(path, "a.npz cannot be read, it may be cut off or damaged")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image.npy", b"no array")
    refuses(path, "a.npz cannot be read, it may be cut off or damaged")


def test_headers_of_arrays_are_parsed_one_at_a_time(tmp_path, monkeypatch):
    """Threads decode a large set's images; CPython 3.11 raises SystemError where two of them parse together."""
    paths = [tmp_path / f"{number}.npy" for number in range(12)]
    for path in paths:
        np.save(path, np.full((4, 5), 7, np.int16))
    read, inside, most = volumes.HEADER_READERS[1, 0], [], []

    def parse(file):
        inside.append(file)
        most.append(len(inside))
        time.sleep(0.005)
        header = read(file)
        inside.remove(file)
        return header

    monkeypatch.setitem(volumes.HEADER_READERS, (1, 0), parse)
    with ThreadPoolExecutor(6) as pool:
        pixels = list(pool.map(read_image, paths))
    assert max(most) == 1 and len(most) == 12 and all((each == 7).all() for each in pixels)
