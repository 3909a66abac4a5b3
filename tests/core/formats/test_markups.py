"""3D Slicer's landmark files: hand-written files of every form, round trips, every malformed file, real volumes."""

import json
import math

import nibabel as nib
import numpy as np
import pytest

from core.errors import UserError
from core.formats.markups import is_markup, read_labels, read_markups, write_markups
from tests.conftest import DATA

DATA = DATA / "mouse_ct"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="real data not found; set LANDMARK_DATA")
COLUMNS = "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"
A = {"label": "a", "position": [1.0, 2.0, 3.0]}


def markups(path, *points, **node):
    path.write_text(json.dumps({"markups": [{"type": "Fiducial", "controlPoints": points, **node}]}))
    return path


def fcsv(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def mrk(tmp_path):
    return tmp_path / "v.mrk.json"


@pytest.mark.parametrize(
    "node, ras",
    [
        ({"coordinateSystem": "LPS"}, [-1, -2, 3]),
        ({"coordinateSystem": "RAS"}, [1, 2, 3]),
        ({"coordinateSystem": "1"}, [-1, -2, 3]),
        ({"coordinateSystem": 0}, [1, 2, 3]),
        ({}, [-1, -2, 3]),
        ({"coordinateUnits": "cm"}, [-10, -20, 30]),
        ({"coordinateUnits": "um", "coordinateSystem": "RAS"}, [0.001, 0.002, 0.003]),
        ({"coordinateUnits": ["m", "UCUM", "meter"]}, [-1000, -2000, 3000]),
    ],
)
def test_json_coordinates(mrk, node, ras):
    world = read_markups(markups(mrk, A, **node), ["a"])
    assert world.shape == (1, 3) and world.dtype == np.float64
    assert world[0] == pytest.approx(ras, abs=1e-12)


def test_json_order_and_points_that_are_not_there(mrk):
    unset = {"label": "b", "position": [7, 7, 7], "positionStatus": "undefined"}
    missing = {"label": "c", "position": "", "positionStatus": "missing"}
    path = markups(mrk, {"label": "d", "position": [4, 5, 6], "positionStatus": "defined"}, unset, missing, A)
    world = read_markups(path, ["a", "b", "c", "d", "e"])
    assert world[[0, 3]].tolist() == [[-1, -2, 3], [-4, -5, 6]] and np.isnan(world[[1, 2, 4]]).all()
    assert read_labels(path) == ["d", "b", "c", "a"]


def test_the_point_list_is_found_beside_other_markups(mrk):
    line = {"type": "Line", "controlPoints": [{"label": "a", "position": [9, 9, 9]}]}
    mrk.write_text(json.dumps({"markups": [line, {"type": "Fiducial", "controlPoints": [A]}]}))
    assert read_markups(mrk, ["a"]).tolist() == [[-1, -2, 3]]


@pytest.mark.parametrize(
    "system, ras",
    [
        (["# CoordinateSystem = LPS"], [-1.5, 2, 3]),
        (["# CoordinateSystem = RAS"], [1.5, -2, 3]),
        (["# CoordinateSystem = 1"], [-1.5, 2, 3]),
        (["# CoordinateSystem = 0"], [1.5, -2, 3]),
        ([], [1.5, -2, 3]),
    ],
)
def test_fcsv_coordinates(tmp_path, system, ras):
    lines = ["# Markups fiducial file version = 4.10", *system, COLUMNS, "node_0,1.5,-2,3,0,0,0,1,1,1,0,a,,"]
    assert read_markups(fcsv(tmp_path / "v.fcsv", *lines), ["a"]).tolist() == [ras]


def test_fcsv_columns_quotes_and_status(tmp_path):
    rows = ['"tip, left",1,2,3,1,1', 'say ""hi,4,5,6,1,1']
    path = fcsv(tmp_path / "v.fcsv", "# Fiducial List file v.fcsv", "# columns = label,x,y,z,sel,vis", *rows)
    assert read_labels(path) == ["tip, left", 'say ""hi']
    assert read_markups(path, ["tip, left", 'say ""hi']).tolist() == [[1, 2, 3], [4, 5, 6]]
    rows = [f"{i},{i},0,0,0,0,0,1,1,1,0,p{i},,,{i},0" for i in range(4)]  # what Slicer 5 writes, and a blank line
    world = read_markups(fcsv(tmp_path / "w.fcsv", COLUMNS, rows[0], "", *rows[1:]), ["p0", "p1", "p2", "p3"])
    assert world[2].tolist() == [2, 0, 0] and np.isnan(world[[0, 1, 3]]).all()  # status 2 is "defined"


@pytest.mark.parametrize(
    "node, message",
    [
        ({"coordinateSystem": "IJK"}, 'coordinate system "IJK" is not one of LPS, RAS, 0 '),
        ({"coordinateSystem": True}, "coordinate system true is not one of"),
        ({"coordinateUnits": "inch"}, 'coordinateUnits "inch" is not one of nm, um, µm, mm, cm, dm, m'),
        ({"coordinateUnits": ["mm", "SCT", "x"]}, r'coordinateUnits \["mm", "SCT", "x"\] is not one of'),
        ({"controlPoints": {}}, "controlPoints must be a list"),
        ({"controlPoints": [1]}, "controlPoints must be a list of objects"),
        ({"controlPoints": []}, "has no control points"),
        ({"type": "Curve"}, r"has 0 point lists \(type Fiducial\) instead of one; its markups are: Curve"),
    ],
)
def test_bad_json_node(mrk, node, message):
    with pytest.raises(UserError, match=f"v.mrk.json.*{message}"):
        read_markups(markups(mrk, A, **node), ["a"])


@pytest.mark.parametrize(
    "points, message",
    [
        ([A, A], 'label "a" appears twice'),
        ([A, {**A, "label": "nasoin"}], r'"nasoin" is not one of the data set\'s 3 landmarks \(did you mean "nasion"'),
        ([{**A, "label": "x"}], "has none of the 3 landmarks a, b, nasion; its labels are x"),
        ([A, {"position": [1, 2, 3]}], "control point 2: its label must be the landmark's name, not null"),
        ([{**A, "label": " "}], 'control point 1: its label must be the landmark\'s name, not " "'),
        ([{**A, "positionStatus": "set"}], 'positionStatus "set" is not one of undefined, preview, defined, missing'),
        *(
            ([{"label": "a", **position}], r'control point 1 \("a"\): its position must be three finite numbers')
            for position in (
                {},
                {"position": ""},
                {"position": [1, 2]},
                {"position": [1, 2, "3"]},
                {"position": [1, 2, True]},
                {"position": [1, 2, math.nan]},
                {"position": [1, math.inf, 3]},
                {"position": [1, 2, 10**400]},
            )
        ),
    ],
)
def test_bad_control_points(mrk, points, message):
    with pytest.raises(UserError, match=f"v.mrk.json.*{message}"):
        read_markups(markups(mrk, *points), ["a", "b", "nasion"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not a readable JSON file: "),
        ('{"markups": [', "is not a readable JSON file: "),
        ("[" * 100_000, "is not a readable JSON file: "),
        ("[]", "has no markups: expected 3D Slicer's"),
        ('{"markups": []}', "has no markups"),
        ('{"markups": [3]}', "has no markups"),
        (json.dumps({"markups": [{"type": "Fiducial"}] * 2}), "has 2 point lists .*: Fiducial, Fiducial"),
    ],
)
def test_bad_json_file(mrk, text, message):
    mrk.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_labels(mrk)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "lines, message",
    [
        (["1,2,3,a"], "must name the column label once"),
        (["# columns = label,x,x,y,z", "a,1,1,2,3"], "must name the column x once"),
        (["# CoordinateSystem = 2", COLUMNS, "0,1,2,3,0,0,0,1,1,1,0,a,,"], 'coordinate system "2" is not one of'),
        ([COLUMNS, "0,1,2,3,0,0,0,1,1,1,0,a,b,,"], "line 2: its 15 cells do not fit the 14 columns; a label"),
        ([COLUMNS, "0,1,2,3,0,0,0,1,1,1,0,a,b,c,,"], "line 2: its 16 cells do not fit the 14 columns"),
        ([COLUMNS, "0,1,2,3,0,0,0,1,1,1,0,a,,,2"], "line 2: its 15 cells do not fit the 14 columns"),
        ([COLUMNS, "0,1,2,3"], "line 2: its 4 cells do not fit"),
        ([COLUMNS, "0,1,2,c,0,0,0,1,1,1,0,a,,"], 'line 2: "c" is not a number'),
        ([COLUMNS, "0,1,2,inf,0,0,0,1,1,1,0,a,,"], 'line 2: "inf" is not a finite number'),
        ([COLUMNS, "0,1,2,nan,0,0,0,1,1,1,0,a,,"], "line 2: its position must be three finite numbers"),
        ([COLUMNS, "0,1,2,3,0,0,0,1,1,1,0,,,"], "line 2: its label must be the landmark's name"),
        ([COLUMNS, "0,1,2,3,0,0,0,1,1,1,0,a," + "d" * 200_000 + ","], "line 2 is not readable: field larger"),
        ([COLUMNS], "has no control points"),
    ],
)
def test_bad_fcsv(tmp_path, lines, message):
    with pytest.raises(UserError, match=f"v.fcsv.*{message}"):
        read_markups(fcsv(tmp_path / "v.fcsv", *lines), ["a"])


