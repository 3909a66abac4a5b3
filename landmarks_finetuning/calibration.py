"""calibration.json: how a trained detector's expected errors relate to what validation labels show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.data.dataset import ImageSet
from core.errors import UserError
from core.files import content_digest, parse_json, write_json
from core.formats.geometry import apply_maps
from landmarks_finetuning.decoding import decode_maps
from landmarks_finetuning.inference import TrainedDetector
from landmarks_finetuning.metrics import physical_errors
from landmarks_finetuning.predictions import find_landmarks
from landmarks_finetuning.refinement import crop_batches, crop_scores
from landmarks_finetuning.uncertainty import (
    TEMPERATURES,
    Calibration,
    Spread,
    fit_scales,
    fit_temperatures,
    log_likelihoods,
)

FILE = "calibration.json"
DECODING = ("loss", "decoder", "shape_prior")  # settings of finetune that make other maps, or other points of them


def calibrate(detector: TrainedDetector, images: ImageSet,
              decoder: str | None = None) -> tuple[np.ndarray, Calibration | None]:
    """The detector's errors (M, N) on labelled `images` that did not train it, and its calibration on them.

    The images go through the network twice: for the temperatures, and for what the maps say under these. Validation
    labels may also have chosen the weights, so that it is a little too sure where they are few. No calibration (None)
    where outputs or loss give no expected error, and where no landmark is annotated.
    """
    truth, start = images.original_points(), None
    measures = detector.kind.heatmaps is not None and detector.recipe.finetune.loss == "cross_entropy_pixels"
    if measures and np.isfinite(truth).all(axis=2).any():
        likelihoods = _likelihoods(detector, images, truth, decoder)
        start = Calibration(fit_temperatures(likelihoods), 1.0, 1.0, 0, 0)
    found = find_landmarks(detector, images, decoder, calibration=start)
    errors = physical_errors(found.points, truth, images.spacings())
    if start is None:
        return errors, None
    return errors, fit_scales(start.temperatures, Spread(found.expected_error, found.radius90), errors)


def _likelihoods(detector: TrainedDetector, images: ImageSet, truth: np.ndarray, decoder: str | None) -> np.ndarray:
    """(M, N, T) of `log_likelihoods`, of the maps that the last stage reads its answers off."""
    likelihoods = np.full((*truth.shape[:2], len(TEMPERATURES)), np.nan)
    second, config = detector.second, detector.config
    if second is None:
        for chosen, outputs, maps in detector.outputs(images):
            scores = decode_maps(outputs, detector.recipe.finetune, detector.sigma, decoder, detector.shape).scores
            likelihoods[chosen] = log_likelihoods(scores, torch.from_numpy(apply_maps(truth[chosen], maps)))
        return likelihoods
    answers = find_landmarks(detector, images, decoder, refined=False).points
    for crops in crop_batches(second.model, images.records, answers, config):
        where = (crops.image, crops.landmark)
        scores = crop_scores(crops, second.header["spread_pixels"], config)
        own = torch.from_numpy(apply_maps(truth[where][:, None], crops.maps))
        likelihoods[where] = log_likelihoods(scores, own)[:, 0]
    return likelihoods


def write_calibration(folder: Path, detector: TrainedDetector, calibration: Calibration | None,
                      decoder: str | None = None) -> None:
    """Leave calibration.json in `folder`, with what it holds for: the detector's weights, and the decoding.

    Without a calibration an older file goes.
    """
    if calibration is None:
        (folder / FILE).unlink(missing_ok=True)
        return
    values = {"validation_images": calibration.images, "validation_landmarks": calibration.landmarks,
              "error_scale": calibration.error_scale, "radius_scale": calibration.radius_scale,
              "temperatures": dict(zip(detector.landmark_names, calibration.temperatures.tolist(), strict=True))}
    write_json(folder / FILE, {**values, "holds_for": _holds_for(detector, decoder)})


def read_calibration(run_dir: Path, detector: TrainedDetector, decoder: str | None = None) -> Calibration | None:
    """That of `run_dir`, where it was fitted on these weights, decoded as now; else None. UserError where damaged."""
    path = run_dir / FILE
    if not path.is_file():
        return None
    try:
        values = parse_json(path.read_text(encoding="utf8"))
        if values["holds_for"] != _holds_for(detector, decoder):
            return None
        temperatures = np.array([float(values["temperatures"][name]) for name in detector.landmark_names])
        return Calibration(temperatures, float(values["error_scale"]), float(values["radius_scale"]),
                           int(values["validation_images"]), int(values["validation_landmarks"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); delete it, or evaluate that run again") from None


def _holds_for(detector: TrainedDetector, decoder: str | None) -> dict[str, Any]:
    """Other weights, maps or points would need another calibration."""
    settings = {key: getattr(detector.config.finetune, key) for key in DECODING}
    settings |= {} if decoder is None else {"decoder": decoder}
    if detector.second is not None:
        settings |= {"second": content_digest(detector.second.path), "prior": detector.config.finetune.refine.prior}
    return {"weights": content_digest(detector.path), **settings}
