"""The report page in a real browser: filters, sorting, error curves and pictures, with scripts and without."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from landmarks_finetuning.report import figures
from landmarks_finetuning.report.build import build_report
from landmarks_finetuning.report.collect import read_experiment
from tests.landmarks_finetuning.report.test_report import write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome found")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")
ODD = """</script><img id=bad>"Ü'&"""  # a method's name that would end the script if it were not escaped
TABLE = "study_cephalo_test"
SHARED = f"#labels=10&sort={TABLE}-results:micromean:desc"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Means at 10 labels: ddpm 2.5 (two draws), scratch 9.5, the odd one 10.5, mean shape 20; ddpm 12 at 1 label."""
    root = tmp_path_factory.mktemp("runs") / "study"
    write_run(root, "ddpm", 10, 0, [[1, 3], [2, 2]])
    write_run(root, "ddpm", 10, 1, [[3, 3], [3, 3]])
    bare = write_run(root, "scratch", 10, 0, [[9, 10], [9, 10]])
    (bare / "overlays" / "rank001_000.png").unlink()
    odd = write_run(root, "odd", 10, 0, [[10, 11], [10, 11]]) / "metrics.json"
    odd.write_text(json.dumps(json.loads(odd.read_text()) | {"backbone": ODD}))
    write_run(root, "mean_shape", 10, 0, [[20, 20], [20, 20]])
    write_run(root, "ddpm", 1, 0, [[12, 12], [12, 12]])
    write_run(root.with_name("other"), "ddpm", 10, 0, [[1, 1]], dataset="chest", paper_rule="chest", unit="px")
    return build_report([root, root.with_name("other")])


def browse(page: Path, tmp_path: Path, *options: str, address: str = "", script: str = "",
           name: str = "page.html") -> str:
    """What the browser prints of `page`, opened with `address` (from its #); `script` runs after the page's own."""
    source = page.read_text(encoding="utf8")
    copy = tmp_path / name
    copy.write_text(source.replace("</body>", f"<script>{script}</script></body>"), encoding="utf8")
    done = subprocess.run([BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *options,
                           f"file://{copy}{address}"], capture_output=True, timeout=120, check=True)
    return done.stdout.decode("utf8")


def rows(dom: str, table: str, column: int = 0) -> list[tuple[str, bool]]:
    """(first line of the cell in `column`, whether it is hidden) of each row of a table, in the order of the page."""
    body = re.search(rf'<table[^>]*id="{re.escape(table)}".*?<tbody>(.*?)</tbody>', dom, re.S).group(1)
    found = re.findall(r"<tr([^>]*)>(.*?)</tr>", body, re.S)
    cells = [(tag, re.findall(r"<td[^>]*>(.*?)</td>", inner, re.S)[column].partition("<br")[0]) for tag, inner in found]
    return [(html.unescape(re.sub("<[^>]*>", "", cell)).strip(), " hidden" in tag) for tag, cell in cells]


def shown(dom: str, table: str, column: int = 0) -> list[str]:
    return [text for text, hidden in rows(dom, table, column) if not hidden]


def answer(dom: str) -> str:
    """What a test's script wrote into the title."""
    return html.unescape(re.search(r"<title>(.*?)</title>", dom, re.S).group(1))


@needs_browser
def test_the_address_filters_and_sorts(page, tmp_path):
    dom = browse(page, tmp_path, "--dump-dom", address=SHARED)
    assert shown(dom, f"{TABLE}-results", 3) == ["20.00", "10.50", "9.50", "2.50"]  # as numbers: 10.5 above 9.5
    assert [text for text, hidden in rows(dom, f"{TABLE}-results") if hidden] == ["1 + 20"]
    assert shown(dom, f"{TABLE}-comparisons") == ["10", "10", "10"]
    assert [text for text, hidden in rows(dom, f"{TABLE}-runs") if hidden] == ["1"]
    assert "Filtered: 5 of 6 results" in dom
    assert 'data-column="micromean" aria-sort="descending"' in dom


@needs_browser
def test_two_starts_and_a_data_set(page, tmp_path):
    dom = browse(page, tmp_path, "--dump-dom", address="#start=ddpm&start=scratch&data=cephalo&labels=10&labels=99")
    assert shown(dom, f"{TABLE}-results", 3) == ["2.50", "9.50"]
    assert shown(dom, f"{TABLE}-comparisons", 2) == ["From scratch (best)"]  # not the others of ddpm
    assert shown(dom, f"{TABLE}-runs", 3) == ["0", "1", "0"]
    hidden = re.findall(r'<div data-data="(\w+)" hidden', dom)
    assert hidden == ["chest"] and "Filtered: 2 of 6 results" in dom


@needs_browser
def test_a_heading_sorts_up_down_and_back(page, tmp_path):
    """Through the heading's button; the empty cell ("± draws" of one draw) is last either way; the address follows."""
    script = f"""
      const table = document.getElementById("{TABLE}-results"), seen = [];
      const column = [...table.tHead.rows[1].cells].findIndex(cell => cell.textContent.startsWith("±"));
      const note = () => seen.push([...table.tBodies[0].rows].map(row => row.cells[column].textContent).join(" "));
      note();
      for (let click = 0; click < 3; click++) {{
        table.tHead.rows[1].cells[column].querySelector("button").click(); note();
        if (click < 2) seen.push(new URLSearchParams(location.hash.slice(1)).get("sort"));
      }}
      document.title = seen.join("|");"""
    own, up, first, down, second, back = answer(browse(page, tmp_path, "--dump-dom", script=script)).split("|")
    assert own == back == "– 0.71 – – –"  # by labels, then error: 12; 2.5 (of 2 and 3), 9.5, 10.5, 20
    assert up == down == "0.71 – – – –"
    assert (first, second) == (f"{TABLE}-results:draws:asc", f"{TABLE}-results:draws:desc")


@needs_browser
def test_the_total_stays_below_and_texts_sort_as_texts(page, tmp_path):
    dom = browse(page, tmp_path, "--dump-dom", address=f"#sort={TABLE}-by-landmark:landmark:asc")
    assert [text for text, _ in rows(dom, f"{TABLE}-by-landmark")] == ["Nasion", "Sella", "macro mean"]
    own = rows(page.read_text(encoding="utf8"), f"{TABLE}-by-landmark")
    assert [text for text, _ in own] == ["Sella", "Nasion", "macro mean"]


@needs_browser
def test_the_curves_are_read_by_pointing(page, tmp_path):
    """Errors of ddpm at 10 labels: 1 3 2 2 and four times 3, so 3 of 8 lie within 2 mm and all within 3.1 mm."""
    script = f"""
      const place = document.getElementById("{TABLE}-curves"), seen = [];
      const note = () => seen.push(place.querySelector(".readout").textContent
        + [...place.querySelectorAll(".legend button")].map(entry => entry.textContent).join(";")
        + place.querySelectorAll("path.curve").length);
      note();
      const box = place.querySelector(".stage svg").getBoundingClientRect();
      const x = box.left + 42 + (box.width - 54) * 3.1 / 6.25;  // the axis starts 42 and ends 12 from the edges
      place.querySelector(".stage svg").dispatchEvent(new PointerEvent("pointermove", {{ clientX: x }}));
      note();
      place.querySelector(".legend button").click();
      note();
      seen.push(location.hash);
      place.querySelector(".chips button").click();
      note();
      document.title = seen.join("|");"""
    dom = browse(page, tmp_path, "--dump-dom", script=script)
    names = ["Mean shape", "From scratch"]
    start, pointed, without, address, other = answer(dom).split("|")
    assert start.startswith("Within 2.00 mm:") and "Diffusion pre-training37.5 %" in start
    assert all(f"{name}0.0 %" in start for name in [*names, ODD]) and start.endswith("4")
    assert pointed.startswith("Within 3.11 mm:") and "Diffusion pre-training100.0 %" in pointed
    assert without.endswith("3") and address.startswith("#hide=")
    assert other.startswith("Within 3.11 mm:") and "From scratch" not in other  # 1 label: ddpm alone
    assert "<img id" not in dom


@needs_browser
def test_a_row_shows_its_pictures_or_says_that_there_are_none(page, tmp_path):
    script = f"""
      const seen = [];
      for (const row of [...document.querySelectorAll("#{TABLE}-results tr[data-row]")]) {{
        row.querySelector("button").click();
        const detail = row.nextElementSibling;
        seen.push(detail.querySelectorAll("img").length + " " + detail.textContent);
      }}
      document.title = [...seen, document.querySelectorAll("tr.detail").length].join("|");"""
    one, ten, scratch, odd, shape, details = answer(browse(page, tmp_path, "--dump-dom", script=script)).split("|")
    assert one.startswith("1 Diffusion pre-training, 1 label (draw 0): worst images first")
    assert ten.startswith("1 Diffusion pre-training, 10 labels") and odd.startswith(f"1 {ODD}, 10 labels")
    assert scratch.startswith("0 ") and "no overlays: nothing is in landmarks/scratch/default/shots010" in scratch
    assert shape.startswith("0 ") and "mean shape does not look at the image" in shape
    assert details == "1"


@needs_browser
def test_filters_reach_the_papers_tables(page, tmp_path):
    """Ours and theirs of one start and number of labels stay, and of one data set its own table alone."""
    everything = browse(page, tmp_path, "--dump-dom")
    dom = browse(page, tmp_path, "--dump-dom", address="#start=ddpm&labels=10&data=cephalo")
    ours, theirs = (shown(dom, "table2_cephalo-table", column) for column in (1, 2))
    assert ours == ["Diffusion pre-training", "–"]
    assert theirs == ["DDPM (Gaussian heatmaps)", "DDPM (contour-hugging)"]
    assert len(shown(everything, "table2_cephalo-table")) > 15 and set(shown(dom, "table2_cephalo-table")) == {"10"}
    assert re.findall(r'<section class="card paper" id="(\w+)" hidden', dom) == ["table1_chest"]
    assert not re.findall(r'<section class="card paper" id="(\w+)" hidden', everything)


@needs_browser
@pytest.mark.parametrize("width", [1200, 1600])
def test_the_results_do_not_scroll_sideways(page, tmp_path, width):
    """At the width of a laptop's screen, with the longest name and every interval of two digits before the point."""
    script = f"""const box = document.getElementById("{TABLE}-results").parentElement;
      document.title = innerWidth + " " + (box.scrollWidth - box.clientWidth);"""
    dom = browse(page, tmp_path, "--dump-dom", f"--window-size={width},900", script=script)
    assert answer(dom) == f"{width} 0"


@needs_browser
def test_a_link_keeps_the_view(page, tmp_path):
    script = 'document.querySelector("nav a").click(); document.title = location.hash;'
    dom = browse(page, tmp_path, "--dump-dom", address="#labels=10", script=script)
    assert answer(dom) == f"#labels=10&at={TABLE}"


@needs_browser
@pytest.mark.parametrize("width", [360, 390, 800])
def test_it_fits_a_narrow_screen(page, tmp_path, width):
    """Nothing but the tables' own boxes scrolls sideways; in a frame, as a browser's own window is 500 wide or more.

    Also with every part opened. A table that is cut says so, until its end is in sight; no other one does.
    """
    frame = tmp_path / "frame.html"
    frame.write_text(f'<body></body><iframe src="page.html" width="{width}" height="800" style="border:0"></iframe>')
    script = """for (const part of document.querySelectorAll("details")) part.open = true;
      setTimeout(() => {
        const boxes = [...document.querySelectorAll(".scroll")];
        const cut = boxes.filter(box => box.scrollWidth > box.clientWidth + 1);
        const told = boxes.filter(box => !box.previousElementSibling.hidden && box.classList.contains("more"));
        const same = cut.length === told.length && cut.every(box => told.includes(box));
        cut[0].scrollLeft = cut[0].scrollWidth;
        cut[0].dispatchEvent(new Event("scroll"));  // which a browser without a screen may put off
        setTimeout(() => parent.postMessage([innerWidth, document.documentElement.scrollWidth, cut.length > 0, same,
          cut[0].classList.contains("more")].join(" "), "*"), 300);
      }, 500);"""
    browse(page, tmp_path, "--dump-dom", script=script)
    dom = browse(frame, tmp_path, "--dump-dom", "--virtual-time-budget=3000",
                 script="onmessage = event => { document.title = event.data; };", name="outer.html")
    assert answer(dom) == f"{width} {width} true true false"


@needs_browser
def test_screenshots_light_and_dark(page, tmp_path):
    means = []
    for scheme in ("1", "0"):
        picture = tmp_path / f"{scheme}.png"
        browse(page, tmp_path, f"--screenshot={picture}", "--window-size=1200,3000",
               f"--blink-settings=preferredColorScheme={scheme}", address=SHARED)
        pixels = np.asarray(Image.open(picture).convert("L"), dtype=float)
        assert pixels.shape == (3000, 1200) and pixels.std() > 10
        assert (np.abs(np.diff(pixels, axis=1)) > 40).any(axis=1).mean() > 0.3  # something is drawn nearly everywhere
        means.append(pixels.mean())
    assert means[0] > 200 and means[1] < 70


@needs_browser
def test_without_scripts_everything_is_shown(page, tmp_path):
    """The page without its own script; closed <details> open by themselves and so count as shown."""
    bare = tmp_path / "bare.html"
    bare.write_text(re.sub(r"<script>.*?</script>", "", page.read_text(encoding="utf8"), flags=re.S))
    script = """for (const part of document.querySelectorAll("details")) part.open = true;
      const parts = [...document.querySelectorAll("table, tr, .figure svg, img[src]")];
      document.title = parts.length + " " + parts.filter(part => !part.checkVisibility()).length
        + " " + document.getElementById("filters").checkVisibility();"""
    dom = browse(bare, tmp_path, "--dump-dom", address=SHARED, script=script)
    assert shown(dom, f"{TABLE}-results", 3) == ["12.00", "2.50", "9.50", "10.50", "20.00"]
    parts, hidden, controls = answer(dom).split()
    assert int(parts) > 40 and (hidden, controls) == ("0", "false")


def test_names_cannot_end_the_script(page):
    text = page.read_text(encoding="utf8")
    assert "<img id" not in text and text.count("</script>") == 3  # two sections' curves and the page's own


def test_curves_hold_the_shares_of_the_table(tmp_path):
    """Of the errors 1, 2, 2.5 and 7: a quarter lies below 2, half within exactly 2, three quarters from 2.5 on."""
    write_run(tmp_path / "study", "ddpm", 10, 0, [[1, 2], [2.5, 7]])
    curves = figures.within_curves(read_experiment(tmp_path / "study").runs, [2.0, 2.5])
    shares = dict(zip(curves.distances, curves.panels[10]["ddpm"], strict=True))
    assert (shares[0.0], shares[2.0], shares[2.5], shares[6.25]) == (0, 50, 75, 75)
    assert max(share for distance, share in shares.items() if distance < 2) == 25
    assert 160 <= len(shares) <= 162
    page = figures.page_curves(curves, "mm")
    assert page["panels"][0]["labels"] == "10" and page["thresholds"] == [2.0, 2.5]
    assert dict(zip(page["distances"], page["panels"][0]["curves"][0]["values"], strict=True))[2.5] == 75
