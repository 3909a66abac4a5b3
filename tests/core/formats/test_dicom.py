"""DICOM: an oblique series against hand-computed places and nibabel's formula, values by hand, every bad series."""

import tracemalloc

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import set_pixel_data
from pydicom.sequence import Sequence
from pydicom.uid import (
    MPEG2MPML,
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEGLosslessSV1,
    RLELossless,
    RTStructureSetStorage,
    generate_uid,
)

from core.config.dataset import Dataset as DatasetConfig
from core.data.cache import load_one
from core.data.records import Record
from core.errors import UserError
from core.files import stamp
from core.formats.geometry import index_to_world
from core.formats.images import find_images, image_suffix, read_geometry, read_image

STORED = np.random.default_rng(0).integers(0, 4096, (5, 4, 6)).astype(np.uint16)  # (z, y, x)
ACROSS, DOWN, NORMAL = np.array([(0.6, 0.8, 0), (0, 0, -1), (-0.8, 0.6, 0)])  # NORMAL = ACROSS x DOWN, by hand
ORIGIN = np.array([10.0, 20, 30])
SERIES = "1.2.826.0.1.3680043.8.498.1"  # the same in every process: it is part of a test's name
NAMES = ("c.dcm", "e.dcm", "a.dcm", "d.dcm", "b.dcm")  # in the order of their positions


