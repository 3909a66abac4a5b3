"""Synthetic lateral skull radiographs whose 19 landmarks are known exactly, in the layout of the ISBI 2015 data.

Anatomy is drawn in head coordinates: millimetres, x anterior, y down, origin at sella, image height 240 mm. The
landmarks are sampled first and every contour is then a spline through them, so a label is a vertex, tip or centre of
something that is drawn. Attenuation of all parts adds up (Beer-Lambert) before it is turned into grey values.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw
from scipy.interpolate import CubicHermiteSpline
from scipy.ndimage import gaussian_filter

from core.errors import UserError
from core.files import atomic_folder, clear_once, parse_json

LANDMARK_NAMES: tuple[str, ...] = (
    "sella", "nasion", "orbitale", "porion", "subspinale", "supramentale", "pogonion", "menton", "gnathion", "gonion",
    "lower incisor", "upper incisor", "upper lip", "lower lip", "subnasale", "soft-tissue pogonion",
    "posterior nasal spine", "anterior nasal spine", "articulare")

_KEYS = ("S", "N", "Or", "Po", "A", "B", "Pog", "Me", "Gn", "Go", "L1", "U1", "UL", "LL", "Sn", "Pog'", "PNS", "ANS",
         "Ar")
_VERSION = 1
_MIN_SIZE = 48
_HEIGHT_MM, _WIDTH_MM = 240.0, 193.5
_MARGIN = 0.05  # landmarks keep this fraction of the image away from its edges
Marks = dict[str, np.ndarray]


class Shape(NamedTuple):
    """One part of the drawing: `points` (N, 2) as x, y in mm; a stroke of `width` mm, or a filled polygon if 0."""
    name: str
    points: np.ndarray
    density: float  # attenuation it adds where it covers a pixel; negative carves a cavity
    blur: float = 0.3  # sigma of its edge, mm
    width: float = 0.0


class Pose(NamedTuple):
    """Head mm to image pixels: `points @ matrix.T + offset`, x, y order, pixel centres at integers."""
    matrix: np.ndarray
    offset: np.ndarray

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        """(N, 2) head mm -> (N, 2) image pixels."""
        return points @ self.matrix.T + self.offset


def _vary(rng: np.random.Generator, *deviations: float) -> np.ndarray:
    """Normal variation with the given standard deviations, cut at two of them."""
    return np.clip(rng.standard_normal(len(deviations)), -2, 2) * deviations


def _ray(length: float, degrees: float) -> np.ndarray:
    return length * np.array([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))])


def _curve(points: Sequence[ArrayLike] | np.ndarray, corners: Sequence[int] = (), closed: bool = True,
           step: int = 6) -> np.ndarray:
    """Smooth curve through `points`; the tangent at a point is parallel to its neighbours' chord, 0 at `corners`."""
    knots = np.array(points, dtype=np.float64)
    if closed:
        knots = np.concatenate([knots[-2:], knots, knots[:2]])
    time = np.concatenate([[0.0], np.cumsum(np.sqrt(np.hypot(*np.diff(knots, axis=0).T)) + 1e-6)])
    slope = np.gradient(knots, axis=0) / np.gradient(time)[:, None]
    first, last = (2, len(knots) - 2) if closed else (0, len(knots) - 1)
    slope[[corner + first for corner in corners]] = 0
    sample = (time[first:last, None] + np.arange(step) / step * np.diff(time)[first:last, None]).ravel()
    return CubicHermiteSpline(time, knots, slope)(sample if closed else np.append(sample, time[-1]))


def _ellipse(centre: np.ndarray, radius_x: float, radius_y: float, count: int = 36) -> np.ndarray:
    angle = np.arange(count) * (2 * np.pi / count)
    return np.asarray(centre) + np.stack([radius_x * np.cos(angle), radius_y * np.sin(angle)], axis=1)


def _tooth(tip: np.ndarray, lean: float, length: float, width: float) -> np.ndarray:
    """An incisor whose cutting tip is exactly `tip`; `length` < 0 roots it upwards, it goes `lean` back per mm."""
    axis = np.array([-lean, np.sign(length)]) / np.hypot(lean, 1.0) * abs(length)
    along = np.array([0, 0.2, 0.38, 0.7, 1, 1, 0.7, 0.38, 0.2])
    across = np.array([0, 0.42, 0.5, 0.4, 0.12, -0.12, -0.4, -0.5, -0.42]) * width / abs(length)
    return tip + np.outer(along, axis) + np.outer(across, (-axis[1], axis[0]))


