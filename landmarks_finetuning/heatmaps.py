"""Landmarks to heatmaps and back, in any number of dimensions (the length of the heatmap's size).

Points are (B, N, D) in the tensor's axis order, pixel centres at integers, NaN where not annotated.
Heatmaps are (B, N, *size).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from core.errors import UserError, did_you_mean
from landmarks_finetuning.losses import log_softmax_channels

LOG_2 = float(np.log(2.0))
T = TypeVar("T")


# ---- drawing


def draw_target(points: Tensor, size: Sequence[int], kind: str, sigma: float) -> Tensor:
    """Heatmaps (B, N, *size), float32 on the points' device, of the landmarks `points` (B, N, D); sigma in pixels.

    `kind` is a key of TARGETS. A NaN landmark, and one so far outside that nothing of it falls in, is all zeros.
    Raises UserError for an unknown kind.
    """
    draw = _choose(TARGETS, kind, "finetune.target")
    if points.shape[-1] != len(size):
        raise ValueError(f"points with {points.shape[-1]} coordinates do not fit a size of {len(size)} axes")
    return draw(points.float(), tuple(size), sigma)


def _draw_pixel(points: Tensor, size: tuple[int, ...], sigma: float) -> Tensor:
    """1 at the pixel that holds the position (rounded, half to even, clipped into the image); sigma is not used."""
    return _nearest_pixel(points, size).float()


def _draw_disk(points: Tensor, size: tuple[int, ...], sigma: float) -> Tensor:
    """1 where exp(-d^2 / (2 sigma^2)) > 1/2; a disk too small to reach a pixel centre becomes the nearest pixel."""
    return ((_gaussian(points, size, sigma) > 0.5) | _nearest_pixel(points, size)).float()


def _draw_gaussian(points: Tensor, size: tuple[int, ...], sigma: float) -> Tensor:
    """exp(-d^2 / (2 sigma^2)), 1 at the sub-pixel position; zeros where the disk would be all zeros.

    A landmark far outside must not leave its faint tail: a loss that normalises the target would make it certain.
    """
    gaussian = _gaussian(points, size, sigma)
    reaches = ((gaussian > 0.5) | _nearest_pixel(points, size)).flatten(2).any(dim=2)
    return torch.where(reaches[(..., *(None,) * len(size))], gaussian, 0.0)


def _gaussian(points: Tensor, size: tuple[int, ...], sigma: float) -> Tensor:
    squares = []
    for axis, length in enumerate(size):
        offsets = torch.arange(length, device=points.device) - points[..., axis, None]
        squares.append(_along(axis, len(size), offsets.square()))
    return torch.exp(reduce(torch.add, squares) / (-2.0 * sigma**2))


def _nearest_pixel(points: Tensor, size: tuple[int, ...]) -> Tensor:
    """True at the one pixel whose area holds the point; all False outside [-0.5, length - 0.5] or for NaN."""
    nearest = torch.ones((), dtype=torch.bool, device=points.device)
    for axis, length in enumerate(size):
        position = points[..., axis, None]
        inside = (position >= -0.5) & (position <= length - 0.5)
        hit = torch.arange(length, device=points.device) == position.round().clamp(0, length - 1)
        nearest = nearest & _along(axis, len(size), hit & inside)
    return nearest


def _along(axis: int, dims: int, values: Tensor) -> Tensor:
    """View (B, N, K) as (B, N, 1, .., K, .., 1): the values vary along one of `dims` spatial axes."""
    return values.reshape(*values.shape[:2], *(1,) * axis, -1, *(1,) * (dims - axis - 1))


def _draw_window(points: Tensor, size: tuple[int, ...], sigma: float) -> Tensor:
    """A Gaussian about the nearest whole pixel p in [p - 3 sigma, p + 3 sigma), stretched there to 0..1 (GU2Net).

    A window that lies outside in part is cut off there.
    """
    half, nearest = round(3 * sigma), points.round()
    offsets = [_along(axis, len(size), torch.arange(length, device=points.device) - nearest[..., axis, None])
               for axis, length in enumerate(size)]
    lowest = float(np.exp(-len(size) * half**2 / (2 * sigma**2)))  # at the corner that all its sides begin in
    gaussian = torch.exp(reduce(torch.add, [each.square() for each in offsets]) / (-2.0 * sigma**2))
    inside = reduce(torch.logical_and, [(each >= -half) & (each < half) for each in offsets])
    return torch.where(inside, (gaussian - lowest) / (1 - lowest), 0.0)


TARGETS = {"disk": _draw_disk, "gaussian": _draw_gaussian, "pixel": _draw_pixel,
           "gaussian_window": _draw_window}


# ---- decoding


class LogMaps(NamedTuple):
    """Log-probabilities of heatmaps (B, N, *size): `scores` less `total`, which is never subtracted for whole maps."""

    scores: Tensor  # (B, N, *size) float32
    total: Tensor  # (B, N)
    finite: Tensor  # (B, N): whether all of the network's outputs are


def log_maps(outputs: Tensor, loss: str) -> LogMaps:
    """The softmax that `loss` trains, over pixels or over landmarks, of raw outputs (B, N, *size).

    Raises UserError for an unknown loss. Waits for nothing on a GPU: whether all is finite is for `require_finite`.
    """
    scores, total = _choose(LOG_MAPS, loss, "finetune.loss")(outputs)
    finite = torch.isfinite(outputs.flatten(2).sum(dim=2))  # a fiftieth of the time that looking at each number takes
    return LogMaps(scores, total, finite)


def require_finite(finite: Tensor | np.ndarray) -> None:
    """UserError unless all of the network's outputs are finite numbers."""
    if not finite.all():
        raise UserError("the network's outputs are not finite numbers: its training diverged (lower the learning rate)")


