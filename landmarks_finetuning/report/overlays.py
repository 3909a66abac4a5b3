"""Pictures of predictions: image, prediction, truth, error lines and heatmap contours, half-pixel exact.

Points are (y, x) with pixel centres at integers; a point is drawn at (i + 0.5) * new / old - 0.5 of the picture,
so a pixel's centre stays that pixel's centre whatever the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import contourpy
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

PREDICTION = (255, 176, 0)
TRUTH = (90, 190, 255)
PAPER = (20, 22, 26)
INK = (240, 240, 240)  # neutral: the marks are the only colours in a grey picture
TITLE_HEIGHT = 40
MARGIN = 12
CROSS_HALF_LENGTH = 5.0
CIRCLE_RADIUS = 8.0
CONTOUR_OVERSAMPLING = 3


def draw_overlay(image: np.ndarray, predicted: np.ndarray, truth: np.ndarray | None, names: Sequence[str],
                 heatmaps: np.ndarray | None, title: str, width: int = 900) -> Image.Image:
    """One picture, `width` pixels wide: a title strip of TITLE_HEIGHT, the image, a legend with the landmarks' names.

    `image` (C, H, W) of any range is shown min-max; `predicted` and `truth` (N, 2) are (y, x) pixels of it, NaN where
    there is none; `heatmaps` (N, h, w) get a contour at half of each one's maximum. A volume (C, D, H, W) with points
    (N, 3) is shown as its maximum projection along the first axis.
    """
    if image.ndim == 4:
        image, heatmaps = image.max(axis=1), None if heatmaps is None else heatmaps.max(axis=1)
        predicted, truth = predicted[:, 1:], None if truth is None else truth[:, 1:]
        title += " (maximum projection)"
    size = np.array(image.shape[-2:])
    shape = (max(1, round(size[0] * width / size[1])), width)
    canvas = _picture(image, shape)
    if heatmaps is not None:
        _blend(canvas, _contours(heatmaps, shape), PREDICTION, 0.6)
    drawn = map_points(predicted, size, shape)
    drawn_truth = np.full_like(drawn, np.nan) if truth is None else map_points(truth, size, shape)
    for point, target in zip(drawn, drawn_truth, strict=True):
        _draw_marks(canvas, point, target)
    picture = Image.fromarray(np.rint(canvas).astype(np.uint8))
    _draw_numbers(picture, drawn, drawn_truth)
    return _framed(picture, title, names, truth is not None, heatmaps is not None)


def map_points(points: np.ndarray, old_size: Sequence[int], new_size: Sequence[int]) -> np.ndarray:
    """(N, 2) points of an image of `old_size` -> the same places in one of `new_size`: (i + 0.5) * new / old - 0.5."""
    return (np.asarray(points, dtype=np.float64) + 0.5) * np.asarray(new_size) / np.asarray(old_size) - 0.5


def _picture(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(C, H, W) of any range -> float (h, w, 3) in 0..255; the resampling keeps pixel edges on pixel edges."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    channels = values if len(values) == 3 else values.mean(axis=0, keepdims=True)
    low, high = channels.min(), channels.max()
    channels = (channels - low) / (high - low) * 255 if high > low else np.zeros_like(channels)
    resized = [Image.fromarray(c).resize(shape[::-1], Image.Resampling.BICUBIC) for c in channels]
    planes = np.clip(np.stack([np.asarray(plane) for plane in resized], axis=-1), 0, 255)
    return np.repeat(planes, 3, axis=-1) if planes.shape[-1] == 1 else planes


def _contours(heatmaps: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(h, w) coverage in 0..1 of the lines at half of each heatmap's maximum."""
    oversampled = (shape[0] * CONTOUR_OVERSAMPLING, shape[1] * CONTOUR_OVERSAMPLING)
    mask = Image.new("L", oversampled[::-1])
    draw = ImageDraw.Draw(mask)
    for heatmap in np.asarray(heatmaps, dtype=np.float64):
        if not heatmap.max() > 0:
            continue
        padded = np.pad(heatmap, 1)  # a peak at the border still gives a closed line
        for line in contourpy.contour_generator(z=padded).lines(heatmap.max() / 2):
            points = map_points(line[:, ::-1] - 1, heatmap.shape, oversampled)
            draw.line([(x, y) for y, x in points], fill=255, width=CONTOUR_OVERSAMPLING + 1)
    return np.asarray(mask.reduce(CONTOUR_OVERSAMPLING), dtype=np.float64) / 255


def _draw_marks(canvas: np.ndarray, point: np.ndarray, target: np.ndarray) -> None:
    has_point, has_target = np.isfinite(point).all(), np.isfinite(target).all()
    if has_point and has_target:
        _segment(canvas, point, target, (0, 0, 0), 1.8, 0.45)
        _segment(canvas, point, target, INK, 0.7)
    if has_target:
        _ring(canvas, target)
    if has_point:
        for direction in ((1, 1), (1, -1)):
            arm = CROSS_HALF_LENGTH * np.array(direction)
            _segment(canvas, point - arm, point + arm, (0, 0, 0), 2.0, 0.45)
        for direction in ((1, 1), (1, -1)):
            arm = CROSS_HALF_LENGTH * np.array(direction)
            _segment(canvas, point - arm, point + arm, PREDICTION, 0.9)


def _ring(canvas: np.ndarray, centre: np.ndarray) -> None:
    for half_width, colour, opacity in ((2.0, (0, 0, 0), 0.45), (0.9, TRUTH, 1.0)):
        window, y, x = _window(canvas, centre, centre, CIRCLE_RADIUS + 4)
        distance = np.abs(np.hypot(y - centre[0], x - centre[1]) - CIRCLE_RADIUS)
        _blend(canvas[window], np.clip(half_width + 0.5 - distance, 0, 1), colour, opacity)


