"""Where a detector sees the landmarks of a set of images, as files: a table, markups for 3D Slicer, pictures."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd

from core.data.dataset import ImageSet
from core.files import atomic_file
from core.formats.cells import harmless
from core.formats.geometry import index_to_world
from core.formats.images import image_id
from core.formats.markups import write_markups
from landmarks_finetuning.decoding import Located
from landmarks_finetuning.heatmaps import contour_centroid
from landmarks_finetuning.inference import TrainedDetector
from landmarks_finetuning.paper_scorer import round_original
from landmarks_finetuning.uncertainty import Calibration

NAME_BYTES = 200  # of an id in a file name, which may have 255


@dataclass(frozen=True, eq=False)
class Predictions:
    """points (M, N, D) in stored pixels of the landmarks `names` in `images`, and how far off these may be.

    `expected_error` and `radius90` (M, N) are in the unit of errors: `unit`, the data set's, or else mm, and stored
    pixels for an image whose spacing is not known; NaN = none. `calibration` is theirs, None = uncalibrated.
    `confidence` (M, N) in [0, 1] weighs landmarks against each other, and is shown to nobody.
    `scorer_points` (M, N, 2) are network pixels for the paper's scorer, None for volumes. `detector` draws heatmaps for
    pictures; the guess without an image has none.
    """

    images: ImageSet
    names: Sequence[str]
    points: np.ndarray
    expected_error: np.ndarray
    radius90: np.ndarray
    confidence: np.ndarray
    scorer_points: np.ndarray | None = None
    detector: TrainedDetector | None = None
    calibration: Calibration | None = None
    unit: str | None = None

    def unit_of(self, index: int) -> str:
        """Of distances in image `index`."""
        return self.unit or ("px" if self.images.records[index].spacing is None else "mm")

    def expected_text(self, index: int, landmark: int) -> str:
        """"expected error 1.3 mm"; empty where there is none."""
        value = self.expected_error[index, landmark]
        return "" if np.isnan(value) else f"expected error {value:.1f} {self.unit_of(index)}"


def find_landmarks(detector: TrainedDetector, images: ImageSet, decoder: str | None = None, *, refined: bool = True,
                   calibration: Calibration | None = None, unit: str | None = None) -> Predictions:
    """Run `detector` on `images`, its second stage too where it has one, unless `refined` is false.

    Heatmaps are decoded batch by batch and not kept. `unit` is the data set's; `calibration` is that of the last stage.
    """
    second = detector.second if refined else None
    parts, scorer_parts = [], []
    kind, config, dims = detector.kind, detector.recipe, images.images.ndim - 2
    heatmaps = kind.heatmaps if dims == 2 else None
    spacing = np.array([record.spacing or (1.0,) * dims for record in images.records])
    for chosen, outputs, maps in detector.outputs(images):
        parts.append(kind.locate(outputs, maps, config, decoder, detector.shape, spacing[chosen],
                                 calibration if second is None else None))
        if heatmaps is not None:
            scorer_parts.append(contour_centroid(heatmaps(outputs)).numpy())
    located = Located(*(np.concatenate(each) for each in zip(*parts, strict=True)))
    scorer_points = np.concatenate(scorer_parts) if scorer_parts else None
    if second is not None and kind.second is not None:
        located = kind.second.refine(second.model, images.records, located.points, second.header["spread_pixels"],
                                     detector.config, calibration)
    if second is not None or kind.heatmaps is None:
        side = detector.config.dataset.image_size
        square = len(side) == 2 and len(set(side)) == 1  # of others there is no published scorer
        scorer_points = round_original(located.points, images.original_sizes, side[0]) if square else None
    return Predictions(images, detector.landmark_names, *located, scorer_points, detector, calibration, unit)


def table_rows(predictions: Predictions, errors: np.ndarray | None = None,
               published: np.ndarray | None = None, human: np.ndarray | None = None) -> list[dict[str, Any]]:
    """Rows of predictions.csv: one per image and landmark, (x, y[, z]) in stored pixels; NaN = no value.

    expected_error and radius90 (of the circle that holds 90 % of the heatmap) are in the unit of `Predictions`.
    `errors` (M, N) adds truth and error columns; `published` (M, N) are the paper's scorer's, `human` (M, N) the
    distances between two annotators.
    """
    axes = "xyz"[: predictions.points.shape[2]]
    rows = []
    for m, record in enumerate(predictions.images.records):
        for n, name in enumerate(predictions.names):
            row = {"image": record.id, "patient": record.patient, "landmark": name}
            row |= dict(zip(axes, predictions.points[m, n, ::-1], strict=True))
            if errors is not None:
                row |= {f"truth_{a}": v for a, v in zip(axes, record.truth[n, ::-1], strict=True)}
                row |= {"error": errors[m, n], "paper_error": None if published is None else published[m, n]}
                row |= {} if human is None else {"human_distance": human[m, n]}
            rows.append({**row, "expected_error": predictions.expected_error[m, n],
                         "radius90": predictions.radius90[m, n]})
    return rows


def append_rows(table: BinaryIO, rows: list[dict[str, Any]]) -> None:
    """Write `rows` to the end of a CSV with empty cells for NaN, below a header where nothing is there yet."""
    shown = [{key: harmless(value) for key, value in row.items()} for row in rows]
    text = pd.DataFrame(shown).to_csv(index=False, header=table.tell() == 0, float_format="%.4f")
    table.write(text.encode(errors="backslashreplace"))  # of names that are no UTF-8


def printable(name: str) -> str:
    r"""A file's name with bytes that are no UTF-8 as \udcfc."""
    return name.encode(errors="backslashreplace").decode()


def names_about(images: Sequence[str]) -> dict[str, str]:
    """{image: what files about it are called}: x of x.jpg, but x.jpg where x.png is another one of `images`."""
    bare = {image: image_id(image) for image in images}
    counts = Counter(bare.values())
    return {image: name if counts[name] == 1 and (name == image or name not in bare) else image
            for image, name in bare.items()}


def picture_name(image: str, suffix: str) -> str:
    """The name of a file about an image: its id, or where that is too long a digest of it and its end."""
    name = printable(image).encode()
    if max(map(len, name.split(b"/"))) + len(suffix) <= NAME_BYTES:
        return name.decode() + suffix
    end = name.replace(b"/", b"-")[-NAME_BYTES:].decode(errors="ignore")
    return f"{hashlib.sha256(name).hexdigest()[:8]}-{end}{suffix}"


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write `rows` as a CSV, atomically."""
    with atomic_file(path) as table:
        append_rows(table, rows)


def write_slicer_files(folder: Path, predictions: Predictions, names: Mapping[str, str] | None = None) -> None:
    """folder/<image>.mrk.json (LPS mm) for every volume that says where its voxels lie; opens in 3D Slicer on it.

    `names` are those of `names_about` all images, where these are some of them.
    """
    names = names or names_about([record.id for record in predictions.images.records])
    for index, record in enumerate(predictions.images.records):
        if record.geometry is not None and record.geometry.affine is not None:
            descriptions = [predictions.expected_text(index, n) for n in range(len(predictions.names))]
            points = index_to_world(predictions.points[index], record.geometry.affine)
            write_markups(folder / picture_name(names[record.id], ".mrk.json"), predictions.names, points, descriptions)