def _sample_anatomy(rng: np.random.Generator) -> Marks:
    """Landmarks and helper points of one head, each (2,) as x, y in mm; keys of landmarks are `_KEYS`."""
    m: Marks = {"S": np.zeros(2), "N": _ray(*(63, -7) + _vary(rng, 3, 3.5))}
    m["Or"], m["Po"] = (49.0, 18.0) + _vary(rng, 2.2, 2.0), (-20.0, 17.0) + _vary(rng, 2.5, 2.5)
    upper = _vary(rng, 3.0, 2.8)  # of the whole upper jaw
    m["ANS"] = np.array([69.0, 41.0]) + upper + _vary(rng, 1.2, 1.2)
    m["PNS"] = np.array([24.0, 38.0]) + 0.6 * upper + _vary(rng, 1.5, 1.5)
    m["A"] = m["ANS"] + (-4.8, 8.5) + _vary(rng, 0.6, 1.1)
    m["Ar"] = np.array([-13.0, 37.0]) + _vary(rng, 2.2, 2.0)
    m["Go"] = m["Ar"] + _ray(*(40, 78) + _vary(rng, 4, 4.5))
    m["Me"] = m["Go"] + _ray(*(66, 29) + _vary(rng, 5.5, 5))  # a short body gives class II, a long one class III
    chin = np.array([6.5, 7.5]) + _vary(rng, 0.8, 0.9)
    m["chin"] = m["Me"] - (0, chin[1])
    m["Pog"], m["Gn"] = m["chin"] + (chin[0], 0), m["chin"] + chin * np.sqrt(0.5)
    bite_y = max(0.5 * (m["A"][1] + 18) + 0.5 * (m["Me"][1] - 42), m["A"][1] + 16)
    m["U1"] = np.array([m["A"][0] + 6 + 0.25 * (m["Pog"][0] - 57), bite_y]) + _vary(rng, 1.8, 1.6)
    m["L1"] = m["U1"] + (-3.5, -2.0) + (0.15 * np.clip(m["Pog"][0] - 57, -12, 12), 0) + _vary(rng, 1.2, 1.2)
    m["alveole"] = m["L1"] + (-3.5, 10.0)
    level, bay = (0.48, 3.2) + _vary(rng, 0.05, 0.9)
    m["B"] = (1 - level) * m["alveole"] + level * m["Pog"] - (bay, 0)
    m["Sn"] = m["A"] + (13.0, -5.0) + _vary(rng, 1.6, 1.5)
    m["tip"] = m["Sn"] + (15.0, -11.0) + _vary(rng, 2.5, 2.5)
    m["UL"] = m["U1"] + (11.5, -11.0) + _vary(rng, 1.6, 1.6)
    m["UL"][1] = max(m["UL"][1], m["Sn"][1] + 8)
    m["LL"] = m["L1"] + (11.5, 12.0) + _vary(rng, 1.6, 1.6)
    m["Pog'"] = m["Pog"] + (11.0, 1.0) + _vary(rng, 1.8, 2.0)
    m["LL"][1] = min(max(m["LL"][1], m["UL"][1] + 15), m["Pog'"][1] - 16)
    return m


