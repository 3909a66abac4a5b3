"""One page for a study of many runs: how long it takes to build and to open, and how large it is.

The runs are made up: errors, logs and pictures as a study of cephalograms leaves them (150 images, 19 landmarks),
without heatmaps; 10 starts x 6 numbers of labels x 5 draws.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import gaussian_filter

from core.config.starts import BACKBONES, MEAN_SHAPE
from core.errors import CommandParser, UserError, run_command
from core.runs.record import environment
from landmarks_finetuning.metrics import summarise
from landmarks_finetuning.report.build import build_report

IMAGES, LANDMARKS, OVERLAYS, STEPS = 150, 19, 4, 60
STARTS, SHOTS, DRAWS, THRESHOLDS = 10, (1, 2, 5, 10, 25, 50), 5, (2.0, 2.5, 3.0, 4.0)
TIMER = """<script>addEventListener("load", () => {
const height = document.body.offsetHeight;  // all of the page is laid out
const others = performance.getEntriesByType("resource").filter(each => !each.name.startsWith("data:"));
document.title = `opened ${performance.now()} height ${height} others ${others.length}`; });</script>"""


def write_study(root: Path, draws: int = DRAWS, starts: int = STARTS, images: int = IMAGES) -> int:
    """Runs of every start, number of labels and draw; how many there are. The same pictures lie in many of them."""
    rng = np.random.default_rng(0)
    names = [f"landmark {number}" for number in range(1, LANDMARKS + 1)]
    pictures = [_picture(rng) for _ in range(8)]
    count = 0
    for place, start in enumerate([MEAN_SHAPE, *BACKBONES][:starts]):
        for shots in SHOTS:
            for draw in range(draws):
                folder = root / "landmarks" / start / "default" / f"shots{shots:03d}_draw{draw}_seed0"
                errors = rng.gamma(2, (1 + 0.2 * place) * (1 + 2 / shots) / 2, (images, LANDMARKS))
                _write_run(folder, start, shots, draw, errors, names)
                for rank in range(OVERLAYS if start != MEAN_SHAPE else 0):
                    picture = pictures[(count + rank) % len(pictures)]
                    (folder / "overlays" / f"rank{rank + 1:03d}_{rank:03d}.png").write_bytes(picture)
                count += 1
    return count


def _picture(rng: np.random.Generator) -> bytes:
    """A PNG as detailed as a radiograph with an overlay: 640 x 790 pixels."""
    smooth = sum(gaussian_filter(rng.normal(size=(790, 640)), width) * width for width in (2, 8, 40))
    grey = np.interp(smooth, np.percentile(smooth, (1, 99)), (0, 255)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _write_run(folder: Path, start: str, shots: int, draw: int, errors: np.ndarray, names: list[str]) -> None:
    (folder / "overlays").mkdir(parents=True)
    mean = float(errors.mean())
    metrics = {"dataset": "cephalo", "layout": "cephalo", "paper_rule": "cephalo", "phantom": False, "split": "test",
               "backbone": start, "variant": "default", "shots": shots, "draw": draw, "seed": 0, "unit": "mm",
               "training_images": ["t"] * shots, "validation_labels": 20, "images": len(errors), "decoder": "argmax",
               "landmark_names": names, "image_size": [256, 256], "seconds": 600.0, "validation_mre": mean,
               "physical": {**summarise(errors, THRESHOLDS), "interval": [mean - 0.1, mean + 0.1]},
               "paper": summarise(errors, THRESHOLDS)}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "config.json").write_text(json.dumps({"experiment": {"name": "large"}}))
    image = np.repeat([f"{number:03d}" for number in range(len(errors))], LANDMARKS)
    flat, column = errors.ravel(), np.ones(errors.size)
    pd.DataFrame({"image": image, "patient": "", "landmark": np.tile(names, len(errors)), "x": column, "y": column,
                  "truth_x": column, "truth_y": column, "error": flat, "paper_error": flat,
                  "expected_error": flat[::-1], "radius90": 2 * column}
                 ).to_csv(folder / "predictions.csv", index=False, float_format="%.4f")
    decay = np.exp(-np.arange(1, STEPS + 1) / 15)
    lines = [{"step": 10 * step, "loss": 1 + value, "validation_loss": 1.5 + value, "validation_mre": mean + 9 * value}
             for step, value in enumerate(decay, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def seconds_to_open(page: Path) -> float:
    """From the navigation's start to the `load` event with the page laid out, in a fresh headless browser.

    Raises UserError where the page asks for another file: its size is then not all that it loads.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise UserError("no chromium, chromium-browser or google-chrome found")
    with tempfile.TemporaryDirectory() as profile:
        copy = Path(profile) / "page.html"
        copy.write_text(page.read_text(encoding="utf8").replace("</head>", f"{TIMER}</head>", 1), encoding="utf8")
        dom = subprocess.run([browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                              f"--user-data-dir={profile}/profile", "--timeout=20000", "--dump-dom", f"file://{copy}"],
                             capture_output=True, check=True, timeout=120).stdout.decode("utf8")
    found = re.search(r"<title>opened ([\d.]+) height \d+ others (\d+)", dom)
    if found is None:
        raise UserError(f"{page} did not open within 20 s")
    if found.group(2) != "0":
        raise UserError(f"{page} loads {found.group(2)} files beside itself")
    return float(found.group(1)) / 1000


def main() -> None:
    """Command line."""
    parser = CommandParser(prog="python -m benchmarks.large_report", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter,
                           epilog="example: python -m benchmarks.large_report")
    parser.add_argument("--folder", type=Path, help="keep the study here (default: a temporary folder)")
    parser.add_argument("--draws", type=int, default=DRAWS,
                        help=f"of each start and number of labels ({DRAWS}: 300 runs)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = (arguments.folder or Path(temporary)) / "large"
        shutil.rmtree(root, ignore_errors=True)
        count = write_study(root, arguments.draws)
        started, worked = time.perf_counter(), time.process_time()
        page = build_report([root])
        built, worked = time.perf_counter() - started, time.process_time() - worked
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        times = sorted(seconds_to_open(page) for _ in range(5))
        machine = environment()
        print(f"{machine['cpu']}, {machine['cores']} cores; {count} runs: page of {page.stat().st_size / 1e6:.1f} MB, "
              f"which loads no other file; built in {built:.0f} s ({worked:.0f} s of one core), memory at most "
              f"{memory:.0f} MB; open after {times[2]:.2f} s (median of 5, {times[0]:.2f} to {times[-1]:.2f})")


if __name__ == "__main__":
    run_command(main)
