"""Labels changed where they lie: what is read back, what stays as it was, and the splits."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
from PIL import Image

from core.data.folder_layout import read_folder
from core.data.labels import FolderLabels, new_data_set
from core.formats.markups import read_markups, write_markups
from tests.conftest import error_of

NAN = [np.nan, np.nan]


def flat(root, table, **description):
    """A data set of three images of 30 x 40 pixels."""
    (root / "images/a").mkdir(parents=True)
    for name in ("a/one", "a/two", "three"):
        Image.fromarray(np.zeros((30, 40), np.uint8)).save(root / f"images/{name}.png")
    (root / "landmarks.csv").write_text(table)
    values = {"landmarks": ["tip", "base"], "splits": {"train": ["a/one"], "validation": ["three"]}, **description}
    (root / "dataset.json").write_text(json.dumps(values))
    return FolderLabels(root, root / "dataset.json")


TABLE = "image,patient,spacing_x,spacing_y,tip_x,tip_y,base_x,base_y\n" \
        "a/one.png,p1,0.1,0.2,1.25,2,0.1,0.30000000000000004\nthree,p2,,,5,6,,\n"


def test_one_image_changes_and_the_others_stay_number_for_number(tmp_path):
    labels = flat(tmp_path, TABLE, spacing_mm=1)
    before = labels.stamp()
    labels.write("a/two", np.array([[7, 8.5], NAN]))
    assert labels.stamp() != before
    header, one, three, two = (tmp_path / "landmarks.csv").read_text().splitlines()
    assert one == "a/one.png,p1,0.1,0.2,1.25,2.0,0.1,0.30000000000000004" and three == "three,p2,,,5.0,6.0,,"
    assert two == "a/two,,,,8.5,7.0,,"  # (y, x) inside, (x, y) in files
    source = read_folder(tmp_path, None, tmp_path / "dataset.json", ())
    assert [record.id for record in source.splits["train"]] == ["a/one", "a/two"]
    assert source.splits["train"][1].landmarks.tolist()[0] == [7, 8.5]


def test_spacing_of_a_row_counts(tmp_path):
    labels = flat(tmp_path, TABLE, spacing_mm=0.5)
    assert labels.records["a/one"].spacing == (0.2, 0.1) and labels.records["a/two"].spacing == (0.5, 0.5)


def test_the_last_label_takes_an_image_out_of_its_split(tmp_path):
    labels = flat(tmp_path, TABLE, spacing_mm=1)
    labels.write("a/two", np.array([[7, 8], NAN]))
    labels.write("a/two", np.array([NAN, NAN]))
    assert "two" not in (tmp_path / "landmarks.csv").read_text()
    labels.write("three", np.array([NAN, NAN]))  # its patient stays
    assert (tmp_path / "landmarks.csv").read_text().splitlines()[2] == "three,p2,,,,,,"
    splits = json.loads((tmp_path / "dataset.json").read_text())["splits"]
    assert splits == {"train": ["a/one"], "validation": []}
    read_folder(tmp_path, None, tmp_path / "dataset.json", ())


def test_a_patient_stays_in_one_split(tmp_path):
    labels = flat(tmp_path, TABLE, patients={"a/two.png": "p2"})
    labels.write("a/two", np.array([[1, 1], [2, 2]]))
    assert json.loads((tmp_path / "dataset.json").read_text())["splits"]["validation"] == ["three", "a/two"]
    assert labels.training() == ["a/one"]


def test_drawn_splits_are_not_drawn_for_good_by_asking(tmp_path):
    labels = flat(tmp_path, TABLE, splits={"train": 0.5, "test": 0.5, "seed": 0})
    assert len(labels.training()) == 1 and not (tmp_path / "dataset.splits.json").exists()
    labels.write("a/two", np.array([[1, 1], [2, 2]]))
    assert json.loads((tmp_path / "dataset.json").read_text())["splits"] == {"train": 0.5, "test": 0.5, "seed": 0}


def test_a_long_table_becomes_a_wide_one(tmp_path):
    labels = flat(tmp_path, "image,landmark,x,y,radius90\na/one,tip,1,2,9\na/one,base,3,4,9\nthree,tip,5,6,9\n")
    labels.write("a/one", np.array([[2, 1], [8, 8]]))
    assert {key: points.tolist() for key, points in labels.read().items()}["a/one"] == [[2, 1], [8, 8]]
    assert labels.read()["three"][0].tolist() == [6, 5]


def volumes(root, **description):
    """Two volumes with a tilted affine."""
    (root / "images").mkdir(parents=True)
    affine = np.array([[0, -2, 0, 30], [1.5, 0, 0, -7], [0, 0, 3, 11], [0, 0, 0, 1]], dtype=float)
    for name in ("c0", "c1"):
        nibabel.save(nibabel.Nifti1Image(np.zeros((10, 12, 14), np.int16), affine), root / f"images/{name}.nii.gz")
    values = {"landmarks": ["tip", "base"], "splits": {"train": 1.0}, **description}
    (root / "dataset.json").write_text(json.dumps(values))
    return affine


def test_markup_files_of_volumes(tmp_path):
    affine = volumes(tmp_path)
    (tmp_path / "landmarks").mkdir()
    labels = FolderLabels(tmp_path, tmp_path / "dataset.json")
    points = np.array([[3, 4, 5.25], [np.nan] * 3])
    labels.write("c1", points)
    file = tmp_path / "landmarks/c1.mrk.json"
    world = read_markups(file, ["tip", "base"])
    assert np.allclose(world[0], (affine @ [5.25, 4, 3, 1])[:3]) and np.isnan(world[1]).all()
    assert np.allclose(labels.read()["c1"], points, equal_nan=True)
    write_markups(file, ["tip", "base"], np.array([[1 / 3, 2 / 7, 20.1], [np.nan] * 3]))
    first = json.loads(file.read_text())["markups"][0]["controlPoints"][0]["position"]
    labels.write("c1", np.array([labels.read()["c1"][0], [1, 1, 1]]))  # pixels and back lose the last digits
    assert json.loads(file.read_text())["markups"][0]["controlPoints"][0]["position"] == first
    labels.write("c1", np.full((2, 3), np.nan))
    assert not file.exists()


def test_a_table_in_mm_of_the_patient(tmp_path):
    affine = volumes(tmp_path, coordinates="LPS")
    columns = ",".join(f"{name}_{axis}" for name in ("tip", "base") for axis in "xyz")
    (tmp_path / "landmarks.csv").write_text(f"image,{columns}\nc0,-20,3,20,,,\n")
    labels = FolderLabels(tmp_path, tmp_path / "dataset.json")
    labels.write("c1", np.array([[3, 4, 5], [np.nan] * 3]))
    lines = (tmp_path / "landmarks.csv").read_text().splitlines()
    assert lines[1] == "c0,,,,,-20.0,3.0,20.0,,,"
    right, front, up, _ = affine @ [5, 4, 3, 1]
    assert lines[2] == f"c1,,,,,{-right},{-front},{up},,,"
    assert np.allclose(labels.read()["c1"][0], [3, 4, 5])


def test_a_kind_that_is_only_read_is_refused(tmp_path):
    volumes(tmp_path)
    (tmp_path / "landmarks").mkdir()
    (tmp_path / "landmarks/c0.fcsv").write_text("# CoordinateSystem = 0\n# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,"
                                                "label,desc,associatedNodeID\n1,20,-3,20,0,0,0,1,1,1,0,tip,,\n")
    assert "c0.fcsv (landmarks of c0) is of a kind that is read but not written" in error_of(
        FolderLabels, tmp_path, tmp_path / "dataset.json")


def test_a_new_data_set_of_images_that_lie_elsewhere(tmp_path):
    images, other = tmp_path / "scans", tmp_path / "others"
    for folder in (images, other):
        folder.mkdir()
        Image.fromarray(np.zeros((30, 40), np.uint8)).save(folder / "one.png")
    root = tmp_path / "mine"
    new_data_set(root, images, ["tip", "base"], 2)
    labels = FolderLabels(root, root / "dataset.json")
    labels.write("one", np.array([[1, 2], [3, 4]]))
    new_data_set(root, images, ["tip", "base"], 2)  # again: it stays
    assert labels.read()["one"].tolist() == [[1, 2], [3, 4]] and labels.training() == []  # one label: for testing
    assert "is a data set of the images in" in error_of(new_data_set, root, other, ["tip", "base"], 2)
    assert "is not empty and has no dataset.json" in error_of(new_data_set, images, other, ["tip"], 2)


@pytest.mark.parametrize("excluded", [(), ("three",)])
def test_excluded_images_are_not_read(tmp_path, excluded):
    flat(tmp_path, TABLE)
    (tmp_path / "images/three.png").write_bytes(b"damaged")
    if excluded:
        labels = FolderLabels(tmp_path, tmp_path / "dataset.json", excluded)
        assert sorted(labels.records) == sorted(labels.read() | {"a/two": 0}) == ["a/one", "a/two"]
    else:
        assert "three.png" in error_of(FolderLabels, tmp_path, tmp_path / "dataset.json")
