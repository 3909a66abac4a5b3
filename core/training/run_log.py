"""What a run says while it trains: metrics.jsonl, TensorBoard and a progress bar."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from core.files import parse_json, write_atomically


class RunLog:
    """Appends to metrics.jsonl and TensorBoard; on resume forgets what lies beyond `step`."""

    def __init__(self, run_dir: Path, title: str, step: int, total: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports for a second: only where something is trained

        self.path = run_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.file = self.path.open("a", encoding="utf8")
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        self.bar = tqdm(total=total, initial=step, desc=title, unit="step", dynamic_ncols=True,
                        mininterval=0.5 if sys.stderr.isatty() else 30)
        self.images, self.started = 0, time.perf_counter()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.board.close()
        self.file.close()

    def advance(self, images: int) -> None:
        """One optimiser step over `images` images is done."""
        self.images += images
        self.bar.update()

    def interval(self) -> dict[str, float]:
        """Seconds and images per second since the last call."""
        now = time.perf_counter()
        seconds = max(now - self.started, 1e-9)
        rate = self.images / seconds
        self.images, self.started = 0, now
        return {"images_per_second": rate, "seconds": seconds}

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, the same to TensorBoard, the loss on the bar."""
        line = {"step": step, **values}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        shown = {"loss": "loss", "validation_loss": "val", "images_per_second": "img/s"}
        self.bar.set_postfix({short: f"{values[name]:.4g}" for name, short in shown.items() if name in values})


class NoLog(nullcontext):
    """The log of a process that is not the one to speak."""

    def __init__(self, run_dir: Path, title: str, step: int, total: int) -> None:
        super().__init__(self)

    def advance(self, images: int) -> None:
        """Nothing."""

    def interval(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def write(self, step: int, values: dict[str, float]) -> None:
        """Nothing."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; what is none, such as a last line cut off by a crash, is left out."""
    if not path.is_file():
        return []
    return [line for text in path.read_bytes().splitlines() if (line := _line(text)) is not None]


def _line(text: bytes) -> dict[str, Any] | None:
    """A step and its figures, None where `text` is no such line."""
    try:
        line = parse_json(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return None
    return line if all(isinstance(value, int | float) for value in line.values()) else None


def logged_below(folder: Path) -> tuple[float, int]:
    """`logged` of all trainings in a run's folder: a run may have several, one after the other."""
    parts = [logged(path) for path in folder.rglob("metrics.jsonl")]
    return sum(seconds for seconds, _ in parts), sum(steps for _, steps in parts)


def logged(path: Path) -> tuple[float, int]:
    """Seconds that a metrics.jsonl accounts for, and the steps done in them."""
    timed = [line for line in read_metrics(path) if "seconds" in line]
    return sum(line["seconds"] for line in timed), timed[-1]["step"] if timed else 0