def test_other_files(tmp_path):
    with pytest.raises(UserError, match="v.csv is not a landmark file of 3D Slicer: those end in .mrk.json or .fcsv"):
        read_labels(tmp_path / "v.csv")
    with pytest.raises(UserError, match="landmark file .*v.fcsv does not exist"):
        read_labels(tmp_path / "v.fcsv")


def test_is_markup(tmp_path):
    files = ("a.MRK.JSON", "", True), ("b.json", '{"markups": []}', True), ("c.json", "{}", False)
    for name, content, expected in files:
        (tmp_path / name).write_text(content)
        assert is_markup(tmp_path / name) is expected


@pytest.mark.parametrize("coordinates, signs", [("LPS", (-1, -1, 1)), ("RAS", (1, 1, 1))])
def test_write_and_read_back(mrk, coordinates, signs):
    names = ["tip, left", 'a "b"', "Größe"]
    world = np.array([[1 / 3, -2e-7, 123456.789012345], [math.nan, 1, 2], [0, 1e-300, -7]])
    write_markups(mrk, names, world, ["sure", "", "half"], coordinates)
    node = json.loads(mrk.read_text())["markups"][0]
    first, second, third = node["controlPoints"]
    assert node["coordinateSystem"] == coordinates and node["coordinateUnits"] == "mm"
    assert first["position"] == [signs[0] / 3, signs[1] * -2e-7, 123456.789012345]
    assert first["orientation"] == [signs[0], 0, 0, 0, signs[1], 0, 0, 0, signs[2]]
    assert second["positionStatus"] == "undefined" and "position" not in second
    assert [point["description"] for point in node["controlPoints"]] == ["sure", "", "half"]
    assert [point["id"] for point in node["controlPoints"]] == ["1", "2", "3"] and third["label"] == "Größe"
    back = read_markups(mrk, names)
    assert np.array_equal(back[[0, 2]], world[[0, 2]]) and np.isnan(back[1]).all()
    assert read_labels(mrk) == names and [path.name for path in mrk.parent.iterdir()] == [mrk.name]


