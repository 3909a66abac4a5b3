"""One image as pictures show it: its pixels, predictions, truth and heatmaps on one grid."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from core.data.dataset import ImageSet
from core.formats.geometry import apply_maps, inverse, upright, upright_map
from core.formats.images import read_image
from landmarks_finetuning.heatmaps import draw_target, probability_maps
from landmarks_finetuning.inference import TrainedDetector
from landmarks_finetuning.pictures.overlays import HALF_MAXIMUM, OF_FIRST_STAGE, Doubt
from landmarks_finetuning.pictures.volume_overlays import draw_case
from landmarks_finetuning.predictions import NAME_BYTES, Predictions, printable

ID_KEY = "Title"  # of the PNG's text: file names are shortened ids, and may be alike
PNG_EFFORT = 3  # half the time of the library's 6, files larger by a twentieth


class Case(NamedTuple):
    """One image as pictures show it: the stored image upright, or the network's where that is all a pack has.

    pixels (C, *size); found and truth (N, D) in its pixels; probabilities and targets (N, *own), None without a
    detector and for one without heatmaps, cover the same field on the network's grid, targets being what training aims
    at; spacing along the picture's axes, None where unknown; doubt None where nothing is expected of any landmark.
    """

    pixels: np.ndarray
    found: np.ndarray
    truth: np.ndarray | None
    probabilities: np.ndarray | None
    targets: np.ndarray | None
    spacing: tuple[float, ...] | None
    doubt: Doubt | None = None


def case_of(predictions: Predictions, index: int) -> Case:
    """Image `index` of `predictions` with all that its pictures show."""
    images, record = predictions.images, predictions.images.records[index]
    first, size = images.firsts[index].numpy(), images.sizes[index].numpy()
    if record.geometry is None:
        pixels = images.images[index][(slice(None), *_part(first, size))].numpy()
        to_picture = images.maps[index].copy()
        to_picture[:, -1] -= first
    else:
        pixels, to_picture = upright(read_image(record.image), record.geometry), upright_map(record.geometry)
    # a picture's axis is one stored axis, resampled or not
    steps = np.abs(inverse(to_picture)[:, :-1])
    spacing = None if record.spacing is None else tuple(np.array(record.spacing) @ steps)
    truth = None if record.landmarks is None else apply_maps(record.landmarks, to_picture)
    probabilities, targets = None, None
    if predictions.detector is not None:
        probabilities, targets = _heatmaps(predictions.detector, images, index)
    return Case(pixels, apply_maps(predictions.points[index], to_picture), truth, probabilities, targets, spacing,
                _doubt(predictions, index, steps))


def _doubt(predictions: Predictions, index: int, steps: np.ndarray) -> Doubt | None:
    """`steps` (D, D): stored pixels along each stored axis of a step along each axis of the picture."""
    radii, spacing = predictions.radius90[index], predictions.images.records[index].spacing
    if np.isnan(radii).all():
        return None
    lengths = steps.sum(axis=0) if spacing is None else np.array(spacing) @ steps  # of a picture's pixel
    notes = [predictions.expected_text(index, n) for n in range(len(predictions.names))]
    return Doubt(radii[:, None] / lengths, notes)


def _part(first: np.ndarray, size: np.ndarray) -> tuple[slice, ...]:
    """`size` pixels from `first` on, along each axis."""
    return tuple(slice(start, end) for start, end in zip(first.tolist(), (first + size).tolist(), strict=True))


def _heatmaps(detector: TrainedDetector, images: ImageSet, index: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Probabilities and targets (N, *own) where the image itself fills the network's input; None: not annotated.

    Both are None for a detector without heatmaps.
    """
    if detector.kind.heatmaps is None:
        return None, None
    config = detector.recipe
    [(_, outputs, maps)] = detector.outputs(images, [index])
    skipped = [0] * (outputs.ndim - 2) if images.fits else [part.start for part in images.seen(index)]
    first = images.firsts[index].numpy() - skipped
    own = (slice(None), *_part(first, images.sizes[index].numpy()))
    probabilities = probability_maps(outputs, config.finetune.loss)[0][own].cpu().numpy()
    landmarks = images.records[index].landmarks
    if landmarks is None:
        return probabilities, None
    points = torch.from_numpy(apply_maps(landmarks, maps[0]))[None]
    targets = draw_target(points, tuple(outputs.shape[2:]), config.finetune.target, detector.sigma)
    return probabilities, targets[0][own].numpy()


def draw_predictions(path: Path, predictions: Predictions, index: int, title: str,
                     errors: np.ndarray | None = None) -> None:
    """A PNG of one image with its predictions, heatmap contours and, with `errors` (N,), the truth; it holds its id."""
    case, record = case_of(predictions, index), predictions.images.records[index]
    geometry = record.geometry
    sides = geometry is not None and geometry.affine is not None
    refined = predictions.detector is not None and predictions.detector.second is not None
    picture = draw_case(case.pixels, case.found, None if errors is None else case.truth, predictions.names,
                        case.probabilities, title, case.spacing, errors, sides, case.doubt,
                        OF_FIRST_STAGE if refined else HALF_MAXIMUM)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngInfo()
    text.add_itxt(ID_KEY, printable(record.id))
    picture.save(path, compress_level=PNG_EFFORT, pnginfo=text)


def draw_ranked(folder: Path, count: int, predictions: Predictions, badness: np.ndarray, titles: Sequence[str],
                errors: np.ndarray | None = None) -> None:
    """folder/rank001_<end of the image's id>.png and so on, of the `count` images of largest `badness` (M,); NaN last.

    What lies in the folder goes. `titles` has one for each image, `errors` are (M, N).
    """
    shutil.rmtree(folder, ignore_errors=True)
    order = np.argsort(-np.where(np.isnan(badness), -np.inf, badness), kind="stable")[:count]
    for rank, index in enumerate(order.tolist(), start=1):
        name = printable(predictions.images.records[index].id)
        shortened = name.replace("/", "-").encode()[-NAME_BYTES:].decode(errors="ignore")
        draw_predictions(folder / f"rank{rank:03d}_{shortened}.png", predictions, index, titles[index],
                         None if errors is None else errors[index])


def pictured_image(path: Path) -> str:
    """The id of the image in a file of `draw_predictions`; of an earlier version's, what its name says."""
    with Image.open(path) as picture:
        return picture.info.get(ID_KEY, path.stem.partition("_")[2])
