"""How far matching alone gets with few labels: its error on the validation images, beside the mean shape's.

The labelled images are those of finetune.selection; searched are all other images of the pre-training, scored are the
validation images among them. No detector is trained.
"""

from __future__ import annotations

import time

import numpy as np

from core.config.config import Config
from core.config.load import add_config_arguments, load_config
from core.data.dataset import load_images
from core.data.records import DataSource
from core.data.shots import select_shots
from core.data.source import load_source
from core.errors import CommandParser, run_command
from landmarks_finetuning.coverage import coverage_order
from landmarks_finetuning.matching import SPREADS, matches
from landmarks_finetuning.metrics import physical_errors
from landmarks_finetuning.shape import mean_shape_prediction


def measure(config: Config, source: DataSource, shots: int, draw: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{method: errors (M, N) on the validation images in the reporting unit, certainties (M, N)} of one draw."""
    selection, order = config.finetune.selection, coverage_order(config, source, shots)
    scored = source.require("validation")
    chosen = select_shots(source.require("train"), shots, draw, selection, order)
    taken = {record.id for record in (*chosen, *scored)}
    rest = [record for record in source.pretraining_records() if record.id not in taken]
    labelled, others = load_images(chosen, config.dataset), load_images([*scored, *rest], config.dataset)
    images = load_images(scored, config.dataset)
    guess = images.from_centred(mean_shape_prediction(labelled.centred_points()))
    found = {"mean shape": (guess, np.zeros(guess.shape[:2]))}
    for name, spreads in (("each landmark by itself", ()), ("with the shape prior", SPREADS)):
        points, certainty = matches(config, labelled, others, spreads)
        found[name] = points[: len(scored)], certainty[: len(scored)]
    return {name: (physical_errors(points, images.original_points(), images.spacings()), certainty)
            for name, (points, certainty) in found.items()}


def print_table(rows: list[dict[str, tuple[np.ndarray, np.ndarray]]], unit: str) -> None:
    """Mean over draws, each draw's mean, median and that of the surer half of the landmarks."""
    print(f"| method | error, {unit} | by draw | median | of the surer half |\n|---|---|---|---|---|")
    for name in rows[0]:
        errors, certainties = (np.stack(parts) for parts in zip(*(row[name] for row in rows), strict=True))
        means = np.nanmean(errors, axis=(1, 2))
        surer = np.nanmean(errors[certainties > np.median(certainties)]) if certainties.any() else np.nan
        print(f"| {name} | {means.mean():.2f} | {', '.join(f'{mean:.2f}' for mean in means)} | "
              f"{np.nanmedian(errors):.2f} | {'' if np.isnan(surer) else f'{surer:.2f}'} |")


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m benchmarks.matching", description=__doc__,
        epilog="example: python -m benchmarks.matching --config configs/cephalo.json --draws 0 1 2")
    add_config_arguments(parser)
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--shots", type=int, default=1, help="labelled images")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)
    source, begun = load_source(config.dataset), time.monotonic()
    rows = [measure(config, source, arguments.shots, draw) for draw in arguments.draws]
    print_table(rows, source.unit)
    print(f"{arguments.shots} labelled, {rows[0]['mean shape'][0].shape[0]} validation images; "
          f"{(time.monotonic() - begun) / len(rows):.0f} s a draw")


if __name__ == "__main__":
    run_command(main)
