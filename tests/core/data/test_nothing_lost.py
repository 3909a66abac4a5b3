"""Folder data sets as people have them: nothing is lost or swept in without a word, and settings mean one thing."""

import io
import json
import unicodedata
import zlib

import nibabel
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from core import errors
from core.config.dataset import Dataset as DatasetConfig
from core.data.cache import load_one
from core.data.dataset import load_images
from core.data.layouts import read_layout
from core.data.make_pack import write_pack
from core.data.packs import open_pack
from core.data.records import Record
from core.data.resize import normalise
from core.data.source import load_source
from core.errors import UserError
from core.formats.images import find_images, read_geometry, read_image
from core.formats.markups import write_markups
from core.formats.points import read_folder_csv, read_hand
from landmarks_finetuning.predict import collect_images
from tests.core.formats.test_dicom import SERIES, STORED, picture, slice_at, write

GREY = np.random.default_rng(0).integers(0, 256, (20, 16), dtype=np.uint8)


def make(root, names=("a", "b", "c", "d"), splits=None, **settings):
    """A data set of small pictures with one landmark each."""
    (root / "images").mkdir(parents=True)
    rows = ["image,p_x,p_y"]
    for number, name in enumerate(names):
        Image.fromarray(np.roll(GREY, number)).save(root / "images" / f"{name}.png")
        rows.append(f"{name},{number + 1},2")
    (root / "landmarks.csv").write_text("\n".join(rows))
    splits = splits or {"train": list(names[:2]), "validation": [names[2]], "test": list(names[3:])}
    (root / "dataset.json").write_text(json.dumps({"landmarks": ["p"], "splits": splits, **settings}))
    return root


def ids(records):
    return [record.id for record in records]


