"""The command that converts: every pair of formats, what is lost, one line for a mistake."""

import csv
import json
import re
from dataclasses import replace
from itertools import permutations

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from core.files import write_json
from core.formats.convert import convert, main
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
    shown = replace(LABELS, rows=(replace(LABELS.rows[0], hidden=None),))
    write_label_file(tmp_path / "l.csv", shown, "wide")
    assert convert(tmp_path / "l.csv", tmp_path / "m.csv") == []


def test_images_that_lack_landmarks_are_noted(tmp_path):
    """As of a table that was cut: five points of three in each of two images."""
    path = tmp_path / "cut.csv"
    path.write_text("image,landmark,x,y\na,l,1,2\na,m,3,4\na,r,5,6\nb,l,1,2\nb,m,3,4\n")
    assert convert(path, tmp_path / "m.csv") == [
        f'{path}: 1 of 2 images lack landmarks that others have, such as "r" of image "b"']


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


def test_a_volume_of_slicers_older_list(tmp_path, capsys, monkeypatch):
    """By hand: stored along x at -0.5 mm from 10 on, y at 0.7 from -20, z at 0.9 from 30 (RAS); LPS turns x and y."""
    affine = np.diag([-0.5, 0.7, 0.9, 1])
    affine[:3, 3] = 10, -20, 30
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), affine), tmp_path / "w.nii.gz")
    (tmp_path / "l.csv").write_text('image,"a, b_x","a, b_y","a, b_z",c_x,c_y,c_z,d_x,d_y,d_z\n'
                                    "w.nii.gz,2,4,1,,,,0,0,5\n")
    monkeypatch.setattr("sys.argv", ["convert", str(tmp_path / "l.csv"), str(tmp_path / "w.fcsv"),
                                     "--images", str(tmp_path)])
    main()
    lines = (tmp_path / "w.fcsv").read_text().splitlines()
    assert lines[:2] == ["# Markups fiducial file version = 4.11", "# CoordinateSystem = LPS"]
    assert lines[2] == "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"
    first, last = csv.reader(lines[3:])
    assert first[0] == "1" and [float(cell) for cell in first[1:4]] == pytest.approx([-9, 17.2, 30.9])
    assert last[0] == "3" and [float(cell) for cell in last[1:4]] == pytest.approx([-10, 20, 34.5])  # c is left out
    assert first[4:] == ["0", "0", "0", "1", "1", "1", "0", "a, b", "", ""] and last[11] == "d"
    assert "not in" in (said := capsys.readouterr()).err and "landmarks that no image has: c" in said.err
    for target, kind in (("one/w.mrk.json", None), ("back.csv", None), ("folder", "fcsv")):
        convert(tmp_path / "w.fcsv", tmp_path / target, target_kind=kind, folder=tmp_path, names=["a, b", "c", "d"])
    assert (tmp_path / "folder/w.nii.gz.fcsv").read_text() == (tmp_path / "w.fcsv").read_text()
    [row] = read_label_file(tmp_path / "back.csv").rows
    assert row.points[[0, 2]] == pytest.approx(np.array([[1, 4, 2], [5, 0, 0]])) and np.isnan(row.points[1]).all()
    same(read_label_file(tmp_path / "one/w.mrk.json", ["a, b", "c", "d"], Images(tmp_path)), LabelSet(
        ("a, b", "c", "d"), (FolderRow("w", row.points),)), hidden=False)


@pytest.mark.parametrize("kind", PICTURES)
def test_what_is_not_finite_is_refused(tmp_path, images, kind, run_main):
    """By the file and what it calls the image or the place in itself, in every format."""
    at = replace(LABELS, rows=tuple(replace(row, points=np.array([[5.0, 12.25], [8, 9], [1, 2]]), size=(40, 60),
                                            hidden=None) for row in LABELS.rows))
    path = tmp_path / FORMATS[kind].place
    write_label_file(path, at, kind)
    file = sorted(path.rglob("*.json"))[0] if path.is_dir() else path
    number = {"wide": "12.25", "long": "12.25", "coco": "12.25", "label-studio": "21.25"}.get(kind, "12.75")
    assert number in file.read_text()  # x of a landmark as the format counts it
    file.write_text(file.read_text().replace(number, "1e400", 1))
    status, out, error = run_main("core.formats.convert", path, tmp_path / "new.csv", "--images", images, "--names",
                                  *NAMES, "--from", kind)
    assert (status, out, error.count("\n")) == (2, "", 1) and "finite" in error and not (tmp_path / "new.csv").exists()
    assert error.startswith(f"error: {file}")
    assert re.search(r"(line|row|shape|task|annotation) \d|image \"a/001", error.removeprefix(f"error: {file}"))


def test_an_image_that_is_there_twice_is_refused(tmp_path, images):
    """In the table itself, and under two names of one image."""
    write_label_file(tmp_path / "l.csv", LABELS, "wide")
    lines = (tmp_path / "l.csv").read_text().splitlines(keepends=True)
    for again, folder in ((lines[1], None), (lines[1].replace("a/001.png", "a/001"), images)):
        (tmp_path / "t.csv").write_text("".join(lines) + again)
        with pytest.raises(UserError, match='t.csv: image "a/001.png" is there twice; keep one set of landmarks an im'):
            convert(tmp_path / "t.csv", tmp_path / "m.csv", folder=folder)
    marks = {"markups": [{"type": "Fiducial", "coordinateSystem": "LPS", "controlPoints": [
        {"label": "a", "position": [1, 1, 1], "positionStatus": "defined"}]}]}
    (tmp_path / "v").mkdir()
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.eye(4)), tmp_path / "v/c0.nii.gz")
    (tmp_path / "s").mkdir()
    for name in ("c0.mrk.json", "c0.nii.gz.mrk.json"):
        (tmp_path / "s" / name).write_text(json.dumps(marks))
    with pytest.raises(UserError, match='s: image "c0.nii.gz" is there twice'):
        convert(tmp_path / "s", tmp_path / "m.csv", folder=tmp_path / "v")


def test_landmarks_beside_their_image_are_noted(tmp_path, images, run_main):
    """Past the border of an image that is at hand; at negative numbers where it is not. On the border is inside."""
    points = np.array([[-0.5, -0.5], [39.5, 59.5], [5, 60]])
    second = np.nan_to_num(LABELS.rows[1].points)
    labels = replace(LABELS, rows=(replace(LABELS.rows[0], points=points), replace(LABELS.rows[1], points=second)))
    write_label_file(tmp_path / "l.csv", labels, "wide")
    status, out, error = run_main("core.formats.convert", tmp_path / "l.csv", tmp_path / "m.csv", "--images", images)
    assert status == 0 and error == (f'note: {tmp_path}/l.csv: 1 landmarks lie outside their image, such as '
                                     f'"{NAMES[2]}" of image "a/001.png" at (60, 5)\n')
    assert convert(tmp_path / "l.csv", tmp_path / "n.csv") == []
    points[0] = -1, 7
    write_label_file(tmp_path / "k.csv", labels, "wide")
    assert f'"{NAMES[0]}" of image "a/001.png" at (7, -1)' in convert(tmp_path / "k.csv", tmp_path / "o.csv")[0]


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
