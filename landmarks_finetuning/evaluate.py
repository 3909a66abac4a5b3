"""Score a trained detector: predictions.csv, metrics.json and overlays, with the physical and the paper's scorer."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from core.config.config import Config
from core.config.dataset import Dataset
from core.config.starts import MEAN_SHAPE, SOFTMAX_STARTS
from core.data.dataset import ImageSet, load_images
from core.data.digests import data_digests
from core.data.elsewhere import all_test, dataset_at
from core.data.folds import cell_source
from core.data.leaks import find_leaks, leaked_ids
from core.data.records import DataSource, Record, patient_group
from core.data.shots import answered_records, labelled_subset, scored_records
from core.data.source import load_source
from core.errors import CommandParser, UserError, run_command
from core.files import content_digest, write_json
from core.runs.best import run_folder
from core.runs.claims import claim
from core.runs.identity import scoring_settings
from core.runs.inputs import (
    INPUTS,
    SCORED,
    GroupedImages,
    counted,
    image_changes,
    images_digest,
    read_record,
    write_inputs,
)
from core.runs.places import Cell, cell_dir, choosing_path, variant
from core.runs.record import write_run_config
from core.training.run_log import logged_below
from core.training.threads import use_threads
from landmarks_finetuning.calibration import calibrate, read_calibration, write_calibration
from landmarks_finetuning.coverage import coverage_order
from landmarks_finetuning.inference import TrainedDetector, as_trained, trained_detector
from landmarks_finetuning.metrics import annotator_distances, physical_errors, share_within, summarise
from landmarks_finetuning.paper_scorer import paper_errors, paper_sigma, round_original, why_undefined
from landmarks_finetuning.pictures.cases import draw_ranked
from landmarks_finetuning.pictures.heatmap_files import write_heatmaps
from landmarks_finetuning.predictions import (
    Predictions,
    find_landmarks,
    printable,
    table_rows,
    write_slicer_files,
    write_table,
)
from landmarks_finetuning.self_training import round_figures
from landmarks_finetuning.shape import mean_shape_prediction
from landmarks_finetuning.statistics import bootstrap_interval
from landmarks_finetuning.unscored import write_answers


def evaluate(run_dir: Path, decoder: str | None = None, overrides: tuple[str, ...] = (), out: Path | None = None,
             config: Config | None = None, others: Sequence[Path] = (), data: Path | None = None) -> tuple[Path, dict]:
    """Score the detector of `run_dir` on evaluation.split; returns the files' folder and what metrics.json holds.

    Where the data set holds nothing back there is no score: the detector answers unlabelled images.

    The folder is `run_dir` where this is the score that the study itself asks of it, else one of its own below
    evaluations/, or `out`. Landmarks are matched with the data set's by name. `config` is the study's as it is now,
    which may say other places than the run's own. The heatmaps are the mean of those of `run_dir` and of the runs
    `others`. `data` is the folder, or a study's config, of another data set; where that holds nothing back, all its
    labels are scored.
    """
    detector = trained_detector(run_dir, overrides, others)
    if config is not None:
        detector.config = as_trained(config, detector.header)
    own, header, config = detector.own_config, detector.header, detector.config
    check_decoder(detector, decoder)
    if data is not None:
        config = detector.config = config.model_copy(update={"dataset": dataset_at(data, config.dataset)})
    check_folds(detector, others)
    if data is not None:
        source = all_test(load_source(config.dataset, keep_draws=False))
    else:  # a header may name any folder: nothing is written there
        source = cell_source(config, header["draw"], header.get("fold"), keep_draws=False)
    source = source.ordered(detector.landmark_names)
    settings = scoring_settings(config, header["backbone"], decoder)
    own_data = data is None and has_data_of(run_dir, source, config.dataset)
    if data is not None:
        note_seen(run_dir, scored_records(source, config.evaluation, config.dataset), config.dataset)
    elif not own_data:
        print(f"note: the data at {source.root} have other training images or labels than this run was made from",
              file=sys.stderr)
    if out is None:
        own_settings = scoring_settings(own, header["backbone"])
        parts = [f"{key.rpartition('.')[2]}-{value}" for key, value in settings.items() if value != own_settings[key]]
        parts += [f"with-{other.resolve().parent.name}-{other.resolve().name}" for other in others]
        parts += [] if own_data else [f"data-{config.dataset.name}"]
        out = run_dir / "evaluations" / re.sub(r"[^\w.=-]+", "-", "_".join(parts)) if parts else run_dir
    use, records = answered_records(source, config.evaluation, config.dataset)
    answered = load_images(records, config.dataset) if records else None
    if detector.device.type == "cpu":
        use_threads()
    validation = validation_images(detector, source) if own_data else None
    if validation is None:
        errors, calibration = None, None if own_data else read_calibration(run_dir, detector, decoder)
    else:
        errors, calibration = calibrate(detector, validation, decoder)
    predictions = None if answered is None else find_landmarks(detector, answered, decoder, calibration=calibration,
                                                               unit=source.unit)
    seconds, _ = logged_below(run_dir)
    identity = {**{key: header[key] for key in ("backbone", "shots", "draw", "seed", "training_images",
                                                "validation_labels", "iteration")},
                "timestep": header.get("timestep"), "encoder": header.get("encoder"),
                "variant": variant(config, header["backbone"]), "seconds": seconds,
                "decoder": used_decoder(detector, decoder),
                **({"averaged_with": list(map(str, others))} if others else {}),
                "validation_mre": None if errors is None else float(np.nanmean(errors)),
                "calibration": None if calibration is None else {
                    "images": calibration.images, "landmarks": calibration.landmarks,
                    "of_scored": validation is not None and answered is not None
                    and share_images(validation, answered)},
                "rounds": round_figures(run_dir, detector.rounds)}
    write_calibration(out, detector, calibration, decoder)
    if source.unscored or predictions is None:
        return out, write_answers(out, config, source, use, records, predictions, identity)
    return out, score(out, config, source, predictions, identity)


def check_folds(detector: TrainedDetector, others: Sequence[Path]) -> None:
    """UserError where a run of a cross-validation would be scored on labels that it, or one beside it, has seen."""
    header, config = detector.header, detector.config
    own = (header.get("folds"), header.get("fold"), header["draw"])
    if own[0] is not None and own[0] != config.evaluation.folds:
        raise UserError(f"evaluation.folds {config.evaluation.folds}: this run is of one of {own[0]} folds")
    for path in others if own[0] is not None else ():
        other = trained_detector(path).header
        if (other.get("folds"), other.get("fold"), other["draw"]) != own:
            raise UserError(f"--with {path}: it is not of fold {own[1]} of {own[0]} of draw {own[2]}, whose labels it "
                            "may have seen")


def check_decoder(detector: TrainedDetector, decoder: str | None) -> None:
    """UserError for a decoder of heatmaps that the detector's outputs are not."""
    backbone = detector.header["backbone"]
    if decoder is not None and detector.kind.heatmaps is None:
        raise UserError(f'--decoder {decoder}: backbone "{backbone}" has no heatmaps, and one way to answer; leave '
                        "it away")
    if decoder == "contour_centroid" and backbone not in SOFTMAX_STARTS:
        raise UserError(f'--decoder {decoder} thresholds raw outputs, which "{backbone}" has as logarithms; choose '
                        "component_centroid")


