"""What the pre-trained diffusion U-Net sees in images: the maps of its decoder at several timesteps.

The activations of a denoising network say where things are, without a label (Baranchuk et al. 2022, Tang et al. 2023).
Places in the decoder are counted from the coarsest level (0) to the one of the image's own size; the one after that is
the network's last block. Images go in without noise: the timestep alone says how much of it to expect, which serves
better than noise of that timestep (docs/results/cephalograms.md), and knows no chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config.config import Config
from core.data.dataset import ImageSet
from core.networks.unet import UNet
from core.networks.weights import load_weights
from core.training.device import autocast, resolve_device, resolve_precision
from landmarks_finetuning.starts import check_same_network


class Batch(NamedTuple):
    """Images (B, C, *size) of an ImageSet, which of them, and `maps` (B, D, D + 1) from stored to these pixels."""

    chosen: list[int]
    images: Tensor
    maps: np.ndarray


def batches(images: ImageSet, count: int, multiple: int) -> Iterator[Batch]:
    """`images` in batches of `count`; where they are larger than the network's size, whole and one by one.

    Their sizes are then filled up with zeros at the far ends to multiples of `multiple`.
    """
    if images.fits:
        for first in range(0, len(images.records), count):
            some = list(range(first, min(first + count, len(images.records))))
            yield Batch(some, images.images[some], images.maps[some])
        return
    for index in range(len(images.records)):
        part, maps = images.seen(index), images.maps[[index]]
        maps[:, :, -1] -= [place.start for place in part]
        image = images.images[(slice(index, index + 1), slice(None), *part)]
        fill = [extent for size in reversed(image.shape[2:]) for extent in (0, -size % multiple)]
        yield Batch([index], F.pad(image, fill), maps)


def decoder_places(model: UNet) -> list[nn.Module]:
    """The modules whose outputs are features, the coarsest first: the attention of each level, and the last block."""
    levels = [list(level.children()) for level in model.ups.children()]
    return [*(attention for *_, attention, _ in levels), model.final_res_block]


@torch.no_grad()
def decoder_maps(model: UNet, images: Tensor, places: Sequence[int], timesteps: Sequence[int]) -> list[Tensor]:
    """Activations of `model` at `places` (see `decoder_places`) for images (B, C, *size), one pass a timestep.

    Returns for each place a tensor (B, T * width, *size of that level), float32, on the images' device: the channels
    of the first timestep, then those of the next.
    """
    modules = decoder_places(model)
    kept: dict[int, list[Tensor]] = {place: [] for place in places}

    def keep(place: int, output: Tensor) -> None:
        kept[place].append(output.float())

    hooks = [modules[place].register_forward_hook(lambda _module, _inputs, output, place=place: keep(place, output))
             for place in kept]
    try:
        for timestep in timesteps:
            model(images, torch.full((len(images),), timestep, device=images.device))
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(kept[place], dim=1) for place in places]


class FeatureNetwork:
    """The U-Net of a weights file, in evaluation, on the config's device, and how its features are asked for.

    UserError for a file that cannot be read, or of another network than the config's for images of `channels`.
    """

    def __init__(self, config: Config, path: Path, channels: int) -> None:
        weights = load_weights(path)
        check_same_network(path, weights, config.unet, channels)
        self.device = resolve_device(config.experiment.device)
        self.precision = resolve_precision(config.experiment.precision, self.device)
        self.model = weights.build(config.dataset.image_size).to(self.device).eval()
        self.batch_size = config.evaluation.batch_size
        self.steps = config.ddpm.num_train_timesteps

    def batches(self, images: ImageSet) -> Iterator[Batch]:
        """See `batches`; the network halves sizes once less than it has levels."""
        return batches(images, self.batch_size, 2 ** (len(self.model.ups) - 1))

    def maps(self, images: Tensor, places: Sequence[int], noise_levels: Sequence[float]) -> list[Tensor]:
        """See `decoder_maps`; timesteps as shares of those of the pre-training."""
        timesteps = [round(level * self.steps) for level in noise_levels]
        with autocast(self.device, self.precision):
            return decoder_maps(self.model, images.to(self.device), places, timesteps)