def test_linked_folders_are_entered_once(tmp_path):
    root = make(tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(GREY + 1).save(tmp_path / "elsewhere/e.png")
    (root / "images/site").symlink_to(tmp_path / "elsewhere")
    (root / "images/round").symlink_to(root / "images")  # a circle
    (root / "images/again").symlink_to(tmp_path / "elsewhere")
    assert ids(read_layout("folder", root).unlabelled) == ["again/e"]
    assert ids(collect_images([tmp_path / "data"], tmp_path / "out"))[0] == "images/a.png"


@pytest.mark.parametrize("text, leads", [
    ("../../site", True), ("../../site/s.png", True), ("../../nowhere", False), ("site", False),
    ("../../site\n", False), ("", False)])
def test_a_link_that_a_copy_made_a_file_of_is_noted(tmp_path, capsys, monkeypatch, text, leads):
    monkeypatch.setattr(errors, "_NOTED", set())
    for place in ("data/images/a.png", "site/s.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / place)
    link = tmp_path / "data/images/link"
    link.write_text(text)
    assert [path.name for path in find_images(tmp_path / "data/images", recursive=True)] == ["a.png"]
    said = capsys.readouterr().err
    assert said.startswith(f'note: {link} holds nothing but "{text}"') if leads else said == ""


@pytest.mark.parametrize("folder", ["@eaDir/a.png", "#recycle", "$RECYCLE.BIN/S-1-5", "__MACOSX", "@Recycle",
                                    "System Volume Information", ".Trash"])  # fmt: skip
def test_folders_of_file_servers_are_passed_over(tmp_path, folder):
    root = make(tmp_path / "data")
    (root / "images" / folder).mkdir(parents=True)
    Image.fromarray(GREY).save(root / "images" / folder / "copy.png")
    assert read_layout("folder", root).unlabelled == ()


def test_what_predict_drew_is_no_image(tmp_path):
    root = make(tmp_path / "data")
    for out in (root / "images/found", root / "images"):
        (out / "overlays").mkdir(parents=True)
        Image.fromarray(GREY).save(out / "overlays/a.png")
    before = ids(collect_images([root / "images"], root / "images/found"))  # a run before was struck down
    assert before == ["a.png", "b.png", "c.png", "d.png", "overlays/a.png"]
    (root / "images/found/predictions.csv").touch()
    (root / "images/predictions.csv").touch()
    assert ids(collect_images([root / "images"], tmp_path / "new")) == ["a.png", "b.png", "c.png", "d.png"]
    assert read_layout("folder", root).unlabelled == ()


@pytest.mark.parametrize("on_disk, in_table", [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_match_whatever_their_unicode_form(tmp_path, on_disk, in_table):
    names = ("a", "Müller", "c", "d")
    root = make(tmp_path / "data", [unicodedata.normalize(on_disk, name) for name in names])
    for file in ("landmarks.csv", "dataset.json"):
        text = json.loads((root / file).read_text()) if file.endswith("json") else (root / file).read_text()
        text = json.dumps(text, ensure_ascii=False) if file.endswith("json") else text
        (root / file).write_text(unicodedata.normalize(in_table, text), encoding="utf8")
    source = read_layout("folder", root, exclude=[unicodedata.normalize(in_table, "Müller")])
    assert len(read_layout("folder", root).labelled) == 4 and ids(source.labelled) == ["a", "c", "d"]


def test_exclude_drops_what_cannot_be_read(tmp_path):
    """The others keep their drawn splits; of unlabelled images elsewhere the name is enough."""
    root = make(tmp_path / "data", splits={"train": 0.5, "validation": 0.25, "test": 0.25})
    whole = {split: ids(records) for split, records in read_layout("folder", root).splits.items()}
    (root / "images/b.png").write_text("<html>error 404")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/bad.npy").write_text("<html>error 404")
    np.save(tmp_path / "more/good.npy", GREY)
    with pytest.raises(UserError, match=r"b\.png cannot be read"):
        read_layout("folder", root)
    with pytest.raises(UserError, match=r"bad\.npy cannot be read"):
        read_layout("folder", root, exclude=["b"], unlabelled_dirs=[tmp_path / "more"])
    source = read_layout("folder", root, exclude=["b", "bad"], unlabelled_dirs=[tmp_path / "more"])
    assert {split: ids(records) for split, records in source.splits.items()} == {
        split: [name for name in names if name != "b"] for split, names in whole.items()}
    assert [record.image.name for record in source.unlabelled] == ["good.npy"]
    with pytest.raises(UserError, match='exclude: "bad.x" is no image'):
        read_layout("folder", root, exclude=["b", "bad", "bad.x"], unlabelled_dirs=[tmp_path / "more"])


def volumes(root, count=4):
    (root / "images").mkdir(parents=True)
    (root / "landmarks").mkdir()
    for number in range(count):
        folder = root / "images" / f"c{number}"
        for z in range(3):
            write(folder / f"{z}.IMA" if number else folder / f"{z}.dcm", slice_at(z))
    (root / "dataset.json").write_text(json.dumps({"landmarks": ["p"], "splits": {
        "train": ["c0", "c1"], "validation": ["c2"], "test": ["c3"]}}))
    return root


def test_markups_in_upper_case_without_mrk_and_as_predict_names_them(tmp_path):
    root = volumes(tmp_path / "data")
    inside = np.array([[-8.7, -21.6, 29.5]])  # voxel (1, 1, 2) of test_dicom's series
    for name in ("c0", "c1", "c2", "c3"):
        write_markups(root / "landmarks" / f"{name}.mrk.json", ["p"], inside)
    (root / "landmarks/c0.mrk.json").rename(root / "landmarks/c0.MRK.JSON")
    (root / "landmarks/c1.mrk.json").rename(root / "landmarks/c1.json")
    (root / "landmarks/c2.mrk.json").rename(root / "landmarks/c2.dcm.mrk.json")
    (root / "landmarks/notes.json").write_text("{}")
    source = read_layout("folder", root, dims=3, check_geometry=False)
    assert len(source.labelled) == 4
    assert all(record.landmarks == pytest.approx(source.labelled[0].landmarks) for record in source.labelled)
    (root / "landmarks/c9.json").write_text((root / "landmarks/c1.json").read_text())
    with pytest.raises(UserError, match=r'c9\.json belongs to no image: "c9"'):
        read_layout("folder", root, dims=3)


def test_tables_of_predict_are_labels(tmp_path):
    table = tmp_path / "landmarks.csv"
    table.write_text("image,patient,landmark,x,y,expected_error,radius90\na.png,P1,p,1.5,2.5,0.1,0.2\na.png,P1,q,,,,\n"
                     "sub/b.png,,q,3,4,0.1,0.2\n")
    a, b = read_folder_csv(table, ["p", "q"])
    assert (a.image, a.patient, b.image, b.patient) == ("a.png", "P1", "sub/b.png", None)
    assert np.array_equal(a.points, [[2.5, 1.5], [np.nan, np.nan]], equal_nan=True)
    assert np.array_equal(b.points, [[np.nan, np.nan], [4, 3]], equal_nan=True)
    for change, message in (("q,3", "r,3"), '"r" is not one of'), (("sub/b.png,,q", "a.png,,q"), "appears twice"):
        table.write_text(table.read_text().replace(*change))
        with pytest.raises(UserError, match=message):
            read_folder_csv(table, ["p", "q"])
        table.write_text(table.read_text().replace(*change[::-1]))


def test_scouts_and_suffixes_of_series(tmp_path):
    """What lies beside a series is told of, and .IMA files are slices and pictures."""
    root = volumes(tmp_path / "data")
    assert find_images(root / "images") == [root / f"images/c{number}" for number in range(4)]
    scout = slice_at(1, SeriesInstanceUID="1.2.3", SeriesDescription="scout")
    write(root / "images/c3/0_scout", scout)
    with pytest.raises(UserError, match=r"c3 holds 2 series: .*1\.2\.3 \(scout, 1 file\)"):
        read_layout("folder", root, dims=3)
    write(root / "alone/a.IMA", picture(STORED[0]))
    write(root / "alone/b", picture(STORED[1], SeriesInstanceUID="1.2.4"))
    assert find_images(root / "alone") == [root / "alone/a.IMA", root / "alone/b"]
    assert read_image(root / "alone/b").shape == (1, 4, 6)


@pytest.mark.parametrize("uid", [SERIES, "", None])
def test_radiographs_that_share_a_series_or_have_no_uid_are_pictures(tmp_path, uid):
    for name in ("a.dcm", "b.dcm"):
        write(tmp_path / "s" / name, picture(STORED[0], SeriesInstanceUID=uid, Modality="DX"))
    assert find_images(tmp_path, recursive=True) == [tmp_path / "s/a.dcm", tmp_path / "s/b.dcm"]


@pytest.mark.parametrize("step", [0.333, 0.067])  # rounding moves a slice by 1.5 and by 7.5 % of it
def test_positions_rounded_to_two_decimals_are_a_regular_grid(tmp_path, step):
    def series(folder, left_out=()):
        for z in range(60):
            place = [0, 0, round(step * z, 2)]
            if z not in left_out:
                write(folder / f"{z:02}.dcm", slice_at(z % 5, ImagePositionPatient=place,
                                                       ImageOrientationPatient=[1, 0, 0, 0, 1, 0]))
        return folder

    assert read_geometry(series(tmp_path / "whole")).spacing_mm[0] == pytest.approx(step, abs=1e-3)
    for missing in (1, 30, 58):
        with pytest.raises(UserError, match="missing or uneven slices"):
            read_geometry(series(tmp_path / f"without{missing}", (missing,)))


def test_hand_ids_in_quotes_and_empty_columns(tmp_path, capsys):
    cells = ",".join(f"{number}.5" for number in range(74))
    table = tmp_path / "all.csv"
    table.write_text(f'"3142",{cells}\n 3143 ,{cells},,\n3144,"{cells.replace(",", chr(34) + "," + chr(34))}"\n')
    assert list(read_hand(table)) == ["3142", "3143", "3144"]
    table.write_text(f"1_0,{cells}\n")
    assert list(read_hand(table)) == ["1_0"]
    table.write_text(f"3142,{cells[:-4]}1_0\n")
    with pytest.raises(UserError, match='"1_0" is not a number|"71_0" is not a number'):
        read_hand(table)


def test_a_spreadsheets_empty_columns(tmp_path):
    (tmp_path / "a.csv").write_text("image,p_x,p_y,,\na,1,2,,\nb,3,4\n,,,,\n")
    assert [row.image for row in read_folder_csv(tmp_path / "a.csv", ["p"])] == ["a", "b"]
    (tmp_path / "a.csv").write_text("image,p_x,p_y\na,1,2,7\n")
    with pytest.raises(UserError, match="has 4 cells"):
        read_folder_csv(tmp_path / "a.csv", ["p"])


def test_patients_that_differ_in_case_are_noted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(errors, "_NOTED", set())
    root = make(tmp_path / "data", patients={"a": "P1", "d": "p1"})
    assert len(read_layout("folder", root).labelled) == 4
    assert 'patients "P1" and "p1"' in capsys.readouterr().err


def test_one_spacing_for_labelled_unlabelled_and_predicted(tmp_path):
    """The config's takes the header's place everywhere, or the header's counts everywhere."""
    root = make(tmp_path / "data")
    for folder in (root / "images", tmp_path / "more"):
        write(folder / "z.dcm", picture(STORED[0], PixelSpacing=[0.2, 0.2], SeriesInstanceUID="1.2"))
    with (root / "landmarks.csv").open("a") as file:
        file.write("\nz,1,2")
    for record in (root / "images").glob("*.png"):
        record.unlink()
    (root / "landmarks.csv").write_text("image,p_x,p_y\nz,1,2")
    (root / "dataset.json").write_text(json.dumps({"landmarks": ["p"], "splits": {"train": ["z"]}}))
    for given, expected in ((None, (0.2, 0.2)), (0.5, (0.5, 0.5))):
        source = read_layout("folder", root, spacing_mm=given, unlabelled_dirs=[tmp_path / "more"])
        predicted = collect_images([tmp_path / "more"], tmp_path / "out", given)
        assert [r.spacing for r in (*source.labelled, *source.unlabelled, *predicted)] == [expected] * 3


def test_the_spacing_of_dataset_json_is_that_of_predicted_images(tmp_path):
    """A table's row tells of its own image alone; a volume that says where it lies has its own."""
    root = make(tmp_path / "data", ("a", "b"), {"train": ["a", "b"]})
    described = json.loads((root / "dataset.json").read_text())
    for told, expected in ((None, None), (0.5, (0.5, 0.5)), ([0.2, 0.4], (0.4, 0.2))):
        (root / "dataset.json").write_text(json.dumps({**described, "spacing_mm": told}))
        source = read_layout("folder", root)
        predicted = collect_images([root / "images"], tmp_path / "out", None, source.spacing_mm)
        assert [source.spacing_mm, *(r.spacing for r in predicted)] == [expected] * 3
        assert collect_images([root / "images"], tmp_path / "out", 0.7, source.spacing_mm)[0].spacing == (0.7, 0.7)
    volume = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.diag([0.3, 0.3, 0.3, 1]))
    nibabel.save(volume, tmp_path / "v.nii")
    assert collect_images([tmp_path / "v.nii"], None, None, (2, 2, 2))[0].spacing == pytest.approx((0.3, 0.3, 0.3))


@pytest.mark.parametrize("pixels, kind", [
    ([np.linspace(0, 1, 320), np.linspace(0, 4080, 320)], np.uint16),
    ([np.linspace(0, 1, 320), np.linspace(0.2, 0.7, 320)], np.uint16),
    ([np.linspace(-1000, 3000, 320), np.linspace(-5, 5, 320)], np.uint16),
])  # fmt: skip
def test_a_pack_keeps_each_images_range(tmp_path, pixels, kind):
    root = make(tmp_path / "data", ("a", "b"), splits={"train": ["a"], "validation": ["b"]})
    for name, values in zip("ab", pixels, strict=True):
        (root / f"images/{name}.png").unlink()
        Image.fromarray(values.reshape(20, 16).astype(np.float32)).save(root / f"images/{name}.tif")
    config = DatasetConfig(root=str(root), image_size=(20, 16), cache_dir=str(tmp_path / "cache"))
    write_pack(config, tmp_path / "pack.npz")
    packed = config.model_copy(update={"root": str(tmp_path / "pack.npz")})
    with np.load(tmp_path / "pack.npz") as file:
        assert file["pixels"].dtype == kind
    for split in ("train", "validation"):
        before, after = (load_images(load_source(each).splits[split], each).images for each in (config, packed))
        assert float((before - after).abs().max()) < 1e-4


def test_damaged_packs_are_one_line(tmp_path):
    root = make(tmp_path / "data")
    config = DatasetConfig(root=str(root), image_size=(20, 16), cache_dir=str(tmp_path / "cache"))
    write_pack(config, tmp_path / "pack.npz")
    content = (tmp_path / "pack.npz").read_bytes()
    random = np.random.default_rng(0)
    for number in range(60):
        changed = bytearray(content[: random.integers(1, len(content))] if number % 3 == 0 else content)
        changed[random.integers(len(changed))] ^= 1 << int(random.integers(8))
        path = tmp_path / f"{number}.npz"
        path.write_bytes(changed)
        try:
            load_source(config.model_copy(update={"root": str(path)}))
        except UserError as error:
            assert path.name in str(error) and "\n" not in str(error)
        open_pack.cache_clear()


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b"", lambda b: b[:-9] + bytes(9),
                                    lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:], lambda b: b"hello" * 99])
