"""Landmark files: hand-computed coordinates, every malformed file, one real point of each data set."""

import math

import numpy as np
import pytest

from core.errors import UserError
from core.formats.points import FolderRow, read_cephalo, read_chest, read_folder_csv, read_hand, write_folder_csv
from tests.conftest import DATA

real_data = pytest.mark.skipif(not DATA.is_dir(), reason="real data not found; set LANDMARK_DATA")


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_cephalo_reads_19_points_and_ignores_the_classes(tmp_path):
    path = write(tmp_path / "a.txt", *(f"{10 * i},{i}.5" for i in range(19)), "1", "2", "3")
    points = read_cephalo(path)
    assert points.shape == (19, 2) and points.dtype == np.float64
    assert points[3].tolist() == [3.5, 30]  # (y, x)


@pytest.mark.parametrize(
    "lines, message",
    [
        (["1,2"] * 18, "a.txt has 18 of 19 points"),
        (["1,2"] * 18 + ["3"], 'a.txt, line 19: expected "x,y"'),
        (["1,two"] + ["1,2"] * 18, 'a.txt, line 1: "two" is not a number'),
        (["1,1e400"] + ["1,2"] * 18, 'a.txt, line 1: "1e400" is not a finite number'),
        (["1,nan"] + ["1,2"] * 18, 'a.txt, line 1: "1" and "nan" are half a point'),
        ([], "a.txt has 0 of 19 points"),
    ],
)
def test_bad_cephalo(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read_cephalo(write(tmp_path / "a.txt", *lines))


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UserError, match="landmark file .*none.txt does not exist"):
        read_cephalo(tmp_path / "none.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="a.txt cannot be read as UTF-8 text"):
        read_cephalo(tmp_path / "a.txt")


def test_chest_fractions(tmp_path):
    path = write(tmp_path / "a.txt", "6", "0 0", "1 1", "0.5 0.25", "0.1 0.2", "0.1 0.2", "0.1 0.2")
    points = read_chest(path, (200, 100))  # H, W
    assert points[:3].tolist() == [[-0.5, -0.5], [199.5, 99.5], [49.5, 49.5]]


@pytest.mark.parametrize(
    "lines, message",
    [
        (["5"] + ["0 0"] * 5, 'line 1: the number of points must be 6, not "5"'),
        (["6"] + ["0 0"] * 5, "a.txt has 5 of 6 points"),
        (["6"] + ["0 0"] * 7, "a.txt has 7 of 6 points"),
        (["6"] + ["0,0"] * 6, 'line 2: expected "x y"'),
        (["6"] + ["0 0"] * 5 + ["-inf 0"], 'line 7: "-inf" is not a finite number'),
        ([], "the number of points must be 6"),
    ],
)
def test_bad_chest(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read_chest(write(tmp_path / "a.txt", *lines), (10, 10))


def test_hand(tmp_path):
    path = write(tmp_path / "all.csv", "0007," + ",".join(str(i) for i in range(74)))
    points = read_hand(path)["0007"]
    assert points.shape == (37, 2) and points[0].tolist() == [1, 0] and points[36].tolist() == [73, 72]


@pytest.mark.parametrize(
    "lines, message",
    [
        (["1," + ",".join("5" * 73)], r"line 1: has 74 columns, not 75"),
        (["1,1e400," + ",".join("5" * 73)], 'line 1: "1e400" is not a finite number'),
        (["1,5,nan," + ",".join("5" * 72)], 'line 1: "5" and "nan" are half a point; give both numbers, or neither'),
        (["1," + ",".join("5" * 74)] * 2, 'line 2: id "1" appears twice'),
        (["1,x," + ",".join("5" * 73)], 'line 1: "x" is not a number'),
    ],
)
def test_bad_hand(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read_hand(write(tmp_path / "all.csv", *lines))


def test_folder_csv(tmp_path):
    path = tmp_path / "landmarks.csv"
    path.write_bytes(b"\xef\xbb\xbfb_x,image,b_y,a_x,a_y,spacing_y,spacing_x,patient\r\n1,i,2,,,0.3,0.2,p\r\n3,j,4,5,6,,,\r\n\r\n")
    first, second = read_folder_csv(path, ["a", "b"])
    assert (first.image, first.patient, first.spacing) == ("i", "p", (0.3, 0.2))
    assert np.isnan(first.points[0]).all() and first.points[1].tolist() == [2, 1]
    assert (second.patient, second.spacing) == (None, None) and second.points.tolist() == [[6, 5], [4, 3]]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", 'column "image" is missing'),
        ("image,tip_x\n", 'column "tip_y" is missing'),
        ("image,tip_x,tip_y,patiant\n", r'unknown column "patiant" \(did you mean "patient"\?\); columns are image, '),
        ("image;tip_x;tip_y\n", r"\(its columns are parted by semicolons: save the table with commas\)"),
        ("image,tpi_x,tip_y\n", r'unknown column "tpi_x" \(did you mean "tip_x"\?\)'),
        ("image,tip_x,tip_y,tip_x\n", 'column "tip_x" appears twice'),
        ("image,tip_x,tip_y,spacing_x\n", "spacing_x and spacing_y must be given together"),
        ("image,tip_x,tip_y\na,1\n", "row 2: has 2 cells, but the header has 3 columns"),
        ("image,tip_x,tip_y\na,1,\n", "row 2: tip has only one of tip_x and tip_y; give both or leave both empty"),
        ("image,tip_x,tip_y\na,1,2\nb,1,l\n", 'row 3, column tip_y: "l" is not a number'),
        ("image,tip_x,tip_y\n,1,2\n", "row 2: column image is empty"),
        ("image,tip_x,tip_y,spacing_x,spacing_y\na,1,2,0,1\n", "row 2: spacing_x and spacing_y must be above 0"),
    ],
)
def test_bad_folder_csv(tmp_path, text, message):
    path = tmp_path / "landmarks.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_folder_csv(path, ["tip"])


def test_folder_csv_round_trip(tmp_path):
    path = tmp_path / "landmarks.csv"
    points = np.array([[1 / 3, 2e-7], [math.nan, math.nan]])
    write_folder_csv(path, ["a, b", "c"], [FolderRow("x/y", points, (0.1, 0.2), "p"), FolderRow("z", points + 1)])
    first, second = read_folder_csv(path, ["a, b", "c"])
    assert np.array_equal(first.points, points, equal_nan=True) and first.spacing == (0.1, 0.2) and first.patient == "p"
    assert np.array_equal(second.points, points + 1, equal_nan=True) and second.spacing is None
    assert [file.name for file in tmp_path.iterdir()] == ["landmarks.csv"]


def test_folder_csv_of_volumes(tmp_path):
    path = tmp_path / "landmarks.csv"
    path.write_text(
        "a_z,image,a_y,a_x,b_x,b_y,b_z,spacing_z,spacing_x,spacing_y\n3,i,2,1,4,5,6,0.9,0.7,0.8\n,j,,,-4,5.5,6e1,,,\n"
    )
    first, second = read_folder_csv(path, ["a", "b"], dims=3)
    assert first.points.tolist() == [[3, 2, 1], [6, 5, 4]] and first.spacing == (0.9, 0.8, 0.7)  # (z, y, x)
    assert np.isnan(second.points[0]).all() and second.points[1].tolist() == [60, 5.5, -4] and second.spacing is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("image,tip_x,tip_y\n", 'column "tip_z" is missing; columns are image, tip_x, tip_y, tip_z, patient, '),
        ("image,tip_x,tip_y,tip_z,spacing_x,spacing_y\n", "spacing_x, spacing_y and spacing_z must be given together"),
        ("image,tip_x,tip_y,tip_z\na,1,,3\n", "row 2: tip has only some of tip_x, tip_y and tip_z; give all or"),
        ("image,tip_x,tip_y,tip_z\na,1,2,c\n", 'row 2, column tip_z: "c" is not a number'),
        (
            "image,tip_x,tip_y,tip_z,spacing_x,spacing_y,spacing_z\na,1,2,3,1,1,0\n",
            "row 2: spacing_x, spacing_y and spacing_z must be above 0 mm",
        ),
    ],
)
def test_bad_folder_csv_of_volumes(tmp_path, text, message):
    path = tmp_path / "landmarks.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_folder_csv(path, ["tip"], dims=3)


