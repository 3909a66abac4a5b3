"""Pictures of predictions: image, prediction, truth, error lines and heatmap contours, half-pixel exact.

Points are (y, x) with pixel centres at integers; a point is drawn at (i + 0.5) * new / old - 0.5 of the picture,
so a pixel's centre stays that pixel's centre whatever the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import contourpy
import matplotlib
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

PREDICTION = (255, 176, 0)
TRUTH = (90, 190, 255)
PAPER = (20, 22, 26)
INK = (240, 240, 240)  # neutral: the marks are the only colours in a grey picture
FAINT = (178, 184, 192)
TITLE_HEIGHT = 40
TALLEST = 4  # times its width: of a strip of 1 x 5000 pixels the picture is squeezed
MARGIN = 12
CROSS_HALF_LENGTH = 5.0
CIRCLE_RADIUS = 8.0
CONTOUR_OVERSAMPLING = 3
CIRCLE = "90 % circle"
HALF_MAXIMUM = "half maximum"
OF_FIRST_STAGE = "half maximum, first stage"
DASHES = 24  # of a 90 % circle


class Doubt(NamedTuple):
    """How far off predictions may be: half axes (N, D) of the 90 % circle in pixels of the image, NaN where there is
    none, and what is said of each landmark: "expected error 1.3 mm", or nothing.
    """

    reach: np.ndarray
    notes: Sequence[str]


def draw_overlay(image: np.ndarray, predicted: np.ndarray, truth: np.ndarray | None, names: Sequence[str],
                 heatmaps: np.ndarray | None, title: str, width: int = 900, doubt: Doubt | None = None,
                 contours: str = HALF_MAXIMUM) -> Image.Image:
    """One picture, `width` pixels wide: a title strip of TITLE_HEIGHT, the image, a legend with the landmarks' names.

    `image` (C, H, W) of any range is shown min-max; `predicted` and `truth` (N, 2) are (y, x) pixels of it, NaN where
    there is none; `heatmaps` (N, h, w) get a contour at half of each one's maximum, which the legend calls `contours`;
    `doubt` is shown as thin dashed circles and beside the names.
    """
    size = np.array(image.shape[-2:])
    shape = (min(max(1, round(size[0] * width / size[1])), TALLEST * width), width)
    canvas = shaded(image, shape)
    if heatmaps is not None:
        draw_contours(canvas, [map_points(line, heatmap.shape, shape) for heatmap in heatmaps
                               for line in half_maximum_lines(heatmap, heatmap.max())])
    if doubt is not None:
        circles = (dashed_circle(*pair) for pair in zip(predicted, doubt.reach, strict=True))
        draw_contours(canvas, [map_points(dash, size, shape) for circle in circles for dash in circle])
    drawn = map_points(predicted, size, shape)
    drawn_truth = np.full_like(drawn, np.nan) if truth is None else map_points(truth, size, shape)
    for point, target in zip(drawn, drawn_truth, strict=True):
        draw_marks(canvas, point, target)
    picture = as_image(canvas)
    draw_numbers(picture, drawn, drawn_truth)
    legend = legend_strip(width, truth is not None, "" if heatmaps is None else contours, circles=doubt is not None)
    if doubt is not None:
        names = [f"{name}  {note}" for name, note in zip(names, doubt.notes, strict=True)]
    return stacked([title_strip(title, width), picture, legend, names_strip(names, width)])


def map_points(points: np.ndarray, old_size: ArrayLike, new_size: ArrayLike) -> np.ndarray:
    """(N, 2) points of an image of `old_size` -> the same places in one of `new_size`: (i + 0.5) * new / old - 0.5."""
    return (np.asarray(points, dtype=np.float64) + 0.5) * np.asarray(new_size) / np.asarray(old_size) - 0.5


def shaded(image: np.ndarray, shape: tuple[int, int], window: tuple[float, float] | None = None,
           box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    """(C, H, W) -> float (h, w, 3) in 0..255; the resampling keeps pixel edges on pixel edges.

    `window` are the values that become black and white, without it the smallest and the largest. `box` (left, top,
    right, bottom) is the part to show in pixel edges: 0 is the first pixel's outer edge, not its centre.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    channels = values if len(values) == 3 else values.mean(axis=0, keepdims=True)
    low, high = (channels.min(), channels.max()) if window is None else window
    channels = (channels - low) / (high - low) * 255 if high > low else np.zeros_like(channels)
    channels = np.clip(channels, 0, 255).astype(np.float32)
    resized = [Image.fromarray(c).resize(shape[::-1], Image.Resampling.BICUBIC, box) for c in channels]
    planes = np.clip(np.stack([np.asarray(plane) for plane in resized], axis=-1), 0, 255)
    return np.repeat(planes, 3, axis=-1) if planes.shape[-1] == 1 else planes