def picture(stored, **elements):
    """A grey 12-bit picture with these elements beside or instead of the usual ones; None leaves one out."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.SeriesInstanceUID = CTImageStorage, generate_uid(), SERIES
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes()
    for key, value in elements.items():
        if value is None:
            dataset.pop(key, None)
        else:
            setattr(dataset, key, value)
    dataset["PixelData"].VR = "OW"
    return dataset


def write(path, dataset):
    path.parent.mkdir(exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def slice_at(z, **elements):
    place = {"ImagePositionPatient": (ORIGIN + 2 * z * NORMAL).tolist(), "PixelSpacing": [0.5, 0.25],
             "ImageOrientationPatient": [*ACROSS, *DOWN], "InstanceNumber": 9 - int(z)}  # fmt: skip
    return picture(STORED[int(z)], **{**place, **elements})


@pytest.fixture
def series(tmp_path):
    for z, name in enumerate(NAMES):
        write(tmp_path / "series" / name, slice_at(z, RescaleSlope=2, RescaleIntercept=-1000 - z))
    return tmp_path / "series"


def refuses(path, message, readers=(read_image, read_geometry)):
    for read in readers:
        with pytest.raises(UserError, match=message) as caught:
            read(path)
        assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_series_is_sorted_by_position_and_rescaled_slice_by_slice(series):
    volume = read_image(series)
    assert volume.dtype == np.float32 and volume.shape == (1, 5, 4, 6)
    assert np.array_equal(volume[0], STORED * 2.0 - 1000 - np.arange(5)[:, None, None])


@pytest.mark.filterwarnings("ignore:The DICOM readers are highly experimental")
def test_oblique_series_lies_where_the_standard_says(series):
    from nibabel.nicom.dicomwrappers import wrapper_from_file

    geometry = read_geometry(series)
    assert geometry.size == (5, 4, 6) and geometry.spacing_mm == pytest.approx((2, 0.5, 0.25))
    # slice 2, row 3, column 4 in LPS: (10, 20, 30) + 4 * 0.25 (0.6, 0.8, 0) + 3 * 0.5 (0, 0, -1) + 2 * 2 (-0.8, 0.6, 0)
    assert index_to_world(np.array([2.0, 3, 4]), geometry.affine) == pytest.approx([-7.4, -23.2, 28.5])  # RAS
    for z, name in enumerate(NAMES):  # nibabel's matrix takes (row, column, 0, 1) of one file to LPS
        for row, column in ((0, 0), (3, 1), (1, 5)):
            lps = wrapper_from_file(series / name).affine @ (row, column, 0, 1)
            ras = index_to_world(np.array([z, row, column]), geometry.affine)
            assert ras == pytest.approx(lps[:3] * (-1, -1, 1))


def test_axial_series_is_lps(tmp_path):
    for z in range(3):
        place = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [-50, -60, 7 - 1.5 * z]}
        write(tmp_path / "s" / f"{z}.DCM", slice_at(z, **place))
    geometry = read_geometry(tmp_path / "s")
    assert geometry.axes == "LPS" and geometry.spacing_mm == (1.5, 0.5, 0.25)
    assert geometry.affine[:3, 3].tolist() == [50, 60, 4]
    assert np.array_equal(read_image(tmp_path / "s")[0], STORED[[2, 1, 0]])


def test_any_file_name_and_what_lies_beside(series):
    for name, other in zip(NAMES, ("IM0001", "1.2.840.5", "B.DCM", "x.dcm", "7"), strict=True):
        (series / name).rename(series / other)
    (series / "DICOMDIR").write_bytes((series / "7").read_bytes())
    (series / ".x.dcm").write_bytes((series / "7").read_bytes())
    (series / "notes").write_text("no picture")
    (series / "preview.png").touch()
    assert read_image(series).shape == (1, 5, 4, 6) and read_geometry(series).size == (5, 4, 6)


def test_white_is_zero_is_inverted_before_rescaling(tmp_path):
    stored = np.array([[0, 1, 4095]], dtype=np.uint16)
    rescaled = {"PhotometricInterpretation": "MONOCHROME1", "RescaleSlope": 2, "RescaleIntercept": -1000}
    path = write(tmp_path / "a.dcm", picture(stored, **rescaled))
    assert read_image(path).tolist() == [[[7190, 7188, -1000]]]  # 2 * 4095 - 1000, 2 * 4094 - 1000, -1000
    signed = picture(np.array([[-2048, -1, 2047]], dtype=np.int16), PhotometricInterpretation="MONOCHROME1")
    assert read_image(write(tmp_path / "a.dcm", signed)).tolist() == [[[2047, 0, -2048]]]


def test_unused_bits_and_signs(tmp_path):
    unsigned = picture(np.array([[0xF001, 0x0FFF]], dtype=np.uint16))
    assert read_image(write(tmp_path / "a.dcm", unsigned)).tolist() == [[[1, 4095]]]
    signed = picture(np.array([[0x0FFF, 0x0800]], dtype=np.int16))  # -1 and -2048 in 12 bits
    assert read_image(write(tmp_path / "a.dcm", signed)).tolist() == [[[-1, -2048]]]


def test_modality_table(tmp_path):
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [3, 10, 16])  # three entries, the first for the stored value 10
    table.add_new("LUTData", "US", [100, 400, 900])
    table.ModalityLUTType = "US"
    dataset = picture(np.array([[10, 11, 12, 4000, 0]], dtype=np.uint16), ModalityLUTSequence=Sequence([table]))
    assert read_image(write(tmp_path / "a.dcm", dataset)).tolist() == [[[100, 400, 900, 900, 100]]]


def test_run_length_compression(tmp_path):
    dataset = picture(STORED[0])
    dataset.compress(RLELossless)
    path = write(tmp_path / "a.dcm", dataset)
    assert np.array_equal(read_image(path)[0], STORED[0])
    path.write_bytes(path.read_bytes()[:-20])
    refuses(path, "a.dcm cannot be read, it may be cut off or damaged: End of file reached", [read_image])


@pytest.mark.parametrize(
    "elements, spacing",
    [
        ({"PixelSpacing": [0.2, 0.1], "ImagerPixelSpacing": [0.4, 0.3]}, (0.2, 0.1)),
        ({"ImagerPixelSpacing": [0.4, 0.3]}, (0.4, 0.3)),
        ({"PixelSpacing": [], "ImagerPixelSpacing": [0.4, 0.3]}, (0.4, 0.3)),
        ({}, None),
    ],
)
def test_radiograph(tmp_path, elements, spacing):
    path = write(tmp_path / "a.DCM", picture(STORED[0], **elements))
    geometry = read_geometry(path)
    assert read_image(path).shape == (1, 4, 6) and np.array_equal(read_image(path)[0], STORED[0])
    assert (geometry.size, geometry.spacing_mm, geometry.affine) == ((4, 6), spacing, None)


def test_refused_files(tmp_path):
    for elements, message in (
        ({"NumberOfFrames": 3}, "holds 3 frames"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, r"holds colours \(PALETTE COLOR\)"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, r"holds colours \(RGB\)"),
        ({"PixelSpacing": [0.5, 0]}, r"pixel spacing of \[0.5, 0.0\] mm; it must be above 0"),
        ({"Rows": None, "SOPClassUID": "1.2.8\n 1.5"}, r"holds no picture \(1.2.8 1.5\)"),
        ({"Rows": None, "SOPClassUID": RTStructureSetStorage}, r"holds no picture \(RT Structure Set Storage\)"),
    ):
        refuses(write(tmp_path / "a.dcm", picture(STORED[0], **elements)), message)
    without = picture(STORED[0])
    del without.PixelData
    without.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    refuses(tmp_path / "a.dcm", "cannot be read.*no pixel data", [read_image])
    colour = picture(STORED[0])
    set_pixel_data(colour, np.zeros((4, 6, 3), dtype=np.uint8), "RGB", 8)
    refuses(write(tmp_path / "a.dcm", colour), r"holds colours \(RGB\)")
    (tmp_path / "text.dcm").write_text("hello" * 100)
    refuses(tmp_path / "text.dcm", "text.dcm cannot be read.*it is not DICOM, the mark DICM is missing at byte 128")


def test_compression_that_cannot_be_decoded_names_the_package(tmp_path):
    dataset = picture(STORED[0], PixelData=encapsulate([b"\xff\xd8\xff\xd9"]))
    dataset["PixelData"].is_undefined_length = True
    for syntax, message in ((JPEGLosslessSV1, r"compressed with JPEG Lossless.*pip install pylibjpeg\S* pylibjpeg-lib"),
                            (MPEG2MPML, "MPEG2 .* cannot be decoded; convert it to uncompressed DICOM")):  # fmt: skip
        dataset.file_meta.TransferSyntaxUID = syntax
        refuses(write(tmp_path / "a.dcm", dataset), message)


@pytest.mark.parametrize("kept", [0.1, 0.3, 0.6, 0.9])
def test_cut_file(tmp_path, kept, capfd):
    path = write(tmp_path / "a.dcm", picture(np.zeros((40, 40), dtype=np.uint16)))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    refuses(path, "a.dcm (cannot be read|holds no picture .* header is cut off)", [read_image])
    assert capfd.readouterr().err == ""


def test_damaged_slice_is_named_and_does_not_trouble_the_headers(series):
    content = (series / "a.dcm").read_bytes()
    (series / "a.dcm").write_bytes(content[:-10])
    assert read_geometry(series).size == (5, 4, 6)
    refuses(series, r"series/a\.dcm cannot be read", [read_image])
    (series / "a.dcm").write_bytes(b"")
    refuses(series, r"series/a\.dcm cannot be read")


def test_geometry_reads_no_pixels(tmp_path):
    for z in range(2):
        write(tmp_path / "s" / f"{z}.dcm", slice_at(z, Rows=1000, Columns=1000, PixelData=bytes(2_000_000)))
    tracemalloc.start()
    assert read_geometry(tmp_path / "s").size == (2, 1000, 1000)
    assert read_geometry(tmp_path / "s" / "0.dcm").size == (1000, 1000)
    assert find_images(tmp_path) == [tmp_path / "s"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_missing_slice(series):
    (series / "d.dcm").unlink()
    message = r"missing or uneven slices: 4 mm between a.dcm and b.dcm \(after slice 3 of 4\), usually 2 mm"
    refuses(series, message)
    (series / "e.dcm").unlink()  # two gaps of 4 mm: an even, coarser volume
    assert read_geometry(series).spacing_mm == pytest.approx((4, 0.5, 0.25))


@pytest.mark.parametrize("shift, accepted", [(0.12, True), (0.15, False), (-0.15, False)])
def test_uneven_slices(series, shift, accepted):
    """Slice 3 of 5 then lies 0.75 of the shift off its place; 5 % of 2 mm is 0.1."""
    write(series / "b.dcm", slice_at(4, ImagePositionPatient=(ORIGIN + (8 + shift) * NORMAL).tolist()))
    if accepted:
        assert read_geometry(series).spacing_mm == pytest.approx((2 + shift / 4, 0.5, 0.25))
    else:
        refuses(series, f"uneven slices: {2 + shift} mm between d.dcm and b.dcm")


@pytest.mark.parametrize(
    "elements, message",
    [
        ({"ImagePositionPatient": None}, "slice a.dcm has no ImagePositionPatient"),
        ({"ImageOrientationPatient": None}, "slice a.dcm has no ImageOrientationPatient"),
        ({"PixelSpacing": None}, "slice a.dcm has no PixelSpacing"),
        ({"ImagePositionPatient": [1, 2]}, "ImagePositionPatient must be 3 finite numbers"),
        ({"PixelSpacing": [0.5, 0.3]}, r"b.dcm has another pixel spacing than a.dcm: \(0.5, 0.25\) and \(0.5, 0.3\)"),
        ({"ImageOrientationPatient": [*ACROSS, *NORMAL]}, "slice b.dcm has another orientation than a.dcm"),
        ({"Rows": 3, "PixelData": bytes(36)},
         r"b.dcm has another size \(rows, columns\) than a.dcm: \(4, 6\) and \(3, 6\)"),
        ({"ImagePositionPatient": (ORIGIN + 2 * NORMAL).tolist()}, "slices a.dcm and e.dcm lie at the same place"),
        ({"ImagePositionPatient": (ORIGIN + 4 * NORMAL + 0.05 * DOWN).tolist()},
         "slice a.dcm is shifted sideways by 0.05 mm"),
        ({"NumberOfFrames": 2}, "a.dcm holds 2 frames"),
        ({"SeriesInstanceUID": "1.2.3", "SeriesDescription": "scout\nview"},
         rf"holds 2 series: 1.2.3 \(scout view, 1 file\), {SERIES} \(no description, 4 files\); give each a folder"),
    ],
)  # fmt: skip
def test_bad_series(series, elements, message):
    write(series / "a.dcm", slice_at(2, **elements))
    refuses(series, message)


def test_tilted_gantry_and_crooked_orientation(tmp_path):
    for z in range(3):
        position = (ORIGIN + 2 * z * NORMAL + 0.4 * z * DOWN).tolist()
        write(tmp_path / "tilted" / f"{z}.dcm", slice_at(z, ImagePositionPatient=position))
        crooked = [1, 0, 0, 0.1, 1, 0]
        write(tmp_path / "crooked" / f"{z}.dcm", slice_at(z, ImageOrientationPatient=crooked))
    refuses(tmp_path / "tilted", "tilted cannot be used: its axes are not at right angles")
    refuses(tmp_path / "crooked", "is no pair of directions at right angles")


def test_one_slice_or_none_is_no_series(tmp_path):
    write(tmp_path / "one" / "a.dcm", slice_at(0))
    refuses(tmp_path / "one", "holds 1 DICOM slice, a volume needs two or more")
    (tmp_path / "none").mkdir()
    refuses(tmp_path / "none", "none is not a file, nor a folder with the DICOM slices of one series")


def test_find_images_takes_a_series_for_one_image(series):
    root = series.parent
    (series / "a.dcm").write_bytes(b"")  # a damaged slice does not make the others pictures of their own
    (series / "preview.png").touch()
    for name in ("x.dcm", "y.dcm"):
        write(root / "radiographs" / name, picture(STORED[0], SeriesInstanceUID=generate_uid()))
    for z in range(2):
        write(root / ".hidden" / f"{z}.dcm", slice_at(z))
    (root / "deep").mkdir()
    (root / "folder.png").mkdir()
    series.rename(root / "deep" / "1.2.3")
    for z in range(2):
        write(root / "ct" / str(z), slice_at(z))
    write(root / "flat.dcm", picture(STORED[0]))
    assert find_images(root) == [root / "ct", root / "flat.dcm"]
    assert find_images(root, recursive=True) == [
        root / "ct", root / "deep/1.2.3", root / "flat.dcm", root / "radiographs/x.dcm", root / "radiographs/y.dcm"
    ]  # fmt: skip
    assert image_suffix(root / "deep/1.2.3") is None and image_suffix(root / "flat.dcm") == ".dcm"


def test_what_else_lies_in_the_folder_of_a_series_does_not_count(series, tmp_path):
    """A sub-folder, a note and a link to nowhere: the same volume, from the same cache entry."""
    config = DatasetConfig(image_size=(4, 4, 4), cache_dir=str(tmp_path / "cache"))
    record = Record("series", series, None, None)
    before = load_one(record, config)
    (series / "report").mkdir()
    (series / "report/page.html").write_text("no slice")
    (series / "notes.txt").write_text("no slice")
    (series / "gone").symlink_to(tmp_path / "nowhere")
    after = load_one(record, config)
    assert after.digest == before.digest and np.array_equal(after.pixels, before.pixels)
    assert len(stamp(series)) == len(NAMES) + 2
    assert find_images(tmp_path) == [series]