def probability_maps(outputs: Tensor, loss: str) -> Tensor:
    """The softmax (B, N, *size) that `loss` trains, over pixels or over landmarks, of raw outputs."""
    scores, total, finite = log_maps(outputs, loss)
    require_finite(finite)
    return (scores - total[(..., *(None,) * (outputs.ndim - 2))]).exp()


def decode(outputs: Tensor, decoder: str, loss: str, sigma: float) -> tuple[Tensor, Tensor]:
    """Points (B, N, D) and confidences (B, N) in [0, 1], float64 on the CPU, from raw outputs (B, N, *size).

    `decoder` is a key of DECODERS. Raises UserError as `log_maps`, `require_finite` and `find_points` do.
    """
    maps = log_maps(outputs, loss)
    require_finite(maps.finite)
    points = find_points(outputs, maps, decoder, loss, sigma)
    return points.cpu(), confidence(maps, points, loss, sigma).cpu()


def find_points(outputs: Tensor, maps: LogMaps, decoder: str, loss: str, sigma: float) -> Tensor:
    """Points (B, N, D), float64, where `decoder`, a key of DECODERS, sees them in `maps`.

    On the maps' device, without waiting for it, or on the CPU, by a decoder of ON_CPU, which looks for components
    there. `outputs` are raw, for the published decoder and to break ties. Raises UserError for an unknown decoder, one
    that does not go with `loss`, and a 2D decoder on a volume.
    """
    locate = _choose(DECODERS, decoder, "finetune.decoder")
    if decoder == "window_mass" and loss != "cross_entropy_pixels":
        raise UserError(f'finetune.decoder "window_mass" sums probability over pixels, which finetune.loss "{loss}" '
                        "does not learn; choose another decoder, or cross_entropy_pixels")
    if decoder in ON_CPU:
        require_finite(maps.finite)  # or there would be no component
    return locate(outputs, maps.scores, sigma)


def confidence(maps: LogMaps, points: Tensor, loss: str, sigma: float) -> Tensor:
    """Confidences (B, N) in [0, 1], float64 on the maps' device, of `points` (B, N, D).

    What lies in the window of +-2 sigma pixels along each axis around the point: the probability mass (softmax over
    pixels), or the mean probability that its pixels belong to this landmark (softmax over landmarks).
    """
    places, size = points.to(maps.scores.device).round().long(), maps.scores.shape[2:]
    centre = torch.stack([places[..., axis].clamp(0, length - 1) for axis, length in enumerate(size)], dim=-1)
    values, inside = _window(maps.scores, centre, max(1, round(2 * sigma)))
    mass = (values.flatten(2) - maps.total[..., None]).exp().sum(dim=2)
    if loss == "cross_entropy_channels":
        mass = mass / inside.flatten(2).sum(dim=2)
    return mass.clamp(0, 1).double()


def _over_pixels(outputs: Tensor) -> tuple[Tensor, Tensor]:
    scores = outputs.float()
    return scores, scores.flatten(2).logsumexp(dim=2)


