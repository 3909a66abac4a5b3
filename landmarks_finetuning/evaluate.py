"""Score a trained detector: predictions.csv, metrics.json and overlays, with the physical and the paper's scorer."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from core.checkpoint import write_atomically, write_json
from core.config import Config, load_config
from core.dataset import ImageSet, load_images, load_source, map_points
from core.errors import UserError, run_command
from core.images import read_image
from core.layouts import DataSource
from core.runlog import read_metrics, write_run_config
from core.study import MEAN_SHAPE, Cell, cell_dir, variant
from landmarks_finetuning.detectors.heatmap_unet import TrainedDetector, locate
from landmarks_finetuning.heatmaps import contour_centroid, probability_maps
from landmarks_finetuning.metrics import (
    SMALLEST_SIGMA_PX,
    bootstrap_interval,
    mean_shape_prediction,
    paper_errors,
    physical_errors,
    round_original,
    summarise,
)
from landmarks_finetuning.report.overlays import draw_overlay
from landmarks_finetuning.train import labelled_subset

PAPER_SIGMA = 5.0  # pixels of a 256-pixel image: the published scorer's disk, whatever finetune.sigma is


def evaluate(run_dir: Path, decoder: str | None = None, overrides: tuple[str, ...] = ()) -> dict:
    """Score best.safetensors of `run_dir` on evaluation.split; returns what metrics.json holds."""
    detector = TrainedDetector(run_dir / "best.safetensors")
    config = detector.config
    if overrides:
        config = load_config(run_dir / "config.json", overrides)
    source = load_source(config.dataset)
    held = load_images(source.require(config.evaluation.split), config.dataset)
    outputs = detector.heatmaps(held.images)
    points, confidence = locate(outputs, held.original_sizes, config, decoder)
    scorer_points = contour_centroid(outputs).numpy() if held.images.ndim == 4 else None
    header = detector.header
    seconds = sum(line.get("seconds", 0.0) for line in read_metrics(run_dir / "metrics.jsonl"))
    identity = {**{key: header[key] for key in ("backbone", "shots", "draw", "seed", "timestep", "training_images",
                                                "validation_labels", "iteration")},
                "variant": variant(config, header["backbone"]), "seconds": seconds,
                "decoder": decoder or config.finetune.decoder}
    return score(run_dir, config, source, held, points, confidence, scorer_points, identity, outputs)


def evaluate_mean_shape(config: Config, cell: Cell) -> Path:
    """Score the mean of the cell's labels as a prediction for every image: what a detector must beat."""
    source = load_source(config.dataset)
    chosen, validation = labelled_subset(config, source, cell)
    training = load_images(chosen, config.dataset)
    held = load_images(source.require(config.evaluation.split), config.dataset)
    relative = (training.original_points() + 0.5) / training.original_sizes[:, None]
    points = mean_shape_prediction(relative, held.original_sizes)
    side = config.dataset.image_size[0]
    run_dir = cell_dir(config, cell)
    identity = {"backbone": MEAN_SHAPE, "variant": "default", "shots": cell.shots, "draw": cell.draw, "seed": cell.seed,
                "training_images": [record.id for record in chosen], "validation_labels": 0, "decoder": None,
                "seconds": None}
    write_run_config(run_dir, config.plain(), {"stage": MEAN_SHAPE})
    score(run_dir, config, source, held, points, np.full(points.shape[:2], np.nan),
          round_original(points, held.original_sizes, side), identity, None)
    return run_dir


def score(run_dir: Path, config: Config, source: DataSource, held: ImageSet, points: np.ndarray,
          confidence: np.ndarray, scorer_points: np.ndarray | None, identity: dict, outputs: Tensor | None) -> dict:
    """Write predictions.csv, metrics.json and overlays/ of predictions `points` (M, N, D) in original pixels.

    `scorer_points` (M, N, 2) are network pixels for the paper's scorer, which wants a square 2D input and a disk with
    an area; without them its figures are left out.
    """
    truth, spacing = held.original_points(), held.spacings()
    errors = physical_errors(points, truth, spacing)
    thresholds = config.evaluation.sdr_thresholds or source.sdr_thresholds
    size = config.dataset.image_size
    published, sigma = None, PAPER_SIGMA * size[0] / 256
    if source.paper_rule and scorer_points is not None and len(set(size)) == 1 and sigma > SMALLEST_SIGMA_PX:
        published = paper_errors(source.paper_rule, scorer_points, truth, held.original_sizes, size[0], sigma)
    patients = [record.patient or record.id for record in held.records]
    metrics = {
        **identity, "dataset": config.dataset.name, "layout": source.layout, "paper_rule": source.paper_rule,
        "phantom": config.dataset.phantom is not None, "split": config.evaluation.split, "unit": source.unit,
        "images": len(held.records), "landmark_names": list(source.landmark_names), "image_size": list(size),
        "physical": {**summarise(errors, thresholds),
                     "interval": bootstrap_interval(errors, patients, config.experiment.seed)},
        "paper": None if published is None else summarise(published, thresholds),
    }
    write_predictions(run_dir / "predictions.csv", held, source.landmark_names, points, confidence, errors, published)
    _write_overlays(run_dir / "overlays", config, held, source, points, errors, outputs)
    write_json(run_dir / "metrics.json", metrics)
    return metrics


