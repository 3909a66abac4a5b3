"""Whether a diffusion pre-training may be judged by: samples that are noise, and a loss that was still falling."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLUMNS = 4  # of a picture of samples, see ddpm_pretraining.train
NOISE_CORRELATION = 0.5  # of neighbouring pixels; white noise has 0, radiographs of 32 pixels and more 0.87 to 0.99
FLAT = 1.0  # grey levels of 255: a tile of less spread has nothing to correlate
STILL_FALLING = 0.05  # share of the loss that the last quarter of the steps took off
SURE = 2.0  # standard errors by which a training loss, which is noisy, must have fallen


def pretraining_sentence(ddpm_dir: Path, lines: list[dict[str, Any]], config: dict[str, Any]) -> str:
    """In one sentence what is wrong with the pre-training whose log is `lines`; empty where nothing is seen."""
    noise = noisy_samples(ddpm_dir / "samples", config)
    fall = loss_fall(lines)
    falling = "" if fall is None else (f"its {fall[0]} loss still fell by {fall[1]:.0%} over the last quarter of its "
                                       f"{fall[2]} steps")
    if noise is not None:
        count, total, iteration = noise
        return (f"The diffusion pre-training is bad: {count} of {total} images sampled at iteration {iteration} are "
                f"noise (neighbouring pixels correlate by less than {NOISE_CORRELATION:g}; in radiographs by about "
                f"0.9 or more){f', and {falling}' if falling else ''}; raise ddpm.iterations before you judge it.")
    return f"The diffusion pre-training was cut short: {falling}; more ddpm.iterations may help." if falling else ""


def neighbour_correlation(tile: np.ndarray) -> float:
    """Correlation of neighbouring pixels of (H, W), over both axes; NaN for a flat tile.

    1 - mean squared difference / (2 variance): 0 for white noise, 1 for a smooth picture.
    """
    values = tile.astype(np.float64)
    if values.std() < FLAT:
        return float("nan")
    differences = np.mean([np.square(np.diff(values, axis=axis)).mean() for axis in (0, 1)])
    return float(1 - differences / (2 * values.var()))


def noisy_samples(folder: Path, config: dict[str, Any]) -> tuple[int, int, int] | None:
    """(how many are noise, of how many, iteration) of the newest picture of samples, where more than half are.

    None too where there is no picture, or where it is not what the config's size and ddpm.sample_count make.
    """
    pictures = sorted(folder.glob("samples_iter*.png"))
    size, total = config.get("dataset", {}).get("image_size"), config.get("ddpm", {}).get("sample_count")
    if not pictures or not size or not total:
        return None
    height, width = size[-2:]
    try:
        with Image.open(pictures[-1]) as picture:
            sheet = np.asarray(picture.convert("L"))
    except OSError:  # the page says so where it shows the picture
        return None
    if sheet.shape != (-(-total // COLUMNS) * height, COLUMNS * width):
        return None
    places = [divmod(index, COLUMNS) for index in range(total)]
    tiles = [sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] for row, column in places]
    noisy = sum(neighbour_correlation(tile) < NOISE_CORRELATION for tile in tiles)
    found = re.search(r"iter(\d+)$", pictures[-1].stem)
    return (noisy, total, int(found.group(1)) if found else 0) if 2 * noisy > total else None


def loss_fall(lines: list[dict[str, Any]]) -> tuple[str, float, int] | None:
    """("validation" or "training", share of the loss that the last quarter took off, steps) where it still fell.

    The validation loss, of the same noise every time, is compared with what it was at three quarters of the steps;
    where it was not seen there and at the end, the mean training loss of the last quarter with that of the one before.
    """
    losses = np.array([(line["step"], line["loss"]) for line in lines if "loss" in line])
    validated = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    last = int(max((line["step"] for line in lines), default=0))
    before = [loss for step, loss in validated if last / 2 < step <= 0.75 * last]
    if before and validated[-1][0] > 0.75 * last:
        fall = 1 - validated[-1][1] / before[-1]
        return ("validation", fall, last) if fall > STILL_FALLING else None
    quarters = [] if not len(losses) else [losses[(low * last < losses[:, 0]) & (losses[:, 0] <= high * last), 1]
                                           for low, high in ((0.5, 0.75), (0.75, 1.0))]
    if not quarters or min(map(len, quarters)) < 3:
        return None
    means = [quarter.mean() for quarter in quarters]
    error = np.sqrt(sum(quarter.var(ddof=1) / len(quarter) for quarter in quarters))
    fall = float(1 - means[1] / means[0])
    return ("training", fall, last) if fall > STILL_FALLING and means[0] - means[1] > SURE * error else None
