"""Pseudo-labels: what a trained detector sees in the unlabelled training images, weighted by how sure it is.

Lee (2013); Xie et al. (2020), "Self-training with Noisy Student". Test images, and copies of them, are never among
those that are answered, and neither are validation images, which choose the weights.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from core.config.config import Config
from core.config.second_stage import FOLDER
from core.data.dataset import load_images
from core.data.records import Record
from core.errors import UserError
from core.files import parse_json, write_atomically, write_json
from core.formats.geometry import apply_maps
from core.runs.places import round_dir
from core.training.run_log import read_metrics
from landmarks_finetuning.inference import TrainedDetector
from landmarks_finetuning.matching import match_landmarks
from landmarks_finetuning.metrics import physical_errors
from landmarks_finetuning.predictions import find_landmarks
from landmarks_finetuning.shape import Shape

FILE, FIGURES = "pseudo_labels.npz", "pseudo_labels.json"
MATCHES, MATCHES_FIGURES = "matches.npz", "matches.json"
FIT = 0.1  # of the shape's size: how far from the common shape's place an answer counts half


@dataclass(frozen=True, eq=False)
class PseudoLabels:
    """points (M, N, D) in stored pixels and certainties (M, N) in [0, 1] of the landmarks in the images `ids`."""

    ids: tuple[str, ...]
    points: np.ndarray
    certainty: np.ndarray

    def save(self, path: Path) -> None:
        """Write `path`, atomically."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, ids=np.array(self.ids), points=self.points,
                            certainty=self.certainty)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> PseudoLabels:
        """What `save` left; UserError for a damaged file."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(tuple(map(str, arrays["ids"])), arrays["points"], arrays["certainty"])
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}); delete its folder to train that round again") from None


def match(run_dir: Path, training: Sequence[Record], records: Sequence[Record], config: Config) -> PseudoLabels:
    """What the diffusion features of the labelled `training` images match in `records`; read where it is there."""
    ids = tuple(record.id for record in records)
    labels = kept_labels(run_dir / MATCHES, ids)
    if labels is None:
        images = (load_images(some, config.dataset) for some in (training, records))
        labels = PseudoLabels(ids, *match_landmarks(config, *images))
        write_json(run_dir / MATCHES_FIGURES, figures(labels, None, records))
        labels.save(run_dir / MATCHES)  # last: where it is there, so are its figures
    return labels


def kept_labels(path: Path, ids: tuple[str, ...]) -> PseudoLabels | None:
    """The labels in `path`, None where they are not there or of other images."""
    labels = PseudoLabels.load(path) if path.is_file() else None
    return None if labels is None or labels.ids != ids else labels


def answer(folder: Path, records: Sequence[Record], before: PseudoLabels | None, config: Config) -> PseudoLabels:
    """The answers of the detector in `folder` in `records`, kept there with figures of them; read where they are there.

    `before`: those of the round before, to say how far they moved. UserError for a damaged file.
    """
    ids = tuple(record.id for record in records)
    kept = kept_labels(folder / FILE, ids)
    if kept is not None:
        return kept
    detector, points, certainty = TrainedDetector(folder / "best.safetensors"), [], []
    for first in range(0, len(records), config.evaluation.batch_size):
        images = load_images(records[first : first + config.evaluation.batch_size], config.dataset)
        predictions = find_landmarks(detector, images)
        points.append(predictions.points)
        certainty.append(certainties(apply_maps(predictions.points, images.maps), predictions.confidence,
                                     detector.shape))
    labels = PseudoLabels(ids, np.concatenate(points), np.concatenate(certainty))
    write_json(folder / FIGURES, figures(labels, before, records))
    labels.save(folder / FILE)  # last: where it is there, so are its figures
    return labels


def round_figures(run_dir: Path, rounds: int) -> list[dict[str, Any]]:
    """Of every round: what it was taught by the round before, and its error on the validation images as it ended.

    That is None where its log is gone. Empty for a run without rounds.
    """
    table = []
    matched = (run_dir / MATCHES_FIGURES).is_file()
    for number in range(rounds + 1 if rounds or matched else 0):
        folder, taught = round_dir(run_dir, number), {}
        if number == 0 and matched:
            taught = parse_json((run_dir / MATCHES_FIGURES).read_text(encoding="utf8"))
        elif number:
            taught = parse_json((round_dir(run_dir, number - 1) / FIGURES).read_text(encoding="utf8"))
        logs = [folder / FOLDER / "metrics.jsonl", folder / "metrics.jsonl"]
        lines = next((read_metrics(path) for path in logs if path.is_file()), [])
        best = min((line for line in lines if "validation_loss" in line), key=lambda line: line["validation_loss"],
                   default={})
        table.append({"round": number, **taught, "validation_mre": best.get("validation_mre")})
    return table


def figures(labels: PseudoLabels, before: PseudoLabels | None, records: Sequence[Record]) -> dict[str, float | None]:
    """How many answers there are, how sure on average, and how far they moved, in mm or pixels, since `before`."""
    moved = None
    if before is not None and before.ids == labels.ids:
        spacings = [record.spacing for record in records]
        known = None if any(spacing is None for spacing in spacings) else np.array(spacings)
        moved = float(np.nanmean(physical_errors(labels.points, before.points, known)))
    return {"images": len(labels.ids), "landmarks": int(np.isfinite(labels.points).all(axis=2).sum()),
            "certainty": float(labels.certainty.mean()), "moved": moved}


def certainties(points: np.ndarray, confidence: np.ndarray, shape: Shape | None) -> np.ndarray:
    """How sure answers `points` (M, N, D) are, (M, N) in [0, 1], in network pixels.

    The detector's `confidence` (M, N), cut down where a landmark lies elsewhere than the others and the labels'
    common `shape` put it.
    """
    if shape is None:
        return np.nan_to_num(confidence)
    off = np.linalg.norm(shape.fit(points, confidence) - points, axis=2) / shape.size
    return np.nan_to_num(confidence / (1 + (np.nan_to_num(off) / FIT) ** 2))


def labelled_by(records: Sequence[Record], labels: PseudoLabels) -> tuple[Record, ...]:
    """The records with the answers in `labels` as their landmarks."""
    return tuple(replace(record, landmarks=points) for record, points in zip(records, labels.points, strict=True))


def mixed_order(labelled: int, answered: int, share: float) -> np.ndarray:
    """Indices of images, the labelled ones first, each as often that about `share` of all are answered ones."""
    if not answered:
        return np.arange(labelled)
    repeats = max(1, round(answered * (1 - share) / (labelled * share)))
    return np.concatenate([np.tile(np.arange(labelled), repeats), labelled + np.arange(answered)])
