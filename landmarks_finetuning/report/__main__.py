"""Command line of the report."""

from __future__ import annotations

from pathlib import Path

from core.errors import CommandParser, run_command
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
    print(f"report: {build_report(parser.parse_args().experiment_dirs)}")


if __name__ == "__main__":
    run_command(main)
