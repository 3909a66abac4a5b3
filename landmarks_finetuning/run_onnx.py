"""Find landmarks with a detector that was exported to ONNX: numpy, onnxruntime and Pillow are all this file needs.

It lies beside the exported model and reads there, from the model's metadata, what is to be done before and after the
network. It answers as the detector in Python does: resampling, intensities, decoding, the labels' common shape, the
second stage, expected errors and 90 % radii. Left out: image files other than PNG, JPEG, BMP and WebP, and volumes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

KEY = "landmarks"  # of the model's metadata, JSON
CHECKSUM = b"\x0a\x08checksum\x12@"  # an entry of the metadata, as the file has it: 64 hexadecimal digits follow
CROPS_AT_ONCE = 16
COLUMNS = ("image", "landmark", "x", "y", "expected_error", "radius90")


class Found(NamedTuple):
    """points (N, 2), (y, x) in pixels of the image; the rest (N,): errors in mm where the spacing is known."""

    points: np.ndarray
    expected_error: np.ndarray
    radius90: np.ndarray
    confidence: np.ndarray


def find_checksum(path: Path) -> tuple[int, str, str]:
    """Where in an exported model its checksum stands, what it is and should be: SHA-256 of all else that it holds.

    Very large weights, in a file of their own, are the end of it. ValueError where there is none.
    """
    content = path.read_bytes()
    before, mark, after = content.partition(CHECKSUM)
    if not mark:
        raise ValueError("no model that was exported by this project, or damaged")
    weights = path.with_name(f"{path.name}.data")
    digest = hashlib.sha256(before + mark + after[64:])
    digest.update(weights.read_bytes() if weights.exists() else b"")
    return len(before + mark), after[:64].decode("latin-1"), digest.hexdigest()


class Model:
    """An exported detector: `names` of its landmarks; call it with pixels (H, W). ValueError: its file is damaged."""

    def __init__(self, path: str | Path) -> None:
        _, told, wanted = find_checksum(Path(path))
        if told != wanted:
            raise ValueError("damaged: its checksum is that of another content; export it again")
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.settings: dict[str, Any] = json.loads(self.session.get_modelmeta().custom_metadata_map[KEY])
        self.names: list[str] = self.settings["names"]
        second = self.settings.get("second_stage")
        self.second = Model(Path(path).with_name(second)) if second else None

    def maps(self, images: np.ndarray) -> np.ndarray:
        """(B, H, W) in [0, 1] -> raw heatmaps (B, N, H, W)."""
        return self.session.run(None, {"images": images[:, None].astype(np.float32)})[0]

    def __call__(self, pixels: np.ndarray, spacing_mm: float | None = None) -> Found:
        """The landmarks of an image, raw intensities (H, W), by both stages where there are two."""
        spacing = np.array(spacing_mm or self.settings["spacing_mm"] or 1.0)
        size = self.settings["size"]
        outputs = self.maps(normalise(resize(pixels, size), self.settings)[None])[0]
        step = np.array(pixels.shape) / size  # stored pixels per network pixel
        found = measured(read_maps(outputs, self.settings), step * spacing, self.settings, slice(None))
        found = found._replace(points=(found.points + 0.5) * step - 0.5)
        return found if self.second is None else self.second.refine(pixels, found.points, spacing)

    def refine(self, pixels: np.ndarray, answers: np.ndarray, spacing: np.ndarray) -> Found:
        """The first stage's answers (N, 2) seen again by this, the second one, each in a crop of its own."""
        size, crop, prior = (self.settings[key] for key in ("size", "crop", "prior_px"))
        step = np.array(pixels.shape) / size
        canvas = normalise(resize(pixels, size), self.settings)
        places = (answers + 0.5) / step - 0.5
        corners = np.rint(places - (np.array(crop) - 1) / 2).astype(int)
        rows, columns = ((corners[:, axis, None] + np.arange(crop[axis])).clip(0, size[axis] - 1) for axis in (0, 1))
        crops = canvas[rows[:, :, None], columns[:, None, :]]
        parts = []
        for first in range(0, len(crops), CROPS_AT_ONCE):
            some = self.maps(crops[first : first + CROPS_AT_ONCE])
            for n, maps in enumerate(some, start=first):
                own = maps[n][None]
                if prior is not None:
                    own = own + gaussian_log(own.shape[1:], (places - corners)[[n]], prior)
                found = measured(read_maps(own, self.settings), step * spacing, self.settings, slice(n, n + 1))
                parts.append(found._replace(points=(found.points + corners[n] + 0.5) * step - 0.5))
        return Found(*(np.concatenate(each) for each in zip(*parts, strict=True)))


