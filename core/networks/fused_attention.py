"""Linear attention on a GPU without queries, keys or values in memory: two functions of rows (B, positions, C).

    seen = softmax over positions of (rows to_key^T)^T, times rows        (B, F, C)
    out = softmax over each head's features of (rows to_query^T), times read   (B, positions, C)

Each reads the rows once and computes the scores again going back, so nothing of size (B, positions, F) is written:
with 128 features and 64 channels they would be two thirds of all that attention moves. The kernels
are in `attention_kernels`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from core.networks.fused_norm import fusable, power_of_two

ROWS, WARPS = 64, 8
PROGRAMS = 264  # two for every multiprocessor of a large GPU
WIDEST = 128  # channels: of more, the sums of a program do not fit into its registers


def fusable_attention(x: Tensor, features: int, width: int) -> bool:
    """Whether the two functions below can take (B, C, *size) and heads of `width` of `features` features."""
    return (fusable(x) and x.dtype != torch.float32 and x.shape[1] <= WIDEST and features >= 16
            and all(power_of_two(number) == number for number in (features, width)))


class SeeKeys(torch.autograd.Function):
    """rows (B, P, C), to_key (F, C) -> seen (B, F, C): what each feature's keys see of the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, to_key: Tensor) -> Tensor:
        """In the rows' type."""
        weight = to_key.to(rows.dtype)
        seen, levels = torch.ops.landmark_kernels.see_keys(rows, weight)
        ctx.save_for_backward(rows, weight, seen, levels)
        ctx.type = to_key.dtype
        return seen.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of both."""
        rows, weight, seen, levels = ctx.saved_tensors
        to_rows, to_weight = torch.ops.landmark_kernels.see_keys_backward(
            rows, weight, levels, gradient.contiguous(), (gradient * seen).sum(2))
        return to_rows, to_weight.sum((0, 1)).to(ctx.type)


class ReadQueries(torch.autograd.Function):
    """rows (B, P, C), to_query (F, C), read (B, F, C) -> out (B, P, C); heads of `width` features."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, to_query: Tensor, read: Tensor, width: int) -> Tensor:
        """In the rows' type."""
        weight, given = to_query.to(rows.dtype), read.to(rows.dtype).contiguous()
        ctx.save_for_backward(rows, weight, given)
        ctx.types, ctx.width = (to_query.dtype, read.dtype), width
        return torch.ops.landmark_kernels.read_queries(rows, weight, given, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of all three."""
        rows, weight, read = ctx.saved_tensors
        to_rows, to_weight, to_read = torch.ops.landmark_kernels.read_queries_backward(
            rows, weight, read, gradient.contiguous(), ctx.width)
        weight_type, read_type = ctx.types
        return to_rows, to_weight.sum((0, 1)).to(weight_type), to_read.sum(1).to(read_type), None


def dealt(rows: Tensor, weight: Tensor) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, int]]:
    """(splits, images), the kernels' (positions, channels, tiles of a program), and their constants."""
    batch, positions, channels = rows.shape
    tiles = -(-positions // ROWS)
    each = -(-tiles // max(1, min(tiles, PROGRAMS // batch)))
    constants = {"ROWS": ROWS, "FEATURES": len(weight), "CHANNELS": max(16, power_of_two(channels)),
                 "num_warps": WARPS}
    return (-(-tiles // each), batch), (positions, channels, each), constants


def parts_of(rows: Tensor, weight: Tensor) -> Tensor:
    """Room for every program's sums, (B, splits, F, C) float32."""
    (splits, batch), _, _ = dealt(rows, weight)
    return torch.empty((batch, splits, *weight.shape), device=rows.device)


@torch.library.custom_op("landmark_kernels::see_keys", mutates_args=(),
                         schema="(Tensor rows, Tensor to_key) -> (Tensor, Tensor)")
def see_keys(rows: Tensor, to_key: Tensor) -> tuple[Tensor, Tensor]:
    """(seen (B, F, C) float32, levels (B, F)): a key's softmax over positions is exp(score - level)."""
    from core.networks import attention_kernels

    grid, sizes, constants = dealt(rows, to_key)
    parts = parts_of(rows, to_key)
    peaks, totals = torch.empty((2, *parts.shape[:3]), device=rows.device)
    attention_kernels.see_keys[grid](rows.contiguous(), to_key.contiguous(), peaks, totals, parts, *sizes, **constants)
    peak = peaks.amax(1, keepdim=True)
    shares = torch.exp(peaks - peak)
    total = (shares * totals).sum(1)
    return (shares[..., None] * parts).sum(1) / total[..., None], peak[:, 0] + total.log()


@see_keys.register_fake
def _(rows: Tensor, to_key: Tensor) -> tuple[Tensor, Tensor]:
    return (torch.empty((len(rows), *to_key.shape), device=rows.device),
            torch.empty((len(rows), len(to_key)), device=rows.device))


@torch.library.custom_op("landmark_kernels::see_keys_backward", mutates_args=(), schema=(
    "(Tensor rows, Tensor to_key, Tensor levels, Tensor gradient, Tensor means) -> (Tensor, Tensor)"))
def see_keys_backward(rows: Tensor, to_key: Tensor, levels: Tensor, gradient: Tensor,
                      means: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the rows, and of the weights in parts (B, splits, F, C)."""
    from core.networks import attention_kernels

    grid, sizes, constants = dealt(rows, to_key)
    to_rows, parts = torch.empty_like(rows.contiguous()), parts_of(rows, to_key)
    attention_kernels.key_gradients[grid](rows.contiguous(), to_key.contiguous(), levels, gradient, means.float(),
                                          to_rows, parts, *sizes, **constants)
    return to_rows, parts


@see_keys_backward.register_fake
def _(rows: Tensor, to_key: Tensor, levels: Tensor, gradient: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), parts_of(rows, to_key)


@torch.library.custom_op("landmark_kernels::read_queries", mutates_args=(),
                         schema="(Tensor rows, Tensor to_query, Tensor read, int width) -> Tensor")
def read_queries(rows: Tensor, to_query: Tensor, read: Tensor, width: int) -> Tensor:
    """The output."""
    from core.networks import attention_kernels

    grid, sizes, constants = dealt(rows, to_query)
    out = torch.empty_like(rows.contiguous())
    attention_kernels.read_queries[grid](rows.contiguous(), to_query.contiguous(), read, out, *sizes, WIDTH=width,
                                         **constants)
    return out


@read_queries.register_fake
def _(rows: Tensor, to_query: Tensor, read: Tensor, width: int) -> Tensor:
    return rows.new_empty(rows.shape)


@torch.library.custom_op("landmark_kernels::read_queries_backward", mutates_args=(), schema=(
    "(Tensor rows, Tensor to_query, Tensor read, Tensor gradient, int width) -> (Tensor, Tensor, Tensor)"))
def read_queries_backward(rows: Tensor, to_query: Tensor, read: Tensor, gradient: Tensor,
                          width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows, and in parts (B, splits, F, C) of the weights and of `read`."""
    from core.networks import attention_kernels

    grid, sizes, constants = dealt(rows, to_query)
    to_rows, to_weight, to_read = (torch.empty_like(rows.contiguous()), parts_of(rows, to_query),
                                   parts_of(rows, to_query))
    attention_kernels.query_gradients[grid](rows.contiguous(), to_query.contiguous(), read, gradient, to_rows, to_read,
                                            to_weight, *sizes, WIDTH=width, **constants)
    return to_rows, to_weight, to_read


@read_queries_backward.register_fake
def _(rows: Tensor, to_query: Tensor, read: Tensor, gradient: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return rows.new_empty(rows.shape), parts_of(rows, to_query), parts_of(rows, to_query)
