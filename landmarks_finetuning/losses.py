"""Heatmap losses: which softmax turns raw network outputs into probabilities, and its cross-entropy with a target.

Both losses take raw outputs and targets of shape (B, N, *size), any number of spatial dimensions, and compute in
float32 whatever the input's precision. A landmark whose target is all zeros (not annotated) costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_softmax_pixels(outputs: Tensor) -> Tensor:
    """Log-probability of each pixel within its own heatmap, (B, N, *size): exp sums to 1 over each heatmap."""
    return outputs.float().flatten(2).log_softmax(dim=2).view(outputs.shape)


def log_softmax_channels(outputs: Tensor) -> Tensor:
    """Log-probability of each landmark at each pixel, (B, N, *size): exp sums to 1 over the N landmarks."""
    return outputs.float().log_softmax(dim=1)


def cross_entropy_pixels(outputs: Tensor, target: Tensor, absent: Tensor | None = None, weights: Tensor | None = None
                         ) -> Tensor:
    """Cross-entropy of the distribution over all pixels of each heatmap, averaged over the present landmarks.

    The target is normalised to sum 1 over its pixels. With a one-pixel target this is the negative log-likelihood
    of contour-hugging heatmaps (McCouat & Voiculescu, CVPR 2022). Zero, with zero gradient, if nothing is present.

    `absent` (B, N) marks landmarks known to lie outside a crop. With it the distribution has one more outcome, "not
    here", whose output is fixed at 0: such a landmark costs -log p(not here), and outputs of different crops of an
    image are on one scale, as overlapping windows need. `weights` (B, N) are what each landmark's cost counts; the
    average is over landmarks, not over weights, so that uncertain ones teach less.
    """
    target = target.float()
    mass = target.flatten(2).sum(dim=2)
    present = mass > 0
    if absent is None:
        log_probability = log_softmax_pixels(outputs)
    else:
        nowhere = torch.zeros((*outputs.shape[:2], 1), device=outputs.device)
        partition = torch.cat((outputs.float().flatten(2), nowhere), dim=2).logsumexp(dim=2)
        log_probability = outputs.float() - partition[(..., *(None,) * (outputs.ndim - 2))]
    cost = -(target * log_probability).flatten(2).sum(dim=2) / torch.where(present, mass, 1.0)
    if absent is not None:
        cost = torch.where(absent & ~present, partition, cost)
        present = present | absent
    return _weighted(cost, weights).sum() / present.sum().clamp(min=1)


def cross_entropy_channels(outputs: Tensor, target: Tensor, absent: Tensor | None = None, weights: Tensor | None = None
                           ) -> Tensor:
    """Cross-entropy of the distribution over landmarks at each pixel: -sum_n target_n log p_n, as published.

    Averaged over images and pixels. Background pixels (no target) cost nothing; where targets overlap, each counts.
    A missing landmark adds no term, but stays one of the N classes of the softmax, whether it is `absent` from a crop
    or not annotated. With N = 1 it is always zero. `weights` (B, N) are what each landmark's cost counts.
    """
    pixels = outputs.shape[0] * outputs[0, 0].numel()
    cost = (target.float() * log_softmax_channels(outputs)).flatten(2).sum(dim=2)
    return -_weighted(cost, weights).sum() / pixels


def _weighted(cost: Tensor, weights: Tensor | None) -> Tensor:
    return cost if weights is None else cost * weights


LOSSES = {"cross_entropy_pixels": cross_entropy_pixels, "cross_entropy_channels": cross_entropy_channels}
