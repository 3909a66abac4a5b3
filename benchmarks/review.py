"""The review measured: how near drags end to the pointer, what kill -9 loses, how fast images page.

    python -m benchmarks.review                  # all three; needs chromium and chromedriver
    python -m benchmarks.review paging --images 1000 --pages 200
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from http.client import HTTPException
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

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
from core.files import JUST_SECONDS, LEFT_BEHIND
from core.phantoms.radiographs import render_radiograph
from study.review.__main__ import command_line, opened

SIZE = (2400, 1935)  # rows, columns of the images that page
FORKS = multiprocessing.get_context("fork")
DRAWN = 50  # of them differ, the others are copies, which nobody knows but the disk's own memory


def drags(folder: Path, count: int) -> str:
    """`count` drags at random zooms, half of them on each coded image."""
    root = folder / "mine"
    run = write_coded_images(root)
    rng, found = np.random.default_rng(0), []
    with served(run, root) as review, browser(folder / "profile") as driver:
        for number, name in enumerate(("across", "down")):
            page = Page(driver, review.address)
            if number:
                page.keys("n")
                page.wait_shown(number)
            found += [coded_drag(page, rng, root / "landmarks.csv", name) for _ in range(count // 2)]
    scale, off, drawn = np.array(found).T
    within = off <= 0.5 + 0.5 / scale  # the pointer is in whole screen pixels
    return (f"drags: {len(found)} at {scale.min():.2f} to {scale.max():.1f} screen pixels a pixel (median "
            f"{np.median(scale):.1f}). The point is drawn at most {drawn.max():.2f} screen pixels from the pointer "
            f"(mean {drawn.mean():.2f}); the saved coordinate is that of the pixel under the pointer, to half a pixel "
            f"and half a screen pixel, in {within.sum()} of {len(found)}; at 4 screen pixels a pixel and more the "
            f"saved coordinate is at most {off[scale >= 4].max():.3f} pixels from that pixel's centre")


class Forked(Asked):
    """The review in a process that is split off this one, so that its start takes no time; killed like any other."""

    def __init__(self, run: Path, root: Path) -> None:
        ours, theirs = FORKS.Pipe(duplex=False)
        self.process = FORKS.Process(target=_serve, args=(run, root, theirs), daemon=True)
        self.process.start()
        self.address = f"http://127.0.0.1:{ours.recv()}/"

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.join()


def _serve(run: Path, root: Path, port: Connection) -> None:
    arguments = command_line().parse_args([str(run), "--images", str(root), "--port", "0", "--predictions",
                                           str(run / "predictions.csv")])
    with opened(arguments) as review:
        port.send(review.server.port)
        review.server.serve_forever()


class Writer(threading.Thread):
    """Makes one change after the other and remembers which were answered."""

    def __init__(self, review: Forked, images: int, seed: int) -> None:
        super().__init__()
        self.review, self.images, self.seed = review, images, seed
        self.answered: list[str] = []
        self.asked = 0

    def run(self) -> None:
        """Until nobody answers."""
        versions = [image["version"] for image in self.review.ask("state")[1]["images"]]
        pick = random.Random(self.seed)
        try:
            while True:
                number, self.asked = pick.randrange(self.images), self.asked + 1
                change = f"{self.seed}-{self.asked}"
                action = pick.choice(["move", "move", "move", "absent", "undo"])
                status, values = self.review.ask(f"change/{number}", {
                    "version": versions[number], "action": action, "landmark": pick.randrange(2),
                    "to": [round(pick.uniform(0, 250), 2), round(pick.uniform(0, 250), 2)], "change": change})
                if status != 200:
                    raise RuntimeError(values.get("message"))
                if values["version"] > versions[number]:
                    self.answered.append(change)
                versions[number] = values["version"]
        except (OSError, HTTPException):  # none, or half an answer
            return


class Killed(NamedTuple):
    """What came of kills among `answered` changes.

    `lost` of them; images whose labels, journal and splits disagree after the next start (`wrong`); starts that
    finished a change which was cut between its files (`mended`); temporary files that were there after that (`left`).
    """

    kills: int
    answered: int
    lost: int
    wrong: int
    mended: int
    left: int


def kill_reviews(folder: Path, count: int, seed: int = 0, longest: float = 2.0) -> Killed:
    """`count` times: changes as fast as they are answered, kill -9 at a random moment, start again, compare."""
    root, images = folder / "mine", 20
    (root / "images").mkdir(parents=True)
    points = {}
    for number in range(images):
        Image.fromarray(np.zeros((254, 254), np.uint8)).save(root / f"images/{number:03d}.png")
        points[f"{number:03d}"] = np.array([[10.0, 20], [30, 40]])
    run = write_data_set(root, ["tip", "base"], points, splits={"train": []})
    pick, answered, mended, lost, wrong = random.Random(seed), list[str](), 0, 0, 0
    for number in range(count):
        review = Forked(run, root)
        writer = Writer(review, images, 1000 * seed + number)
        writer.start()
        while not writer.answered:
            time.sleep(0.01)
        time.sleep(pick.uniform(0, longest))
        review.kill()
        writer.join()
        answered += writer.answered
        before = (root / "landmarks.csv").read_bytes(), (root / "dataset.json").read_bytes()
        again = Forked(run, root)  # what the program says now, and what lies on disk
        mended += before != ((root / "landmarks.csv").read_bytes(), (root / "dataset.json").read_bytes())
        lines = (root / "review/journal.jsonl").read_text(encoding="utf8").splitlines()
        lost += len(set(answered) - {json.loads(line)["change"] for line in lines})
        saved = saved_points(root / "landmarks.csv")
        listed = json.loads((root / "dataset.json").read_text(encoding="utf8"))["splits"]["train"]
        for index in range(images):
            image = again.ask(f"image/{index}")[1]
            at = [each["at"] or [np.nan, np.nan] for each in image["landmarks"]]
            labelled = bool(np.isfinite(at).any())
            same = np.array_equal(saved.get(image["id"], np.full((2, 2), np.nan)), at, equal_nan=True)
            wrong += not same or labelled != (image["id"] in listed)
        again.kill()
    time.sleep(2 * JUST_SECONDS)  # before that nothing counts as left behind
    Forked(run, root).kill()
    left = sum(bool(LEFT_BEHIND.fullmatch(path.name)) for path in root.rglob(".*"))
    return Killed(count, len(answered), lost, wrong, mended, left)


def kills(folder: Path, count: int) -> str:
    """kill_reviews, in words."""
    done = kill_reviews(folder, count)
    return (f"kill -9: {done.kills} times at random moments among {done.answered} answered changes: {done.lost} of "
            f"them lost, {done.wrong} images whose labels, journal and splits disagree after the next start; "
            f"{done.mended} times that start finished a change that was cut between its files; {done.left} temporary "
            "files are left")


def paging(folder: Path, count: int, most: int) -> str:
    """Press N in `count` radiographs of SIZE, with a second to look at each, and again at once when one is shown.

    The time runs in the page from the key to the frame after the image is drawn.
    """
    root = folder / "mine"
    (root / "images").mkdir(parents=True)
    pixels, marks = render_radiograph(SIZE, np.random.default_rng(0))
    pixels = np.asarray(pixels)
    rng, points = np.random.default_rng(1), {}
    grain = rng.normal(0, 6, (SIZE[0] * 2, SIZE[1]))
    for number in range(count):
        name, file = f"{number:04d}", root / f"images/{number:04d}.jpg"
        if number < DRAWN:
            first, roll = int(rng.integers(SIZE[0])), int(rng.integers(SIZE[1]))
            noisy = pixels + np.roll(grain[first : first + SIZE[0]], roll, axis=1)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, quality=92)
        else:
            shutil.copy(root / f"images/{number % DRAWN:04d}.jpg", file)
        points[name] = marks[:, ::-1]
    run = write_data_set(root, [f"landmark {number}" for number in range(len(marks))], points)
    said = []
    with served(run, root) as review, browser(folder / "profile") as driver:
        driver.set_script_timeout(60)
        for how, wait, limit in (("after a second each", 1.0, min(most, 60)), ("at once", 0.0, most)):
            pages = min(count - 1, limit)
            page = Page(driver, review.address)
            times = []
            for number in range(pages):
                times.append(float(driver.execute_async_script(PRESS, str(number + 1))))
                time.sleep(wait)
            said.append(f"{pages} pages {how}: median {np.median(times):.0f} ms, 95 % {np.percentile(times, 95):.0f}, "
                        f"99 % {np.percentile(times, 99):.0f}, longest {max(times):.0f}; "
                        f"{np.mean(np.array(times) <= 300):.1%} within 300 ms")
            page.settle()
    size = np.mean([path.stat().st_size for path in (root / "images").iterdir()]) / 1e6
    return f"paging {count} JPEG files of {SIZE[0]} x {SIZE[1]} ({size:.1f} MB each): " + ". ".join(said)


PRESS = """
const wanted = arguments[0], done = arguments[1], start = performance.now();
const seen = new MutationObserver(() => {
  if (document.body.dataset.shown === wanted) { seen.disconnect(); done(performance.now() - start); }
});
seen.observe(document.body, { attributes: true, attributeFilter: ["data-shown"] });
document.dispatchEvent(new KeyboardEvent("keydown", { key: "n" }));
"""


def main(given: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.review", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["drags", "kill", "paging"], help="drags, kill, paging; all three")
    parser.add_argument("--drags", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--pages", type=int, default=999, help="of these images, how many are paged through at once")
    arguments = parser.parse_args(given)
    measures: dict[str, tuple[Callable[[Path, int], str], int]] = {
        "drags": (drags, arguments.drags), "kill": (kills, arguments.kills),
        "paging": (partial(paging, most=arguments.pages), arguments.images)}
    for what in arguments.what:
        measure, count = measures[what]
        with tempfile.TemporaryDirectory() as folder:
            print(f"{measure(Path(folder), count)} (load of the machine {os.getloadavg()[1]:.1f})", flush=True)


if __name__ == "__main__":
    main()
