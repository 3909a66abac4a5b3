"""The command that converts: every pair of formats, what is lost, one line for a mistake."""

from dataclasses import replace
from itertools import permutations

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from core.files import write_json
from core.formats.convert import convert
from core.formats.label_files import FLAT, FORMATS, Images, detect, match_image, read_label_file, write_label_file
from core.formats.labels import LabelSet
from core.formats.points import FolderRow
from tests.core.formats.label_sets import LABELS, NAMES, same

PICTURES = ("wide", "long", *FLAT)


@pytest.fixture
def images(tmp_path):
    for row in LABELS.rows:
        path = tmp_path / "images" / row.image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((40, 60), np.uint8)).save(path)
    return tmp_path / "images"


@pytest.mark.parametrize("kind", PICTURES)
def test_every_format_is_told_by_its_name_and_content(tmp_path, kind):
    path = tmp_path / FORMATS[kind].place
    write_label_file(path, LABELS, kind)
    assert detect(path) == kind


@pytest.mark.parametrize("source, target", list(permutations(PICTURES, 2)))
def test_every_pair(tmp_path, images, source, target):
    one, other = tmp_path / "one" / FORMATS[source].place, tmp_path / "other" / FORMATS[target].place
    write_label_file(one, LABELS, source)
    convert(one, other, target_kind=target, folder=images, names=list(NAMES))
    keeps = not {"hidden"} & {*FORMATS[source].cannot, *FORMATS[target].cannot}
    same(read_label_file(other, NAMES, Images(images)), hidden=keeps)


@pytest.mark.parametrize("kind, words", [
    ("wide", ["that 1 points are hidden"]),
    ("long", ["that 1 points are hidden", "the spacing of 1 images"]),
    ("coco", ["the spacing of 1 images", "patients"]),
    ("labelme", ["that 1 points are hidden", "the spacing of 1 images", "patients", "landmarks that no image has: tip"]),  # noqa: E501
    ("cvat", ["the spacing of 1 images", "patients", "that 1 images were looked at and have no landmark"]),
    ("label-studio", ["the spacing of 1 images", "patients", "landmarks that no image has: tip <&> 1"]),
    ("tps", ["that 1 points are hidden", "a spacing that differs between x and y", "patients",
             "the names sella, nasion, tip <&> 1: keep their order"]),
])
def test_what_is_lost_is_one_line(tmp_path, run_main, monkeypatch, kind, words):
    points = LABELS.rows[0].points.copy()
    points[2] = np.nan
    first = replace(LABELS.rows[0], points=points, spacing=(0.1, 0.2), patient="p")
    labels = replace(LABELS, rows=(first, replace(LABELS.rows[1], points=np.full((3, 2), np.nan))))
    monkeypatch.setattr("core.formats.convert.read_label_file", lambda *_: labels)
    out = tmp_path / FORMATS[kind].place
    status, said, error = run_main("core.formats.convert", "in.csv", out, "--to", kind)
    assert status == 0 and said == f"landmarks in {out}\n"
    assert error.startswith(f"note: not in {out}: {kind} cannot hold {words[0]}") and error.count("\n") == 1
    assert all(word in error for word in words) and error.count(", ") >= len(words) - 1


def test_nothing_lost_nothing_said(tmp_path):
    shown = replace(LABELS, rows=tuple(replace(row, hidden=None) for row in LABELS.rows))
    write_label_file(tmp_path / "l.csv", shown, "wide")
    assert convert(tmp_path / "l.csv", tmp_path / "m.csv") == []