def _segment(canvas: np.ndarray, start: np.ndarray, end: np.ndarray, colour: tuple[int, int, int], half_width: float,
             opacity: float = 1.0) -> None:
    """An anti-aliased line from `start` to `end`: coverage follows from the distance to it, nothing is rounded."""
    window, y, x = _window(canvas, start, end, half_width + 2)
    along = end - start
    length = max(float(along @ along), 1e-12)
    t = np.clip(((y - start[0]) * along[0] + (x - start[1]) * along[1]) / length, 0, 1)
    distance = np.hypot(y - start[0] - t * along[0], x - start[1] - t * along[1])
    _blend(canvas[window], np.clip(half_width + 0.5 - distance, 0, 1), colour, opacity)


def _window(canvas: np.ndarray, start: np.ndarray, end: np.ndarray, margin: float):
    """The slices of `canvas` around two points and the (y, x) grids of its pixel centres."""
    limits = np.array(canvas.shape[:2])
    low = np.clip(np.floor(np.minimum(start, end) - margin), 0, limits).astype(int)
    high = np.clip(np.ceil(np.maximum(start, end) + margin) + 1, 0, limits).astype(int)
    y, x = np.mgrid[low[0] : high[0], low[1] : high[1]]
    return (slice(low[0], high[0]), slice(low[1], high[1])), y, x


def _blend(region: np.ndarray, coverage: np.ndarray, colour: tuple[int, int, int], opacity: float) -> None:
    """Paint `colour` onto `region` (h, w, 3) in place where `coverage` (h, w) is above 0."""
    alpha = (coverage * opacity)[..., None]
    region += alpha * (np.array(colour, dtype=region.dtype) - region)


def _draw_numbers(picture: Image.Image, drawn: np.ndarray, truth: np.ndarray) -> None:
    """Landmark numbers beside their marks, away from the other end of the error line."""
    draw, font = ImageDraw.Draw(picture), _font(13)
    for number, (point, target) in enumerate(zip(drawn, truth, strict=True), start=1):
        anchor = point if np.isfinite(point).all() else target
        if not np.isfinite(anchor).all():
            continue
        leftwards = np.isfinite(target).all() and target[1] > anchor[1] + 2
        x, y = anchor[1] + (-13 if leftwards else 13), anchor[0] - 13
        x, y = np.clip(x, 14, picture.width - 14), np.clip(y, 8, picture.height - 8)
        draw.text((x, y), str(number), fill=INK, font=font, anchor="rm" if leftwards else "lm", stroke_width=2,
                  stroke_fill=(0, 0, 0))


def _framed(picture: Image.Image, title: str, names: Sequence[str], has_truth: bool, has_maps: bool) -> Image.Image:
    """Title strip above, legend strip below."""
    font = _font(13)
    entries = [f"{number}  {name}" for number, name in enumerate(names, start=1)]
    column = max([font.getlength(entry) for entry in entries], default=1.0) + 20
    columns = max(1, int((picture.width - 2 * MARGIN) // column))
    lines = -(-len(entries) // columns)
    frame = Image.new("RGB", (picture.width, TITLE_HEIGHT + picture.height + 44 + 19 * lines + MARGIN), PAPER)
    frame.paste(picture, (0, TITLE_HEIGHT))
    draw = ImageDraw.Draw(frame)
    draw.text((MARGIN, TITLE_HEIGHT / 2), _fitted(title, _font(17), picture.width - 2 * MARGIN), fill=INK,
              font=_font(17), anchor="lm")
    top = TITLE_HEIGHT + picture.height
    canvas = np.asarray(frame, dtype=np.float64).copy()
    step = min(150, (picture.width - 2 * MARGIN) // 4)
    _legend(canvas, top + 22, step, has_truth, has_maps)
    frame = Image.fromarray(np.rint(canvas).astype(np.uint8))
    draw, x = ImageDraw.Draw(frame), MARGIN
    for text in _legend_texts(has_truth, has_maps):
        draw.text((x + 26, top + 22), text, fill=INK, font=font, anchor="lm")
        x += step
    for index, entry in enumerate(entries):
        position = (MARGIN + column * (index // lines), top + 44 + 19 * (index % lines) + 8)
        draw.text(position, _fitted(entry, font, column - 8), fill=(178, 184, 192), font=font, anchor="lm")
    return frame


def _legend_texts(has_truth: bool, has_maps: bool) -> list[str]:
    return ["prediction", *["truth", "error"] * has_truth, *["half maximum"] * has_maps]


def _legend(canvas: np.ndarray, y: int, step: int, has_truth: bool, has_maps: bool) -> None:
    """The symbols of the legend, one each `step` pixels."""
    nothing, x = np.full(2, np.nan), MARGIN + 10.0
    _draw_marks(canvas, np.array([y, x]), nothing)
    if has_truth:
        _draw_marks(canvas, nothing, np.array([y, x + step]))
        centre = x + 2 * step
        _segment(canvas, np.array([y, centre - 9]), np.array([y, centre + 9]), INK, 0.6)
    if has_maps:
        centre = x + (3 if has_truth else 1) * step
        window, rows, columns = _window(canvas, np.array([y, centre]), np.array([y, centre]), 12)
        distance = np.abs(np.hypot((rows - y) * 1.4, columns - centre) - 9)
        _blend(canvas[window], np.clip(1.2 - distance, 0, 1), PREDICTION, 0.6)


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """`text`, cut with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
