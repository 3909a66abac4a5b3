"""Tables whose names are taken from the table: wide and long, images and volumes."""

import numpy as np
import pytest

from core.errors import UserError
from core.formats.labels import LabelSet
from core.formats.points import FolderRow, read_folder_csv
from core.formats.tables import is_long, read_table, write_long, write_wide
from tests.core.formats.label_sets import LABELS, NAMES, same


@pytest.mark.parametrize("write, long", [(write_wide, False), (write_long, True)])
def test_round_trip(tmp_path, write, long):
    write(tmp_path / "t.csv", LABELS)
    assert is_long(tmp_path / "t.csv") == long
    same(read_table(tmp_path / "t.csv"), hidden=False, tolerance=0)
    assert len(read_folder_csv(tmp_path / "t.csv", NAMES)) == 2  # a valid landmarks.csv


@pytest.mark.parametrize("write", [write_wide, write_long])
def test_volumes_and_patients(tmp_path, write):
    volumes = LabelSet(("a",), (FolderRow("v", np.array([[3.0, 2, 1]]), patient="p"), FolderRow("w", np.full((1, 3), np.nan))))  # noqa: E501
    write(tmp_path / "t.csv", volumes)
    first, second = read_table(tmp_path / "t.csv").rows
    assert first.points.tolist() == [[3, 2, 1]] and first.patient == "p" and np.isnan(second.points).all()


def test_long_by_hand_with_other_columns(tmp_path):
    (tmp_path / "t.csv").write_text("image,landmark,x,y,radius90\ni,b,1,2,9\ni,a,,,9\n")
    found = read_table(tmp_path / "t.csv")
    assert found.names == ("b", "a") and found.rows[0].points[0].tolist() == [2, 1]
    assert found.passed_over == ('column "radius90"',)
    write_long(tmp_path / "u.csv", found)
    assert (tmp_path / "u.csv").read_text() == "image,patient,landmark,x,y\ni,,b,1.0,2.0\ni,,a,,\n"


@pytest.mark.parametrize("text", ["", "image,patient\ni,p\n", "image,landmark,x,y\n", "image,a_x,a_y\n"])
def test_no_landmarks(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match="t.csv holds no landmarks"):
        read_table(tmp_path / "t.csv")


def test_images_among_volumes(tmp_path):
    rows = (FolderRow("v", np.zeros((3, 3))), FolderRow("i", np.zeros((3, 2))))
    with pytest.raises(UserError, match="is for images or for volumes, but there are both"):
        write_wide(tmp_path / "t.csv", LabelSet(NAMES, rows))
