"""Label files of tools in a folder data set: each gives the same records; two of them are refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from core.data.layouts import read_layout
from core.errors import UserError
from core.formats.label_files import write_label_file
from core.formats.labels import LabelSet
from core.formats.points import FolderRow

NAMES = ("b", "a")
SIZE = (40, 60)
PLACES = {"landmarks.csv": "long", "landmarks": "labelme", "images": "labelme", "landmarks.json": "coco",
          "landmarks.xml": "cvat", "landmarks.tps": "tps"}
POINTS = np.array([[20 + 1 / 3, 10.125], [39.5, 4]])  # (y, x)


def labels(names=("x/1.png", "2.png", "3.png")):
    return LabelSet(NAMES, tuple(FolderRow(name, POINTS - number, size=SIZE) for number, name in enumerate(names)))


@pytest.fixture
def root(tmp_path):
    for name in ("x/1.png", "2.png", "3.png", "unlabelled.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros(SIZE, np.uint8)).save(path)
    splits = {"train": ["x/1"], "validation": ["2"], "test": ["3"]}
    (tmp_path / "dataset.json").write_text(json.dumps({"landmarks": NAMES, "splits": splits}))
    return tmp_path


@pytest.mark.parametrize("place, kind", [*PLACES.items(), ("landmarks.json", "label-studio")])
def test_each_is_read(root, place, kind):
    write_label_file(root / place, labels(), kind)
    source = read_layout("folder", root)
    for number, split in enumerate(("train", "validation", "test")):
        (record,) = source.splits[split]
        np.testing.assert_allclose(record.truth, POINTS - number, rtol=0, atol=1e-9)
    assert source.landmark_names == NAMES and [record.id for record in source.unlabelled] == ["unlabelled"]


@pytest.mark.parametrize("one, other", [("landmarks.csv", "landmarks.json"), ("landmarks.xml", "landmarks.tps"),
                                        ("landmarks.csv", "images"), ("landmarks.json", "landmarks")])
def test_two_are_refused(root, one, other):
    for place in (one, other):
        write_label_file(root / place, labels(), PLACES[place])
    with pytest.raises(UserError, match=r"has both .* and .*; give one of them, see datasets/README.md"):
        read_layout("folder", root)


def test_folders_that_a_tool_forgot(root):
    write_label_file(root / "landmarks.xml", labels(("1.png", "task/2.png", "3.png")), "cvat")
    assert [record.id for record in read_layout("folder", root).labelled] == ["x/1", "2", "3"]


@pytest.mark.parametrize("found, message", [
    (labels(("x/1.png", "2.png", "4.png")), 'image "4.png" is not in images/'),
    (labels(("x/1.png", "1.png", "3.png")), 'landmarks.json: image "1.png" is there twice'),
    (replace(labels(), names=("b", "c")), r'"c" is not one of the 2 landmarks'),
    (replace(labels(), rows=tuple(replace(row, size=(20, 30)) for row in labels().rows)), "is 30 x 20 pixels there"),
])
def test_what_does_not_fit(root, found, message):
    write_label_file(root / "landmarks.json", found, "coco")
    with pytest.raises(UserError, match=message):
        read_layout("folder", root)


def test_sidecars_of_another_kind_are_none(root):
    """A .json beside an image tells of the scanner, not of landmarks."""
    (root / "images/2.json").write_text('{"Manufacturer": "x"}')
    write_label_file(root / "landmarks.xml", labels(), "cvat")
    assert len(read_layout("folder", root).labelled) == 3


def test_what_else_a_file_has_is_said(root, capsys):
    write_label_file(root / "landmarks.xml", labels(), "cvat")
    text = (root / "landmarks.xml").read_text().replace("</image>", '<box label="b"/></image>')
    (root / "landmarks.xml").write_text(text)
    read_layout("folder", root)
    assert capsys.readouterr().err == f"note: {root / 'landmarks.xml'} also has 3 box, passed over\n"


def test_volumes_take_no_file_of_pictures(root):
    np.save(root / "v.npy", np.zeros((3, 4, 5), np.float32))
    for path in (root / "images").rglob("*.png"):
        path.unlink()
    (root / "v.npy").rename(root / "images/v.npy")
    write_label_file(root / "landmarks.json", labels(("v",)), "coco")
    with pytest.raises(UserError, match="landmarks.json holds landmarks of flat images, but the images are volumes"):
        read_layout("folder", root, dims=3)
