"""Command line of the report."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from core.errors import CommandParser, run_command
from core.runs.claims import claim
from landmarks_finetuning.report.build import build_report


def main() -> None:
    """Parse the command line, build the page and print where it is."""
    parser = CommandParser(
        prog="python -m landmarks_finetuning.report",
        description="Write EXPERIMENT_DIR/report: index.html (one self-contained page), tables/*.csv and *.tex, "
                    "figures/*.png. More folders join the same page, which goes to the first.",
        epilog="example: python -m landmarks_finetuning.report runs/cephalo runs/chest")
    parser.add_argument("experiment_dirs", nargs="+", type=Path, metavar="EXPERIMENT_DIR",
                        help="runs/<experiment>, finished or not")
    folders = parser.parse_args().experiment_dirs
    with claim(folders[0] / "report", wait=True) if folders[0].is_dir() else nullcontext():  # one build at a time
        print(f"report: {build_report(folders)}")


if __name__ == "__main__":
    run_command(main)