# ---- before the network


def read_picture(path: Path) -> np.ndarray:
    """(H, W) raw intensities of the upright image; colours become luminance (BT.601)."""
    with Image.open(path, formats=("PNG", "JPEG", "BMP", "WEBP")) as image:
        if any(";16" in str(tile.args) for tile in image.tile) and image.mode in ("RGB", "RGBA", "LA"):
            raise ValueError("16-bit colour, of which Pillow reads 8 bits")
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith(("I", "F")):
            return np.asarray(upright, dtype=np.float32)
        if upright.mode in ("1", "L", "LA", "La"):
            return np.asarray(upright.convert("L"), dtype=np.float32)
        return (np.asarray(upright.convert("RGB")) @ np.array([0.299, 0.587, 0.114])).astype(np.float32)


def resize(pixels: np.ndarray, size: list[int]) -> np.ndarray:
    """A triangle filter along each axis, as wide as an output pixel where it shrinks; half-pixel exact."""
    rows, columns = (triangles(old, new) for old, new in zip(pixels.shape, size, strict=True))
    return rows @ pixels @ columns.T


def triangles(old: int, new: int) -> np.ndarray:
    """(new, old) weights, each row of sum 1."""
    ratio = old / new
    away = abs(np.arange(old) - ((np.arange(new)[:, None] + 0.5) * ratio - 0.5))
    weights = (1 - away / max(ratio, 1)).clip(min=0)
    return weights / weights.sum(axis=1, keepdims=True)


