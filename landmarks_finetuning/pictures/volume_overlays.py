"""Pictures of predictions in volumes: three maximum projections, and close-ups of each landmark, worst first.

Points are (z, y, x) with pixel centres at integers, in a volume whose axes run up, back and to the patient's left. A
plane leaves out one axis and keeps the others' order: axial (y, x), coronal (z, x), sagittal (z, y). Where z is a
plane's row it is turned over, so that up is up; nothing else is ever turned. All pictures are in mm, not in voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from landmarks_finetuning.pictures.overlays import (
    FAINT,
    HALF_MAXIMUM,
    INK,
    MARGIN,
    PAPER,
    Doubt,
    as_image,
    dashed_circle,
    draw_contours,
    draw_marks,
    draw_numbers,
    draw_overlay,
    fitted,
    font,
    half_maximum_lines,
    legend_strip,
    map_points,
    shaded,
    stacked,
    title_strip,
)

PLANES = {"axial": 0, "coronal": 1, "sagittal": 2}  # the axis that each leaves out
PATIENT_ENDS = (("I", "S"), ("A", "P"), ("R", "L"))  # where z, y, x start and end
FILE_ENDS = (("−z", "+z"), ("−y", "+y"), ("−x", "+x"))  # of a volume without spacing nothing is known
BORDER = 20  # around a projection, for letters and for marks at its rim
CLOSE_UP_FRACTION = 0.15  # half the width of a close-up, of the volume's largest extent
CARD_WIDTH = 380  # at least, of the close-ups of one landmark
CARD_HEADER = 22
TILE_GAP = 4
OUTSIDE = (38, 41, 48)  # beyond the volume
PERCENTILES = (0.5, 99.9)  # of the voxels: black and white of the close-ups
MOST_VOXELS = 1_000_000  # that the percentiles are taken of


def draw_case(image: np.ndarray, predicted: np.ndarray, truth: np.ndarray | None, names: Sequence[str],
              heatmaps: np.ndarray | None, title: str, spacing: Sequence[float] | None = None,
              errors: np.ndarray | None = None, sides: bool = False, doubt: Doubt | None = None,
              contours: str = HALF_MAXIMUM) -> Image.Image:
    """The picture of one case: `draw_overlay` of an image (C, H, W), `draw_volume_overlay` of a volume (C, D, H, W)."""
    if image.ndim == 3:
        return draw_overlay(image, predicted, truth, names, heatmaps, title, doubt=doubt, contours=contours)
    return draw_volume_overlay(image, predicted, truth, names, heatmaps, title, spacing, errors, sides, doubt=doubt,
                               contours=contours)


def draw_volume_overlay(volume: np.ndarray, predicted: np.ndarray, truth: np.ndarray | None, names: Sequence[str],
                        heatmaps: np.ndarray | None, title: str, spacing: Sequence[float] | None,
                        errors: np.ndarray | None = None, sides: bool = False, width: int = 1200,
                        doubt: Doubt | None = None, contours: str = HALF_MAXIMUM) -> Image.Image:
    """One picture, `width` pixels wide: a title, three maximum projections with all points, close-ups, a legend.

    `volume` (C, D, H, W) of any range has axes up, back and to the patient's left; `predicted` and `truth` (N, 3) are
    (z, y, x) pixels of it, truth NaN where there is none; `heatmaps` (N, d, h, w) of any size cover the same field; the
    legend calls their lines `contours`.
    `spacing` is (z, y, x) mm per voxel, without one voxels are taken as cubes; `sides`: the patient's are known.
    `errors` (N,) are in mm, or pixels without spacing; None: distances of `predicted` from `truth`. Each close-up is
    the slice through the truth, or the prediction where there is none, at the nearest voxel; dashed in it is where the
    sphere of `doubt` about the prediction meets the slice.
    """
    case = _Case.of(volume, predicted, truth, heatmaps, spacing, errors, sides, doubt)
    unit, half = case.unit, case.half_width
    hollow = f"prediction off the slice: {unit} towards {', '.join('/'.join(e[::-1]) for e in case.ends)}"
    note = f"Slices through the {'prediction' if truth is None else 'truth'} at the nearest voxel: " \
           f"{', '.join(PLANES)}, {2 * half:.3g} {unit} wide" + ("" if truth is None else ", the largest error first")
    note += ". Sides as the file's header names them" if sides else ". The axes are the file's"
    legend = legend_strip(width, truth is not None, "" if heatmaps is None else contours,
                          "" if truth is None else hollow, doubt is not None)
    return stacked([title_strip(title, width), _projections(case, width), _note_strip(note, width),
                    _cards(case, names, width), legend])


@dataclass(frozen=True, eq=False)
class _Case:
    """What all pictures of one volume share; `truth` and `errors` are NaN where there is none."""

    volume: np.ndarray
    predicted: np.ndarray
    truth: np.ndarray
    heatmaps: np.ndarray | None
    spacing: np.ndarray
    errors: np.ndarray
    unit: str
    ends: tuple[tuple[str, str], ...]
    window: tuple[float, float]
    doubt: Doubt | None

    @classmethod
    def of(cls, volume: np.ndarray, predicted: np.ndarray, truth: np.ndarray | None, heatmaps: np.ndarray | None,
           spacing: Sequence[float] | None, errors: np.ndarray | None, sides: bool,
           doubt: Doubt | None) -> _Case:
        """The case of `draw_volume_overlay`'s arguments."""
        predicted = np.asarray(predicted, dtype=np.float64)
        truth = np.full_like(predicted, np.nan) if truth is None else np.asarray(truth, dtype=np.float64)
        steps = np.ones(3) if spacing is None else np.asarray(spacing, dtype=np.float64)
        distances = np.linalg.norm((predicted - truth) * steps, axis=1)
        errors = distances if errors is None else np.where(np.isnan(distances), np.nan, errors)
        ends = PATIENT_ENDS if sides else FILE_ENDS
        return cls(volume, predicted, truth, heatmaps, steps, errors, "px" if spacing is None else "mm", ends,
                   _window(volume), doubt)

    @property
    def size(self) -> np.ndarray:
        """(D, H, W)."""
        return np.array(self.volume.shape[1:])

    @property
    def half_width(self) -> float:
        """Half the width of a close-up, in mm or pixels."""
        return CLOSE_UP_FRACTION * float((self.size * self.spacing).max())

    def flat(self, points: np.ndarray, through: int) -> np.ndarray:
        """(.., 3) points -> (.., 2) rows and columns of the plane that leaves out axis `through`."""
        flat = np.delete(points, through, axis=-1)
        if through != 0:
            flat[..., 0] = self.size[0] - 1 - flat[..., 0]
        return flat


