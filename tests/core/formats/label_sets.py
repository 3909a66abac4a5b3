"""Landmarks of two pictures that every format's tests write and read, and the tools' own libraries."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from core.formats.labels import LabelSet
from core.formats.points import FolderRow
from tests.conftest import PROJECT

FIXTURES = PROJECT / "tests/fixtures/label_files"
TOOLS = Path(os.environ.get("LABEL_TOOLS", PROJECT / ".venv-tools/bin/python"))  # with requirements-tools.txt
NAMES = ("sella", "nasion", "tip <&> 1")
SIZE = (40, 60)  # H, W
NAN = [np.nan, np.nan]
FIRST = [[20 + 1 / 3, 10.123456789], [-0.5, 59.5], [0.0, 0.1 + 0.2]]  # (y, x); two edges of the image
LABELS = LabelSet(NAMES, (
    FolderRow("a/001.png", np.array(FIRST), size=SIZE, hidden=np.array([True, False, False])),
    FolderRow("b 2.png", np.array([NAN, [39.25, 1e-7], NAN]), size=SIZE, hidden=np.zeros(3, dtype=bool)),
))
needs_tools = pytest.mark.skipif(not TOOLS.is_file(), reason="no environment with requirements-tools.txt; see docs")


def same(found, wanted=LABELS, hidden=True, tolerance=1e-9):
    """Names, images, points within `tolerance` px, and what is hidden."""
    assert found.names == wanted.names and [row.image for row in found.rows] == [row.image for row in wanted.rows]
    for one, other in zip(found.rows, wanted.rows, strict=True):
        np.testing.assert_allclose(one.points, other.points, rtol=0, atol=tolerance)
        assert not hidden or one.hidden.tolist() == other.hidden.tolist()
        assert one.size in (None, other.size)


def read_by_tool(path):
    """{image: {label: [x, y]}} as the tool's own library has it."""
    done = subprocess.run([TOOLS, FIXTURES / "tools.py", "read", path], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