@pytest.mark.parametrize("system", ["LPS", "RAS"])
def test_fcsv_survives_conversion(tmp_path, mrk, system):
    numbers = np.random.default_rng(0).normal(0, 100, (5, 3))
    rows = [f"{i},{x!r},{y!r},{z!r},0,0,0,1,1,1,0,p{i},," for i, (x, y, z) in enumerate(numbers.tolist())]
    names = [f"p{i}" for i in range(5)]
    world = read_markups(fcsv(tmp_path / "v.fcsv", f"# CoordinateSystem = {system}", COLUMNS, *rows), names)
    write_markups(mrk, names, world, coordinates=system)
    written = [point["position"] for point in json.loads(mrk.read_text())["markups"][0]["controlPoints"]]
    assert np.abs(np.array(written) - numbers).max() < 1e-9


@pytest.mark.parametrize("coordinates", ["LPS", "RAS"])
def test_a_written_fcsv_is_read_exactly(tmp_path, coordinates):
    world = np.random.default_rng(0).normal(0, 100, (4, 3))
    world[2] = np.nan
    names = ["a", 'said "b", twice', "c", "#d"]
    write_markups(tmp_path / "v.fcsv", names, world, ["expected error 1.0, or more", "", "", ""], coordinates)
    np.testing.assert_array_equal(read_markups(tmp_path / "v.fcsv", names), world)
    assert read_labels(tmp_path / "v.fcsv") == [names[0], names[1], names[3]]