def used_decoder(detector: TrainedDetector, decoder: str | None) -> str | None:
    """What reads landmarks off heatmaps, None for a detector without them."""
    return None if detector.kind.heatmaps is None else decoder or detector.recipe.finetune.decoder


def has_data_of(run_dir: Path, source: DataSource, dataset: Dataset) -> bool:
    """Whether `source` is the data set of the run, wherever it lies: it has its training images with their labels.

    A run that records none is taken to be of it.
    """
    record = read_record(run_dir / INPUTS)
    if record is None:
        return True
    training = {"training": record["images"]["training"]}
    images = [image for image in source.labelled if image.id in training["training"]]
    return not image_changes(training, {"training": data_digests(images, source.landmark_names, dataset)})


def note_seen(run_dir: Path, records: Sequence[Record], dataset: Dataset) -> None:
    """Say which of the `records` of another data set are files that the run was trained on, if it recorded those."""
    record = read_record(run_dir / INPUTS)
    known = {pixels for images in (record or {"images": {}})["images"].values() for pixels, _ in images.values()}
    digests = data_digests([replace(each, landmarks=None) for each in records], (), dataset)
    seen = [name for name, (pixels, _) in digests.items() if pixels is not None and pixels in known]
    if seen:
        print(f"note: {counted(seen)} of this data set are files that the run was made from", file=sys.stderr)