def as_image(canvas: np.ndarray) -> Image.Image:
    """Float (h, w, 3) in 0..255 -> a picture."""
    return Image.fromarray(np.rint(canvas).astype(np.uint8))


def half_maximum_lines(heatmap: np.ndarray, maximum: float) -> list[np.ndarray]:
    """Closed lines (K, 2), (y, x) pixels of `heatmap` (h, w), at half of `maximum`; none if that is not above 0."""
    if not maximum > 0:
        return []
    padded = np.pad(np.asarray(heatmap, dtype=np.float64), 1)  # a peak at the border still gives a closed line
    return [np.asarray(line)[:, ::-1] - 1 for line in contourpy.contour_generator(z=padded).lines(maximum / 2)]


def dashed_circle(centre: np.ndarray, reach: np.ndarray) -> list[np.ndarray]:
    """Dashes (K, 2), (y, x) pixels, of the ellipse with half axes `reach` (2,) about `centre`; none where it is NaN."""
    if not (np.isfinite(centre).all() and np.isfinite(reach).all()):
        return []
    angles = np.arange(DASHES)[:, None] * 2 * np.pi / DASHES + np.linspace(0, np.pi / DASHES, 5)
    return list(centre + reach * np.stack([np.sin(angles), np.cos(angles)], axis=-1))


def draw_contours(canvas: np.ndarray, lines: Sequence[np.ndarray]) -> None:
    """Paint lines (K, 2) in (y, x) pixels of `canvas` (h, w, 3) in place, thinly, in the prediction's colour."""
    shape = canvas.shape[:2]
    oversampled = (shape[0] * CONTOUR_OVERSAMPLING, shape[1] * CONTOUR_OVERSAMPLING)
    mask = Image.new("L", oversampled[::-1])
    draw = ImageDraw.Draw(mask)
    for line in lines:
        draw.line([(x, y) for y, x in map_points(line, shape, oversampled)], fill=255, width=CONTOUR_OVERSAMPLING + 1)
    coverage = np.asarray(mask.reduce(CONTOUR_OVERSAMPLING), dtype=np.float64) / 255
    _blend(canvas, coverage, PREDICTION, 0.6)


def draw_marks(canvas: np.ndarray, point: np.ndarray, target: np.ndarray, hollow: bool = False,
               scale: float = 1.0) -> None:
    """Paint a prediction's cross, a truth's ring and the line between them in place; a NaN point has no mark.

    `point` and `target` are (y, x) pixels of `canvas` (h, w, 3). A `hollow` cross has no middle.
    """
    has_point, has_target = np.isfinite(point).all(), np.isfinite(target).all()
    if has_point and has_target:
        _segment(canvas, point, target, (0, 0, 0), 1.8, 0.45)
        _segment(canvas, point, target, INK, 0.7)
    if has_target:
        _ring(canvas, target, CIRCLE_RADIUS * scale)
    if has_point:
        for colour, half_width, opacity in (((0, 0, 0), 2.0, 0.45), (PREDICTION, 0.9, 1.0)):
            for direction in ((1, 1), (1, -1)):
                arm = CROSS_HALF_LENGTH * scale * np.array(direction)
                for start in (0.45 * arm, -0.45 * arm) if hollow else (-arm,):
                    end = arm * np.sign(start @ arm) if hollow else arm
                    _segment(canvas, point + start, point + end, colour, half_width, opacity)


def _ring(canvas: np.ndarray, centre: np.ndarray, radius: float) -> None:
    for half_width, colour, opacity in ((2.0, (0, 0, 0), 0.45), (0.9, TRUTH, 1.0)):
        window, y, x = _window(canvas, centre, centre, radius + 4)
        distance = np.abs(np.hypot(y - centre[0], x - centre[1]) - radius)
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


def _window(canvas: np.ndarray, start: np.ndarray, end: np.ndarray,
            margin: float) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
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


def draw_numbers(picture: Image.Image, drawn: np.ndarray, truth: np.ndarray, size: int = 13, gap: float = 13,
                 avoid: Sequence[tuple[float, ...]] = ()) -> None:
    """Landmark numbers beside their marks (N, 2), away from the other end of the error line where there is room.

    Of the eight places around a mark, `gap` pixels off, each number takes the one that hides least of the marks, the
    numbers before it and the boxes to `avoid`, (left, top, right, bottom).
    """
    draw, face = ImageDraw.Draw(picture), font(size)
    marks = [p for p in (*drawn, *truth) if np.isfinite(p).all()]
    around = [(p[1] - gap / 3, p[0] - gap / 3, p[1] + gap / 3, p[0] + gap / 3) for p in marks]
    taken = np.array([*avoid, *around]).reshape(-1, 4)
    for number, (point, target) in enumerate(zip(drawn, truth, strict=True), start=1):
        anchor = point if np.isfinite(point).all() else target
        if not np.isfinite(anchor).all():
            continue
        half = np.array([face.getlength(str(number)) / 2, size * 0.4])
        side = -1 if np.isfinite(target).all() and target[1] > anchor[1] + 2 else 1
        places = [(side, -1), (side, 1), (side, 0), (0, -1), (0, 1), (-side, -1), (-side, 1), (-side, 0)]
        low, high = np.minimum(half + 2, np.array(picture.size) / 2), np.array(picture.size) - half - 2
        steps = np.array(places) * (gap + half[0], gap)
        centres = np.clip(anchor[::-1] + steps, low, np.maximum(low, high))
        boxes = np.hstack([centres - half, centres + half])
        best = int(np.argmin(_overlaps(taken, boxes).sum(axis=0)))
        taken = np.vstack([taken, boxes[best]])
        draw.text(tuple(centres[best]), str(number), fill=INK, font=face, anchor="mm", stroke_width=2,
                  stroke_fill=(0, 0, 0))


