"""TPS files against ktch and hand-written ones; y counts from the lower edge."""

from dataclasses import replace

import numpy as np
import pytest

from core.errors import UserError
from core.formats.tps import read_tps, write_tps
from tests.core.formats.label_sets import FIXTURES, LABELS, SIZE, needs_tools, read_by_tool, same


def tps(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def size_of(_name):
    return SIZE


def test_what_ktch_wrote_is_read():
    """tools.py says with which numbers; an image 40 px high: 20.75 above the lower edge is row 18.75."""
    found = read_tps(FIXTURES / "landmarks.tps", ["sella", "nasion"], size_of)
    assert [row.image for row in found.rows] == ["a/001.png", "b 2.png"]
    np.testing.assert_allclose(found.rows[0].points, [[18.75, 9.75], [39, 3]], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.rows[1].points, [[0.49, 59.49], [np.nan, np.nan]], rtol=0, atol=1e-12)
    assert found.passed_over == ("2 SCALE of an unknown unit",) and found.rows[0].spacing is None


@needs_tools
def test_ktch_reads_ours(tmp_path):
    write_tps(tmp_path / "l.tps", LABELS)
    theirs = read_by_tool(tmp_path / "l.tps")
    points = LABELS.rows[0].points
    for number, (y, x) in enumerate(points.tolist(), 1):
        assert theirs["a/001.png"][str(number)] == pytest.approx([x + 0.5, 40 - (y + 0.5)], abs=1e-12)
    assert theirs["b 2.png"]["1"] == [-1, -1]


def test_by_hand(tmp_path):
    rows = (replace(LABELS.rows[0], points=np.array([[0, 0], [39, 59], [np.nan] * 2]), spacing=(0.2, 0.1)),)
    write_tps(tmp_path / "l.tps", replace(LABELS, rows=rows))
    assert (tmp_path / "l.tps").read_text() == "LM=3\n0.5 39.5\n59.5 0.5\n-1 -1\nIMAGE=a/001.png\nID=0\nSCALE=0.1\n"


def test_round_trip(tmp_path):
    write_tps(tmp_path / "l.tps", LABELS)
    same(read_tps(tmp_path / "l.tps", LABELS.names, size_of), hidden=False)
    assert read_tps(tmp_path / "l.tps", None, size_of).names == ("1", "2", "3")


def test_curves_and_missing_landmarks(tmp_path):
    found = read_tps(tps(tmp_path / "l.tps", "lm=2", "1 2", "NA NA", "CURVES=1", "POINTS=2", "1 1", "2 2",
                         "IMAGE=x\\i.png", "LM=0", "IMAGE=j.png"), None, size_of)
    assert found.rows[0].image == "x/i.png" and found.rows[0].points[0].tolist() == [37.5, 0.5]
    assert np.isnan(found.rows[0].points[1]).all() and found.passed_over == ("1 curve",)


@pytest.mark.parametrize("lines, message", [
    (["LM=2", "1 2"], r'its end: expected "x y"'),
    (["LM=1", "1 2 3", "IMAGE=i"], 'line 2: expected "x y", found "1 2 3"'),
    (["LM=1", "1 y", "IMAGE=i"], '"y" is not a number'),
    (["LM=1", "1 2"], "line 1: the image has no line IMAGE="),
    (["LM3=1", "1 2 3", "IMAGE=i"], "found 3D landmarks"),
    (["LM=x"], '"x" is not a number of points'),
    (["LM=1", "1 2", "IMAGE=i", "LM=1", "1 2", "IMAGE=i"], 'image "i" is there twice'),
    ([], "holds no landmarks"),
])
def test_bad_files(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read_tps(tps(tmp_path / "l.tps", *lines), None, size_of)


def test_count_size_and_place(tmp_path):
    path = tps(tmp_path / "l.tps", "LM=1", "1 2", "IMAGE=i.png")
    with pytest.raises(UserError, match="image i.png has 1 landmarks, not 2: a, b"):
        read_tps(path, ["a", "b"], size_of)
    with pytest.raises(UserError, match="y counts from the lower edge of i.png: name the folder"):
        read_tps(path)
    outside = replace(LABELS, rows=(replace(LABELS.rows[0], points=np.full((3, 2), -2.0)),))
    with pytest.raises(UserError, match='landmark "sella" of image "a/001.png" lies outside'):
        write_tps(path, outside)


def test_an_image_that_is_not_there_is_told_with_the_file(tmp_path):
    def unknown(_name):
        raise UserError("no such image")

    path = tps(tmp_path / "a.tps", "LM=1", "1 2", "IMAGE=gone.png")
    with pytest.raises(UserError, match=r"a\.tps, line \d: no such image"):
        read_tps(path, ["sella"], unknown)