def normalise(pixels: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """Raw intensities -> [0, 1], by the image's extremes, its percentiles, or a window."""
    low, high = pixels.min(), pixels.max()
    if settings["intensity"] == "window":
        low, high = settings["window"]
    elif settings["intensity"] == "percentile":
        some = np.percentile(pixels, settings["percentiles"])
        low, high = some if some[1] > some[0] else (low, high)
    return ((pixels - low) / max(high - low, 1e-12)).clip(0, 1)


# ---- after the network: maps (N, H, W), points in their pixels


class Read(NamedTuple):
    """points (N, 2), the log maps (N, H, W) they were read off, up to a constant each, and confidences (N,)."""

    points: np.ndarray
    scores: np.ndarray
    confidence: np.ndarray


def read_maps(outputs: np.ndarray, settings: dict[str, Any]) -> Read:
    """Points of raw maps, decoded once more under the labels' common shape where the settings have one."""
    outputs = outputs.astype(np.float64)
    scores = outputs
    if settings["loss"] == "cross_entropy_channels":
        scores = outputs - log_sum(outputs, 0)
    points = decode(outputs, scores, settings)
    prior = settings.get("shape_prior")
    seen = scores
    if prior is not None:
        fitted = fit_shape(prior, points, confidences(seen, points, settings))
        scores = outputs + gaussian_log(outputs.shape[1:], fitted, prior["width"] * prior["size"])
        points = decode(scores, scores, settings)
    return Read(points, scores, confidences(seen, points, settings))


def log_sum(scores: np.ndarray, axes: int | tuple[int, ...]) -> np.ndarray:
    """log of the sum of exp over `axes`, which stay."""
    most = scores.max(axis=axes, keepdims=True)
    return most + np.log(np.exp(scores - most).sum(axis=axes, keepdims=True))


def gaussian_log(size: tuple[int, ...], centres: np.ndarray, width: float) -> np.ndarray:
    """(N, H, W) logarithms of Gaussians about `centres` (N, 2); 0 about NaN."""
    rows, columns = (np.nan_to_num((np.arange(size[axis]) - centres[:, axis, None]) ** 2) for axis in (0, 1))
    return (rows[:, :, None] + columns[:, None, :]) / (-2 * width**2)


def decode(outputs: np.ndarray, scores: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """Points (N, 2) by the run's decoder; raw outputs decide where scores are equal."""
    kind, sigma = settings["decoder"], settings["sigma"]
    if kind == "component_centroid":
        return np.stack([component(each > each.max() - np.log(2)) for each in scores])
    if kind == "window_mass":
        radius = max(1, round(2 * sigma))
        mass = np.exp(scores - scores.max(axis=(1, 2), keepdims=True))
        for axis in (1, 2):
            around = [(radius + 1, radius) if each == axis else (0, 0) for each in range(3)]
            sums = np.pad(mass, around).cumsum(axis=axis)
            ends = np.arange(mass.shape[axis]) + 2 * radius + 1
            mass = sums.take(ends, axis=axis) - sums.take(ends - 2 * radius - 1, axis=axis)
        return mean_about(peaks(outputs, mass), scores, radius)
    best = peaks(outputs, scores)
    return best.astype(np.float64) if kind == "argmax" else mean_about(best, scores, max(1, round(sigma)))


def peaks(outputs: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(N, 2) places of the highest scores."""
    best = np.where(scores == scores.max(axis=(1, 2), keepdims=True), outputs, -np.inf)
    return np.stack(np.unravel_index(best.reshape(len(best), -1).argmax(axis=1), best.shape[1:]), axis=1)


def window(scores: np.ndarray, centre: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The scores of one map (H, W) within `radius` of whole `centre` along each axis, and their rows and columns."""
    rows, columns = (np.arange(max(0, c - radius), min(length, c + radius + 1))
                     for c, length in zip(centre.tolist(), scores.shape, strict=True))
    return scores[np.ix_(rows, columns)], rows, columns


def mean_about(best: np.ndarray, scores: np.ndarray, radius: int) -> np.ndarray:
    """Mean positions (N, 2) of the maps within `radius` of `best`."""
    means = []
    for each, centre in zip(scores, best, strict=True):
        part, rows, columns = window(each, centre, radius)
        weights = np.exp(part - part.max())
        weights /= weights.sum()
        means.append((weights.sum(axis=1) @ rows, weights.sum(axis=0) @ columns))
    return np.array(means)


def component(mask: np.ndarray) -> np.ndarray:
    """Centroid of the largest part of a mask (H, W) that hangs together by sides; the first of equal ones."""
    labels, before = np.where(mask, np.arange(1, mask.size + 1)[::-1].reshape(mask.shape), 0), None
    while before is None or (labels != before).any():
        before, wide = labels, np.pad(labels, 1)
        around = [wide[1:-1, 1:-1], wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]]
        labels = np.where(mask, np.maximum.reduce(around), 0)
    kinds, counts = np.unique(labels[mask], return_counts=True)
    return np.argwhere(labels == kinds[len(kinds) - 1 - counts[::-1].argmax()]).mean(axis=0)


def confidences(scores: np.ndarray, points: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """(N,): the mass of each map within 2 sigma of its point along each axis, or its mean probability there."""
    over_pixels, sure = settings["loss"] == "cross_entropy_pixels", []
    for each, point in zip(scores, points, strict=True):
        centre = np.rint(point).astype(int).clip(0, np.array(each.shape) - 1)
        part = window(each, centre, max(1, round(2 * settings["sigma"])))[0]
        mass = np.exp(part - (log_sum(each, (0, 1)) if over_pixels else 0))
        sure.append(mass.sum() if over_pixels else mass.mean())
    return np.clip(sure, 0, 1)


def measured(read: Read, step: np.ndarray, settings: dict[str, Any], which: slice) -> Found:
    """Expected errors and radii that hold 90 % of the maps, for landmarks `which`; `step`: mm per pixel of the maps."""
    nothing = np.full(len(read.points), np.nan)
    if settings["loss"] != "cross_entropy_pixels":
        return Found(read.points, nothing, nothing, read.confidence)
    calibration = settings["calibration"] or {"temperatures": [1.0] * len(settings["names"]), "error_scale": 1.0,
                                              "radius_scale": 1.0}
    errors, radii = [], []
    for scores, point, heat in zip(read.scores, read.points, calibration["temperatures"][which], strict=True):
        mass = np.exp(scores / heat - log_sum(scores / heat, (0, 1))).ravel()
        off = [((np.arange(length) - point[axis]) * step[axis]) ** 2 for axis, length in enumerate(scores.shape)]
        away = np.sqrt(off[0][:, None] + off[1] + (step**2).sum() / 12).ravel()  # a pixel is as wide as it is
        order = away.argsort()
        last = np.searchsorted(mass[order].cumsum(), 0.9).clip(max=len(order) - 1)
        errors.append(mass @ away * calibration["error_scale"])
        radii.append(away[order][last] * calibration["radius_scale"])
    return Found(read.points, np.array(errors), np.array(radii), read.confidence)


# ---- the labels' common shape


def fit_shape(prior: dict[str, Any], points: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """The common shape (N, 2) moved onto `points`, outliers counting less and less (Geman-McClure, annealed)."""
    mean = np.array(prior["mean"], dtype=np.float64)  # null is NaN
    modes = None if prior["modes"] is None else np.array(prior["modes"])
    weights, shape, fitted = sure.astype(np.float64), mean, mean
    for scale in prior["scales"]:
        if modes is not None:
            known = np.isfinite(mean).all(axis=1)
            across = np.repeat(np.sqrt(weights[known]), 2) / (prior["scatter"] * prior["size"])
            ways = modes[:, known].reshape(len(modes), -1) * across
            off = (move(points, shape, weights + 1e-9, None) - mean)[known].ravel() * across
            if np.isfinite(off).all():
                amounts = np.linalg.solve(ways @ ways.T + np.eye(len(ways)), ways @ off)
                shape = mean + np.tensordot(amounts, modes, axes=1)
        fitted = move(shape, points, weights + 1e-9, prior["poses"])
        weights = sure / (1 + (np.linalg.norm(fitted - points, axis=1) / prior["size"] / scale) ** 2) ** 2
    return fitted


def move(moving: np.ndarray, fixed: np.ndarray, weights: np.ndarray, poses: dict[str, Any] | None) -> np.ndarray:
    """`moving` (N, 2) turned, scaled and shifted onto `fixed`, least squares, no mirror; NaN where too few are known.

    In the plane by complex numbers. `poses`: how far it may be turned from a middle, and its least and largest scale.
    """
    known = np.isfinite(moving).all(axis=1) & np.isfinite(fixed).all(axis=1)
    if known.sum() <= 2:
        return np.full_like(moving, np.nan)
    weights = np.where(known, weights, 0) / weights[known].sum()
    a, b = (each[:, 0] + 1j * each[:, 1] for each in (moving, fixed))
    a_mean, b_mean = (weights[known] @ each[known] for each in (a, b))
    together = weights[known] @ ((b - b_mean)[known] * (a - a_mean)[known].conj())
    variance = weights[known] @ abs((a - a_mean)[known]) ** 2
    turn = np.angle(together)
    if poses is not None:
        first = poses["rotation"][0]  # acts on rows: (cos, sin) of the middle
        middle = np.arctan2(first[1], first[0])
        turn = middle + np.clip(np.angle(np.exp(1j * (turn - middle))), -poses["turn"], poses["turn"])
    along = (together * np.exp(-1j * turn)).real
    scale = along / variance if variance > 0 else 1.0
    scale = scale if poses is None else np.clip(scale, *poses["scale"])
    moved = (a - a_mean) * scale * np.exp(1j * turn) + b_mean
    return np.stack((moved.real, moved.imag), axis=1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the .onnx file; a second stage lies beside it")
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="a table; without it, it is printed")
    parser.add_argument("--spacing", type=float, metavar="MM", help="mm per pixel; without it the run's, or pixels")
    arguments = parser.parse_args()
    try:
        model = Model(arguments.model)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {arguments.model}: {error}")
    rows = []
    for path in arguments.images:
        try:
            found = model(read_picture(path), arguments.spacing)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {path}: {error}")
        for n, name in enumerate(model.names):
            values = (*found.points[n, ::-1], found.expected_error[n], found.radius90[n])
            rows.append((path.name, name, *("" if np.isnan(value) else f"{value:.4f}" for value in values)))
    with arguments.out.open("w", newline="") if arguments.out else sys.stdout as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