def write_predictions(path: Path, held: ImageSet, names: tuple[str, ...], points: np.ndarray, confidence: np.ndarray,
                      errors: np.ndarray | None = None, published: np.ndarray | None = None) -> None:
    """predictions.csv: a row per image and landmark, (x, y[, z]) in original pixels; empty = no value."""
    axes = "xyz"[: points.shape[2]]
    rows = []
    for m, record in enumerate(held.records):
        for n, name in enumerate(names):
            row = {"image": record.id, "patient": record.patient, "landmark": name}
            row |= dict(zip(axes, points[m, n, ::-1], strict=True))
            if errors is not None:
                row |= {f"truth_{a}": v for a, v in zip(axes, record.landmarks[n, ::-1], strict=True)}
                row |= {"error": errors[m, n], "paper_error": None if published is None else published[m, n]}
            rows.append({**row, "confidence": confidence[m, n]})
    write_atomically(path, pd.DataFrame(rows).to_csv(index=False, float_format="%.4f").encode())


def _write_overlays(folder: Path, config: Config, held: ImageSet, source: DataSource, points: np.ndarray,
                    errors: np.ndarray, outputs: Tensor | None) -> None:
    """rank001_<image>.png and so on, the worst image (mean error) first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mean_errors = np.where(np.isnan(errors).all(axis=1), -1.0, np.nanmean(errors, axis=1))
    for rank, index in enumerate(np.argsort(-mean_errors)[: config.evaluation.overlays], start=1):
        record = held.records[index]
        maps = None
        if outputs is not None:
            maps = probability_maps(outputs[index : index + 1], config.finetune.loss)[0].numpy()
        pixels, scale = picture_of(held, int(index))
        title = f"{record.id}: mean error {mean_errors[index]:.2f} {source.unit}"
        predicted, truth = scale(points[index]), scale(record.landmarks)
        picture = draw_overlay(pixels, predicted, truth, source.landmark_names, maps, title)
        picture.save(folder / f"rank{rank:03d}_{record.id.replace('/', '-')}.png")


def picture_of(held: ImageSet, index: int):
    """(pixels (C, H, W), map from original pixels to theirs): the original file, or the resized image of a pack."""
    record = held.records[index]
    if record.image.suffix != ".npz":
        return read_image(record.image), lambda points: points
    original = held.original_sizes[index]
    return held.images[index].numpy(), lambda points: map_points(points, original, np.array(held.size))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m landmarks_finetuning.evaluate", description=__doc__,
        epilog="example: python -m landmarks_finetuning.evaluate "
               "runs/cephalo/landmarks/ddpm/default/shots010_draw0_seed0")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--decoder", help="another decoder than the config's")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="SECTION.KEY=VALUE",
                        help="override values of the run's config, for example --set dataset.root=/data/cephalo")
    arguments = parser.parse_args()
    if not arguments.run_dir.is_dir():
        raise UserError(f"run folder {arguments.run_dir} does not exist")
    metrics = evaluate(arguments.run_dir, arguments.decoder, tuple(arguments.set))
    physical, unit = metrics["physical"], metrics["unit"]
    rates = ", ".join(f"{threshold} {unit} {rate:.1f} %" for threshold, rate in physical["sdr"].items())
    print(f"{metrics['images']} {metrics['split']} images: mean error {physical['mre']:.2f} {unit} "
          f"(median {physical['median']:.2f}); within {rates}; files in {arguments.run_dir}")


if __name__ == "__main__":
    run_command(main)