def _upright(plane: np.ndarray, through: int) -> np.ndarray:
    """(.., rows, columns) of a volume without axis `through`, turned over where its rows are z."""
    return plane if through == 0 else plane[..., ::-1, :]


def _window(values: np.ndarray) -> tuple[float, float]:
    """The values to show as black and as white: few very bright or dark voxels must not decide."""
    step = max(1, int(np.ceil((values.size / MOST_VOXELS) ** (1 / 3))))
    low, high = np.percentile(values[(slice(None), *[slice(None, None, step)] * 3)], PERCENTILES)
    return (float(low), float(high)) if high > low else (float(values.min()), float(values.max()))


def _projections(case: _Case, width: int) -> Image.Image:
    """Axial, coronal and sagittal maximum projection side by side, in one scale."""
    extents = {name: np.delete(case.size * case.spacing, through) for name, through in PLANES.items()}
    room = width - 2 * MARGIN - 2 * BORDER * len(PLANES)
    scale = min(room / sum(e[1] for e in extents.values()), 0.8 * width / max(e[0] for e in extents.values()))
    shapes = {name: tuple(np.maximum(1, np.floor(extent * scale)).astype(int)) for name, extent in extents.items()}
    strip = Image.new("RGB", (width, max(rows for rows, _ in shapes.values()) + 2 * BORDER), PAPER)
    gap = (width - sum(columns + 2 * BORDER for _, columns in shapes.values())) / (len(PLANES) + 1)
    left = gap
    for name, shape in shapes.items():
        strip.paste(_projection(case, name, shape), (round(left), 0))
        left += shape[1] + 2 * BORDER + gap
    return strip


