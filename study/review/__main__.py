"""Look at a run's predictions in the browser, in the order of doubt, and correct them; they are labels at once."""

from __future__ import annotations

import argparse
import getpass
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from werkzeug.serving import BaseWSGIServer

from core.data.labels import FolderLabels, new_data_set
from core.data.records import image_id
from core.errors import CommandParser, UserError, run_command
from core.files import parse_json
from core.formats.images import find_images, read_geometry
from core.runs.best import run_folder
from core.runs.claims import claim
from study.review.answers import are_calibrated, find_answers, order_of_doubt, read_answers, suggested
from study.review.server import HOST, review_server
from study.review.session import Review

PORT = 8137


def recorded_config(run_dir: Path) -> dict[str, Any]:
    """The values of a run's config.json. UserError: it is not there."""
    path = run_dir / "config.json"
    try:
        values = parse_json(path.read_text(encoding="utf8"))
        if not isinstance(values, dict) or not all(isinstance(values.get(key, {}), dict)
                                                   for key in ("dataset", "experiment")):
            raise ValueError("it holds no settings of a study")
        if not isinstance(values.get("dataset", {}).get("root", ""), str):
            raise ValueError("its dataset.root is no text")
        return values
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); RUN is the folder of a trained run, such as "
                        "runs/mine/landmarks/ddpm/default/shots010_draw0_seed0") from None


def find_labels(images: Path, given: Path | None, config: dict[str, Any], run_dir: Path) -> FolderLabels:
    """The data set whose labels are reviewed: the folder data set that holds `images`, or `given`, made when new.

    Of images that belong to no data set one is made beside them, which links to them. UserError: no such folder, or one
    of the data sets in layouts of their own, whose labels stay as they are.
    """
    if not images.is_dir():
        raise UserError(f"--images {images} is not a folder")
    data = config.get("dataset", {})
    described = Path(data["description"]) if data.get("description") else None
    root = given or next((folder for folder in (images, *images.resolve().parents)
                          if (folder / "images").is_dir() and ((folder / "dataset.json").is_file() or (
                              described is not None and folder.resolve() == Path(data["root"]).resolve()))), None)
    root = root or images.resolve().with_name(f"{images.resolve().name}_labels")
    own = Path(data.get("root", "")).resolve() == root.resolve()
    if own and data.get("layout") != "folder":
        raise UserError(f"--labels {root} is in layout {data['layout']}, whose labels are not changed here; name a "
                        "new folder")
    description = described if own and described is not None else root / "dataset.json"
    if not description.exists():
        pictures = find_images(images, recursive=True)
        if not pictures:
            raise UserError(f"--images {images} holds no image")
        new_data_set(root, images, names_of(run_dir), len(read_geometry(pictures[0]).size))
    excluded = [image_id(name) for name in data.get("exclude", ())] if own else []
    return FolderLabels(root, description, excluded, data.get("spacing_mm") if own else None)


def names_of(run_dir: Path) -> list[str]:
    """The landmarks of a run's detector."""
    from landmarks_finetuning.inference import trained_detector  # takes seconds, for torch

    return trained_detector(run_dir).landmark_names


def chosen_images(labels: FolderLabels, images: Path) -> list[str]:
    """The images of the data set that lie below `images`. UserError: none."""
    below = images.resolve()
    chosen = [key for key, record in labels.records.items()
              if below in record.image.resolve().parents or below == labels.root.resolve()]
    if not chosen:
        raise UserError(f"--images {images} holds no image of the data set {labels.root}")
    return chosen


def training_command(run_dir: Path, config: dict[str, Any], labels: FolderLabels) -> str:
    """What trains with the labels there are now."""
    values, data = [], config.get("dataset", {})
    if Path(data.get("root", "")).resolve() != labels.root.resolve():
        values = [f"experiment.name={config.get('experiment', {}).get('name', 'study')}_reviewed",
                  f"dataset.name={labels.root.resolve().name}", "dataset.layout=folder", f"dataset.root={labels.root}",
                  "dataset.phantom=null"]
    values.append(f"finetune.shots=[{max(1, len(labels.training()))}]")
    words = ["./launch_experiments.sh", "--config", str(run_dir / "config.json"), "--set", *values]
    return shlex.join(words)


class Opened(NamedTuple):
    """A review that is ready to be served."""

    session: Review
    server: BaseWSGIServer
    keys: list[str]
    labels: FolderLabels
    config: dict[str, Any]
    run_dir: Path


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[Opened]:
    """A review whose data set is held against others while the block runs. UserError: arguments that do not fit."""
    run_dir = run_folder(arguments.run_dir)
    config = recorded_config(run_dir)
    labels = find_labels(arguments.images, arguments.labels, config, run_dir)
    keys = chosen_images(labels, arguments.images)
    records = {key: labels.records[key] for key in keys}
    folder = labels.root / "review"
    with claim(folder):
        if arguments.predictions:
            answers = read_answers(arguments.predictions, records, labels.names, told=False)
        else:
            answers = find_answers(run_dir, records, labels.names, folder, tuple(arguments.set))
        session = Review(labels, answers, folder, arguments.who, str(run_dir))
        order = order_of_doubt(keys, answers, suggested(run_dir), session.at_start)
        command = training_command(run_dir, config, labels)
        calibrated = bool(arguments.predictions) or are_calibrated(folder)  # of a table nothing is known
        server = review_server(session, order, arguments.port, command, calibrated)
        yield Opened(session, server, keys, labels, config, run_dir)


def review(arguments: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    with opened(arguments) as found:
        labels, session = found.labels, found.session
        open_ones = len(found.keys) - len(session.at_start.intersection(found.keys))
        print(f"{len(found.keys)} images, {open_ones} of them with open landmarks; labels go to "
              f"{labels.table if labels.table.exists() else labels.folder}, the journal is {session.journal.path}")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, partial(_stop, found.server))
        print(f"listening on http://{HOST}:{found.server.port}/  (Ctrl-C stops)", flush=True)
        found.server.serve_forever()
        with session.lock:  # a change that is being made is finished
            print(f"\nstopped; changed in reviews: {len(session.changed())} images. To train with the labels:")
            print(f"  {training_command(found.run_dir, found.config, labels)}")


def _stop(server: BaseWSGIServer, *_: object) -> None:
    """End `server` from another thread: an exception raised here could be lost, in a finalizer for one."""
    threading.Thread(target=server.shutdown, daemon=True).start()


def command_line() -> CommandParser:
    """The arguments of the command."""
    parser = CommandParser(
        prog="python -m study.review", description=__doc__,
        epilog="example: python -m study.review runs/mine --images datasets/mine")
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run's folder, or an experiment's for its best run")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR",
                        help="a folder data set, or a folder of images in it or elsewhere")
    parser.add_argument("--labels", type=Path, metavar="DIR", help="the folder data set that labels go to; default: "
                        "the one that the images lie in, or a new one beside them, DIR_labels")
    parser.add_argument("--predictions", type=Path, metavar="CSV",
                        help="a predictions.csv of landmarks_finetuning.predict, in place of asking the run again")
    parser.add_argument("--port", type=int, default=PORT, help=f"default {PORT}; 0: any free one")
    parser.add_argument("--who", default=getpass.getuser(), help="who looks, for the journal; default: your login")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="SECTION.KEY=VALUE")
    return parser


def main() -> None:
    """Command line."""
    review(command_line().parse_args())


if __name__ == "__main__":
    run_command(main)