def test_folder_csv_of_volumes_round_trip(tmp_path):
    path = tmp_path / "landmarks.csv"
    points = np.array([[1 / 3, 2e-7, -3.5], [math.nan] * 3])
    rows = [FolderRow("x", points, (0.1, 0.2, 0.3)), FolderRow("y", points + 1)]
    write_folder_csv(path, ["a", "b"], rows, dims=3)
    header, line, _ = path.read_text().splitlines()
    assert header == "image,patient,spacing_x,spacing_y,spacing_z,a_x,a_y,a_z,b_x,b_y,b_z"
    assert line == "x,,0.3,0.2,0.1,-3.5,2e-07,0.3333333333333333,,,"
    first, second = read_folder_csv(path, ["a", "b"], dims=3)
    assert np.array_equal(first.points, points, equal_nan=True) and first.spacing == (0.1, 0.2, 0.3)
    assert np.array_equal(second.points, points + 1, equal_nan=True) and second.spacing is None
    with pytest.raises(ValueError, match="not 2-dimensional"):
        write_folder_csv(path, ["a", "b"], rows[1:])
    with pytest.raises(ValueError, match="not 3-dimensional"):
        write_folder_csv(path, ["a", "b"], [FolderRow("x", points, (0.1, 0.2))], dims=3)


@real_data
def test_real_files():
    assert read_cephalo(DATA / "cephalo/400_junior/001.txt")[0].tolist() == [991, 829]
    chest = read_chest(DATA / "chest/labels/CHNCXR_0001_0.txt", (512, 512))
    assert chest[0] == pytest.approx([0.14375 * 512 - 0.5, 0.41625 * 512 - 0.5])
    hand = read_hand(DATA / "hand/labels/all.csv")
    assert len(hand) == 910 and hand["3142"][0].tolist() == [1913, 297] and hand["3142"][36].tolist() == [402, 166]
