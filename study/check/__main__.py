"""Look at a data set before anything is trained: sizes, grey values, labels that do not fit, twins, and the cost."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from core.config.load import add_config_arguments, load_config
from core.data.source import load_source
from core.errors import CommandParser, run_command
from study.check.cost import cost_of
from study.check.overview import overview
from study.check.page import write_page
from study.runs import study_runs

STAGES = ("pretrain", "ssl", "finetune")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = CommandParser(prog="python -m study.check", description=__doc__,
                           epilog="example: python -m study.check --config configs/mine.json")
    add_config_arguments(parser)
    parser.add_argument("--out", type=Path, help="folder of the page and the text (default: check/ of the experiment)")
    parser.add_argument("--no-timing", action="store_true", help="leave out what a study costs: no step is taken")
    given = parser.parse_args(arguments)
    config = load_config(given.config, given.set)
    source = load_source(config.dataset)
    stages = STAGES if source.labelled else STAGES[:1]
    cost = None if given.no_timing else cost_of(config, stages, study_runs(config, stages))
    found = overview(config, source, cost)
    folder = given.out or config.experiment_dir / "check"
    page = write_page(folder / "index.html", config, source, found)
    (folder / "check.txt").write_text("\n".join(found.lines(None)) + "\n", encoding="utf8")
    print("\n".join(found.lines()))
    print(f"page: {page}")
    launch = ["./launch_experiments.sh", "--config", str(given.config), *(["--set", *given.set] if given.set else [])]
    print(f"next: {shlex.join(launch)}")


if __name__ == "__main__":
    run_command(main)
