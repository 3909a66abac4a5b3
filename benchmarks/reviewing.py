"""What tests and measurements of the review share: data sets, the command as a process, and a browser that uses it."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

PROJECT = Path(__file__).resolve().parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-quic",
         "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--force-color-profile=srgb", "--window-size=1400,900")
WAIT_S = 60.0
CODED = 254  # pixels of each side of a coded image
RADIUS = 4.0  # pixels, of all points' 90 % circles


def write_data_set(root: Path, names: Sequence[str], points: dict[str, np.ndarray], dims: int = 2,
                   splits: Any = None) -> Path:
    """dataset.json, an empty landmarks.csv and predictions.csv (points (N, D) as (x, y[, z])) of images at `root`.

    Each image is more doubtful than the one before. Returns a run's folder that names the data set.
    """
    axes = "xyz"[:dims]
    description = {"landmarks": list(names), "splits": splits or {"train": 1.0}}
    (root / "dataset.json").write_text(json.dumps(description), encoding="utf8")
    header = ["image", *(f"{name}_{axis}" for name in names for axis in axes)]
    (root / "landmarks.csv").write_text(",".join(header) + "\n", encoding="utf8")
    rows = [",".join(["image", "landmark", *axes, "expected_error", "radius90"])]
    for rank, (image, each) in enumerate(points.items()):
        for name, point in zip(names, each, strict=True):
            values = *point, 2 + rank / 1000, RADIUS
            rows.append(",".join([image, name, *(f"{value:.4f}" for value in values)]))
    run = root.with_name(f"{root.name}_run")
    run.mkdir()
    (run / "predictions.csv").write_text("\n".join(rows) + "\n", encoding="utf8")
    config = {"experiment": {"name": "mine"}, "dataset": {"layout": "folder", "root": str(root)}}
    (run / "config.json").write_text(json.dumps(config), encoding="utf8")
    return run


def write_coded_images(root: Path) -> Path:
    """down.png and across.png, whose grey values are 1 + the row, and 1 + the column, of each pixel; their run."""
    (root / "images").mkdir(parents=True)
    ramp = np.broadcast_to(np.arange(1, CODED + 1, dtype=np.uint8), (CODED, CODED))
    Image.fromarray(np.ascontiguousarray(ramp.T)).save(root / "images/down.png")
    Image.fromarray(np.ascontiguousarray(ramp)).save(root / "images/across.png")
    start = np.array([[100.0, 120.0], [60.0, 200.0]])
    return write_data_set(root, ["tip", "base"], {"down": start, "across": start})


class Asked:
    """A program that answers at `address`."""

    address: str

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """(status, JSON) of an address of the page."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read()
            return error.code, json.loads(text) if text.startswith(b"{") else {}


class Served(Asked):
    """The command of a review as a process of its own."""

    def __init__(self, run: Path, root: Path, port: int = 0, *more: str) -> None:
        command = [sys.executable, "-m", "study.review", str(run), "--images", str(root), "--port", str(port),
                   "--predictions", str(run / "predictions.csv"), "--who", "reader", *more]
        self.process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None and self.process.stderr is not None
        for line in self.process.stdout:
            found = re.search(r"http://[\d.]+:(\d+)/", line)
            if found:
                self.address, self.port = found[0], int(found[1])
                return
        raise RuntimeError(f"the review did not start: {self.process.stderr.read()}")

    def kill(self) -> None:
        """kill -9."""
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def stop(self) -> tuple[int, str, str]:
        """Ctrl-C; (exit status, stdout since it listens, stderr)."""
        self.process.send_signal(signal.SIGINT)
        out, error = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, out, error


@contextmanager
def served(run: Path, root: Path, port: int = 0) -> Iterator[Served]:
    """A review that runs while the block does."""
    process = Served(run, root, port)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.kill()