def _projection(case: _Case, name: str, shape: tuple[int, int]) -> Image.Image:
    """The maximum along one axis, `shape` large, with all marks and a border that names the sides."""
    through = PLANES[name]
    projection = _upright(case.volume.max(axis=1 + through), through)
    canvas = np.zeros((shape[0] + 2 * BORDER, shape[1] + 2 * BORDER, 3)) + PAPER
    canvas[BORDER:-BORDER, BORDER:-BORDER] = shaded(projection, shape)
    drawn, drawn_truth = (map_points(case.flat(points, through), projection.shape[1:], shape) + BORDER
                          for points in (case.predicted, case.truth))
    for point, target in zip(drawn, drawn_truth, strict=True):
        draw_marks(canvas, point, target, scale=0.6)
    panel = as_image(canvas)
    ImageDraw.Draw(panel).text((BORDER, BORDER / 2), name, fill=FAINT, font=font(12), anchor="lm")
    draw_numbers(panel, drawn, drawn_truth, size=11, gap=7, avoid=_letters(panel, case, through))
    return panel


def _letters(panel: Image.Image, case: _Case, through: int) -> list[tuple[float, ...]]:
    """Write the patient's sides in the middle of a projection's four borders; the boxes that they take."""
    (row_start, row_end), columns = np.delete(np.array(case.ends), through, axis=0)
    top, bottom = (row_start, row_end) if through == 0 else (row_end, row_start)
    middle_x, middle_y, rim = panel.width / 2, panel.height / 2, BORDER / 2
    draw = ImageDraw.Draw(panel)
    boxes: list[tuple[float, ...]] = []
    for text, place in ((top, (middle_x, rim)), (bottom, (middle_x, panel.height - rim)),
                        (columns[0], (rim, middle_y)), (columns[1], (panel.width - rim, middle_y))):
        draw.text(place, str(text), fill=INK, font=font(14), anchor="mm")
        boxes.append(draw.textbbox(place, str(text), font=font(14), anchor="mm"))
    return boxes


def _note_strip(text: str, width: int) -> Image.Image:
    strip = Image.new("RGB", (width, 30), PAPER)
    ImageDraw.Draw(strip).text((MARGIN, 15), fitted(text, font(13), width - 2 * MARGIN), fill=FAINT, font=font(13),
                               anchor="lm")
    return strip


