"""GroupNorm, scale and shift, SiLU and a residual in one function of channels-last maps on a GPU.

Reads its input once for the moments and once for the result, going back once for the sums and once for the gradient;
keeps the input alone (its own precision) and (5, B, C) numbers. PyTorch's CUDA GroupNorm takes and gives maps with the
channels first: in a channels-last network each of them is copied twice. The kernels are in `norm_kernels`.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

TILE, WARPS = 4096, 8  # numbers of a tile, and the warps that share it
CHANNELS_OF_TILE = 64
PROGRAMS = 2048  # wanted at once, some for every multiprocessor of a large GPU
LEAST_TILES = 8  # of a program: fewer would only add to what the second stage must read
LEAST_GROUP, AT_ONCE = 64, 4096  # channels of a block of the second stage, and the numbers it reads at once
TYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself reads it
_switch = {"on": True, "fake": False}


@cache
def kernels() -> Any:
    """The module `norm_kernels`, or None where Triton cannot run: no GPU of capability 7, no Triton, no compiler."""
    if not INTERPRETED and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (7, 0)):
        return None
    try:
        from core.networks import norm_kernels
    except ImportError:
        warnings.warn("Triton is not installed: the networks run several times slower on this GPU", stacklevel=2)
        return None
    if not INTERPRETED and not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        warnings.warn("no C compiler, which Triton needs (apt install gcc): the networks run several times slower on "
                      "this GPU", stacklevel=2)
        return None
    return norm_kernels


@contextmanager
def switched(name: str, value: bool) -> Iterator[None]:
    """Within it nothing is fused ("on", False): PyTorch's own operations, the reference, run in the kernels' place.

    With ("fake", True) fake tensors, which have a shape and no numbers, count as on a GPU: for counts without one.
    """
    before, _switch[name] = _switch[name], value
    try:
        yield
    finally:
        _switch[name] = before


def on_gpu(x: Tensor) -> bool:
    """Whether what is done with `x` should be what suits a GPU."""
    return x.is_cuda or INTERPRETED or (_switch["fake"] and isinstance(x, FakeTensor))


def fusable(x: Tensor) -> bool:
    """Whether `normalize` can take what lies in memory as `x` (B, C, *size) does."""
    return (_switch["on"] and on_gpu(x) and x.dtype in TYPES and not torch.compiler.is_compiling()
            and row_stride(x) is not None and (isinstance(x, FakeTensor) or kernels() is not None))


def row_stride(x: Tensor) -> int | None:
    """Numbers from one position of (B, C, *size) to the next, if its rows of channels are evenly apart; else None."""
    if x.ndim < 4 or (x.shape[1] > 1 and x.stride(1) != 1):
        return None
    step = stride = x.stride(-1) if x.shape[-1] > 1 else max(x.shape[1], x.stride(-1))
    for axis in (*range(x.ndim - 1, 1, -1), 0):
        if x.shape[axis] > 1 and x.stride(axis) != step:
            return None
        step *= x.shape[axis]
    return stride if stride >= x.shape[1] else None


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """`x` and its row stride; a copy in channels-last memory where its rows are not evenly apart."""
    stride = row_stride(x)
    if stride is not None:
        return x, stride
    x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    return x, x.shape[1]


def normalize(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, added: Tensor | None = None,
              scale_shift: Tensor | None = None, residual: Tensor | None = None, activate: bool = False) -> Tensor:
    """silu(norm(x + added) * (1 + scale) + shift) + residual, (B, C, *size) in channels-last memory, as `x`'s type.

    `weight`, `bias` and `added` (C), scale_shift (B, 2 C) first scale then shift, residual as x; None and False leave
    a part out. For what `fusable` says; GroupNorm of Wu & He 2018, statistics in float32.
    """
    return Normalize.apply(x, added, weight, bias, scale_shift, residual, groups, eps, activate)


class Normalize(torch.autograd.Function):
    """See `normalize`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, scale_shift: Tensor | None,
                residual: Tensor | None, groups: int, eps: float, activate: bool) -> Tensor:
        """The output."""
        out, stats = torch.ops.landmark_kernels.norm(x, added, weight, bias, scale_shift, residual, groups, eps,
                                                     activate)
        ctx.save_for_backward(x, stats, weight, bias, scale_shift)
        ctx.groups, ctx.activate = groups, activate
        ctx.types = [None if t is None else t.dtype for t in (added, weight, bias)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all tensors; the residual's is the output's."""
        x, stats, weight, bias, scale_shift = ctx.saved_tensors
        along, small, scaled = torch.ops.landmark_kernels.norm_backward(
            gradient, x, stats, weight, bias, scale_shift, ctx.groups, ctx.activate)
        to_weight, to_bias, to_added = small.unbind()
        added_type, weight_type, bias_type = ctx.types
        return (along, None if added_type is None else to_added.to(added_type), to_weight.to(weight_type),
                to_bias.to(bias_type), None if scale_shift is None else scaled,
                gradient if ctx.needs_input_grad[5] else None, None, None, None)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


class Tiles:
    """How the positions and channels of (B, C, *size) are dealt to programs."""

    def __init__(self, x: Tensor, groups: int) -> None:
        self.batch, self.channels = x.shape[:2]
        self.positions = x[0, 0].numel()
        self.block = {"CHANNELS": min(CHANNELS_OF_TILE, power_of_two(self.channels)), "num_warps": WARPS}
        height = self.block["ROWS"] = max(1, min(TILE // self.block["CHANNELS"], power_of_two(self.positions)))
        columns = -(-self.channels // self.block["CHANNELS"])
        tiles = -(-self.positions // height)
        splits = min(-(-tiles // LEAST_TILES), max(1, PROGRAMS // (columns * self.batch)))
        self.rows = -(-tiles // splits) * height
        self.splits = -(-self.positions // self.rows)
        self.grid = (self.splits, columns, self.batch)
        self.width = self.channels // groups
        wide = max(LEAST_GROUP, power_of_two(self.width))  # few kinds: each is compiled
        self.group_grid = (self.batch, groups)
        self.group_block = {"CHANNELS": wide, "SPLITS": max(1, AT_ONCE // wide), "num_warps": 4}


def empty_map(x: Tensor) -> Tensor:
    """An empty map of the shape and type of `x` in channels-last memory."""
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)


@torch.library.custom_op("landmark_kernels::norm", mutates_args=(), schema=(
    "(Tensor x, Tensor? added, Tensor weight, Tensor bias, Tensor? scale_shift, Tensor? residual, int groups, "
    "float eps, bool activate) -> (Tensor, Tensor)"))
def norm(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, scale_shift: Tensor | None,
         residual: Tensor | None, groups: int, eps: float, activate: bool) -> tuple[Tensor, Tensor]:
    """(output, stats (5, B, C) float32 as `core.networks.norm_kernels.finish_moments` says)."""
    run, tiles = kernels(), Tiles(x, groups)
    x, stride = rows_of(x)
    sums = torch.empty((tiles.batch, tiles.splits, 2, tiles.channels), device=x.device)
    stats = torch.empty((5, tiles.batch, tiles.channels), device=x.device)
    out = empty_map(x)
    run.partial_moments[tiles.grid](x, sums, tiles.positions, tiles.channels, stride, tiles.rows, **tiles.block)
    scaled = None if scale_shift is None else scale_shift.contiguous()
    run.finish_moments[tiles.group_grid](
        x, sums, x if added is None else added, weight, bias, x if scaled is None else scaled, stats, tiles.positions,
        tiles.channels, tiles.width, stride, tiles.splits, eps, ADDED=added is not None, SCALED=scaled is not None,
        **tiles.group_block)
    other, other_stride = (x, stride) if residual is None else rows_of(residual)
    run.apply_affine[tiles.grid](x, other, stats, out, tiles.positions, tiles.channels, stride, other_stride,
                                 tiles.rows, ACTIVATE=activate, OTHER=residual is not None, **tiles.block)
    return out, stats


@norm.register_fake
def _(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, scale_shift: Tensor | None,
      residual: Tensor | None, groups: int, eps: float, activate: bool) -> tuple[Tensor, Tensor]:
    return empty_map(x), torch.empty((5, *x.shape[:2]), device=x.device)


@torch.library.custom_op("landmark_kernels::norm_backward", mutates_args=(), schema=(
    "(Tensor gradient, Tensor x, Tensor stats, Tensor weight, Tensor bias, Tensor? scale_shift, int groups, "
    "bool activate) -> (Tensor, Tensor, Tensor)"))
def norm_backward(gradient: Tensor, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor,
                  scale_shift: Tensor | None, groups: int, activate: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, (3, C) of weight, bias and `added`, (B, 2 C) of scale and shift."""
    run, tiles = kernels(), Tiles(x, groups)
    x, stride = rows_of(x)
    gradient, gradient_stride = rows_of(gradient)
    shape = (tiles.batch, tiles.channels)
    sums = torch.empty((tiles.batch, tiles.splits, 2, tiles.channels), device=x.device)
    slopes, small = torch.empty((2, *shape), device=x.device), torch.empty((3, *shape), device=x.device)
    scaled = _scaled_gradient(x, scale_shift)
    out = empty_map(x)
    run.partial_gradients[tiles.grid](x, gradient, stats, sums, tiles.positions, tiles.channels, stride,
                                      gradient_stride, tiles.rows, ACTIVATE=activate, **tiles.block)
    run.finish_gradients[tiles.group_grid](
        sums, stats, weight, bias, x if scale_shift is None else scale_shift.contiguous(), slopes, small, scaled,
        tiles.positions, tiles.channels, tiles.width, tiles.splits, SCALED=scale_shift is not None,
        **tiles.group_block)
    run.apply_gradient[tiles.grid](x, gradient, stats, slopes, out, tiles.positions, tiles.channels, stride,
                                   gradient_stride, tiles.rows, ACTIVATE=activate, **tiles.block)
    return out, small.sum(1), scaled


@norm_backward.register_fake
def _(gradient: Tensor, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, scale_shift: Tensor | None,
      groups: int, activate: bool) -> tuple[Tensor, Tensor, Tensor]:
    small = torch.empty((3, x.shape[1]), device=x.device)
    return empty_map(x), small, _scaled_gradient(x, scale_shift)


def _scaled_gradient(x: Tensor, scale_shift: Tensor | None) -> Tensor:
    """Room for the gradient of `scale_shift`."""
    if scale_shift is None:
        return torch.empty(0, device=x.device)
    return torch.empty(scale_shift.shape, dtype=scale_shift.dtype, device=x.device)
