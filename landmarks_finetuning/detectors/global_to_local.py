"""Global-to-local localisation as a detector: every patch votes for where each landmark lies, in one step or in two.

The first step sees whole images. The second has a small network for each landmark, on a window about the first step's
answer. Both learn displacements from patch centres and presence in patches; neither has heatmaps. Points are (B, N, D)
in network pixels, of the image or of each landmark's own window.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.config.config import Config
from core.formats.geometry import apply_maps, inverse
from core.networks.patches import LOCAL_PATCH, GlobalNetwork, LocalNetworks
from core.networks.weights import Weights
from landmarks_finetuning.decoding import Located
from landmarks_finetuning.shape import Shape
from landmarks_finetuning.uncertainty import Calibration

PATCHES = {2: 32, 3: 8}  # published sides of a patch, by the number of dimensions
LARGEST_LOG = 5.0  # of a displacement's logarithm: 100,000 pixels


def patch_of(config: Config) -> int:
    """Sides of the first step's patches in network pixels."""
    return config.finetune.global_to_local.patch or PATCHES[len(config.dataset.image_size)]


def start_global(config: Config, _backbone: str, channels: int, landmarks: int, _start: Path | None = None
                 ) -> GlobalNetwork:
    """A fresh network of the first step, random weights."""
    return GlobalNetwork(len(config.dataset.image_size), channels, landmarks,
                         config.finetune.global_to_local.channels, patch_of(config))


def rebuild_global(weights: Weights, size: tuple[int, ...]) -> GlobalNetwork:
    """The network of the first step that `weights` came from."""
    return GlobalNetwork(len(size), weights.channels, weights.out_channels, weights.header["width"],
                         weights.header["patch"])


def start_local(config: Config, _backbone: str, channels: int, landmarks: int, _start: Path | None = None
                ) -> LocalNetworks:
    """Fresh networks of the second step, random weights; `config` is that of the second step."""
    return LocalNetworks(len(config.dataset.image_size), channels, landmarks,
                         config.finetune.global_to_local.local.channels)


def rebuild_local(weights: Weights, size: tuple[int, ...]) -> LocalNetworks:
    """The networks of the second step that `weights` came from."""
    return LocalNetworks(len(size), weights.channels, weights.out_channels, weights.header["width"])


