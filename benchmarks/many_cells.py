"""Many small fine-tuning runs: all in one process, as the launcher does, against a process for each.

The same study twice, its runs trained and scored: once by one launcher, once by a launcher for each run, one after the
other. The data are decoded and the diffusion model is pre-trained beforehand, for both.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from core.config.config import Config
from core.config.load import add_config_arguments, load_config
from core.config.starts import MEAN_SHAPE
from core.errors import CommandParser, run_command
from core.runs.cells import cells
from core.runs.places import is_scored
from core.runs.record import environment
from study.run import run_study


def launch(arguments: list[str]) -> float:
    """Seconds of one launcher's whole life. Raises CalledProcessError where it fails."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "study.launch", *arguments, "--stages", "finetune"], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def one_of(config: Config, arguments: list[str]) -> list[list[str]]:
    """The launchers' arguments for each trained run of the study by itself."""
    trained = [cell for cell in cells(config) if cell.backbone != MEAN_SHAPE]
    return [[*arguments, f'finetune.backbones=["{cell.backbone}"]', f"finetune.shots=[{cell.shots}]",
             f"finetune.draws=[{cell.draw}]", f"finetune.seeds=[{cell.seed}]"] for cell in trained]


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m benchmarks.many_cells", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.many_cells --config benchmarks/studies/many_cells.json")
    add_config_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/many_cells"), help="folder for both studies' runs")
    arguments = parser.parse_args()
    options = ["--config", str(arguments.config), "--set", *arguments.set, f"experiment.output_dir={arguments.out}"]
    configs = {name: load_config(arguments.config, [*arguments.set, f"experiment.output_dir={arguments.out}",
                                                    f"experiment.name={name}"]) for name in ("together", "apart")}
    shutil.rmtree(arguments.out, ignore_errors=True)
    run_study(configs["together"], ("pretrain",))
    shutil.copytree(configs["together"].experiment_dir, configs["apart"].experiment_dir)
    together = launch([*options, "experiment.name=together"])
    single = one_of(configs["apart"], [*options, "experiment.name=apart"])
    apart = [launch(one) for one in single]
    unscored = [cell for config in configs.values() for cell in cells(config) if not is_scored(config, cell)]
    machine = environment()
    print(f"{machine['cpu']}, {machine['cores']} cores, GPU {machine['gpu']}; {len(single)} trained runs of "
          f"{configs['apart'].finetune.iterations} steps, {len(unscored)} of all runs without a score")
    print(f"one process {together:.1f} s, a process for each {sum(apart):.1f} s "
          f"({min(apart):.1f} to {max(apart):.1f} s each): {sum(apart) / together:.2f} x")


if __name__ == "__main__":
    run_command(main)
