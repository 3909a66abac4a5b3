"""What one CUDA GPU makes of the framework: peaks, steps of ours and the peers, a profile, a study's parts.

Every part is a process of its own with a time of its own: one that fails, or that the minutes do not suffice for, is
a row that says so, and the others are there. Prints tables, writes OUT/gpu.json and OUT/gpu.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.drawing import draw
from benchmarks.gpu_parts import PARTS, Row
from benchmarks.measuring import machine, table
from core.errors import CommandParser, UserError, run_command
from core.files import write_json
from core.training.device import resolve_device

MARK = "row: "
LEAST_SECONDS = 15.0  # of a part: with less it is not begun


def rows_of(part: str, seconds: float, cache: str) -> Iterator[Row]:
    """The rows of a part in a fresh process, which is ended after `seconds`; the last one says what went wrong."""
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    child = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu", "--part", part], env=environment, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    said: list[str] = []
    assert child.stdout is not None and child.stderr is not None
    reading = threading.Thread(target=lambda pipe: said.extend(pipe), args=(child.stderr,), daemon=True)
    reading.start()
    ended = threading.Event()

    def end() -> None:
        ended.set()
        os.killpg(child.pid, 9)

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        for line in child.stdout:
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
        status = child.wait()
    finally:
        timer.cancel()
    reading.join(5)
    if ended.is_set():
        yield {"failed": f"not done after {seconds:.0f} s"}
    elif status:
        yield {"failed": (said or [f"ended by {status}"])[-1].strip()[:200]}


def run_part(part: str) -> None:
    """Print the rows of one part, as the child of `rows_of`."""
    function, _ = PARTS[part]
    for row in function():
        print(f"{MARK}{json.dumps(row)}", flush=True)


def show(rows: list[Row]) -> str:
    """Rows as a table of all their columns."""
    headings = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return table(headings, [[cell(row.get(heading, "")) for heading in headings] for row in rows])


def measure(parts: list[str], minutes: float, out: Path) -> dict[str, list[Row]]:
    """All rows by part; printed, and written after each."""
    deadline = time.monotonic() + 60 * minutes
    result: dict[str, list[Row]] = {}
    about = machine(resolve_device("auto"))
    with tempfile.TemporaryDirectory() as cache:
        for part in parts:
            seconds = min(PARTS[part][1], deadline - time.monotonic())
            started = time.monotonic()
            result[part] = list(rows_of(part, seconds, cache)) if seconds > LEAST_SECONDS else [
                {"failed": f"not begun: {max(0, seconds):.0f} of {minutes:g} minutes' seconds are left"}]
            print(f"\n{part} ({time.monotonic() - started:.0f} s)\n\n{show(result[part])}", flush=True)
            write_json(out / "gpu.json", {"machine": about, "parts": result})
    return result


def main() -> None:
    """Command line."""
    parser = CommandParser(prog="python -m benchmarks.gpu", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter,
                           epilog="example: python -m benchmarks.gpu --minutes 6")
    parser.add_argument("--minutes", type=float, default=6.0, help="all parts together")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                        help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()
    if options.part:
        run_part(options.part)
        return
    if options.minutes <= 0:
        raise UserError(f"--minutes {options.minutes:g}: must be above 0")
    if resolve_device("auto").type != "cuda":
        raise UserError("no CUDA GPU is visible; python -m benchmarks.counting estimates what one would take")
    result = measure(options.parts, options.minutes, options.out)
    bars = {f"{row['network']}, base {row['base']}, {row['size']}, batch {row['batch']}": row["images/s"]
            for part in ("steps", "peers") for row in result.get(part, []) if "images/s" in row}
    if bars:
        draw(options.out / "gpu.png", "one optimiser step, bf16", "images/s", bars)


if __name__ == "__main__":
    run_command(main)