def test_volumes_of_slicer(tmp_path):
    (tmp_path / "images/x").mkdir(parents=True)
    affine = np.diag([-0.5, 0.7, 0.9, 1])
    affine[:3, 3] = 10, -20, 30
    for name in ("x/v.nii.gz", "w.nii.gz"):
        nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), affine), tmp_path / "images" / name)
    rows = tuple(FolderRow(name, np.array([[3.25, 2, 1 / 3], [np.nan] * 3, [0, 1, 2]]))
                 for name in ("w.nii.gz", "x/v.nii.gz"))
    volumes = LabelSet(NAMES, rows)
    write_label_file(tmp_path / "l.csv", volumes, "wide")
    convert(tmp_path / "l.csv", tmp_path / "marks", target_kind="slicer", folder=tmp_path / "images")
    convert(tmp_path / "marks", tmp_path / "m.csv", folder=tmp_path / "images")
    same(read_label_file(tmp_path / "m.csv"), volumes, hidden=False)
    with pytest.raises(UserError, match='coco holds flat images only, and "w.nii.gz" is a volume; choose from wide, lo'):  # noqa: E501
        convert(tmp_path / "l.csv", tmp_path / "c.json", target_kind="coco")
    with pytest.raises(UserError, match='image "w.nii.gz" must be looked at; name the folder of the images with --ima'):
        convert(tmp_path / "l.csv", tmp_path / "n", target_kind="slicer")


def test_labels_of_a_smaller_copy_are_refused(tmp_path, images):
    small = replace(LABELS, rows=tuple(replace(row, size=(20, 30)) for row in LABELS.rows))
    write_label_file(tmp_path / "c.json", small, "coco")
    with pytest.raises(UserError, match='image "a/001.png" is 30 x 20 pixels there, but its file has 60 x 40'):
        convert(tmp_path / "c.json", tmp_path / "l.csv", folder=images)


def test_names_that_tools_shorten():
    ids = ["a/001", "b/001", "b/002"]
    assert match_image("002.png", ids, "x") == "b/002" and match_image("root/a/001.jpg", ids, "x") == "a/001"
    with pytest.raises(UserError, match='image "001.png" may be a/001 or b/001 in x'):
        match_image("001.png", ids, "x")
    with pytest.raises(UserError, match=r'image "c/002" is not in x \(did you mean "b/002"\?\)'):
        match_image("c/002", ids, "x")


@pytest.mark.parametrize("arguments, message", [
    (["none.csv", "o.csv"], "landmark file none.csv does not exist"),
    (["{}/l.csv", "o.json"], "o.json: its name does not tell the format; give --to, one of wide, long, coco"),
    (["{}/l.csv", "{}/l.csv"], "is there already; remove it or name another"),
    (["{}/l.csv", "{}/o.xml"], 'needs the size of image "a/001.png"; name the folder of the images with --images'),
    (["{}/l.csv", "{}/o.xml", "--images", "{}/no"], "no of the images does not exist"),
    (["{}/l.txt", "o.csv"], "is of no known format; name it with --from: wide, "),
    (["{}/l.json", "o.csv"], 'Slicer\'s JSON files; export from Label Studio as "JSON"'),
    (["{}/both", "o.csv"], "holds both 3D Slicer's and LabelMe's files; name the format with --from"),
    (["{}/l.csv", "o.csv", "--to", "yolo"], "invalid choice: 'yolo'"),
])
def test_mistakes_are_one_line(tmp_path, run_main, arguments, message):
    write_label_file(tmp_path / "l.csv", LABELS, "wide")
    write_label_file(tmp_path / "both", LABELS, "labelme")
    (tmp_path / "both/v.mrk.json").write_text("{}")
    (tmp_path / "l.txt").write_text("x")
    (tmp_path / "l.json").write_text('[{"image": "i.png"}]')
    status, _, error = run_main("core.formats.convert", *(each.format(tmp_path) for each in arguments))
    assert status == 2 and message in error and error.count("\n") == 1


def test_a_conversion_that_is_cut_leaves_no_part_of_a_folder(tmp_path, monkeypatch):
    """So that the same command goes on: a folder that is there is refused."""
    source, target = tmp_path / "landmarks.csv", tmp_path / "new" / "labelme"
    write_label_file(source, LABELS, "wide")
    written = []

    def cut(path, values):
        if written:
            raise MemoryError
        written.append(path)
        write_json(path, values)

    with monkeypatch.context() as patch:
        patch.setattr("core.formats.labelme.write_json", cut)
        with pytest.raises(MemoryError):
            convert(source, target, target_kind="labelme")
    assert written and not list(target.parent.iterdir())
    convert(source, target, target_kind="labelme")
    assert len(list(target.rglob("*.json"))) == len(LABELS.rows)
