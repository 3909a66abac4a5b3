"""Remake docs/example_report: the report of a small study on synthetic radiographs, from nothing.

The study runs with paths relative to its folder, so that the page, which shows its config, names no place of the
machine; a page that does is refused.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from core.errors import CommandParser, UserError, run_command

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "benchmarks" / "studies" / "example.json"
TARGET = ROOT / "docs" / "example_report"
LIMIT_BYTES = 2_500_000
EMBEDDED = re.compile(r"base64,[A-Za-z0-9+/=]*")  # pictures: any short word may stand in one by chance
KINDS = ("*.html", "tables/*")  # the figures are in the page; their PNG files would be as large as all the rest


def run_study(folder: Path) -> Path:
    """Run or resume the study in `folder`; the path of its report. Raises UserError when the launcher gives up."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-m", "study.launch", "--config", str(CONFIG)], cwd=folder,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    if done.returncode:
        raise UserError(f"the study in {folder} stopped with status {done.returncode}")
    return folder / "runs" / "example" / "report"


def copy_report(report: Path, target: Path, private: tuple[str, ...]) -> int:
    """Replace `target` by the page and the tables of `report`; the bytes written.

    Raises UserError, and leaves `target` as it is, when they are more than LIMIT_BYTES or hold one of the words of
    `private`.
    """
    contents = {path.relative_to(report): path.read_bytes() for kind in KINDS for path in sorted(report.glob(kind))}
    total = sum(map(len, contents.values()))
    if total > LIMIT_BYTES:
        raise UserError(f"{report} has {total} bytes of page and tables, more than the {LIMIT_BYTES} to be committed")
    for name, content in contents.items():
        text = EMBEDDED.sub("", content.decode("utf8"))
        private_words = [word for word in private if re.search(rf"(?<![\w.-]){re.escape(word)}(?![\w-])", text)]
        if private_words:
            raise UserError(f"{report / name} names {private_words[0]!r}, a place or name of this machine")
    shutil.rmtree(target, ignore_errors=True)
    for name, content in contents.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    return total


def main() -> None:
    """Command line."""
    parser = CommandParser(prog="python -m benchmarks.example_report", description=__doc__,
                                     epilog="example: python -m benchmarks.example_report")
    parser.add_argument("--folder", type=Path, help="run the study here and keep it, or go on with it (default: a "
                                                    "temporary folder)")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary if folder is None else folder).resolve()
        total = copy_report(run_study(place), TARGET, (str(place), str(ROOT), str(Path.home()), platform.node()))
    print(f"example report: {TARGET / 'index.html'}, {total / 1e6:.1f} MB with its tables")


if __name__ == "__main__":
    run_command(main)
