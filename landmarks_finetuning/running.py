"""A network on a set of images: batches of whole images, or overlapping windows of larger ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.config.evaluation import Evaluation
from core.data.dataset import ImageSet
from core.training.device import autocast, resolve_precision
from landmarks_finetuning.ensemble import over_views

JOINED_BYTES = 2**27  # of outputs that are decoded together


class Outputs(NamedTuple):
    """Raw float32 outputs (B, ...), on the device, of images `chosen`; `maps` (B, D, D + 1) from stored pixels."""

    chosen: list[int]
    outputs: Tensor
    maps: np.ndarray


@torch.no_grad()
def run_batched(model: Callable[[Tensor], Tensor], images: ImageSet, settings: Evaluation, device: torch.device,
                precision: str, chosen: Sequence[int] | None = None, views: int = 1, whole: bool = False
                ) -> Iterator[Outputs]:
    """Yield the raw outputs of `model` for all images, or the `chosen` ones, batch by batch, averaged over `views`.

    Images of the network's size go through in batches of settings.batch_size. Larger ones go one by one, in windows
    that overlap by settings.window_overlap; outputs are averaged, weighted by the distance from a window's border.
    `whole`: they go through as they are, for a network that takes any size and gives no heatmaps.
    """
    size, batch = images.network_size, settings.batch_size
    indices = list(range(len(images.records))) if chosen is None else list(chosen)
    precision = resolve_precision(precision, device)

    def outputs_of_view(inputs: Tensor) -> Tensor:
        with autocast(device, precision, keep_casts=False):
            return model(inputs).float()

    def outputs_of(inputs: Tensor) -> Tensor:
        return over_views(outputs_of_view, inputs.to(device), views)

    if images.fits:
        for first in range(0, len(indices), batch):
            some = indices[first : first + batch]
            inputs = images.images[first : first + batch] if chosen is None else images.images[some]
            yield Outputs(some, outputs_of(inputs), images.maps[some])
        return
    for index in indices:
        part, maps = images.seen(index), images.maps[[index]]
        maps[:, :, -1] -= [place.start for place in part]
        image = images.images[(slice(index, index + 1), slice(None), *part)]
        outputs = outputs_of(image) if whole else _over_windows(outputs_of, image, size, settings.window_overlap, batch)
        yield Outputs([index], outputs, maps)


def joined(batches: Iterable[Outputs], most_bytes: int = JOINED_BYTES) -> Iterator[Outputs]:
    """Batches of one size put together while they are small: what decodes them waits for the device less often."""
    group: list[Outputs] = []
    for batch in batches:
        together = sum(each.outputs.nbytes for each in group) + batch.outputs.nbytes
        if group and (together > most_bytes or batch.outputs.shape[1:] != group[0].outputs.shape[1:]):
            yield _together(group)
            group = []
        group.append(batch)
    if group:
        yield _together(group)


def _together(group: Sequence[Outputs]) -> Outputs:
    chosen = [index for batch in group for index in batch.chosen]
    outputs = group[0].outputs if len(group) == 1 else torch.cat([batch.outputs for batch in group])
    return Outputs(chosen, outputs, np.concatenate([batch.maps for batch in group]))


def _over_windows(outputs_of: Callable[[Tensor], Tensor], image: Tensor, size: tuple[int, ...], overlap: float,
                  batch: int) -> Tensor:
    """(1, C, *large) -> (1, N, *large): outputs of overlapping windows of `size`, averaged."""
    starts = [window_starts(length, window, overlap) for length, window in zip(image.shape[2:], size, strict=True)]
    places = [tuple(slice(first, first + window) for first, window in zip(corner, size, strict=True))
              for corner in product(*starts)]
    weight = window_weight(size)
    total, weights = torch.zeros(()), torch.zeros(image.shape[2:])
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        outputs = outputs_of(torch.cat([image[(slice(None), slice(None), *place)] for place in some]))
        if first == 0:
            total = outputs.new_zeros((outputs.shape[1], *image.shape[2:]))
        for place, output in zip(some, outputs, strict=True):
            total[(slice(None), *place)] += output * weight.to(output.device)
            weights[place] += weight
    return (total / weights.to(total.device))[None]


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """First pixels of evenly spaced windows that cover `length` pixels and overlap by at least `overlap`."""
    step = max(1, math.floor(window * (1 - overlap) + 1e-9))
    count = 1 + math.ceil((length - window) / step)
    return np.linspace(0, length - window, count).round().astype(int).tolist()


def window_weight(size: tuple[int, ...]) -> Tensor:
    """(*size) weights above 0, the product of a triangle along each axis."""
    weight = torch.ones(())
    for length in size:
        rise = torch.minimum(torch.arange(length) + 1, length - torch.arange(length)).float()
        weight = weight[..., None] * (rise / rise.max())
    return weight
