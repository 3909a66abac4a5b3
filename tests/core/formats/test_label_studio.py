"""Label Studio's JSON against its own converter and hand-written files."""

import json
from dataclasses import replace

import pytest
from label_studio_converter import Converter
from label_studio_converter.imports.coco import convert_coco_to_ls

from core.errors import UserError
from core.formats.label_studio import read_label_studio, write_label_studio
from tests.core.formats.label_sets import LABELS, same


def task(image="/data/local-files/?d=i.png", **changes):
    value = {"x": 25.0, "y": 50.0, "width": 0.5, "keypointlabels": ["a"]}
    item = {"type": "keypointlabels", "from_name": "l", "to_name": "image", "original_width": 200,
            "original_height": 100, "image_rotation": 0, "value": value, **changes}
    return {"id": 1, "data": {"image": image}, "annotations": [{"result": [item]}]}


def write(path, *tasks):
    path.write_text(json.dumps(tasks))
    return path


def test_percent_of_the_image_and_of_its_corner(tmp_path):
    (row,) = read_label_studio(write(tmp_path / "l.json", task())).rows
    assert row.points.tolist() == [[49.5, 49.5]] and row.size == (100, 200) and row.image == "i.png"


@pytest.mark.parametrize("address, name", [
    ("/data/local-files/?d=a%20b/i.png", "a b/i.png"),
    ("/data/upload/3/0a1b2c3d-i.png", "i.png"),
    ("https://host/some/i%201.png?x=1", "i 1.png"),
    ("a/i.png", "a/i.png"),
])
def test_names_of_images(tmp_path, address, name):
    assert read_label_studio(write(tmp_path / "l.json", task(address))).rows[0].image == name


def test_the_tasks_are_there_when_all_is(tmp_path, monkeypatch):
    """A conversion that is cut is not taken for a whole one by what looks for its file."""
    monkeypatch.setattr("core.formats.label_studio.write_atomically", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_label_studio(tmp_path / "l.json", LABELS)
    assert not (tmp_path / "l.json").exists()


def test_the_converter_reads_ours(tmp_path):
    """Its short JSON and the labelling interface written beside; the server numbers tasks and annotations."""
    write_label_studio(tmp_path / "l.json", LABELS)
    tasks = json.loads((tmp_path / "l.json").read_text())
    write(tmp_path / "l.json", *({**each, "id": number} for number, each in enumerate(tasks)))
    Converter(str(tmp_path / "l_interface.xml"), str(tmp_path)).convert_to_json_min(str(tmp_path / "l.json"), str(tmp_path / "o"),  # noqa: E501
                                                                         is_dir=False)
    first, second = json.loads(next((tmp_path / "o").glob("*.json")).read_text())
    theirs = {point["keypointlabels"][0]: (point["x"] / 100 * 60 - 0.5, point["y"] / 100 * 40 - 0.5)
              for point in first["landmarks"]}
    assert list(theirs) == list(LABELS.names) and len(second["landmarks"]) == 1
    for name, (y, x) in zip(LABELS.names, LABELS.rows[0].points.tolist(), strict=True):
        assert theirs[name] == pytest.approx((x, y), abs=1e-6)


def test_what_the_converter_wrote_is_read(tmp_path):
    """It makes tasks of COCO's annotations, a label for each category; x / width without a shift, as on a canvas."""
    categories = [{"id": number, "name": name, "keypoints": [name]} for number, name in enumerate("ab")]
    entries = [{"id": n, "image_id": 1, "category_id": n, "keypoints": point}
               for n, point in enumerate(([10.25, 20.75, 1], [3, 0.5, 2]))]
    (tmp_path / "c.json").write_text(json.dumps({"categories": categories, "annotations": entries, "images": [
        {"id": 1, "file_name": "i.png", "width": 60, "height": 41}]}))
    convert_coco_to_ls(str(tmp_path / "c.json"), str(tmp_path / "l.json"))
    found = read_label_studio(tmp_path / "l.json")
    assert found.names == ("a", "b") and found.rows[0].image == "i.png" and found.rows[0].size == (41, 60)
    assert found.rows[0].points.ravel() == pytest.approx([20.25, 9.75, 0, 2.5], abs=1e-9)
    assert found.rows[0].hidden.tolist() == [True, False]


def test_round_trip(tmp_path):
    write_label_studio(tmp_path / "l.json", LABELS)
    same(read_label_studio(tmp_path / "l.json", LABELS.names))


def test_predictions_are_no_labels_until_they_are_accepted(tmp_path):
    write_label_studio(tmp_path / "l.json", replace(LABELS, proposed=True))
    with pytest.raises(UserError, match=r"holds predictions only; accept them in Label Studio \(Submit\)"):
        read_label_studio(tmp_path / "l.json")
    first, second = json.loads((tmp_path / "l.json").read_text())
    accepted = {**first, "annotations": [{"id": 5, **first["predictions"][0]}]}
    found = read_label_studio(write(tmp_path / "m.json", accepted, second), LABELS.names)
    same(found, replace(LABELS, rows=LABELS.rows[:1]))


def test_other_shapes_and_cancelled_annotations(tmp_path):
    one = task()
    one["annotations"][0]["result"].append({"type": "rectanglelabels", "value": {}})
    one["annotations"].append({"was_cancelled": True, "result": []})
    assert read_label_studio(write(tmp_path / "l.json", one)).passed_over == ("1 rectanglelabels",)


@pytest.mark.parametrize("value, message", [
    ({**task(), "annotations": task()["annotations"] * 2}, "task 1 has 2 annotations; keep the one that counts"),
    (task(image_rotation=90), "its image was turned"),
    (task(original_width=None, original_height=None), "a point without original_width"),
    (task(value={"x": 1, "y": 2, "keypointlabels": ["a", "b"]}), "a point must have one label"),
    (task(value={"x": 1, "keypointlabels": ["a"]}), '"a": null is not a finite number'),
    ({"image": "i.png", "l": []}, 'export the project as "JSON", not as "JSON-MIN"'),
    ({"data": {"n": 3}, "annotations": [{"result": []}]}, "task 1 names no image"),
    ({"data": {"image": "i.png"}}, "holds no landmarks"),
])
def test_bad_files(tmp_path, value, message):
    with pytest.raises(UserError, match=message):
        read_label_studio(write(tmp_path / "l.json", value))