def validation_images(detector: TrainedDetector, source: DataSource) -> ImageSet | None:
    """The images that chose the detector's weights, and that calibrate its expected errors; None without any."""
    header = detector.header
    _, records = labelled_subset(source, detector.config.finetune, header["shots"], header["draw"],
                                 header.get("chosen_images"))
    return load_images(records, detector.config.dataset) if records else None


def share_images(one: ImageSet, other: ImageSet) -> bool:
    """Whether an image is in both."""
    return not {record.id for record in one.records}.isdisjoint(record.id for record in other.records)


def evaluate_mean_shape(config: Config, cell: Cell) -> Path:
    """Score the mean of the cell's labels as a prediction for every image: what a detector must beat.

    Where the data set holds nothing back there is nothing to say.
    """
    source = cell_source(config, cell.draw, cell.fold)
    order = coverage_order(config, source, cell.shots)
    chosen, _ = labelled_subset(source, config.finetune, cell.shots, cell.draw, order)
    use, records = answered_records(source, config.evaluation, config.dataset)
    run_dir = cell_dir(config, cell)
    identity = {"backbone": MEAN_SHAPE, "variant": variant(config, MEAN_SHAPE), "shots": cell.shots,
                "draw": cell.draw, "seed": cell.seed, "training_images": [record.id for record in chosen],
                "validation_labels": 0, "decoder": None, "seconds": None, "calibration": None}
    write_run_config(run_dir, config.plain(), {"stage": MEAN_SHAPE})
    inputs = {"training": data_digests(chosen, source.landmark_names, config.dataset)}
    write_inputs(run_dir, inputs, chosen_by=None if order is None else choosing_path(config))
    if source.unscored:
        write_answers(run_dir, config, source, use, records, None, identity)
        return run_dir
    training, test_images = load_images(chosen, config.dataset), load_images(records, config.dataset)
    points = test_images.from_centred(mean_shape_prediction(training.centred_points()))
    side = config.dataset.image_size
    square = len(side) == 2 and len(set(side)) == 1  # of others there is no published scorer
    scorer_points = round_original(points, test_images.original_sizes, side[0]) if square else None
    unknown = np.full(points.shape[:2], np.nan)
    guess = Predictions(test_images, source.landmark_names, points, unknown, unknown, unknown, scorer_points)
    score(run_dir, config, source, guess, identity)
    return run_dir


