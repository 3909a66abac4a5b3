"""Find landmarks in unlabelled images with a trained detector: a CSV and overlays in original pixels."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.data.dataset import load_images
from core.data.records import Record, own_spacing
from core.errors import CommandParser, UserError, note_once, run_command
from core.files import atomic_file
from core.formats.images import IMAGE_SUFFIXES, find_images, read_geometry
from core.formats.label_files import FLAT, FORMATS, Images, lost, write_label_file
from core.formats.labels import LabelSet
from core.formats.points import FolderRow
from core.formats.series import is_series
from core.runs.best import run_folder
from core.training.threads import use_threads
from landmarks_finetuning.calibration import read_calibration
from landmarks_finetuning.inference import TrainedDetector, trained_detector
from landmarks_finetuning.pictures.cases import draw_predictions
from landmarks_finetuning.predictions import (
    Predictions,
    append_rows,
    find_landmarks,
    names_about,
    picture_name,
    printable,
    table_rows,
    write_slicer_files,
)
from landmarks_finetuning.uncertainty import Calibration


def collect_images(paths: list[Path], out: Path | None, spacing_mm: float | None = None,
                   usual: tuple[float, ...] | None = None) -> list[Record]:
    """Every image or volume named or below a named folder; UserError when there is none, or two share a name.

    What lies in `out`, pictures of an earlier run, is none of them. `spacing_mm` is the config's, as for training;
    without it that of images which do not say where they lie is `usual`, the training data set's.
    """
    written = [] if out is None else [(out / name).resolve() for name in ("overlays", "markups")]
    images: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist")
        inside = path.is_dir() and not is_series(path)
        for image in find_images(path, recursive=True) if inside else [path]:
            if inside and any(folder in image.resolve().parents for folder in written):
                continue
            name = image.relative_to(path).as_posix() if inside else image.name
            if name in images:
                raise UserError(f"{image} and {images[name]} would both be called {name}; predict them separately")
            images[name] = image
    if not images:
        raise UserError(f"no image in {', '.join(map(str, paths))}; supported: {', '.join(sorted(IMAGE_SUFFIXES))}")
    geometries = {name: read_geometry(image) for name, image in images.items()}
    records = []
    for name, image in images.items():
        given = usual if geometries[name].affine is None else None
        if spacing_mm is not None:
            given = (spacing_mm,) * len(geometries[name].size)
        spacing = own_spacing(geometries[name], given, image)
        records.append(Record(name, image, None, spacing, geometry=geometries[name]))
    return records


def predict(run_dir: Path, paths: list[Path], out: Path, overlays: bool = True,
            overrides: tuple[str, ...] = (), others: Sequence[Path] = (), formats: Sequence[str] = ()) -> Path:
    """Write out/predictions.csv (image, landmark, x, y[, z], expected_error, radius90), out/overlays/ and out/markups/.

    Markups are of volumes alone. Both figures are in mm, or in the image's own pixels where its spacing is not known,
    and calibrated where the run was, by its evaluation on validation labels.

    Images are read and written batch by batch, so that any number of them fits; the table has its name once it is
    whole. The heatmaps are the mean of those of `run_dir` and of the runs `others`. `formats` of labelling tools are
    written as well, out/coco.json and the like (core.formats.label_files). Returns the table's path.
    """
    run_dir, others = run_folder(run_dir), [run_folder(other) for other in others]
    detector = trained_detector(run_dir, overrides, others)
    calibration = None if others else read_calibration(run_dir, detector)
    if calibration is None:
        print(f"note: expected errors are not calibrated: {run_dir} has no calibration.json for these settings "
              "(evaluating a run that has validation labels writes it)", file=sys.stderr)
    records = collect_images(paths, out, detector.config.dataset.spacing_mm, detector.spacing_mm)
    _check_formats(formats, records)
    rows: list[FolderRow] = []
    names = names_about([record.id for record in records])
    path = out / "predictions.csv"
    with atomic_file(path) as table:
        for predictions in predictions_of(detector, records, calibration):
            append_rows(table, table_rows(predictions))
            write_slicer_files(out / "markups", predictions, names)
            rows += [FolderRow(record.id, points, size=record.file_geometry().size)
                     for record, points in zip(predictions.images.records, predictions.points, strict=True)]
            for index, record in enumerate(predictions.images.records if overlays else ()):
                draw_predictions(out / "overlays" / picture_name(names[record.id], ".png"), predictions, index,
                                 f"{printable(record.id)}{_doubt(predictions, index)}")
    labels = LabelSet(tuple(detector.landmark_names), tuple(rows), proposed=True)
    _write_formats(out, labels, {record.id: record.image for record in records}, formats)
    return path


def _check_formats(formats: Sequence[str], records: Sequence[Record]) -> None:
    """UserError where a format cannot hold the images."""
    for name in formats:
        for record in records:
            geometry = record.file_geometry()
            if name in FLAT and len(geometry.size) != 2:
                raise UserError(f"--format {name} holds flat images only, and {record.image} is a volume")
            if name in ("slicer", "fcsv") and geometry.affine is None:
                raise UserError(f"--format {name} counts in mm of the patient, and {record.image} does not say where "
                                "its pixels lie")


def _write_formats(out: Path, labels: LabelSet, images: dict[str, Path], formats: Sequence[str]) -> None:
    for name in dict.fromkeys(formats):
        path = out / FORMATS[name].place
        write_label_file(path, labels, name, Images(paths=images))
        print(f"{name}: {path}")
        if gone := lost(labels, name):
            note_once(str(path), f"note: {name} cannot hold {', '.join(gone)}")


def predictions_of(detector: TrainedDetector, records: Sequence[Record], calibration: Calibration | None,
                   progress: bool = True) -> Iterator[Predictions]:
    """What `detector` finds in `records`, batch by batch, with a progress bar, by as many threads as are fastest."""
    if detector.device.type == "cpu":
        use_threads()
    some = detector.config.evaluation.batch_size
    for first in tqdm(range(0, len(records), some), "batches", disable=not progress):
        images = load_images(records[first : first + some], detector.config.dataset)
        yield find_landmarks(detector, images, calibration=calibration)


def _doubt(predictions: Predictions, index: int) -> str:
    """": largest expected error 4.2 mm (Gonion)" of image `index`; empty where there is none."""
    expected = predictions.expected_error[index]
    if np.isnan(expected).all():
        return ""
    most = int(np.nanargmax(expected))
    how = "" if predictions.calibration is not None else ", not calibrated"
    return f": largest {predictions.expected_text(index, most)} ({predictions.names[most]}{how})"


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m landmarks_finetuning.predict", description=__doc__,
        epilog="example: python -m landmarks_finetuning.predict "
               "runs/cephalo new_images/ --out predictions")
    parser.add_argument("run_dir", type=Path, help="a run's folder or its weights, or an experiment's for its best run")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--with", type=Path, nargs="+", action="extend", default=[], metavar="RUN_DIR", dest="others",
                        help="runs on the same data whose heatmaps are averaged with those of run_dir, such as others "
                        "of finetune.seeds")
    parser.add_argument("--no-overlays", action="store_true", help="write the CSV only")
    parser.add_argument("--format", nargs="+", action="extend", default=[], choices=tuple(FORMATS), dest="formats",
                        help="also write what labelling tools open, corrected there and read back as labels: "
                        "docs/formats.md")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    table = predict(arguments.run_dir, arguments.images, arguments.out, not arguments.no_overlays,
                    tuple(arguments.set), arguments.others, arguments.formats)
    print(f"predictions in {table}")


if __name__ == "__main__":
    run_command(main)