def test_writing_refuses(tmp_path, mrk):
    with pytest.raises(UserError, match="v.csv: 3D Slicer's landmark files are written as .mrk.json or .fcsv"):
        write_markups(tmp_path / "v.csv", ["a"], np.zeros((1, 3)))
    with pytest.raises(UserError, match="v.fcsv: a .fcsv holds no name with a line break"):
        write_markups(tmp_path / "v.fcsv", ["a\nb"], np.zeros((1, 3)))
    with pytest.raises(UserError, match='coordinates must be LPS or RAS, not "lps"'):
        write_markups(mrk, ["a"], np.zeros((1, 3)), coordinates="lps")
    for world in (np.zeros((2, 3)), np.zeros((1, 2)), np.full((1, 3), np.inf)):
        with pytest.raises(ValueError, match="expected 1 points"):
            write_markups(mrk, ["a"], world)
    with pytest.raises(ValueError, match="zip"):
        write_markups(mrk, ["a"], np.zeros((1, 3)), ["one", "two"])
    assert not list(tmp_path.iterdir())


@real_data
def test_real_points_lie_inside_their_volumes():
    names = [str(number) for number in range(1, 52) if number not in (23, 26, 34, 35, 45, 48)]
    files = sorted((DATA / "landmarks").glob("*.mrk.json"))
    assert len(files) == 24
    for path in files:
        image = find_image(path)
        world = read_markups(path, names)
        voxels = nib.affines.apply_affine(np.linalg.inv(image.affine), world)
        assert (voxels >= -0.5).all() and (voxels <= np.array(image.shape) - 0.5).all(), path.name
        raw = json.loads(path.read_text())["markups"][0]["controlPoints"]
        assert np.array_equal(world, np.array([point["position"] for point in raw]) * [-1, -1, 1])
        assert read_labels(path) == names


def find_image(path):
    return nib.load(DATA / "images" / path.name.replace(".mrk.json", ".nii.gz"))


@real_data
def test_written_files_have_what_slicer_writes(mrk):
    path = DATA / "landmarks/A_J.mrk.json"
    names = read_labels(path)
    write_markups(mrk, names, read_markups(path, names))
    ours, slicers = json.loads(mrk.read_text()), json.loads(path.read_text())
    node, reference = ours["markups"][0], slicers["markups"][0]
    assert ours["@schema"] == slicers["@schema"] and list(node) == [key for key in reference if key != "display"]
    for key in set(node) - {"controlPoints"}:
        assert node[key] == reference[key], key
    for point, other in zip(node["controlPoints"], reference["controlPoints"], strict=True):
        assert list(point) == list(other)
        assert {**point, "id": other["id"], "locked": other["locked"]} == other
