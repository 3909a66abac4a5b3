"""CVAT's XML against datumaro and hand-written files."""

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from core.formats.cvat import read_cvat, write_cvat
from tests.core.formats.label_sets import FIXTURES, LABELS, needs_tools, read_by_tool, same


def xml(path, inner, root="annotations"):
    path.write_text(f'<?xml version="1.0" encoding="utf-8"?><{root}><version>1.1</version>{inner}</{root}>')
    return path


def test_what_datumaro_wrote_is_read():
    """tools.py says with which numbers: they count from the corner."""
    found = read_cvat(FIXTURES / "cvat.xml")
    assert found.names == ("sella", "nasion") and [row.image for row in found.rows] == ["a/001.jpg", "b 2.jpg"]
    assert found.rows[0].points.tolist() == [[20.25, 9.75], [0, 3]] and found.rows[0].hidden.tolist() == [True, False]
    np.testing.assert_allclose(found.rows[1].points, [[np.nan, np.nan], [38.51, 59.49]], rtol=0, atol=1e-12)
    assert found.rows[0].size == (40, 60) and found.passed_over == ("2 box",)


@needs_tools
def test_datumaro_reads_ours(tmp_path):
    for row in LABELS.rows:
        (tmp_path / "images" / row.image).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((40, 60), np.uint8)).save(tmp_path / "images" / row.image)
    write_cvat(tmp_path / "c.xml", LABELS)
    theirs = read_by_tool(tmp_path / "c.xml")
    first = dict(zip(LABELS.names, (LABELS.rows[0].points[:, ::-1] + 0.5).tolist(), strict=True))
    assert set(theirs) == {"a/001", "b 2"} and theirs["a/001"].keys() == first.keys()
    for name, place in first.items():
        assert theirs["a/001"][name] == pytest.approx(place, abs=5e-3)  # datumaro keeps two decimals
    assert theirs["b 2"] == {"nasion": pytest.approx([0.5, 39.75], abs=5e-3)}


def test_round_trip(tmp_path):
    write_cvat(tmp_path / "c.xml", LABELS)
    same(read_cvat(tmp_path / "c.xml"))


def test_skeletons_and_points_outside(tmp_path):
    points = '<points label="{}" occluded="{}" outside="{}" points="{}"></points>'
    inner = points.format("b", 1, 0, "1.50,2.00") + points.format("a", 0, 1, "7.00,8.00")
    image = f'<image name="i.png" width="9" height="8"><skeleton label="head">{inner}</skeleton></image>'
    labels = "".join(f"<label><name>{name}</name><type>{kind}</type></label>"
                     for name, kind in (("head", "skeleton"), ("a", "points"), ("b", "points")))
    empty = '<image name="j.png" width="9" height="8"></image>'  # not looked at
    found = read_cvat(xml(tmp_path / "c.xml", f"<meta><labels>{labels}</labels></meta>{image}{empty}"))
    (row,) = found.rows
    assert found.names == ("a", "b") and np.isnan(row.points[0]).all() and row.points[1].tolist() == [1.5, 1]
    assert row.hidden.tolist() == [False, True]


@pytest.mark.parametrize("inner, message", [
    ('<track id="0"/>', 'has the tracks of a video; export the task as "CVAT for images 1.1"'),
    ('<image name="i" width="x" height="8"><points label="a" points="1,2"/></image>', 'width must be a whole number'),
    ('<image name="i"><points label="a" points="1,2;3,4"/></image>', '"a" has 2 points; give every landmark a label'),
    ('<image name="i"><points label="a" points="1,y"/></image>', '"y" is not a number'),
    ('<image name="i"><points points="1,2"/></image>', "points without a label"),
    ('<image name="i"><points label="a" points="1,2"/></image>' * 2, 'image "i" is there twice'),
    ("<image", "is not a readable XML file"),
    ("", "holds no landmarks"),
])
def test_bad_files(tmp_path, inner, message):
    with pytest.raises(UserError, match=message):
        read_cvat(xml(tmp_path / "c.xml", inner))


def test_other_xml(tmp_path):
    with pytest.raises(UserError, match="its root is <svg>"):
        read_cvat(xml(tmp_path / "c.xml", "", "svg"))
    (tmp_path / "d.xml").write_text('<!DOCTYPE a [<!ENTITY b "c">]><annotations/>')
    with pytest.raises(UserError, match="has a document type"):
        read_cvat(tmp_path / "d.xml")