def score(folder: Path, config: Config, source: DataSource, predictions: Predictions, identity: dict) -> dict:
    """Write predictions.csv, markups of volumes, overlays/, heatmaps.npz and metrics.json; returns what that holds.

    Where the data set has a published rule that is not defined for these images, its figures are left out and
    "paper_left_out" says why. "release" is what the scorer of an earlier system's own release says of its answers.
    """
    test_images, points, scorer_points = predictions.images, predictions.points, predictions.scorer_points
    truth, spacing = test_images.original_points(), test_images.spacings()
    errors = physical_errors(points, truth, spacing)
    thresholds = config.evaluation.sdr_thresholds or source.sdr_thresholds
    size = config.dataset.image_size
    rule, published, left_out = source.paper_rule, None, None
    if rule is not None:
        extents_mm = None if spacing is None else test_images.original_sizes * spacing
        left_out = why_undefined(rule, size, config.dataset.makes_windows, extents_mm)
        if left_out is None and scorer_points is not None:
            sizes = test_images.original_sizes
            published = paper_errors(rule, scorer_points, truth, sizes, size[0], paper_sigma(size[0]))
    patients = [patient_group(record.id, record.patient) for record in test_images.records]
    interval = bootstrap_interval(errors, patients, config.experiment.seed)
    pairs = [record.annotators for record in test_images.records if record.annotators is not None]
    human = annotator_distances(np.stack(pairs), spacing) if len(pairs) == len(test_images.records) else None
    leaked = leaked_ids(find_leaks(source, config.dataset), config.evaluation.split)
    metrics = {
        **identity, "dataset": config.dataset.name, "layout": source.layout, "paper_rule": rule,
        "phantom": config.dataset.phantom is not None, "split": config.evaluation.split, "unit": source.unit,
        "images": len(test_images.records), "landmark_names": list(source.landmark_names), "image_size": list(size),
        "physical": {**summarise(errors, thresholds),
                     "interval": None if np.isnan(interval).any() else interval},
        "paper": None if published is None else summarise(published, thresholds), "paper_left_out": left_out,
        **_release(config, rule, predictions),
        "stored_pixels": _in_stored_pixels(points, truth), "leaked": config.evaluation.leaked,
        "without_leaks": _without(leaked, test_images.records, errors, thresholds) if leaked else None,
        "human": None if human is None else {**summarise(human, thresholds), "within": share_within(errors, human)},
    }
    images: GroupedImages = {
        config.evaluation.split: data_digests(test_images.records, source.landmark_names, config.dataset, scoring=True)}
    metrics["scored_on"] = images_digest(images)
    table = folder / "predictions.csv"
    write_table(table, table_rows(predictions, errors, published, human))
    metrics["predictions_sha256"] = content_digest(table)
    write_slicer_files(folder / "markups", predictions)
    _write_overlays(folder / "overlays", config.evaluation.overlays, predictions, source.unit, errors)
    if config.evaluation.overlays:
        write_heatmaps(folder / "heatmaps.npz", predictions)
    settings = scoring_settings(config, identity["backbone"], identity["decoder"])
    write_json(folder / SCORED, {"images": images, "settings": settings})
    write_json(folder / "metrics.json", metrics)
    return metrics


def _release(config: Config, rule: str | None, predictions: Predictions) -> dict[str, Any]:
    """{"release", "release_left_out"}: a summary by the scorer of the detector's own release, or why there is none."""
    scorer = None if predictions.detector is None else predictions.detector.kind.scorer
    scored = None if scorer is None else scorer(config, rule, predictions.points, predictions.images)
    summary = None if scored is None or scored.errors is None else summarise(scored.errors, scored.radii)
    return {"release": summary, "release_left_out": None if scored is None else scored.left_out}


def _without(leaked: Sequence[str], records: Sequence[Record], errors: np.ndarray, thresholds: Sequence[float]) -> dict:
    """What is left of the physical figures without the `leaked` images: {left_out, images, mre, median, sdr}."""
    kept = [index for index, record in enumerate(records) if record.id not in leaked]
    scored = kept and not np.isnan(errors[kept]).all()
    summary = summarise(errors[kept], thresholds) if scored else dict.fromkeys(("mre", "median", "sdr"))
    return {"left_out": leaked, "images": len(kept), **{key: summary[key] for key in ("mre", "median", "sdr")}}


