"""Weight standardisation of all convolutions of a network at once: one kernel going forward, two going back.

One by one it takes some twenty launches a convolution. The kernels are in `core.networks.weight_kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from core.networks.convolutions import CHANNELS_LAST, StandardizedConv, standardization_eps

BLOCK = 1024


@contextmanager
def standardized_together(convolutions: Sequence[StandardizedConv], dtype: torch.dtype) -> Iterator[None]:
    """Within it each convolution has its standardised weights, in `dtype`, ready; `fusable_weights` must hold."""
    weights = StandardizeAll.apply(dtype, *(convolution.weight for convolution in convolutions))
    for convolution, weight in zip(convolutions, weights, strict=True):
        convolution.ready = weight
    try:
        yield
    finally:
        for convolution in convolutions:
            convolution.ready = None


def fusable_weights(convolutions: Sequence[StandardizedConv]) -> bool:
    """Whether all weights are whole float32 parameters: no shares of them (FSDP), no half-precision copies."""
    return all(type(c.weight) in (nn.Parameter, FakeTensor) and c.weight.dtype == torch.float32 for c in convolutions)


class StandardizeAll(torch.autograd.Function):
    """`core.networks.convolutions.Standardize` of every weight, each lying in memory as the weight does."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        """Views of one flat tensor."""
        flat, moments = torch.ops.landmark_kernels.standardize(weights, standardization_eps(dtype), dtype)
        ctx.save_for_backward(moments, *weights)
        return views(flat, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Views of one flat tensor."""
        moments, *weights = ctx.saved_tensors
        flat = torch.cat([flat_as(gradient, weight) for gradient, weight in zip(gradients, weights, strict=True)])
        return None, *views(torch.ops.landmark_kernels.standardize_backward(flat, moments, weights), weights)


def lies_last(weight: Tensor) -> bool:
    """Whether the weights' channels are neighbours in memory."""
    return weight.ndim > 3 and weight.is_contiguous(memory_format=CHANNELS_LAST[weight.ndim - 2])


def flat_as(tensor: Tensor, weight: Tensor) -> Tensor:
    """The numbers of `tensor` in the order in which those of `weight` lie; a view where it lies alike."""
    return (tensor.movedim(1, -1) if lies_last(weight) else tensor).reshape(-1)


def views(flat: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Parts of `flat` shaped, and lying, as `weights`."""
    parts = []
    for part, weight in zip(flat.split([weight.numel() for weight in weights]), weights, strict=True):
        last = lies_last(weight)
        shape = weight.movedim(1, -1).shape if last else weight.shape
        parts.append(part.view(shape).movedim(-1, 1) if last else part.view(shape))
    return tuple(parts)


@lru_cache(maxsize=32)
def filter_table(places: tuple[tuple[int, int, int], ...], device: torch.device) -> Tensor:
    """(filters, 3) int64: address, length and place in the flat output, for weights of (address, filters, length).

    The cache is right whatever becomes of the weights: the same addresses and shapes make the same table.
    """
    rows, place = [], 0
    for address, filters, length in places:
        for index in range(filters):
            rows.append((address + 4 * length * index, length, place))
            place += length
    return torch.tensor(rows, dtype=torch.int64, device=device)


def table_of(weights: Sequence[Tensor]) -> Tensor:
    """The `filter_table` of float32 weights (O, I, *kernel), each filter of which lies together."""
    places = tuple((weight.data_ptr(), weight.shape[0], weight[0].numel()) for weight in weights)
    return filter_table(places, weights[0].device)


@torch.library.custom_op("landmark_kernels::standardize", mutates_args=(), schema=(
    "(Tensor[] weights, float eps, ScalarType dtype) -> (Tensor, Tensor)"))
def standardize(weights: Sequence[Tensor], eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Flat standardised filters in `dtype`, and (filters, 2) float32 mean and 1 / sqrt(variance + eps) of each."""
    from core.networks import weight_kernels

    table, (flat, moments) = table_of(weights), _empty(weights, dtype)
    weight_kernels.standardize_filters[(len(table),)](table, flat, moments, eps, BLOCK=BLOCK, num_warps=4)
    return flat, moments


@standardize.register_fake
def _(weights: Sequence[Tensor], eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _empty(weights, dtype)


def _empty(weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    device = weights[0].device
    return (torch.empty(sum(weight.numel() for weight in weights), dtype=dtype, device=device),
            torch.empty((sum(len(weight) for weight in weights), 2), device=device))


@torch.library.custom_op("landmark_kernels::standardize_backward", mutates_args=(), schema=(
    "(Tensor gradient, Tensor moments, Tensor[] weights) -> Tensor"))
def standardize_backward(gradient: Tensor, moments: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Flat float32 gradients of the weights from flat ones of the standardised filters."""
    from core.networks import weight_kernels

    table, out = table_of(weights), torch.empty(gradient.shape, device=gradient.device)
    weight_kernels.filter_gradients[(len(table),)](table, moments, gradient, out, BLOCK=BLOCK, num_warps=4)
    return out


@standardize_backward.register_fake
def _(gradient: Tensor, moments: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return torch.empty(gradient.shape, device=gradient.device)
