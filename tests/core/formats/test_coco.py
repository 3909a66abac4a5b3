"""COCO keypoints against pycocotools and hand-written files."""

import json

import pytest
from pycocotools.coco import COCO

from core.errors import UserError
from core.formats.coco import read_coco, write_coco
from tests.core.formats.label_sets import LABELS, NAMES, same


def content(**changes):
    """Two images of which one is annotated: x, y, v of three landmarks."""
    entry = {"id": 7, "image_id": 3, "category_id": 1, "num_keypoints": 2, "keypoints": [1.5, 2, 2, 3, 4.25, 1, 9, 9, 0]}  # noqa: E501
    return {"images": [{"id": 3, "file_name": "a.png", "height": 20, "width": 30}, {"id": 4, "file_name": "b.png"}],
            "categories": [{"id": 1, "name": "head", "keypoints": list(NAMES)}], "annotations": [entry], **changes}


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def test_pycocotools_reads_ours(tmp_path):
    write_coco(tmp_path / "c.json", LABELS)
    theirs = COCO(tmp_path / "c.json")
    assert theirs.loadCats([1])[0]["keypoints"] == list(NAMES)
    (image,) = [each for each in theirs.dataset["images"] if each["file_name"] == "a/001.png"]
    (entry,) = theirs.loadAnns(theirs.getAnnIds(imgIds=image["id"]))
    assert (image["width"], image["height"], entry["num_keypoints"]) == (60, 40, 3)
    assert entry["keypoints"] == pytest.approx([10.123456789, 20 + 1 / 3, 1, 59.5, -0.5, 2, 0.3, 0, 2], abs=1e-12)
    assert entry["bbox"] == pytest.approx([0.3, -0.5, 59.2, 20.8333333333])
    assert theirs.loadAnns(theirs.getAnnIds(imgIds=2))[0]["keypoints"] == [0, 0, 0, 1e-7, 39.25, 2, 0, 0, 0]


def test_round_trip(tmp_path):
    write_coco(tmp_path / "c.json", LABELS)
    same(read_coco(tmp_path / "c.json"))


def test_what_pycocotools_wrote_is_read(tmp_path):
    """Annotations of theirs, loaded as results and saved."""
    theirs = COCO(write(tmp_path / "c.json", content())).loadRes(content()["annotations"])
    found = read_coco(write(tmp_path / "d.json", theirs.dataset))
    (row,) = found.rows  # b.png is not annotated
    assert row.image == "a.png" and row.size == (20, 30)
    assert row.points[:2].tolist() == [[2, 1.5], [4.25, 3]] and row.points[2] != pytest.approx(9, nan_ok=True)
    assert row.hidden.tolist() == [False, True, False]


def test_categories_of_one_landmark_are_joined_and_boxes_named(tmp_path):
    categories = [{"id": 1, "keypoints": ["a"]}, {"id": 2, "keypoints": ["b"]}, {"id": 3, "name": "box"}]
    entries = [{"image_id": 3, "category_id": number, "keypoints": [number, 5, 2]} for number in (2, 1)]
    entries.append({"image_id": 4, "category_id": 3, "bbox": [1, 2, 3, 4]})
    found = read_coco(write(tmp_path / "c.json", content(categories=categories, annotations=entries)))
    assert found.names == ("a", "b") and found.rows[0].points.tolist() == [[5, 1], [5, 2]]
    assert found.passed_over == ("1 annotation without keypoints",)


@pytest.mark.parametrize("changes, message", [
    ({"annotations": content()["annotations"] * 2}, 'landmark "sella" of image "a.png" is there twice'),
    ({"annotations": [{"image_id": 9, "category_id": 1, "keypoints": [1, 2, 2]}]}, "annotation 1: its image_id or cat"),
    ({"annotations": [{"image_id": 3, "category_id": 1, "keypoints": [1, 2, 2]}]}, "must be 3 times x, y, v"),
    ({"annotations": [{"image_id": 3, "category_id": 1, "keypoints": [1, 2, 3] * 3}]}, '"sella" must be 0, 1 or 2, not 3'),  # noqa: E501
    ({"annotations": [{"image_id": 3, "category_id": 1, "keypoints": ["1", 2, 2] * 3}]}, '"1" is not a finite number'),
    ({"annotations": []}, "holds no landmarks"),
    ({"categories": [{"id": 1, "name": "head", "keypoints": ["a", "a", "b"]}]}, 'category "head": its keypoints must hav'),  # noqa: E501
    ({"images": [{"id": 3, "file_name": "a.png", "height": 0, "width": 3}]}, "whole numbers above 0"),
    ({"images": {}}, "images must be a list of objects"),
    ({"categories": [{"id": {}, "name": "head", "keypoints": ["a"]}]}, "category 1: its id must be a number or a text, not {}"),  # noqa: E501
    ({"images": [{"id": [3], "file_name": "a.png"}]}, r"image 1: its id must be a number or a text, not \[3\]"),
    ({"images": [{"file_name": "a.png"}]}, "image 1: its id must be a number or a text, not null"),
    ({"images": [{"id": 3, "file_name": name} for name in ("a.png", "b.png")]}, "image 2: its id 3 is there twice"),
    ({"annotations": [{"image_id": {"a": 3}, "category_id": 1, "keypoints": [1, 2, 2]}]}, "its image_id must be a number"),  # noqa: E501
    ({"annotations": [{"image_id": 3, "category_id": [1], "keypoints": [1, 2, 2]}]}, "its category_id must be a number"),  # noqa: E501
])
def test_bad_files(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_coco(write(tmp_path / "c.json", content(**changes)))


def test_other_names(tmp_path):
    with pytest.raises(UserError, match=r'"sella" is not one of the 1 landmarks \(did you mean "selma"\?\)'):
        read_coco(write(tmp_path / "c.json", content()), ["selma"])