def centres(grid: tuple[int, ...], patch: int, device: torch.device) -> Tensor:
    """(D, *grid) float32: the pixel coordinates of the patches' centres."""
    axes = [torch.arange(length, device=device) * patch + (patch - 1) / 2 for length in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def split(outputs: Tensor, landmarks: int) -> tuple[Tensor, Tensor]:
    """Displacements (B, N, D, *grid) and presence logits (B, N, *grid), float32, of a network's outputs."""
    dims = outputs.ndim - 2
    displacements, logits = outputs.float().split([landmarks * dims, landmarks], dim=1)
    return displacements.unflatten(1, (landmarks, dims)), logits


def patch_targets(points: Tensor, grid: tuple[int, ...], patch: int) -> tuple[Tensor, Tensor]:
    """What the outputs should be for landmarks (B, N, D): sign(d) log10(|d| + 1), and 1 in the patch that holds one.

    Displacements are those of landmarks outside the grid as well; none of its patches holds such a one.
    """
    offsets = points.float()[(..., *(None,) * len(grid))] - centres(grid, patch, points.device)
    inside = ((offsets >= -patch / 2) & (offsets < patch / 2)).all(dim=2)
    return offsets.sign() * torch.log10(offsets.abs() + 1), inside.float()


def patch_loss(outputs: Tensor, points: Tensor, patch: int, presence_weight: float, weights: Tensor | None = None
               ) -> Tensor:
    """L1 of the displacements' logarithms over all patches, and `presence_weight` times the binary cross-entropy.

    Averaged over patches, axes, and the landmarks that are annotated.
    """
    displacements, logits = split(outputs, points.shape[1])
    wanted, inside = patch_targets(points, tuple(outputs.shape[2:]), patch)
    present = ~points.isnan().any(dim=2)
    wanted = torch.where(present[(..., *(None,) * (wanted.ndim - 2))], wanted, 0.0)
    cost = (displacements - wanted).abs().flatten(2).mean(dim=2)
    presence = F.binary_cross_entropy_with_logits(logits, inside, reduction="none").flatten(2).mean(dim=2)
    counts = present.float() if weights is None else present * weights
    return ((cost + presence_weight * presence) * counts).sum() / present.sum().clamp(min=1)


def decode_patches(outputs: Tensor, landmarks: int, patch: int) -> tuple[Tensor, Tensor]:
    """Points (B, N, D), the mean of what all patches say weighted by presence, and the largest presence (B, N).

    Both float64 on the CPU.
    """
    displacements, logits = split(outputs, landmarks)
    grid = tuple(outputs.shape[2:])
    lengths = displacements.clamp(-LARGEST_LOG, LARGEST_LOG).double()
    votes = centres(grid, patch, outputs.device) + lengths.sign() * (10 ** lengths.abs() - 1)
    shares = F.logsigmoid(logits.double()).flatten(2).softmax(dim=2)
    points = (votes.flatten(3) * shares[:, :, None]).sum(dim=3)
    return points.cpu(), logits.double().sigmoid().flatten(2).amax(dim=2).cpu()


def global_loss(outputs: Tensor, points: Tensor, config: Config, crop: bool = False, weights: Tensor | None = None
                ) -> Tensor:
    """The first step's `patch_loss`; see interface.Loss. Landmarks outside a crop have displacements all the same."""
    return patch_loss(outputs, points, patch_of(config), config.finetune.global_to_local.presence_weight, weights)


def local_loss(outputs: Tensor, points: Tensor, config: Config, crop: bool = False, weights: Tensor | None = None
               ) -> Tensor:
    """The second step's `patch_loss`, of equal weights; each landmark in pixels of its own window."""
    return patch_loss(outputs, points, LOCAL_PATCH, 1.0, weights)


def locate_patches(outputs: Tensor, maps: np.ndarray, patch: int) -> Located:
    """Outputs and `maps` (B, D, D + 1), or of each landmark (B, N, D, D + 1) -> stored pixels, no expected errors."""
    dims = maps.shape[-2]
    points, presence = decode_patches(outputs, outputs.shape[1] // (dims + 1), patch)
    places = points.numpy()
    to_stored = inverse(maps if maps.ndim == 4 else maps[:, None])
    unknown = np.full(places.shape[:2], np.nan)
    return Located(apply_maps(places[:, :, None], to_stored)[:, :, 0], unknown, unknown, presence.numpy())


def locate_global(outputs: Tensor, maps: np.ndarray, config: Config, decoder: str | None = None,
                  shape: Shape | None = None, spacing: np.ndarray | None = None,
                  calibration: Calibration | None = None, measure: bool = True) -> Located:
    """The first step's answers; see interface.Locate."""
    return locate_patches(outputs, maps, patch_of(config))


def locate_local(outputs: Tensor, maps: np.ndarray, config: Config, decoder: str | None = None,
                 shape: Shape | None = None, spacing: np.ndarray | None = None,
                 calibration: Calibration | None = None, measure: bool = True) -> Located:
    """The second step's answers; see interface.Locate. `maps` (B, N, D, D + 1) lead to each landmark's window."""
    return locate_patches(outputs, maps, LOCAL_PATCH)


def deepest_global(config: Config) -> tuple[int, ...]:
    """The size of the map at its deepest batch normalisation."""
    return tuple(-(-length // patch_of(config)) for length in config.dataset.image_size)


def deepest_local(config: Config) -> tuple[int, ...]:
    """The same of the second step."""
    return tuple(length // LOCAL_PATCH for length in config.dataset.image_size)