def _vault(m: Marks, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scalp, outer and inner table of the skull cap, each (N, 2) in mm, from the forehead back to the occiput."""
    centre, angle = (-12, -30) + _vary(rng, 3, 3), np.deg2rad(np.linspace(8, 222, 24))
    wave = sum(_vary(rng, 0.018)[0] * np.cos(k * angle + rng.uniform(0, 6.28)) for k in (2, 3, 4))
    radius = np.stack([np.cos(angle), -np.sin(angle)], 1) * (80 + _vary(rng, 4)[0], 66 + _vary(rng, 4)[0])
    outer = centre + radius * (1 + wave)[:, None]
    outer += np.exp(-((angle - angle[0]) / 0.7) ** 2)[:, None] * (m["N"] + (3, -11) - outer[0])  # meets the nasion
    away = (outer - centre) / np.hypot(*(outer - centre).T)[:, None]
    thick = 5.5 + 1.6 * np.sin(2 * angle + rng.uniform(0, 6.28)) + rng.uniform(-1, 1)
    return outer + 6.5 * away, outer, outer - thick[:, None] * away


def _cranial_shapes(m: Marks, outer: np.ndarray, inner: np.ndarray, rng: np.random.Generator) -> list[Shape]:
    nasion, ar, po, orb = m["N"], m["Ar"], m["Po"], m["Or"]
    basion, mastoid = ar + (-14, 6), po + (-16, 20)
    skull = _curve([nasion, *outer, mastoid + (-12, -4), mastoid, basion, (2, 20), (30, 6), nasion + (-9, 1)], [0])
    floor = [(-62, 22), (-32, 22), (-16, 6), (-9, -6), (9, -6), (32, -9 + rng.uniform(-3, 1)), nasion + (-12, -7)]
    cavity = _curve([*inner, *np.array(floor)])
    wedge = np.array([nasion + (-10, -5), (32, -6), (9, -6), (6, -3), (-6, -3), (-7, -9), (-10, -8), (-15, 8),
                      basion + (-3, -8), basion, ar, (8, 22), (22, 17), (34, 2), nasion + (-10, 0)])
    pit = _ellipse(m["S"], *(6, 5) + _vary(rng, 0.7, 0.6))
    rhinion = 0.5 * (m["tip"] + nasion) + (-3, -2)
    nasal = np.array([nasion, rhinion, rhinion + (-2, 1.5), nasion + (-5, 7), nasion + (-5, 1)])
    rx, ry, rod = rng.uniform((9.5, 12, 3.2), (12.5, 16, 4.4))
    rim = _ellipse(orb - (0, ry), rx, ry)
    return [
        Shape("skull", skull, 0.8), Shape("cavity", cavity, -0.42, 0.5),
        Shape("petrous", _ellipse(po + (3, 3), 15, 10), 0.25, 3.0), Shape("cranial base", wedge, 0.42, 0.4),
        Shape("sella pit", pit, -0.6), Shape("sella rim", pit[np.arange(-2, 21) % 36], 0.4, 0.3, 1.2),
        Shape("nasal bone", nasal, 0.6), Shape("orbit", rim, -0.22, 0.8),
        Shape("orbit rim", rim[np.arange(-3, 22) % 36], 0.55, 0.3, 1.6), Shape("ear rod", _ellipse(po, rod, rod), 1.3),
        Shape("ear rod hole", _ellipse(po, 0.55 * rod, 0.55 * rod), -1.9),
    ]


def _facial_shapes(m: Marks, rng: np.random.Generator) -> list[Shape]:
    ans, pns, a, u1, l1 = m["ANS"], m["PNS"], m["A"], m["U1"], m["L1"]
    crest, orb, rise = u1 + (-2.5, -8.5), m["Or"], rng.uniform(1, 5)
    front = np.array([min(u1[0], l1[0]) - 11, 0.5 * (u1[1] + l1[1])])
    lean = np.clip((l1[0] - m["B"][0] + 2) / (m["B"][1] - l1[1]), 0.15, 0.7)
    maxilla = _curve([ans, a, crest, u1 + (-10, -10), (pns[0] + 12, front[1] - rise - 7), pns + (3, 8), pns,
                      pns + (0, -14), orb + (-10, 2), orb + (7, 2), ans + (-9, -14)], [0, 2, 6])
    middle, half = 0.5 * (ans + pns), rng.uniform(1.4, 2.2)
    palate = np.array([pns - (0, 0.5), pns + (5, -0.8 * half), middle - (0, half), ans + (-9, -half), ans - (0, 0.5),
                       ans + (0, 0.5), ans + (-7, half), middle + (0, half), pns + (5, 0.8 * half), pns + (0, 0.5)])
    shapes = [
        Shape("maxilla", maxilla, 0.34), Shape("sinus", _ellipse(middle + (-1, -10), 16, 8), -0.2, 1.5),
        Shape("palate", palate, 0.75, 0.2),
        Shape("subspinale edge", _curve([ans, a, crest], closed=False), 0.35, 0.3, 1.2),
        Shape("upper incisor", _tooth(u1, rng.uniform(0.2, 0.5), -24, 7.5), 0.8, 0.2),
        Shape("lower incisor", _tooth(l1, lean, 22, 6.0), 0.8, 0.2),
    ]
    crown = np.array([(-3.3, -0.6), (3.3, -0.6), (3.5, -6), (2.0, -16), (0, -9), (-2.0, -16), (-3.5, -6)])
    for place in [front + (-7.3 * k, -rise * (0.25 + 0.24 * k)) for k in range(5)]:
        shapes += [Shape("upper molar", crown + place, 0.5), Shape("lower molar", crown * (1, -1) + place, 0.5)]
    return shapes


def _mandible_shapes(m: Marks) -> list[Shape]:
    ar, go, me, l1 = m["Ar"], m["Go"], m["Me"], m["L1"]
    up, lower = (ar - go) / np.hypot(*(ar - go)), (go - me) / np.hypot(*(go - me))
    fore = np.array([-up[1], up[0]])
    wide, deep = m["Pog"] - m["chin"], me - m["chin"]
    arc = [m["chin"] + wide * np.cos(t) + deep * np.sin(t) for t in np.pi / 8 * np.arange(-1, 6)]
    corner = [go - 9 * lower + 1.2 * up, go, go + 9 * up + 0.8 * fore]
    border = [m["alveole"], m["B"], *arc, me + 22 * lower - (0, 1.5), *corner, ar]
    head = [ar + 9 * up + 1.5 * fore, ar + 16 * up + 5 * fore, ar + 16 * up + 11 * fore, ar + 8 * up + 14 * fore,
            ar + 3 * up + 20 * fore, ar + 11 * up + 29 * fore, ar + 8 * up + 32 * fore, ar - 10 * up + 33 * fore]
    crest = [np.array([l1[0] - 38, l1[1] + 9]), l1 + (-10, 9.5)]
    return [
        Shape("mandible", _curve([*border, *head, *crest], [0]), 0.5),
        Shape("mandible edge", _curve([*border, *head[:4]], closed=False), 0.4, 0.3, 1.3),
        Shape("symphysis", _ellipse(m["chin"] - (1, 4), 4, 8), 0.18, 1.5),
    ]


def _soft_shapes(m: Marks, scalp: np.ndarray, rng: np.random.Generator) -> list[Shape]:
    nasion, sn, ul, ll, pog, tip = m["N"], m["Sn"], m["UL"], m["LL"], m["Pog'"], m["tip"]
    seam, fold = np.minimum((ul, ll), (ll, pog))[:, 0] - (5, rng.uniform(2.5, 4.5))
    throat = 0.55 * m["Go"] + 0.45 * m["Me"] + (8, 16)
    front: list[ArrayLike] = [
        nasion + (8.5, -9), nasion + (6, 3), 0.5 * (nasion + tip) + (1.5, -1), tip + (-1.5, -4), tip,
        tip + (-3, 4.5), sn + (4, -1), sn, sn + 0.5 * (ul - sn) - (1.5, 0), ul - (1, 3), ul, ul - (1, -3),
        (seam, 0.5 * (ul[1] + ll[1])), ll - (1, 3), ll, ll - (1, -3), (fold, 0.5 * (ll[1] + pog[1])),
        pog - (0.8, 4), pog, pog - (0.8, -4), m["Me"] + (3, 9), m["Me"] + (-8, 10.5), throat,
        throat + (-8, 28), throat + (-10, 110)]
    nape = np.array([(0, 230), (0, 130), (-2, 75)]) + (rng.uniform(-72, -60), 0)
    head = _curve([*front, *nape, *scalp[::-1]], [7, 12])
    airway = _curve([m["PNS"] + (-3, 2), m["PNS"] + (-7, 30), m["Go"] + (14, 12), m["Go"] + (10, 60), m["Go"] + (4, 60),
                     m["Go"] + (5, 10), m["PNS"] + (-14, 26), m["PNS"] + (-12, 2)])
    shapes = [Shape("soft tissue", head, 0.42), Shape("airway", airway, -0.2, 1.0)]
    top, bend = m["Ar"] + (-20, 18), rng.uniform(-0.15, 0.25)
    for k in range(6):
        box = np.array([(-8, 0.5), (7.5, -0.5), (8, 12.5), (-7.5, 13)]) * (1 + 0.03 * k)
        spine = np.array([(-12, 3), (-32, 9), (-33, 14), (-12, 11)]) * (0.8 + 0.04 * k, 1)
        place = top + (bend * 17 * k - 0.012 * (17 * k) ** 2 * bend, 18.5 * k)
        shapes += [Shape("vertebra", _curve(box + place, step=8), 0.6, 0.6), Shape("spine", spine + place, 0.3, 1.0)]
    return shapes


def _build_head(rng: np.random.Generator) -> tuple[np.ndarray, list[Shape]]:
    """One head: landmarks (19, 2) as x, y in mm, and the shapes that show them."""
    marks = _sample_anatomy(rng)
    scalp, outer, inner = _vault(marks, rng)
    skull = _cranial_shapes(marks, outer, inner, rng) + _facial_shapes(marks, rng) + _mandible_shapes(marks)
    return np.stack([marks[key] for key in _KEYS]), _soft_shapes(marks, scalp, rng) + skull


def _sample_pose(marks: np.ndarray, size: tuple[int, ...], rng: np.random.Generator) -> Pose:
    """Rotation +-10 degrees, scale +-12 %, shift up to 8 % of the image; all `marks` stay inside with a margin."""
    extent = np.array(size[::-1], dtype=np.float64)
    scale = (extent / (_WIDTH_MM, _HEIGHT_MM)).min() * rng.uniform(0.88, 1.12)
    turn = np.deg2rad(rng.uniform(-10, 10))
    matrix = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    offset = extent * ((0.64, 0.62) + _vary(rng, 0.036, 0.036)) - matrix @ (45.0, 58.0)
    placed = marks @ matrix.T + offset
    offset += np.maximum(_MARGIN * extent - placed.min(axis=0), 0)
    offset -= np.maximum(placed.max(axis=0) - (1 - _MARGIN) * extent, 0)
    return Pose(matrix, offset)


def _attenuation(shapes: Sequence[Shape], pose: Pose, size: tuple[int, ...]) -> np.ndarray:
    """Summed attenuation (H, W) of the shapes, each drawn supersampled in its bounding box; no imaging effects."""
    canvas = np.zeros(size, dtype=np.float32)
    unit = np.sqrt(abs(np.linalg.det(pose.matrix)))
    for shape in shapes:
        points = pose.to_pixels(shape.points)
        pad = unit * (3 * shape.blur + shape.width) + 2
        low = np.maximum(np.floor(points.min(axis=0) - pad), 0).astype(int)
        high = np.minimum(np.ceil(points.max(axis=0) + pad) + 1, size[::-1]).astype(int)
        if np.any(high <= low):
            continue
        zoom = 4 if np.prod(high - low) < 10_000 else 2
        tile = Image.new("L", tuple(((high - low) * zoom).tolist()))
        vertices = np.rint((points - low + 0.5) * zoom - 0.5).ravel().tolist()  # the drawing would truncate fractions
        if shape.width:
            ImageDraw.Draw(tile).line(vertices, fill=255, width=max(1, round(shape.width * unit * zoom)), joint="curve")
        else:
            ImageDraw.Draw(tile).polygon(vertices, fill=255)
        cover = gaussian_filter(np.asarray(tile.reduce(zoom), dtype=np.float32), shape.blur * unit, truncate=3)
        canvas[low[1] : high[1], low[0] : high[0]] += np.float32(shape.density / 255) * cover
    return canvas


def _add_marker(canvas: np.ndarray, rng: np.random.Generator) -> None:
    """Sometimes a ruler along the front edge, sometimes a lead letter in the upper front corner."""
    height, width = canvas.shape
    letter, ruler, down, back = rng.uniform((0, 0, 0.05, 0), (1, 1, 0.11, 0.06))
    y, x, n = int(height * down), int(width * (0.86 + back)), max(2, height // 100)
    if letter < 0.4:
        canvas[y : y + 7 * n, x : x + n] += 1.6
        canvas[y + 6 * n : y + 7 * n, x + n : x + 4 * n] += 1.6
    for k, y in enumerate(range(int(height * 0.2), int(height * 0.6), max(2, height // 48)) if ruler < 0.4 else ()):
        canvas[y, width - n - (width // 60 if k % 5 else width // 30) : width - n] += 1.0


def _expose(canvas: np.ndarray, marks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Attenuation (H, W) to an 8 bit film: scatter, quantum noise, contrast, illumination, collimation."""
    (height, width), unit = canvas.shape, canvas.shape[0] / _HEIGHT_MM
    scatter = gaussian_filter(canvas[::4, ::4], 2.5 * unit).repeat(4, 0).repeat(4, 1)[:height, :width]
    depth = gaussian_filter(canvas, rng.uniform(0.25, 0.6) * unit) + rng.uniform(0.05, 0.25) * scatter
    noise = rng.standard_normal((3, height, width), dtype=np.float32)
    depth *= 1 + rng.uniform(0.05, 0.22) * unit * gaussian_filter(noise[2], 1.5 * unit)  # tissue texture
    depth += noise[0] * np.exp(0.5 * depth) * rng.uniform(0.006, 0.022)
    grey = 1 - np.exp(-rng.uniform(0.6, 1.2) * np.maximum(depth, 0))
    grey = (grey / np.quantile(grey[::4, ::4], 0.998)) ** rng.uniform(0.75, 1.35)
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None, :]
    tilt = rng.uniform(-0.12, 0.12, 4)
    grey *= 1 + tilt[0] * y + tilt[1] * x + tilt[2] * x * y + tilt[3] * (x * x + y * y - 1)
    grey = rng.uniform(0.0, 0.1) + rng.uniform(0.75, 0.95) * grey + rng.uniform(0.004, 0.012) * noise[1]
    free = np.concatenate([marks.min(axis=0), (height, width) - marks.max(axis=0)]) - 6 * unit
    border = rng.uniform(-0.045, 0.09, 4) * (height, width, height, width)
    top, left, bottom, right = border.clip(0, np.maximum(free, 0)).astype(int)
    film, field = 0.02 + 0.006 * noise[1], (slice(top, height - bottom), slice(left, width - right))
    film[field] = grey[field]
    return (film.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def render_radiograph(size: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One radiograph: image uint8 (H, W) and its landmarks float64 (19, 2) as y, x in pixels, centres at integers."""
    marks, shapes = _build_head(rng)
    pose = _sample_pose(marks, size, rng)
    canvas = _attenuation(shapes, pose, size)
    _add_marker(canvas, rng)
    landmarks = np.ascontiguousarray(pose.to_pixels(marks)[:, ::-1])
    return _expose(canvas, landmarks, rng), landmarks


def _already_there(root: Path, recipe: dict[str, object]) -> bool:
    """True if `root` holds this very data set, False if it is free, UserError if it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        other = parse_json((root / "phantom.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{root}: exists and is not a phantom data set; choose another folder or remove it") from None
    if other != recipe:
        raise UserError(f"{root}: holds phantom {json.dumps(other)}, not {json.dumps(recipe)}; choose another folder")
    return True


def write_phantom_radiographs(root: Path, count: int, size: tuple[int, ...] = (300, 242), seed: int = 0) -> None:
    """Write `count` radiographs of `size` (height, width) pixels to `root`; the folder appears when it is complete.

    Files: jpg/001.jpg ..., 400_junior/001.txt and 400_senior/001.txt (both the exact truth, 19 lines `x,y` in pixels)
    and phantom.json. Image i, counted from 1, depends on `seed`, i and `size` only. A folder that already holds the
    same data set is left alone; any other content is a UserError.
    """
    root, size = Path(root), (int(size[0]), int(size[1]))
    if count < 1 or min(size) < _MIN_SIZE or seed < 0:
        raise UserError(f"phantom: count >= 1, sides >= {_MIN_SIZE} px, seed >= 0 needed, got {count}, {size}, {seed}")
    recipe = {"count": count, "size": list(size), "seed": seed, "version": _VERSION}
    clear_once(root.parent.absolute())
    if _already_there(root, recipe):
        return
    try:
        with atomic_folder(root) as part:
            for name in ("jpg", "400_junior", "400_senior"):
                (part / name).mkdir()
            for i in range(1, count + 1):
                image, landmarks = render_radiograph(size, np.random.default_rng([seed, i]))
                Image.fromarray(image).save(part / "jpg" / f"{i:03d}.jpg", quality=92)
                for rater in ("400_junior", "400_senior"):
                    (part / rater / f"{i:03d}.txt").write_text("".join(f"{x:.2f},{y:.2f}\n" for y, x in landmarks))
            (part / "phantom.json").write_text(json.dumps(recipe) + "\n")
    except OSError:
        if not _already_there(root, recipe):  # another process may have been first
            raise
