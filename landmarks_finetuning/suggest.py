"""Which images to label next: those whose diffusion features cover the images of the pre-training best."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from core.config.config import Config
from core.config.load import add_config_arguments, load_config
from core.data.dataset import ImageSet, load_images
from core.data.records import DataSource, Record
from core.data.source import load_source
from core.errors import CommandParser, UserError, run_command
from core.files import write_atomically
from core.formats.cells import harmless
from landmarks_finetuning.coverage import distances, facility_location, image_features, require_weights, thinned
from landmarks_finetuning.pictures.overlays import fitted, font

TILE, CAPTION, COLUMNS = 240, 40, 5  # pixels of a picture and of what is written below it; pictures in a row


@dataclass(frozen=True)
class Suggestion:
    """An image to label: the share of the images that it is nearest to of all chosen, and the mean distance with it."""

    record: Record
    share: float
    mean_distance: float


def suggest(config: Config, source: DataSource, count: int, ignore_labels: bool = False) -> list[Suggestion]:
    """`count` unlabelled images of the pre-training, the one to label first first; labelled ones count as chosen.

    With `ignore_labels` those of the training split are as if they had none, and none is chosen yet. UserError where
    there are fewer images, or no pre-training yet.
    """
    weights = require_weights(config, "a suggestion")
    images = source.pretraining_records()
    labelled = () if ignore_labels else (*source.splits["train"], *source.splits["validation"])
    candidates = (*(source.splits["train"] if ignore_labels else ()), *source.unlabelled)
    if count > len(candidates):
        hint = "" if ignore_labels else f"; --ignore-labels also takes the {len(source.splits['train'])} of the " \
                                        "training split, as if they had no labels"
        raise UserError(f"--count {count} is above the {len(candidates)} unlabelled images of {source.root}{hint}")
    features = image_features(config, images, weights, "features of the images")
    place = {record.id: index for index, record in enumerate(images)}
    covered = features[thinned(len(images))]
    apart = distances(covered, features[[place[record.id] for record in candidates]])
    nearest = np.full(len(covered), np.inf)
    if labelled:
        nearest = distances(covered, features[[place[record.id] for record in labelled]]).min(axis=1)
    order = facility_location(apart, count, nearest if labelled else None)
    owner = np.argmin(np.column_stack([nearest, apart[:, order]]), axis=1)
    means = [np.minimum(nearest, apart[:, order[: rank + 1]].min(axis=1)).mean() for rank in range(count)]
    return [Suggestion(candidates[index], float((owner == rank + 1).mean()), float(means[rank]))
            for rank, index in enumerate(order)]


def table(suggestions: list[Suggestion]) -> bytes:
    """suggest.csv: rank, image, file, covers_percent, mean_distance."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "image", "file", "covers_percent", "mean_distance"])
    for rank, each in enumerate(suggestions, start=1):
        writer.writerow([rank, harmless(each.record.id), harmless(str(each.record.image)), f"{100 * each.share:.2f}",
                         f"{each.mean_distance:.4f}"])
    return text.getvalue().encode()


def contact_sheet(images: ImageSet, suggestions: list[Suggestion]) -> Image.Image:
    """The suggested images in their order, in the proportions that they are stored in; of volumes the middle plane."""
    rows = -(-len(suggestions) // COLUMNS)
    sheet = Image.new("L", (min(len(suggestions), COLUMNS) * TILE, rows * (TILE + CAPTION)), 255)
    draw, face = ImageDraw.Draw(sheet), font(13)
    for index, each in enumerate(suggestions):
        left, top = index % COLUMNS * TILE, index // COLUMNS * (TILE + CAPTION)
        picture = _thumbnail(images, index)
        sheet.paste(picture, (left + (TILE - picture.width) // 2, top + (TILE - picture.height) // 2))
        name = fitted(f"{index + 1}: {each.record.id}", face, TILE - 12)
        draw.text((left + 6, top + TILE + 3), name, fill=0, font=face)
        draw.text((left + 6, top + TILE + 20), f"nearest to {100 * each.share:.1f} % of the images", fill=90, font=face)
    return sheet


def _thumbnail(images: ImageSet, index: int) -> Image.Image:
    pixels = images.images[index, 0][images.seen(index)]
    height, width = images.original_sizes[index][-2:] if pixels.ndim == 2 else pixels.shape[-2:]
    plane = pixels if pixels.ndim == 2 else pixels[len(pixels) // 2]
    scale = (TILE - 8) / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Image.fromarray((255 * plane.cpu().numpy()).round().astype(np.uint8)).resize(size)


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m landmarks_finetuning.suggest", description=__doc__,
        epilog="example: python -m landmarks_finetuning.suggest --config configs/cephalo.json --count 10")
    add_config_arguments(parser)
    parser.add_argument("--count", type=int, required=True, help="how many images")
    parser.add_argument("--out", type=Path, help="where suggest.csv and suggest.png go; default: suggest/ in the "
                        "experiment's folder")
    parser.add_argument("--ignore-labels", action="store_true",
                        help="choose among the images of the training split as well, as if none had labels")
    arguments = parser.parse_args()
    if arguments.count < 1:
        raise UserError(f"--count {arguments.count}: at least 1 image")
    config = load_config(arguments.config, arguments.set)
    source = load_source(config.dataset)
    suggestions = suggest(config, source, arguments.count, arguments.ignore_labels)
    out = arguments.out or config.experiment_dir / "suggest"
    write_atomically(out / "suggest.csv", table(suggestions))
    picture = io.BytesIO()
    contact_sheet(load_images([each.record for each in suggestions], config.dataset), suggestions).save(picture, "PNG")
    write_atomically(out / "suggest.png", picture.getvalue())
    for rank, each in enumerate(suggestions, start=1):
        print(f"{rank:>3}  {each.record.id}  {each.record.image}  nearest to {100 * each.share:.1f} % of the images; "
              f"mean distance {each.mean_distance:.3f}")
    print(f"files in {out}")


if __name__ == "__main__":
    run_command(main)
