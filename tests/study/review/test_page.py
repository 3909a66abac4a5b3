"""The review's page in a real browser: pointer, keys, two tabs, a killed program, volumes."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from benchmarks import reviewing
from benchmarks.reviewing import (
    Asked,
    Page,
    browser,
    coded_drag,
    saved_points,
    served,
    write_coded_images,
    write_data_set,
)
from core.errors import UserError
from study.review.__main__ import command_line, opened

pytestmark = pytest.mark.skipif(reviewing.BROWSER is None or reviewing.DRIVER is None,
                                reason="no chromium, chromium-browser or google-chrome with a chromedriver found")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture
def coded(tmp_path):
    """(run, root) of the two coded images; the more doubtful one, `across`, is shown first."""
    return write_coded_images(tmp_path / "mine"), tmp_path / "mine"


class Here(Asked):
    """A review in a thread of this process, which starts at once."""

    def __init__(self, address):
        self.address = address


@contextmanager
def here(run, root):
    arguments = command_line().parse_args([str(run), "--images", str(root), "--port", "0", "--who", "reader",
                                           "--predictions", str(run / "predictions.csv")])
    with opened(arguments) as review:
        thread = threading.Thread(target=review.server.serve_forever)
        thread.start()
        try:
            yield Here(f"http://127.0.0.1:{review.server.port}/")
        finally:
            review.server.shutdown()
            thread.join()


def journal(root):
    return [json.loads(line) for line in (root / "review/journal.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name, number", [("across", 0), ("down", 1)])
def test_a_drag_ends_at_the_pointer_at_any_zoom(coded, driver, name, number):
    """Truth: the grey value under the pointer is the pixel's own column or row."""
    run, root = coded
    rng = np.random.default_rng(number)
    with here(run, root) as review:
        page = Page(driver, review.address)
        if number:
            page.keys("n")
            page.wait_shown(number)
        scales = []
        for _ in range(5):
            scale, off, drawn = coded_drag(page, rng, root / "landmarks.csv", name)
            # the pointer is in whole screen pixels, and the grey value that of the pixel at their middle
            assert off <= 0.5 + 0.5 / scale + 2e-3 and drawn <= 0.5, (scale, off, drawn)
            scales.append(scale)
        assert max(scales) / min(scales) > 4


def test_the_order_is_that_of_doubt_and_paging_follows_it(coded, driver):
    run, root = coded
    with here(run, root) as review:
        page = Page(driver, review.address)
        assert page.text("name") == "across" and page.text("place") == "1 of 2"
        assert page.text("doubt") == "expected error 2.0 px"
        page.keys("n")
        page.wait_shown(1)
        assert page.text("name") == "down"
        page.keys("p")
        page.wait_shown(0)


def test_everything_by_keyboard_alone(coded, driver):
    """The most doubtful landmark is chosen; what is not touched is no label."""
    run, root = coded
    with served(run, root) as review:
        page = Page(driver, review.address)
        page.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_UP)
        page.wait_saved()
        points = saved_points(root / "landmarks.csv")
        assert points["across"][0].tolist() == [102, 119] and np.isnan(points["across"][1]).all()
        driver.switch_to.active_element.send_keys(Keys.CONTROL, Keys.ARROW_LEFT)
        driver.switch_to.active_element.send_keys(Keys.SHIFT, Keys.ARROW_DOWN)
        page.wait_saved()
        assert saved_points(root / "landmarks.csv")["across"][0].tolist() == [101.9, 129]
        page.keys(".", "x")
        page.wait_saved()
        page.keys("z", "z")
        page.wait_saved()
        assert saved_points(root / "landmarks.csv")["across"][0].tolist() != [101.9, 129]
        page.keys("y")
        page.wait_saved()
        assert saved_points(root / "landmarks.csv")["across"][0].tolist() == [101.9, 129]
        page.keys("a")  # accepts what is open, goes on
        page.wait_shown(1)
        page.wait_saved()
        assert saved_points(root / "landmarks.csv")["across"].tolist() == [[101.9, 129], [60, 200]]
        page.keys(Keys.ENTER, Keys.ENTER)
        page.wait_saved()
        assert saved_points(root / "landmarks.csv")["down"].tolist() == [[100, 120], [60, 200]]
        status, out, error = review.stop()
    assert (status, error) == (0, "") and "finetune.shots=[2]" in out and "changed in reviews: 2 images" in out
    entry = journal(root)[-1]
    assert entry["who"] == "reader" and entry["action"] == "accept" and entry["landmarks"]["base"] == {
        "before": None, "after": [60, 200], "predicted": [60, 200], "unit": "px",
        "expected_error": pytest.approx(2.0), "radius90": 4.0}


def test_focus_is_visible_and_reaches_all(coded, driver):
    run, root = coded
    with here(run, root) as review:
        page = Page(driver, review.address)
        seen = []
        for _ in range(16):
            page.keys(Keys.TAB)
            seen.append(driver.execute_script(
                "const at = document.activeElement, style = getComputedStyle(at);"
                "return [at.id, at.matches(':focus-visible') && style.outlineStyle === 'solid']"))
        for wanted in ("next", "images-0", "stage", "landmarks-0", "accept", "confirm", "absent", "brightness"):
            assert [wanted, True] in seen, (wanted, seen)