def _cards(case: _Case, names: Sequence[str], width: int) -> Image.Image:
    """The landmarks' close-ups, the largest error first, those without truth last, in the order of `names`."""
    order = np.argsort(np.where(np.isnan(case.errors), np.inf, -case.errors), kind="stable")
    columns = max(1, min(len(order), (width - MARGIN) // CARD_WIDTH))
    side = ((width - MARGIN) // columns - MARGIN - 2 * TILE_GAP) // 3
    card_width, card_height = 3 * side + 2 * TILE_GAP, CARD_HEADER + side + TILE_GAP
    grid = Image.new("RGB", (width, -(-len(order) // columns) * card_height), PAPER)
    for place, index in enumerate(order):
        left, top = MARGIN + place % columns * (card_width + MARGIN), place // columns * card_height
        _card_header(grid, case, (left, top), card_width, int(index), names[index])
        for position, through in enumerate(PLANES.values()):
            tile = _close_up(case, int(index), through, side)
            grid.paste(tile, (left + position * (side + TILE_GAP), top + CARD_HEADER))
    return grid


def _card_header(grid: Image.Image, case: _Case, corner: tuple[int, int], width: int, index: int, name: str) -> None:
    error, face = case.errors[index], font(13)
    text = f"error {error:.2f} {case.unit}" if np.isfinite(error) else ""
    if not text and np.isfinite(case.truth).any():
        text = "not annotated"
    note = "" if case.doubt is None else case.doubt.notes[index]
    text = ", ".join(part for part in (text, note) if part)
    middle = corner[1] + CARD_HEADER / 2
    draw = ImageDraw.Draw(grid)
    label = fitted(f"{index + 1}  {name}", face, width - face.getlength(text) - 10)
    draw.text((corner[0], middle), label, fill=INK, font=face, anchor="lm")
    draw.text((corner[0] + width, middle), text, fill=INK if np.isfinite(error) else FAINT, font=face, anchor="rm")


def _close_up(case: _Case, index: int, through: int, side: int) -> Image.Image:
    """One plane's slice through a landmark, `side` pixels square: marks, contour, how far off it the prediction is."""
    predicted, truth = case.predicted[index], case.truth[index]
    centre = truth if np.isfinite(truth).all() else predicted
    here = int(np.clip(np.rint(centre[through]), 0, case.size[through] - 1))
    plane = _upright(case.volume.take(here, axis=1 + through), through)
    extent = 2 * case.half_width / np.delete(case.spacing, through)  # of the window, in voxels
    origin = case.flat(centre, through) + 0.5 - extent / 2  # its corner, in voxel edges

    def place(points: np.ndarray) -> np.ndarray:
        return (points + 0.5 - origin) * side / extent - 0.5

    canvas = _cropped(plane, origin, extent, side, case.window)
    if case.heatmaps is not None:
        heatmap = np.asarray(case.heatmaps[index], dtype=np.float64)
        cut = _upright(_cut(heatmap, here, through, case.size), through)
        draw_contours(canvas, [place(map_points(line, cut.shape, plane.shape[1:]))
                               for line in half_maximum_lines(cut, heatmap.max())])
    off = (predicted - centre)[through]
    if case.doubt is not None:
        reach = case.doubt.reach[index]
        square = 1 - ((here - predicted[through]) / reach[through]) ** 2  # of the radius in the slice, of 1 in all
        radii = np.sqrt(square if square > 0 else np.nan) * np.delete(reach, through)
        draw_contours(canvas, [place(line) for line in dashed_circle(case.flat(predicted, through), radii)])
    hollow = abs(off) > 0.5
    draw_marks(canvas, place(case.flat(predicted, through)), place(case.flat(truth, through)), hollow)
    tile = as_image(canvas)
    if hollow:
        text = f"{abs(off) * case.spacing[through]:.2f} {case.ends[through][int(off > 0)]}"
        ImageDraw.Draw(tile).text((4, side - 4), text, fill=INK, font=font(11), anchor="ls", stroke_width=2,
                                  stroke_fill=(0, 0, 0))
    return tile


def _cropped(plane: np.ndarray, origin: np.ndarray, extent: np.ndarray, side: int,
             window: tuple[float, float]) -> np.ndarray:
    """The part of `plane` (C, h, w) from `origin` on, `extent` large, both in voxel edges, as (side, side, 3)."""
    size = np.array(plane.shape[1:])
    first = np.floor(origin).astype(int) - 4  # a rim for the interpolation; beyond the volume the last voxel goes on
    last = np.ceil(origin + extent).astype(int) + 4
    rows, columns = (np.clip(np.arange(a, b), 0, n - 1) for a, b, n in zip(first, last, size, strict=True))
    top, left = origin - first
    box = (left, top, left + extent[1], top + extent[0])
    canvas = shaded(plane[:, rows][:, :, columns], (side, side), window, box)
    y, x = ((np.arange(side) + 0.5) * extent[axis] / side + origin[axis] for axis in (0, 1))  # in voxel edges
    canvas[(y < 0) | (y > size[0])] = OUTSIDE
    canvas[:, (x < 0) | (x > size[1])] = OUTSIDE
    return canvas


def _cut(heatmap: np.ndarray, index: int, axis: int, size: np.ndarray) -> np.ndarray:
    """`heatmap` (d, h, w) at plane `index` of a volume of `size` that it covers, between its own planes linearly."""
    length = heatmap.shape[axis]
    position = float(np.clip((index + 0.5) * length / size[axis] - 0.5, 0, length - 1))
    low = int(position)
    high, weight = min(low + 1, length - 1), position - low
    return (1 - weight) * heatmap.take(low, axis) + weight * heatmap.take(high, axis)
