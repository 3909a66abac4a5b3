"""Find landmarks in unlabelled images with a trained detector: a CSV and overlays in original pixels."""

from __future__ import annotations

import argparse
from pathlib import Path

from core.config import load_config
from core.dataset import load_images
from core.errors import UserError, run_command
from core.images import IMAGE_SUFFIXES, find_images
from core.layouts import Record
from landmarks_finetuning.detectors.heatmap_unet import TrainedDetector, locate
from landmarks_finetuning.evaluate import picture_of, write_predictions
from landmarks_finetuning.heatmaps import probability_maps
from landmarks_finetuning.report.overlays import draw_overlay


def collect_images(paths: list[Path]) -> list[Record]:
    """Every image named or below a named folder; UserError when there is none, or two share a name."""
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist")
        for image in find_images(path, recursive=True) if path.is_dir() else [path]:
            name = image.relative_to(path).as_posix() if path.is_dir() else image.name
            if name in found:
                raise UserError(f"{image} and {found[name]} would both be called {name}; predict them separately")
            found[name] = image
    if not found:
        raise UserError(f"no image in {', '.join(map(str, paths))}; supported: {', '.join(sorted(IMAGE_SUFFIXES))}")
    return [Record(name, image, None, None) for name, image in found.items()]


def predict(run_dir: Path, paths: list[Path], out: Path, overlays: bool = True,
            overrides: tuple[str, ...] = ()) -> Path:
    """Write out/predictions.csv (image, landmark, x, y, confidence) and out/overlays/; returns the CSV's path."""
    detector = TrainedDetector(run_dir / "best.safetensors")
    config = load_config(run_dir / "config.json", overrides) if overrides else detector.config
    images = load_images(collect_images(paths), config.dataset, "images")
    outputs = detector.heatmaps(images.images)
    points, confidence = locate(outputs, images.original_sizes, config)
    table = out / "predictions.csv"
    write_predictions(table, images, tuple(detector.landmark_names), points, confidence)
    if overlays:
        (out / "overlays").mkdir(parents=True, exist_ok=True)
        for index, record in enumerate(images.records):
            maps = probability_maps(outputs[index : index + 1], config.finetune.loss)[0].numpy()
            pixels, _ = picture_of(images, index)
            title = f"{record.id}: lowest confidence {confidence[index].min():.2f}"
            picture = draw_overlay(pixels, points[index], None, detector.landmark_names, maps, title)
            picture.save(out / "overlays" / f"{record.id.replace('/', '-')}.png")
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m landmarks_finetuning.predict", description=__doc__,
        epilog="example: python -m landmarks_finetuning.predict "
               "runs/cephalo/landmarks/ddpm/default/shots010_draw0_seed0 new_images/ --out predictions")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--no-overlays", action="store_true", help="write the CSV only")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    table = predict(arguments.run_dir, arguments.images, arguments.out, not arguments.no_overlays,
                    tuple(arguments.set))
    print(f"predictions in {table}")


if __name__ == "__main__":
    run_command(main)