def test_a_damaged_cache_entry_is_made_anew(tmp_path, damage):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    config = DatasetConfig(image_size=(20, 16), cache_dir=str(tmp_path / "cache"))
    record = Record("a", tmp_path / "a.png", None, None)
    before = load_one(record, config).pixels
    entry = next((tmp_path / "cache").glob("*.npy"))
    entry.write_bytes(damage(entry.read_bytes()))
    assert np.array_equal(load_one(record, config).pixels, before)
    content = entry.read_bytes()
    assert zlib.crc32(content[:-4]).to_bytes(4, "big") == content[-4:]


def test_a_cache_entry_of_another_shape_is_not_used(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    config = DatasetConfig(image_size=(20, 16), cache_dir=str(tmp_path / "cache"))
    record = Record("a", tmp_path / "a.png", None, None)
    before = load_one(record, config).pixels
    entry, other = next((tmp_path / "cache").glob("*.npy")), io.BytesIO()
    np.save(other, np.zeros((1, 3, 3), np.float32))
    entry.write_bytes(other.getvalue() + zlib.crc32(other.getvalue()).to_bytes(4, "big"))
    assert np.array_equal(load_one(record, config).pixels, before)


def test_png_metadata_however_large_does_not_matter(tmp_path):
    info = PngInfo()
    info.add_text("notes", "x" * 3_000_000, zip=True)
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    Image.fromarray(GREY).save(tmp_path / "a.png", pnginfo=info, icc_profile=bytes(2_000_000))
    assert np.array_equal(read_image(tmp_path / "a.png")[0], GREY)
    assert read_geometry(tmp_path / "a.png").size == (20, 16)


def test_xmp_turns_no_image(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    Image.fromarray(GREY).save(tmp_path / "a.jpg", xmp=xmp)
    assert read_geometry(tmp_path / "a.jpg").size == (20, 16)


@pytest.mark.parametrize("suffix", [".webp", ".jfif", ".JPE"])
def test_more_suffixes(tmp_path, suffix):
    smooth = np.add.outer(np.arange(20), np.arange(16)).astype(np.uint8) * 5
    kind = {"format": "WEBP", "lossless": True} if suffix == ".webp" else {"format": "JPEG", "quality": 95}
    Image.fromarray(smooth).save(tmp_path / f"a{suffix}", **kind)
    assert np.abs(read_image(tmp_path / f"a{suffix}")[0] - smooth).max() <= 3
    assert find_images(tmp_path) == [tmp_path / f"a{suffix}"]


def test_a_film_of_196_million_pixels_is_a_picture(tmp_path, recwarn):
    """14 x 14 inches at 1000 dpi: a data set of one's own is no attack, and nothing warns of one."""
    Image.new("1", (14000, 14000)).save(tmp_path / "film.png")
    assert read_geometry(tmp_path / "film.png").size == (14000, 14000) and not recwarn.list


def test_too_large_images_are_refused_by_their_header(tmp_path):
    """40000 x 20000 pixels are not read until the setting allows them; nothing is decoded to find out."""
    Image.new("1", (40000, 20000)).save(tmp_path / "a.png")
    record = Record("a", tmp_path / "a.png", None, None)
    config = DatasetConfig(image_size=(8, 8), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"a\.png has 40000 x 20000 = 800 million pixels, more than "
                                        r"dataset\.max_megapixels 300; .* 6\.0 GiB"):
        load_one(record, config)
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="dataset.max_megapixels 0.005"):
        load_one(record, config.model_copy(update={"max_megapixels": 0.005}))


def test_percentiles_that_coincide_are_minmax():
    """An image of which less than 1 % is not background keeps its own greys."""
    pixels = np.zeros((1, 100, 100), np.float32)
    pixels[0, 0, :4] = 10, 20, 30, 40
    shown = normalise(pixels, DatasetConfig(intensity="percentile"))
    assert shown[0, 0, :4] == pytest.approx([0.25, 0.5, 0.75, 1])
