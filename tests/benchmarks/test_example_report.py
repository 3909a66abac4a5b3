"""The committed example report: whole, small, and without a word of the machine that made it."""

from __future__ import annotations

import csv
import re

import pytest

from benchmarks.example_report import EMBEDDED, LIMIT_BYTES, TARGET, copy_report
from core.errors import UserError


def test_the_committed_page_is_whole_and_names_no_machine():
    text = (TARGET / "index.html").read_text(encoding="utf8")
    loads = re.findall(r"""\s(?:src|srcset|href|xlink:href)=["']([^"']+)""", text)
    assert loads and all(address.startswith(("#", "data:")) for address in loads)
    files = [path for path in TARGET.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT_BYTES
    for path in files:
        words = EMBEDDED.sub("", path.read_text(encoding="utf8"))
        assert not re.search(r"(?<![\w.])/(tmp|work|home|root|Users|mnt)\b", words), path
    assert "Heatmaps: Diffusion pre-training" in text and "Best run: " in text and "<dt>Leaked</dt>" in text
    assert "Against the paper" not in text  # of phantoms there is nothing in it; the table's form is a file
    assert (TARGET / "tables/table2_phantom.tex").is_file()


def test_the_committed_tables_show_spreads():
    with (TARGET / "tables/summary.csv").open(encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    assert {row["backbone"] for row in rows} >= {"ddpm", "scratch", "mean_shape"}
    spreads = {row["backbone"]: float(row["mre_spread"]) for row in rows if int(row["draws"]) == 2}
    assert spreads.keys() >= {"ddpm", "scratch"} and min(spreads.values()) > 0


@pytest.fixture
def report(tmp_path):
    (tmp_path / "report/tables").mkdir(parents=True)
    (tmp_path / "report/figures").mkdir()
    (tmp_path / "report/index.html").write_text('page of host70 <img src="data:image/png;base64,AA/host7/">')
    (tmp_path / "report/tables/summary.csv").write_text("made on host7")
    (tmp_path / "report/figures/a.png").write_text("picture")
    return tmp_path / "report"


def test_page_and_tables_are_copied(report, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target/old.html").write_text("old")
    size = sum(path.stat().st_size for path in report.rglob("*.[hc]*"))
    assert copy_report(report, tmp_path / "target", ("host8",)) == size
    found = sorted(str(path.relative_to(tmp_path / "target")) for path in (tmp_path / "target").rglob("*.*"))
    assert found == ["index.html", "tables/summary.csv"]


@pytest.mark.parametrize("spoil", ["word", "size"])
def test_a_page_that_must_not_be_committed_is_refused(report, tmp_path, spoil):
    if spoil == "size":
        (report / "index.html").write_text("x" * (LIMIT_BYTES + 1))
    with pytest.raises(UserError, match=r"names 'host7'" if spoil == "word" else "more than the"):
        copy_report(report, tmp_path / "target", ("host7",) if spoil == "word" else ())
    assert not (tmp_path / "target").exists()
