"""heatmaps.npz: what a detector sees on two test images, small enough to keep, for the report to compare methods."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from core.errors import UserError
from core.files import write_atomically
from landmarks_finetuning.pictures.cases import Case, case_of
from landmarks_finetuning.pictures.overlays import map_points, shaded
from landmarks_finetuning.predictions import Predictions

FILE = "heatmaps.npz"
LONGEST_SIDE = 400  # of the kept picture, in pixels


class FlatCase(NamedTuple):
    """One image flattened for a picture; points are (row, column) pixels of `picture`, NaN where there is none.

    picture (h, w) uint8; heat and target (k, l) uint8 of another grid over the same field: each landmark's map, 255 at
    its own maximum, the largest of all landmarks at each pixel; found and truth (N, 2).
    """

    picture: np.ndarray
    heat: np.ndarray
    target: np.ndarray
    found: np.ndarray
    truth: np.ndarray


def example_indices(count: int) -> list[int]:
    """The first and the middle one of `count` scored images: the same for every method, fixed beforehand."""
    return sorted({0, count // 2})


def write_heatmaps(path: Path, predictions: Predictions) -> None:
    """Write `path` (.npz): images (ids), and for the k-th of them FlatCase's arrays as <field>_<k>.

    A detector without heatmaps leaves none.
    """
    if predictions.detector is None or predictions.detector.kind.heatmaps is None:
        path.unlink(missing_ok=True)
        return
    chosen = example_indices(len(predictions.images.records))
    arrays = {"images": np.array([predictions.images.records[index].id for index in chosen])}
    for k, index in enumerate(chosen):
        arrays |= {f"{name}_{k}": array for name, array in flatten(case_of(predictions, index))._asdict().items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())


def flatten(case: Case) -> FlatCase:
    """The picture of an image with a detector's heatmaps and known landmarks; of a volume its maximum projection.

    A volume, whose axes run up, back and to the patient's left, is seen from the side with up at the top. Pixels of the
    picture are square in mm. ValueError for an image without heatmaps or without truth.
    """
    if case.probabilities is None or case.targets is None or case.truth is None:
        raise ValueError("an image without heatmaps or without truth has nothing to compare")
    size = np.array(case.pixels.shape[1:3])
    extent = size * (1.0 if case.spacing is None else np.array(case.spacing[:2]))
    shape = tuple(np.maximum(np.rint(extent * LONGEST_SIDE / extent.max()), 1).astype(int).tolist())
    volume = case.pixels.ndim > 3

    def seen(values: np.ndarray) -> np.ndarray:
        """(.., rows, columns[, depth]) -> (.., rows, columns) as the picture has them."""
        flat = values.max(axis=tuple(range(3, values.ndim))) if volume else values
        return flat[:, ::-1] if volume else flat

    def placed(points: np.ndarray) -> np.ndarray:
        rows, columns = points[:, 0], points[:, 1]
        return map_points(np.stack([size[0] - 1 - rows if volume else rows, columns], axis=1), size, shape)

    picture = np.rint(shaded(seen(case.pixels), shape).mean(axis=2)).astype(np.uint8)
    return FlatCase(picture, _strongest(seen(case.probabilities)), _strongest(seen(case.targets)),
                    placed(case.found), placed(case.truth))


def _strongest(maps: np.ndarray) -> np.ndarray:
    """(N, k, l) -> (k, l) uint8; a map without a value above 0, as of a landmark without annotation, adds nothing."""
    peaks = np.maximum(maps.max(axis=(1, 2), keepdims=True), np.finfo(np.float32).tiny)
    return np.rint(255 * (maps / peaks).clip(0, 1).max(axis=0)).astype(np.uint8)


def read_heatmaps(path: Path) -> dict[str, FlatCase]:
    """{image: its FlatCase} of a run's FILE; empty where there is none, as of runs scored before it was written.

    Raises UserError for a file that is damaged.
    """
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {str(image): FlatCase(*(arrays[f"{name}_{k}"] for name in FlatCase._fields))
                    for k, image in enumerate(arrays["images"])}
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, or evaluate that run again") from error
