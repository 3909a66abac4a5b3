"""Fine-tune a landmark detector on a few labelled images."""

from __future__ import annotations

import shlex
from pathlib import Path

from core.config.config import Config
from core.config.limits import LARGEST
from core.config.load import add_config_arguments, add_resume_argument, load_config
from core.config.recipes import recipe
from core.config.second_stage import FOLDER, second_of
from core.config.starts import BACKBONES
from core.data.digests import data_digests
from core.data.folds import cell_source
from core.data.records import Record
from core.data.shots import cell_records
from core.data.together import other_data, other_digests
from core.errors import CommandParser, UserError, run_command
from core.files import drop_states
from core.runs.cells import require_backbone, single_setting
from core.runs.claims import claim
from core.runs.identity import check_cell
from core.runs.inputs import check_inputs
from core.runs.places import Cell, cell_dir, choosing_path, is_scored, round_dir, start_path
from core.runs.requirements import check_memory
from landmarks_finetuning.coverage import coverage_order
from landmarks_finetuning.inference import WEIGHTS
from landmarks_finetuning.self_training import PseudoLabels, answer, labelled_by, match
from landmarks_finetuning.stages import CellData, Stage, train_first, train_second
from landmarks_finetuning.starts import START_WEIGHTS


def check_backbone(config: Config, backbone: str) -> None:
    """UserError where a detector cannot start from `backbone` under this config, or its weights cannot be had."""
    require_backbone(config, backbone)
    if backbone in START_WEIGHTS:
        START_WEIGHTS[backbone](config)  # now, not after the images are read


def finetune_cell(config: Config, cell: Cell, resume: str | None = None) -> Path:
    """Train one cell; returns its folder. An interrupted run continues, a finished one returns at once."""
    check_memory(config)
    check_backbone(config, cell.backbone)
    run_dir = cell_dir(config, cell)
    check_cell(config, cell)
    source = cell_source(config, cell.draw, cell.fold)
    order = coverage_order(config, source, cell.shots)
    records = cell_records(source, config, cell.backbone, cell.shots, cell.draw, order)
    digests = {use: data_digests(some, source.landmark_names, config.dataset) for use, some in records.items()}
    digests |= other_digests(other_data(config, cell.backbone, cell.shots, cell.draw))
    check_inputs(run_dir, digests, start_path(config, cell.backbone))
    if resume is None and is_scored(config, cell):
        return run_dir  # by a launcher, which left no state
    if recipe(config, cell.backbone).finetune.loss == "cross_entropy_channels" and len(source.landmark_names) == 1:
        raise UserError('finetune.loss "cross_entropy_channels" compares landmarks with each other and this data set '
                        'has one; choose "cross_entropy_pixels"')
    data = CellData(records["training"], records["validation"], source.landmark_names, digests,
                    spacing_mm=source.spacing_mm)
    if order is not None:
        data = data._replace(chosen=order[: cell.shots], chosen_by=choosing_path(config))
    train_rounds(config, cell, data, records.get("unlabelled", ()), resume)
    return run_dir


def train_rounds(config: Config, cell: Cell, data: CellData, unlabelled: tuple[Record, ...], resume: str | None
                 ) -> None:
    """Train the stages of a cell, and of every round of self-training after the first.

    `resume` is meant for the stage that was begun last; those before it are done.
    """
    run_dir, settings = cell_dir(config, cell), config.finetune.self_training
    rounds = settings.rounds_of(cell.shots) if unlabelled else 0
    data = data._replace(rounds=rounds)
    command = (f"python -m landmarks_finetuning.train --config {shlex.quote(str(run_dir / 'config.json'))} "
               f"--backbone {cell.backbone} --shots {cell.shots} --draw {cell.draw} --seed {cell.seed}"
               f"{'' if cell.fold is None else f' --fold {cell.fold}'}")
    trainings = {"": train_first}
    if second_of(config, cell.backbone) is not None:
        trainings[FOLDER] = train_second
    folders = [round_dir(run_dir, number) / name for number in range(rounds + 1) for name in trainings]
    begun = [folder for folder in folders if (folder / "last.pt").exists() or (folder / "previous.pt").exists()][-1:]
    if resume is not None and not begun:
        raise UserError(f"--resume {resume}: {run_dir} has no state to continue from (last.pt, previous.pt); leave "
                        "--resume away to begin")
    labels: PseudoLabels | None = None
    for number in range(rounds + 1):
        if number:
            labels = answer(round_dir(run_dir, number - 1), unlabelled, labels, config)
        elif unlabelled and settings.matches(cell.backbone, cell.shots):
            labels = match(run_dir, data.training, unlabelled, config)
        if labels is not None:
            data = data._replace(answered=labelled_by(unlabelled, labels), certainty=labels.certainty)
        for name, make in trainings.items():
            folder = round_dir(run_dir, number) / name
            make(config, Stage(folder, cell, data, resume if begun == [folder] else None, command))
            if not (folder / WEIGHTS).is_file() and (folder / "last.pt").is_file():  # its state is past them
                print(f"{folder / WEIGHTS} is gone: trained again", flush=True)
                drop_states(folder)
                make(config, Stage(folder, cell, data, None, command))


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m landmarks_finetuning.train", description=__doc__,
        epilog="example: python -m landmarks_finetuning.train --config configs/cephalo.json --backbone ddpm --shots 10")
    add_config_arguments(parser)
    parser.add_argument("--backbone", required=True, help=f"what to start from: {', '.join(BACKBONES)}")
    parser.add_argument("--encoder", help="of backbones imagenet and random: instead of finetune.encoder")
    parser.add_argument("--shots", type=int, required=True, help="number of labelled images")
    parser.add_argument("--draw", type=int, default=0, help="which labelled subset")
    parser.add_argument("--seed", type=int, default=0, help="initialisation and order")
    parser.add_argument("--fold", type=int, help="under evaluation.folds: the part of the labels, from 1, that the run "
                        "does not see")
    add_resume_argument(parser)
    arguments = parser.parse_args()
    if arguments.encoder is not None and BACKBONES.get(arguments.backbone) == "unet":
        raise UserError(f'--encoder is for backbones with an encoder; "{arguments.backbone}" is the diffusion U-Net')
    for option, number in (("--seed", arguments.seed), ("--draw", arguments.draw)):
        if not 0 <= number <= LARGEST:
            raise UserError(f"{option} {number if number < 0 else f'{number:.0e}'}: {option[2:]}s count from 0 to 2^62")
    encoder = [] if arguments.encoder is None else [f"finetune.encoder={arguments.encoder}"]
    config = load_config(arguments.config, [*arguments.set, *encoder], [arguments.backbone])
    config = single_setting(config, arguments.backbone)
    if (config.evaluation.folds is None) != (arguments.fold is None):
        raise UserError(f"--fold {arguments.fold}: evaluation.folds is {config.evaluation.folds}; a run of a "
                        "cross-validation is one of its folds, another run of none")
    cell = Cell(arguments.backbone, arguments.shots, arguments.draw, arguments.seed, arguments.fold)
    with claim(cell_dir(config, cell)):
        run_dir = finetune_cell(config, cell, arguments.resume)
    print(f"training is done: {run_dir}; score it with: python -m landmarks_finetuning.evaluate {run_dir}")


if __name__ == "__main__":
    run_command(main)