@contextmanager
def browser(profile: Path) -> Iterator[webdriver.Chrome]:
    """Headless Chromium."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The review's page in a browser, used by pointer and keys."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver = driver
        driver.get("about:blank")
        driver.get(address)
        self.wait_shown(0)

    def until(self, script: str, what: str) -> None:
        """Wait until a script's value is true."""
        end = time.monotonic() + WAIT_S
        while not self.driver.execute_script(f"return {script}"):
            if time.monotonic() > end:
                raise TimeoutError(f"{what}; the page says: {self.text('message')}")
            time.sleep(0.01)

    def wait_shown(self, number: int) -> None:
        """Until image `number` is on the screen."""
        self.until(f'document.body.dataset.shown === "{number}"', f"image {number} is not shown")

    def wait_saved(self) -> None:
        """Until no change is on its way."""
        self.until('(document.body.dataset.pending ?? "0") === "0"', "not saved")

    def text(self, identifier: str) -> str:
        """What an element says."""
        return self.driver.execute_script("return document.getElementById(arguments[0]).textContent", identifier)

    def keys(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def place(self, landmark: int, view: int = 0) -> tuple[float, float]:
        """The middle of a landmark's ring on the screen."""
        x, y = self.driver.execute_script(
            "const ring = document.querySelectorAll('.pane')[arguments[1]]"
            ".querySelector(`g[data-landmark='${arguments[0]}'] .place`).getBoundingClientRect();"
            "return [ring.left + ring.width / 2, ring.top + ring.height / 2]", landmark, view)
        return x, y

    def stage(self, view: int = 0) -> tuple[float, float, float, float]:
        """left, top, width, height of a view on the screen."""
        return tuple(self.driver.execute_script(
            "const box = document.querySelectorAll('.pane')[arguments[0]].getBoundingClientRect();"
            "return [box.left, box.top, box.width, box.height]", view))

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the left button at one place of the screen and release it at another, both in whole pixels."""
        actions = ActionBuilder(self.driver, duration=0)
        pointer = actions.pointer_action
        pointer.move_to_location(round(start[0]), round(start[1])).pointer_down()
        pointer.move_to_location(round((start[0] + end[0]) / 2), round((start[1] + end[1]) / 2))
        pointer.move_to_location(round(end[0]), round(end[1])).pointer_up()
        actions.perform()

    def wheel(self, x: float, y: float, turn: int) -> None:
        """Turn the wheel over a place of the screen."""
        webdriver.ActionChains(self.driver, duration=0).scroll_from_origin(
            ScrollOrigin.from_viewport(round(x), round(y)), 0, turn).perform()
        self.settle()

    def settle(self) -> None:
        """Until what was asked for is drawn."""
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def greys(self) -> np.ndarray:
        """(height, width) grey values of the screen without points."""
        hide = "document.querySelectorAll('.pane svg').forEach(each => each.style.visibility = arguments[0])"
        self.driver.execute_script(hide, "hidden")
        picture = Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("L")
        self.driver.execute_script(hide, "")
        return np.asarray(picture).astype(int)


def coded_drag(page: Page, rng: np.random.Generator, table: Path, name: str) -> tuple[float, float, float]:
    """Drag landmark 0 of a coded image at a random zoom, to a random place that shows a pixel of it.

    Returns (scale, |saved - coded|, distance of the drawn point from the pointer): CSS pixels of a pixel, pixels of the
    image along the coded axis, CSS pixels. The grey value under the pointer is the truth.
    """
    left, top, width, height = page.stage()
    page.keys("0")
    page.settle()
    x, y = page.place(0)
    page.wheel(x, y, int(rng.integers(-2200, 700)))
    page.keys("f")
    page.settle()
    greys = page.greys()
    start = page.place(0)
    while True:
        end = round(left + rng.uniform(4, width - 4)), round(top + rng.uniform(4, height - 4))
        grey = greys[end[1], end[0]]
        if grey and np.hypot(end[0] - start[0], end[1] - start[1]) > 30:
            break
    page.drag(start, end)
    page.wait_saved()
    page.settle()
    drawn = page.place(0)
    saved = saved_points(table)[name][0]
    scale = float(page.driver.execute_script(
        "return document.querySelector(`g[data-landmark='0'] .radius`).getAttribute('rx')")) / RADIUS
    return scale, abs(saved[0 if name == "across" else 1] - (grey - 1)), float(np.hypot(*np.subtract(drawn, end)))


def saved_points(table: Path) -> dict[str, np.ndarray]:
    """{image: (N, D) as (x, y[, z])} of a landmarks.csv with the plain columns that the review writes."""
    header, *rows = [line.split(",") for line in table.read_text(encoding="utf8").splitlines()]
    at = [index for index, column in enumerate(header)
          if re.search(r"_[xyz]$", column) and not column.startswith("spacing_")]
    dims = len({header[index][-1] for index in at})
    return {row[0]: np.array([float(row[index] or "nan") for index in at]).reshape(-1, dims) for row in rows}