def _overlaps(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The areas (M, N) that boxes (M, 4) and (N, 4), each (left, top, right, bottom), share."""
    low, high = (reach(some[:, None, part], others[:, part]) for reach, part in (
        (np.maximum, slice(0, 2)), (np.minimum, slice(2, 4))))
    return np.clip(high - low, 0, None).prod(axis=2)


def stacked(strips: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other on the page's ground."""
    page = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), PAPER)
    top = 0
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height
    return page


def title_strip(title: str, width: int) -> Image.Image:
    """The title in one line, cut where it is too long."""
    strip = Image.new("RGB", (width, TITLE_HEIGHT), PAPER)
    text = fitted(title, font(17), width - 2 * MARGIN)
    ImageDraw.Draw(strip).text((MARGIN, TITLE_HEIGHT / 2), text, fill=INK, font=font(17), anchor="lm")
    return strip


def legend_strip(width: int, has_truth: bool, contours: str, hollow: str = "", circles: bool = False) -> Image.Image:
    """The symbols of the pictures and their meaning; `contours` and `hollow`, of a hollow cross, empty without any."""
    face, texts = font(13), ["prediction", *[hollow] * bool(hollow), *["truth", "error"] * has_truth,
                             *[contours] * bool(contours), *[CIRCLE] * circles]
    places: list[tuple[float, int]] = []
    x: float = MARGIN
    y = 22
    for text in texts:
        end = x + 26 + face.getlength(text)
        if places and end > width - MARGIN:
            x, y, end = MARGIN, y + 22, MARGIN + 26 + face.getlength(text)
        places.append((x, y))
        x = end + 24
    canvas = np.zeros((y + 22, width, 3)) + PAPER
    for text, (left, middle) in zip(texts, places, strict=True):
        _draw_symbol(canvas, text if text != hollow else "hollow", np.array([middle, left + 10.0]))
    strip = as_image(canvas)
    draw = ImageDraw.Draw(strip)
    for text, (left, middle) in zip(texts, places, strict=True):
        draw.text((left + 26, middle), text, fill=INK, font=face, anchor="lm")
    return strip


def _draw_symbol(canvas: np.ndarray, kind: str, centre: np.ndarray) -> None:
    """The legend's picture of one kind of mark."""
    nothing = np.full(2, np.nan)
    if kind in ("prediction", "hollow"):
        draw_marks(canvas, centre, nothing, hollow=kind == "hollow")
    elif kind == "truth":
        draw_marks(canvas, nothing, centre)
    elif kind == "error":
        _segment(canvas, centre - (0, 9), centre + (0, 9), INK, 0.6)
    elif kind == CIRCLE:
        draw_contours(canvas, dashed_circle(centre, np.full(2, 9.0)))
    else:
        window, y, x = _window(canvas, centre, centre, 12)
        distance = np.abs(np.hypot((y - centre[0]) * 1.4, x - centre[1]) - 9)
        _blend(canvas[window], np.clip(1.2 - distance, 0, 1), PREDICTION, 0.6)


def names_strip(names: Sequence[str], width: int) -> Image.Image:
    """The landmarks' numbers and names in columns."""
    face = font(13)
    entries = [f"{number}  {name}" for number, name in enumerate(names, start=1)]
    column = max([face.getlength(entry) for entry in entries], default=1.0) + 20
    columns = max(1, int((width - 2 * MARGIN) // column))
    lines = -(-len(entries) // columns)
    strip = Image.new("RGB", (width, 19 * lines + MARGIN), PAPER)
    draw = ImageDraw.Draw(strip)
    for index, entry in enumerate(entries):
        position = (MARGIN + column * (index // lines), 19 * (index % lines) + 8)
        draw.text(position, fitted(entry, face, column - 8), fill=FAINT, font=face, anchor="lm")
    return strip


def fitted(text: str, face: ImageFont.FreeTypeFont, width: float) -> str:
    """`text`, cut with an ellipsis where it is wider than `width` pixels."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The pictures' one typeface, `size` pixels high."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
