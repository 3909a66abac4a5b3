"""Cells of CSV files: harmless in a spreadsheet, numbers still numbers, and given back as they were."""

import numpy as np
import pytest

from core.formats.cells import harmless, meant
from core.formats.points import FolderRow, read_folder_csv, write_folder_csv

FORMULAS = ["=1+1", "+A1", "-A1", "@SUM(A1)", "=HYPERLINK(\"http://x\")", "\t=1", "'=1", "''=1", "-", "--5"]
PLAIN = ["a", "", "'", "'a", "a=b", "-5", "+5.25e-3", "-inf", 3, -2.5, None]


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_are_text(text):
    assert harmless(text) == f"'{text}" and meant(harmless(text)) == text


@pytest.mark.parametrize("cell", PLAIN)
def test_the_rest_stays(cell):
    assert harmless(cell) is cell and (not isinstance(cell, str) or meant(cell) == cell)


def test_tables_of_labels_round_trip(tmp_path):
    points = np.array([[1.0, -2.0], [3.0, 4.0]])
    write_folder_csv(tmp_path / "t.csv", ["-tip", "=base"], [FolderRow("=cmd|x", points, None, "@p")])
    text = (tmp_path / "t.csv").read_text()
    assert not [cell for line in text.splitlines() for cell in line.split(",") if cell[:1] in ("=", "@")]
    assert ",-2.0," in text  # a number
    [row] = read_folder_csv(tmp_path / "t.csv", ["-tip", "=base"])
    assert row.image == "=cmd|x" and row.patient == "@p" and (row.points == points).all()