def _in_stored_pixels(points: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Mean and median radial error in pixels (voxels) of the stored images."""
    errors = physical_errors(points, truth)
    return {"mre": float(np.nanmean(errors)), "median": float(np.nanmedian(errors))}


def _write_overlays(folder: Path, count: int, predictions: Predictions, unit: str, errors: np.ndarray) -> None:
    """rank001_<end of the image's id>.png and so on, the worst image (mean error) first."""
    mean_errors = np.where(np.isnan(errors).all(axis=1), -1.0, np.nanmean(errors, axis=1))
    titles = []
    for record, error, expected in zip(predictions.images.records, mean_errors, predictions.expected_error,
                                       strict=True):
        doubt = "" if np.isnan(expected).all() else f", expected {np.nanmean(expected):.2f} {unit}"
        titles.append(f"{printable(record.id)}: mean error {error:.2f} {unit}{doubt}")
    draw_ranked(folder, count, predictions, mean_errors, titles, errors)


def check_other_data(run_dir: Path, overrides: Sequence[str], out: Path | None) -> None:
    """UserError where a score on another data set would take the place of the run's own, or is described twice."""
    twice = [override for override in overrides if override.startswith("dataset.")]
    if twice:
        raise UserError(f"--set {twice[0]}: --data says what the data set is; put the key into a config and name that")
    if out is not None and out.resolve() == run_dir.resolve():
        raise UserError(f"--out {out} is the run's own folder, which holds its own score; name another one")


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m landmarks_finetuning.evaluate", description=__doc__,
        epilog="example: python -m landmarks_finetuning.evaluate "
               "runs/cephalo/landmarks/ddpm/default/shots010_draw0_seed0")
    parser.add_argument("run_dir", type=Path, help="a run's folder, or an experiment's for its best run")
    parser.add_argument("--with", type=Path, nargs="+", action="extend", default=[], metavar="RUN_DIR", dest="others",
                        help="runs on the same data whose heatmaps are averaged with those of run_dir")
    parser.add_argument("--data", type=Path, metavar="DIR_OR_CONFIG", help="another data set: a folder with images/ "
                        "and labels, or a study's config; all labels are scored, or a split where it has splits")
    parser.add_argument("--decoder", help="another decoder than the config's")
    parser.add_argument("--out", type=Path, help="where the files go; default: the run's folder for the study's own "
                        "score, a folder below its evaluations/ for another split, decoder or data set")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="SECTION.KEY=VALUE",
                        help="override values of the run's config, for example --set dataset.root=/data/cephalo")
    arguments = parser.parse_args()
    run_dir = run_folder(arguments.run_dir)
    if not run_dir.is_dir():
        raise UserError(f"run folder {run_dir} does not exist")
    if arguments.data is not None:
        check_other_data(run_dir, arguments.set, arguments.out)
    with claim(run_dir):
        folder, metrics = evaluate(run_dir, arguments.decoder, tuple(arguments.set), arguments.out,
                                   others=arguments.others, data=arguments.data)
    physical, unit = metrics["physical"], metrics["unit"]
    if physical is None:
        print(f"every label of the data set is for training: no score, but predictions on {metrics['images']} "
              f"unlabelled images; files in {folder}")
        return
    rates = ", ".join(f"{threshold} {unit} {rate:.1f} %" for threshold, rate in physical["sdr"].items())
    rest = metrics["without_leaks"]
    known = rest is not None and rest["mre"] is not None
    clean = f"; without the {len(rest['left_out'])} that leak {rest['mre']:.2f} {unit}" if known else ""
    print(f"{metrics['images']} {metrics['split']} images: mean error {physical['mre']:.2f} {unit} "
          f"(median {physical['median']:.2f}); within {rates}{clean}; files in {folder}")
    if metrics["paper_left_out"]:
        print(f"the paper's scorer is left out: {metrics['paper_left_out']}")
    if metrics["release"]:
        print(f"by its release's own scorer: mean error {metrics['release']['mre']:.2f} {unit}")
    if metrics["release_left_out"]:
        print(f"its release's own scorer is left out: {metrics['release_left_out']}")


if __name__ == "__main__":
    run_command(main)