def _over_landmarks(outputs: Tensor) -> tuple[Tensor, Tensor]:
    return log_softmax_channels(outputs), outputs.new_zeros(outputs.shape[:2], dtype=torch.float32)


LOG_MAPS = {"cross_entropy_pixels": _over_pixels, "cross_entropy_channels": _over_landmarks}


# decoders: (raw outputs, log-probabilities up to a constant for each heatmap, sigma) -> points


def argmax(outputs: Tensor, scores: Tensor, sigma: float) -> Tensor:
    """The most probable pixel; where probabilities are equal (they round to 1), the one of the largest raw output."""
    return _peak(outputs, scores).double()


def local_expectation(outputs: Tensor, scores: Tensor, sigma: float) -> Tensor:
    """Sub-pixel mean of the probability map in the window of +-max(1, round(sigma)) pixels around the argmax."""
    return _mean_about(_peak(outputs, scores), scores, max(1, round(sigma)))


def quadratic(outputs: Tensor, scores: Tensor, sigma: float) -> Tensor:
    """Top of the parabola through the log-probabilities of the 3^D pixels about the argmax; exact for a Gaussian.

    It has their central differences for slopes and curvatures; a peak on the border is seen from the next pixel inside.
    Where it has no top, or that is over a pixel from the argmax, each axis counts by itself, at most a pixel.
    """
    peak, dims = _peak(outputs, scores), outputs.ndim - 2
    last = torch.tensor(scores.shape[2:], device=peak.device) - 2
    centre = torch.minimum(peak.clamp(min=1), last)
    values = _window(scores, centre, 1)[0].cpu().double()
    off = (peak - centre).cpu().double()

    def at(*moves: tuple[int, int]) -> Tensor:
        place = [1] * dims
        for axis, step in moves:
            place[axis] += step
        where: tuple[slice | int, ...] = (slice(None), slice(None), *place)
        return values[where]

    slopes = torch.stack([(at((i, 1)) - at((i, -1))) / 2 for i in range(dims)], dim=-1)
    curved = torch.stack([torch.stack([
        at((i, 1)) - 2 * at() + at((i, -1)) if i == j else
        (at((i, 1), (j, 1)) - at((i, 1), (j, -1)) - at((i, -1), (j, 1)) + at((i, -1), (j, -1))) / 4
        for j in range(dims)], dim=-1) for i in range(dims)], dim=-2)
    bends = curved.diagonal(dim1=-2, dim2=-1)
    alone = torch.where(bends < 0, -slopes / bends, off)
    alone = torch.where(alone.isfinite(), alone, off)
    sound = curved.isfinite().flatten(2).all(dim=2)
    curved = torch.where(sound[..., None, None], curved, torch.eye(dims, dtype=curved.dtype))
    sound &= torch.linalg.eigvalsh(curved).amax(dim=2) < 0
    together = torch.linalg.solve_ex(curved, -slopes[..., None])[0][..., 0]
    sound &= ((together - off).abs() <= 1).all(dim=2)
    return centre.cpu().double() + torch.where(sound[..., None], together, off + (alone - off).clamp(-1, 1))


def window_mass(outputs: Tensor, scores: Tensor, sigma: float) -> Tensor:
    """Sub-pixel mean in the window of +-max(1, round(2 sigma)) pixels along each axis that holds the most probability.

    Where a map is broad or has several peaks, its mass tells more than its single highest pixel.
    """
    dims, radius = outputs.ndim - 2, max(1, round(2 * sigma))
    relative = (scores - scores.amax(dim=tuple(range(2, outputs.ndim)), keepdim=True)).exp()
    mass = POOLING[dims](relative, 2 * radius + 1, stride=1, padding=radius)  # outside counts 0
    return _mean_about(_peak(outputs, mass), scores, radius)


def _mean_about(peak: Tensor, scores: Tensor, radius: int) -> Tensor:
    """Mean position (B, N, D) of the probability map in the window of +-radius around integer `peak`."""
    values, _ = _window(scores, peak, radius)
    weights = values.flatten(2).softmax(dim=2).view(values.shape)
    steps = torch.arange(-radius, radius + 1, device=weights.device).expand(1, 1, -1)
    moments = [(weights * _along(axis, peak.shape[-1], steps)).flatten(2).sum(dim=2) for axis in range(peak.shape[-1])]
    return peak.double() + torch.stack(moments, dim=-1).double()


