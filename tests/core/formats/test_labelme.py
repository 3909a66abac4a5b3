"""LabelMe's files against its own library and hand-written ones."""

import json

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from core.formats.labelme import read_labelme, write_labelme
from tests.core.formats.label_sets import LABELS, same


@pytest.fixture
def label_file():
    """LabelMe's class; its package opens Qt's libraries, which some machines lack."""
    return pytest.importorskip("labelme", exc_type=ImportError).LabelFile


def picture(path, size=(40, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros(size, np.uint8)).save(path)
    return path


def test_labelme_reads_ours(tmp_path, label_file):
    """The picture is found from the file, and a point at a pixel's centre is half a pixel from the corner."""
    images = {row.image: picture(tmp_path / "images" / row.image) for row in LABELS.rows}
    write_labelme(tmp_path / "out", LABELS, images)
    theirs = label_file(str(tmp_path / "out/a/001.json"))
    assert theirs.image_path == "../../images/a/001.png" and theirs.image_data
    assert [shape["label"] for shape in theirs.shapes] == list(LABELS.names)
    assert {shape["shape_type"] for shape in theirs.shapes} == {"point"}
    places = np.array([shape["points"][0] for shape in theirs.shapes])
    np.testing.assert_allclose(places, LABELS.rows[0].points[:, ::-1] + 0.5, rtol=0, atol=1e-12)
    assert len(label_file(str(tmp_path / "out/b 2.json")).shapes) == 1


def test_what_labelme_wrote_is_read(tmp_path, label_file):
    shapes = [{"label": name, "points": points, "shape_type": kind, "flags": {}, "group_id": None, "description": ""}
              for name, kind, points in (("b", "point", [[10.75, 3.5]]), ("box", "rectangle", [[1, 2], [3, 4]]),
                                         ("a", "point", [[0.5, 40]]))]
    (tmp_path / "x").mkdir()
    pixels = picture(tmp_path / "p.png").read_bytes()
    label_file().save(str(tmp_path / "x/p.json"), shapes, "..\\images\\p.png", 40, 60, pixels)
    found = read_labelme(tmp_path, ["a", "b"])
    assert found.rows[0].points.tolist() == [[39.5, 0], [3, 10.25]]
    assert (found.rows[0].image, found.rows[0].size, found.passed_over) == ("x/p.png", (40, 60), ("1 rectangle",))


def test_round_trip(tmp_path):
    write_labelme(tmp_path / "out", LABELS)
    (tmp_path / "out/settings.json").write_text("{}")
    same(read_labelme(tmp_path / "out", LABELS.names), hidden=False)


def test_other_json_files_of_a_folder_are_named(tmp_path):
    """One that is no JSON may be a damaged file of LabelMe: it is refused; another one is passed over by its name."""
    write_labelme(tmp_path / "out", LABELS)
    (tmp_path / "out/a/settings.json").write_text("{}")
    assert read_labelme(tmp_path / "out").passed_over == ("1 files not of LabelMe, such as a/settings.json",)
    whole = (tmp_path / "out/a/001.json").read_bytes()
    for damaged in (b"", whole[:1], bytes(len(whole)), whole[:5], b"<html></html>", '{"a": 1}'.encode("utf-16"),
                    whole.replace(b'"', b'"\xff', 1), b"[" * 100_000):
        (tmp_path / "out/a/001.json").write_bytes(damaged)
        with pytest.raises(UserError, match="out/a/001.json") as caught:
            read_labelme(tmp_path / "out")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes, message", [
    ({"shapes": 3}, "shapes must be a list of objects"),
    ({"imagePath": None}, "imagePath must be a text, not null"),
    ({"shapes": [{"label": "a", "shape_type": "point", "points": [[1, 2], [3, 4]]}]}, r"a point must be \[\[x, y\]\]"),
    ({"shapes": [{"label": "a", "shape_type": "point", "points": [[1, None]]}]}, "null is not a finite number"),
    ({"shapes": [{"label": "", "shape_type": "point", "points": [[1, 2]]}]}, "shape 1: label must be a text"),
    ({"shapes": [{"label": "a", "shape_type": "point", "points": [[1, 2]]}] * 2}, '"a" of image "p.png" is there twice'),  # noqa: E501
])
def test_bad_files(tmp_path, changes, message):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"version": "5.0.0", "flags": {}, "shapes": [], "imagePath": "p.png", **changes}))
    with pytest.raises(UserError, match=message):
        read_labelme(path)
