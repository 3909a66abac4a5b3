"""Where a detector sees the landmarks of a set of images, as files: a table, markups for 3D Slicer, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from core.data.dataset import ImageSet
from core.files import write_atomically
from core.formats.geometry import apply_maps, index_to_world, inverse, upright, upright_map
from core.formats.images import read_image
from core.formats.markups import write_markups
from landmarks_finetuning.heatmaps import contour_centroid, draw_target, probability_maps
from landmarks_finetuning.inference import TrainedDetector, locate, sigma_pixels
from landmarks_finetuning.pictures.volume_overlays import draw_case

PNG_EFFORT = 3  # half the time of the library's 6, files larger by a twentieth


@dataclass(frozen=True, eq=False)
class Predictions:
    """points (M, N, D) in stored pixels and confidence (M, N), NaN = none, of the landmarks `names` in `images`.

    `scorer_points` (M, N, 2) are network pixels for the paper's scorer, None for volumes. `detector` draws heatmaps
    for pictures; the guess without an image has none.
    """

    images: ImageSet
    names: Sequence[str]
    points: np.ndarray
    confidence: np.ndarray
    scorer_points: np.ndarray | None = None
    detector: TrainedDetector | None = None


def find_landmarks(detector: TrainedDetector, images: ImageSet, decoder: str | None = None) -> Predictions:
    """Run `detector` on `images`; heatmaps are decoded batch by batch and not kept."""
    points, confidence, scorer_points = [], [], []
    flat = images.images.ndim == 4
    for _, outputs, maps in detector.heatmaps(images):
        found, sure = locate(outputs, maps, detector.config, decoder, detector.shape)
        points.append(found)
        confidence.append(sure)
        if flat:
            scorer_points.append(contour_centroid(outputs).numpy())
    return Predictions(images, detector.landmark_names, np.concatenate(points), np.concatenate(confidence),
                       np.concatenate(scorer_points) if flat else None, detector)


def table_rows(predictions: Predictions, errors: np.ndarray | None = None,
               published: np.ndarray | None = None, human: np.ndarray | None = None) -> list[dict[str, Any]]:
    """Rows of predictions.csv: one per image and landmark, (x, y[, z]) in stored pixels; NaN = no value.

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
                row |= {f"truth_{a}": v for a, v in zip(axes, record.landmarks[n, ::-1], strict=True)}
                row |= {"error": errors[m, n], "paper_error": None if published is None else published[m, n]}
                row |= {} if human is None else {"human_distance": human[m, n]}
            rows.append({**row, "confidence": predictions.confidence[m, n]})
    return rows


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write `rows` as a CSV with empty cells for NaN."""
    write_atomically(path, pd.DataFrame(rows).to_csv(index=False, float_format="%.4f").encode())


def write_slicer_files(folder: Path, predictions: Predictions) -> None:
    """folder/<image>.mrk.json (LPS mm) for every volume that says where its voxels lie; opens in 3D Slicer on it."""
    for record, points, sure in zip(predictions.images.records, predictions.points, predictions.confidence,
                                    strict=True):
        if record.geometry is not None and record.geometry.affine is not None:
            told = ["" if np.isnan(value) else f"confidence {value:.3f}" for value in sure]
            write_markups(folder / f"{record.id}.mrk.json", predictions.names,
                          index_to_world(points, record.geometry.affine), told)


class Case(NamedTuple):
    """One image as pictures show it: the stored image upright, or the network's where that is all a pack has.

    pixels (C, *size); found and truth (N, D) in its pixels; probabilities and targets (N, *own), None without a
    detector, cover the same field on the network's grid, targets being what training aims at; spacing along the
    picture's axes, None where unknown.
    """

    pixels: np.ndarray
    found: np.ndarray
    truth: np.ndarray | None
    probabilities: np.ndarray | None
    targets: np.ndarray | None
    spacing: tuple[float, ...] | None


def case_of(predictions: Predictions, index: int) -> Case:
    """Image `index` of `predictions` with all that its pictures show."""
    images, record = predictions.images, predictions.images.records[index]
    first, size = images.firsts[index].numpy(), images.sizes[index].numpy()
    if record.geometry is None:
        pixels = images.images[(index, slice(None), *map(slice, first, first + size))].numpy()
        to_picture = images.maps[index].copy()
        to_picture[:, -1] -= first
    else:
        pixels, to_picture = upright(read_image(record.image), record.geometry), upright_map(record.geometry)
    # a picture's axis is one stored axis, resampled or not
    steps = np.abs(inverse(to_picture)[:, :-1])
    spacing = None if record.spacing is None else tuple(np.array(record.spacing) @ steps)
    truth = None if record.landmarks is None else apply_maps(record.landmarks, to_picture)
    maps = (None, None) if predictions.detector is None else _heatmaps(predictions, index)
    return Case(pixels, apply_maps(predictions.points[index], to_picture), truth, *maps, spacing)


def _heatmaps(predictions: Predictions, index: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Probabilities and targets (N, *own) where the image itself fills the network's input; None: not annotated."""
    images, config = predictions.images, predictions.detector.config
    [(_, outputs, maps)] = predictions.detector.heatmaps(images, [index])
    skipped = [0] * (outputs.ndim - 2) if images.fits else [part.start for part in images.seen(index)]
    first = images.firsts[index].numpy() - skipped
    own = (0, slice(None), *map(slice, first.tolist(), (first + images.sizes[index].numpy()).tolist()))
    probabilities = probability_maps(outputs, config.finetune.loss)[own].cpu().numpy()
    landmarks = images.records[index].landmarks
    if landmarks is None:
        return probabilities, None
    points = torch.from_numpy(apply_maps(landmarks, maps[0]))[None]
    targets = draw_target(points, tuple(outputs.shape[2:]), config.finetune.target, sigma_pixels(config))
    return probabilities, targets[own].numpy()


def draw_predictions(path: Path, predictions: Predictions, index: int, title: str,
                     errors: np.ndarray | None = None) -> None:
    """A PNG of one image with its predictions, heatmap contours and, with `errors` (N,), the truth."""
    case, geometry = case_of(predictions, index), predictions.images.records[index].geometry
    sides = geometry is not None and geometry.affine is not None
    picture = draw_case(case.pixels, case.found, None if errors is None else case.truth, predictions.names,
                        case.probabilities, title, case.spacing, errors, sides)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, compress_level=PNG_EFFORT)