def component_centroid(outputs: Tensor, scores: Tensor, sigma: float) -> Tensor:
    """Unweighted centroid of the largest face-connected component above half the probability map's maximum.

    With the softmax over landmarks the map is the probability of the landmark at each pixel: the loss leaves the
    background free, so a component may be a cell between neighbours rather than a disk.
    """
    half_maximum = scores.flatten(2).amax(dim=2) - LOG_2
    masks = scores > half_maximum[(..., *(None,) * (outputs.ndim - 2))]
    return _for_each_heatmap(_largest_component_centroid, masks)


def contour_centroid(outputs: Tensor, scores: Tensor | None = None, sigma: float | None = None) -> Tensor:
    """The published decoder, 2D only, for the paper's scorer: RAW outputs, half maximum, outer contour, moments.

    A contour of zero area, or a heatmap whose maximum is not above 0, leaves the point at (0, 0).
    """
    if outputs.ndim != 4:
        raise UserError("contour_centroid decodes 2D heatmaps only; choose component_centroid, argmax, "
                        "local_expectation, window_mass or quadratic for volumes")
    raw = outputs.float()
    return _for_each_heatmap(_largest_contour_centroid, raw > raw.amax(dim=(2, 3), keepdim=True) / 2)


POOLING = {2: F.avg_pool2d, 3: F.avg_pool3d}
DECODERS = {"component_centroid": component_centroid, "contour_centroid": contour_centroid, "argmax": argmax,
            "local_expectation": local_expectation, "window_mass": window_mass, "quadratic": quadratic}
ON_CPU = ("component_centroid", "contour_centroid")


def _largest_component_centroid(mask: np.ndarray) -> np.ndarray:
    labels, _ = ndimage.label(mask)
    largest = np.bincount(labels.ravel())[1:].argmax() + 1
    return np.argwhere(labels == largest).mean(axis=0)


def _largest_contour_centroid(mask: np.ndarray) -> tuple[float, float]:
    contours, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:  # nothing exceeds half of a maximum that is not above 0
        return 0.0, 0.0
    moments = cv2.moments(max(contours, key=cv2.contourArea))
    if moments["m00"] == 0:
        return 0.0, 0.0
    return moments["m01"] / moments["m00"], moments["m10"] / moments["m00"]


def _for_each_heatmap(locate: Callable[[np.ndarray], Sequence[float] | np.ndarray], masks: Tensor) -> Tensor:
    points = [[locate(mask) for mask in image] for image in masks.cpu().numpy()]
    return torch.from_numpy(np.array(points, dtype=np.float64))


def _peak(outputs: Tensor, scores: Tensor) -> Tensor:
    """Integer position (B, N, D) of each heatmap's maximum probability; the raw outputs break ties."""
    flat, raw = scores.flatten(2), outputs.float().flatten(2)
    if scores is not outputs:
        flat = torch.where(flat == flat.amax(dim=2, keepdim=True), raw, -torch.inf)
    index, places = flat.argmax(dim=2), []
    for length in reversed(scores.shape[2:]):  # as torch.unravel_index, which copies the size to the device and waits
        places.append(index % length)
        index = index // length
    return torch.stack(places[::-1], dim=-1)


def _window(scores: Tensor, centre: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Scores (B, N, 2 radius + 1, ..) around integer centres (B, N, D), -inf outside; and the inside mask."""
    size = scores.shape[2:]
    steps = torch.arange(-radius, radius + 1, device=centre.device)
    flat = torch.zeros((), dtype=torch.long, device=centre.device)
    inside = torch.ones((), dtype=torch.bool, device=centre.device)
    for axis, length in enumerate(size):
        index = _along(axis, len(size), centre[..., axis, None] + steps)
        inside = inside & (index >= 0) & (index < length)
        flat = flat * length + index.clamp(0, length - 1)
    values = scores.flatten(2).gather(2, flat.flatten(2)).view(flat.shape)
    return values.masked_fill(~inside, -torch.inf), inside


def _choose(registry: dict[str, T], name: str, key: str) -> T:
    if name not in registry:
        choices = ", ".join(registry)
        raise UserError(f'{key}: unknown value "{name}"; choose one of {choices}{did_you_mean(name, list(registry))}')
    return registry[name]
