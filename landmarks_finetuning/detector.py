"""A trained detector for Python programs: arrays, files and folders in, landmarks as (x, y[, z]) out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from core.data.arrays import array_record
from core.data.records import Record, parse_spacing
from core.errors import UserError
from core.formats.series import is_series
from core.runs.best import run_folder
from landmarks_finetuning.calibration import read_calibration
from landmarks_finetuning.inference import TrainedDetector, trained_detector
from landmarks_finetuning.predict import collect_images, predictions_of
from landmarks_finetuning.uncertainty import Calibration

PathLike = str | os.PathLike[str]
Spacing = float | Sequence[float]


@dataclass(frozen=True, eq=False)
class Landmarks:
    """What a detector finds in one image, landmark by landmark in the order of `names`.

    points: (N, D) float64, (x, y[, z]) in pixels of the image as it is stored, the first pixel's centre being 0.
    expected_error, radius90: (N,) how far off a point is likely to be, and the radius that holds the truth nine times
    in ten, in `unit`, "mm" or "px"; NaN where the run's loss says nothing of it. They are what a validation set taught
    where `calibrated`, else the heatmap's own belief. confidence: (N,) in [0, 1], the mass of the heatmap about the
    point: it weighs landmarks against each other and is not the chance that one is right. spacing_mm: mm per pixel
    along x, y[, z], where known.
    """

    image: str
    names: tuple[str, ...]
    points: np.ndarray
    expected_error: np.ndarray
    radius90: np.ndarray
    confidence: np.ndarray
    unit: str
    calibrated: bool
    spacing_mm: tuple[float, ...] | None

    def __getitem__(self, name: str) -> np.ndarray:
        """The point (D,) of landmark `name`; KeyError for one that there is not."""
        if name not in self.names:
            raise KeyError(f"{name}; the landmarks are {', '.join(self.names)}")
        return self.points[self.names.index(name)]


class Detector:
    """A trained run, read once. It answers as `python -m landmarks_finetuning.predict` does, by the same code.

    A mistake raises core.errors.UserError, whose message is one line.
    """

    def __init__(self, trained: TrainedDetector, calibration: Calibration | None) -> None:
        self._trained, self._calibration = trained, calibration

    @classmethod
    def load(cls, run: PathLike, *others: PathLike, settings: Sequence[str] = ()) -> Detector:
        """The detector of a run: both its stages, its last round, its calibration.

        `run` is the run's folder, its best.safetensors, or the experiment's folder, whose best run it then is.
        With `others`, runs on the same data, it is an ensemble, which has no calibration. `settings` are those of
        predict's --set, such as "evaluation.views=4" or "experiment.device=cpu". UserError where there is no such run.
        """
        folder = run_folder(Path(run))
        trained = trained_detector(folder, tuple(settings), [run_folder(Path(other)) for other in others])
        return cls(trained, None if others else read_calibration(folder, trained))

    @property
    def names(self) -> tuple[str, ...]:
        """The landmarks, in the order of their points."""
        return tuple(self._trained.landmark_names)

    @overload
    def __call__(self, image: np.ndarray, spacing_mm: Spacing | None = None) -> Landmarks: ...

    @overload
    def __call__(self, image: PathLike) -> Landmarks | list[Landmarks]: ...

    @overload
    def __call__(self, image: list[Any] | tuple[Any, ...], spacing_mm: Spacing | None = None) -> list[Landmarks]: ...

    def __call__(self, image: np.ndarray | PathLike | list[Any] | tuple[Any, ...],
                 spacing_mm: Spacing | None = None) -> Landmarks | list[Landmarks]:
        """The landmarks of an array, or of an image file or series; a list of those of a folder, or of several images.

        An array is (height, width), (height, width, 3) of RGB, or a volume (depth, height, width), in raw intensities;
        `spacing_mm` is its mm per pixel, a number or (x, y[, z]); without it, that of the training data set where
        that has one. A file has its own.
        """
        if isinstance(image, np.ndarray):
            return self._found([self._in_memory(image, "array", spacing_mm)])[0]
        if isinstance(image, (str, os.PathLike)):
            if spacing_mm is not None:
                raise UserError(f"spacing_mm is for arrays, and {os.fspath(image)} has its own; for one that has none "
                                'give Detector.load(..., settings=["dataset.spacing_mm=..."])')
            found = self._found(self._in_files(image))
            return found if Path(image).is_dir() and not is_series(Path(image)) else found[0]
        records: list[Record] = []
        for number, each in enumerate(image):
            if isinstance(each, np.ndarray):
                records.append(self._in_memory(each, f"array {number}", spacing_mm))
            else:
                records += self._in_files(each)
        return self._found(records)

    def _in_memory(self, array: np.ndarray, name: str, spacing_mm: Spacing | None) -> Record:
        dataset = self._trained.config.dataset
        dims = len(dataset.image_size)
        given = dataset.spacing_mm if spacing_mm is None else spacing_mm
        return array_record(array, dims, name, parse_spacing(given, dims, name) or self._trained.spacing_mm)

    def _in_files(self, path: PathLike) -> list[Record]:
        if not isinstance(path, (str, os.PathLike)):
            raise UserError(f"an image is a numpy array or a path, not {type(path).__name__} (numpy.asarray makes one "
                            "of most)")
        return collect_images([Path(path)], None, self._trained.config.dataset.spacing_mm, self._trained.spacing_mm)

    def _found(self, records: Sequence[Record]) -> list[Landmarks]:
        return [Landmarks(record.id, self.names, batch.points[index][:, ::-1].copy(), batch.expected_error[index],
                          batch.radius90[index], batch.confidence[index], batch.unit_of(index),
                          self._calibration is not None, record.spacing and record.spacing[::-1])
                for batch in predictions_of(self._trained, records, self._calibration, progress=False)
                for index, record in enumerate(batch.images.records)]