def test_two_tabs_do_not_overwrite_each_other(coded, driver):
    run, root = coded
    with here(run, root) as review:
        page = Page(driver, review.address)
        first = driver.current_window_handle
        driver.switch_to.new_window("tab")
        other = Page(driver, review.address)
        other.keys(Keys.ARROW_RIGHT)
        other.wait_saved()
        status, _ = review.ask("change/0", {"version": 0, "action": "move", "landmark": 0, "to": [1, 1]})
        assert status == 409
        # a change made elsewhere that this tab has not seen
        assert review.ask("change/0", {"version": 1, "action": "move", "landmark": 1, "to": [9, 8]})[0] == 200
        other.keys(Keys.ARROW_RIGHT)
        other.wait_saved()
        assert "was changed elsewhere meanwhile" in other.text("message")
        assert saved_points(root / "landmarks.csv")["across"].tolist() == [[101, 120], [9, 8]]
        other.keys(Keys.ARROW_RIGHT)  # from what is there now
        other.wait_saved()
        assert saved_points(root / "landmarks.csv")["across"].tolist() == [[102, 120], [9, 8]]
        driver.close()
        driver.switch_to.window(first)
        page.keys(Keys.ARROW_DOWN)  # refused, or after it has looked at what is there: it never overwrites
        page.wait_saved()
        after = saved_points(root / "landmarks.csv")["across"]
        assert after.tolist() in ([[102, 121], [9, 8]], [[102, 120], [9, 8]])


def test_kill_9_between_changes_and_the_tab_goes_on(coded, driver):
    run, root = coded
    with served(run, root) as review:
        page = Page(driver, review.address)
        page.drag(page.place(0), (400, 300))
        page.wait_saved()
        before = saved_points(root / "landmarks.csv")["across"][0]
        port = review.port
        review.kill()
        page.keys(Keys.ARROW_RIGHT)  # nobody answers
        page.until("document.getElementById('message').textContent.startsWith('Not saved yet')", "no warning")
    with served(run, root, port):
        page.wait_saved()
        after = saved_points(root / "landmarks.csv")["across"][0]
        assert np.allclose(after - before, [1, 0], atol=1e-9)
        assert len(journal(root)) == 2


def test_contrast_zoom_and_names_are_drawn(coded, driver):
    run, root = coded
    with here(run, root) as review:
        page = Page(driver, review.address)
        left, top, width, height = (round(value) for value in page.stage())
        middle = (top + height // 2, slice(left, left + width))
        row = page.greys()[middle]
        shown = row[row > 0]
        assert shown.max() == 254 and shown.min() == 1  # as they are in the file
        driver.switch_to.active_element.send_keys(Keys.SHIFT, "c" * 4)
        driver.switch_to.active_element.send_keys("b" * 4)
        page.settle()
        softer = page.greys()[middle][row > 0]
        assert softer.min() > 60 and np.ptp(softer) < 0.85 * np.ptp(shown)
        page.keys("v")
        page.settle()
        assert (page.greys()[middle] == row).all()


def test_volumes_have_three_slices_and_the_same_keys(driver, tmp_path):
    """Grey values are 1 + x + 2 y + 3 z (8 bits, no place in the patient): where a slice lies shows on the screen."""
    root = tmp_path / "volumes"
    (root / "images").mkdir(parents=True)
    z, y, x = np.mgrid[:20, :30, :40]
    np.save(root / "images/head.npy", (1 + x + 2 * y + 3 * z).astype(np.uint8))
    run = write_data_set(root, ["tip", "base"], {"head": np.array([[10.0, 20, 5], [30, 4, 15]])}, dims=3)
    with here(run, root) as review:
        page = Page(driver, review.address)

        def grey(view):
            px, py = page.place(0, view)
            return page.greys()[round(py), round(px)]

        assert [grey(view) for view in range(3)] == [1 + 10 + 40 + 15] * 3
        page.keys(Keys.ARROW_RIGHT, Keys.PAGE_UP)
        page.wait_saved()
        page.until("document.querySelector('.pane .name').textContent.includes('z 6 of 19')", "no other slice")
        page.settle()
        assert saved_points(root / "landmarks.csv")["head"][0].tolist() == [11, 20, 6]
        assert [grey(view) for view in range(3)] == [1 + 11 + 40 + 18] * 3
        start = page.place(0, 1)  # the second view: x across, z down
        step = np.subtract(page.stage(1)[2:], 0).min()
        page.drag(start, (start[0] + step / 8, start[1] + step / 8))
        page.wait_saved()
        point = saved_points(root / "landmarks.csv")["head"][0]
        assert point[1] == 20 and point[0] > 11.5 and point[2] > 6.5
        page.until("document.body.dataset.pending === '0'", "not saved")
        page.settle()
        found = 1 + np.round(point) @ [1, 2, 3]
        page.until(f"document.querySelector('.pane .name').textContent.includes('z {round(point[2])} of')", "no slice")
        page.settle()
        assert abs(grey(0) - found) <= 3


def test_pages_of_other_sites_are_refused(coded):
    run, root = coded
    with here(run, root) as review:
        request = urllib.request.Request(review.address + "state", headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request)
        plain = urllib.request.Request(review.address + "change/0", b"{}", {"Content-Type": "text/plain"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(plain)
        with pytest.raises(UserError, match="is being worked on by process"), here(run, root):
            pass
