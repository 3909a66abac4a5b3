"""The only diffusion U-Net: any number of spatial dimensions, optional timestep embedding.

Parameter names are those of the published weights, so its checkpoints load without renaming.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from core.config.unet import UNet as UNetConfig
from core.networks.convolutions import CHANNELS_LAST, CONV, Downsample, StandardizedConv, Upsample, weight_and_bias


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which operations on `x` keep its type; the meta device knows no autocast."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm whose output has its input's type: autocast on CUDA would make it float32, twice the memory.

    Statistics are computed in float32 all the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size)."""
        with no_autocast(x):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Block(nn.Module):
    """Standardised convolution, GroupNorm, optional scale and shift, SiLU."""

    def __init__(self, dims: int, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.proj = StandardizedConv(dims, channels_in, channels_out)
        self.norm = GroupNorm(groups, channels_out)

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, C, *size) -> (B, C', *size)."""
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = scale_shift
            x = torch.addcmul(shift, x, scale + 1)
        return F.silu(x)


class ResidualBlock(nn.Module):
    """Two blocks and a skip; the time embedding scales and shifts after the first norm."""

    def __init__(self, dims: int, channels_in: int, channels_out: int, time_channels: int, groups: int) -> None:
        super().__init__()
        self.dims = dims
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, channels_out * 2))
        self.block1 = Block(dims, channels_in, channels_out, groups)
        self.block2 = Block(dims, channels_out, channels_out, groups)
        same = channels_in == channels_out
        self.res_conv = nn.Identity() if same else CONV[dims](channels_in, channels_out, 1)

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        """`time` (B, time_channels), or None to skip the whole scale-and-shift branch."""
        scale_shift = None
        if time is not None:
            projected = self.mlp(time)
            scale_shift = projected.view(*projected.shape, *(1,) * self.dims).chunk(2, dim=1)
        return self.block2(self.block1(x, scale_shift)) + self.res_conv(x)


class Attention(nn.Module):
    """Softmax attention over all positions (Vaswani et al. 2017).

    The 1x1 convolutions are applied as matrix products on (B, positions, channels): in channels-last memory that is
    a view, and no head is ever copied.
    """

    def __init__(self, dims: int, channels: int, heads: int, head_channels: int) -> None:
        super().__init__()
        self.heads = heads
        hidden = heads * head_channels
        self.to_qkv = CONV[dims](channels, hidden * 3, 1, bias=False)
        self.to_out: nn.Module = CONV[dims](hidden, channels, 1)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, C, *size) -> query, key, value, each (B, positions, heads * head_channels)."""
        return F.linear(x.flatten(2).transpose(1, 2), self.to_qkv.weight.flatten(1)).chunk(3, dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size)."""
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.project(x))
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        weight, bias = weight_and_bias(self.to_out)
        return to_image(F.linear(out, weight.flatten(1), bias), x)


class TransposedProduct(torch.autograd.Function):
    """(B, P, M), (B, P, N) -> (B, M, N), first^T second, whose gradients lie in memory as the inputs do."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        """The product."""
        ctx.save_for_backward(first, second)
        return first.transpose(1, 2) @ second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Those of a product."""
        first, second = ctx.saved_tensors
        return second @ gradient.transpose(1, 2), first @ gradient


class LinearAttention(Attention):
    """Attention of linear cost (Shen et al. 2021): softmax of q over features and of k over positions."""

    own_head: Tensor

    def __init__(self, dims: int, channels: int, heads: int, head_channels: int) -> None:
        super().__init__(dims, channels, heads, head_channels)
        self.scale = head_channels**-0.5
        self.to_out = nn.Sequential(CONV[dims](heads * head_channels, channels, 1), GroupNorm(1, channels))
        own_head = torch.block_diag(*[torch.full((head_channels, head_channels), self.scale)] * heads)
        self.register_buffer("own_head", own_head, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size).

        Products associate: neither the values nor what each position reads of them are ever formed. Keys meet the
        input itself, the small (features, C) result meets both weights, `own_head` keeping each head to its own.
        """
        rows = x.flatten(2).transpose(1, 2)
        to_query, to_key, to_value = self.to_qkv.weight.flatten(1).chunk(3)
        query, key = F.linear(rows, to_query), F.linear(rows, to_key)
        with no_autocast(x):  # as in GroupNorm
            query = query.unflatten(2, (self.heads, -1)).softmax(dim=3).flatten(2)
            key = key.softmax(dim=1)
        seen = TransposedProduct.apply(key, rows.to(key.dtype))
        project, norm = self.to_out.children()
        weight, bias = weight_and_bias(project)
        read = (F.linear(seen, to_value) * self.own_head) @ weight.flatten(1).t()
        return norm(to_image(torch.baddbmm(bias, query, read), x))


def to_image(rows: Tensor, like: Tensor) -> Tensor:
    """(B, positions, C) -> (B, C, *size) with the spatial size of `like`; a view in channels-last memory."""
    return rows.transpose(1, 2).unflatten(2, like.shape[2:])


class PreNorm(nn.Module):
    """GroupNorm(1) before `fn`; named as in the published weights."""

    def __init__(self, channels: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = GroupNorm(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size)."""
        return self.fn(self.norm(x))


class Residual(nn.Module):
    """x + fn(x)."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size)."""
        return x + self.fn(x)


class SinusoidalEmbedding(nn.Module):
    """sin half, then cos half, frequencies exp(-ln(10000) k / (C/2 - 1))."""

    frequencies: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        exponents = torch.arange(half) * -(math.log(10000) / (half - 1))
        self.register_buffer("frequencies", torch.exp(exponents), persistent=False)

    def forward(self, timesteps: Tensor) -> Tensor:
        """(B,) -> (B, channels)."""
        angles = timesteps[:, None] * self.frequencies[None]
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class UNet(nn.Module):
    """The published network in D dimensions (DESIGN of Ho et al. 2020 with linear attention on every level).

    Input (B, channels, *size), output (B, out_channels, *size). `timesteps` (B,) int, or None: the null timestep,
    for which the scale-and-shift branch of every block is skipped.
    """

    def __init__(self, config: UNetConfig, channels: int, out_channels: int, size: tuple[int, ...]) -> None:
        super().__init__()
        self.activation_checkpointing = False  # recompute blocks in the backward pass instead of keeping them
        dims = len(size)
        base = config.base_channels
        widths = [base, *(base * m for m in config.channel_multipliers)]
        self.input_slot = config.input_slot
        self.channels, self.out_channels = channels, out_channels
        conv = CONV[dims]
        block = partial(ResidualBlock, dims, time_channels=base * 4, groups=config.norm_groups)

        def attention(level: int, width: int) -> nn.Module:
            full = size[0] // 2**level in config.full_attention_sizes
            if not full and not config.linear_attention:
                return nn.Identity()
            kind = Attention if full else LinearAttention
            return Residual(PreNorm(width, kind(dims, width, config.attention_heads, config.attention_head_channels)))

        self.init_conv = conv(channels * (2 if self.input_slot else 1), base, 1)
        self.time_mlp = nn.Sequential(
            SinusoidalEmbedding(base), nn.Linear(base, base * 4), nn.GELU(), nn.Linear(base * 4, base * 4)
        )
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        levels = list(zip(widths[:-1], widths[1:], strict=True))
        for level, (narrow, wide) in enumerate(levels):
            last = level == len(levels) - 1
            down = conv(narrow, wide, 3, padding=1) if last else Downsample(dims, narrow, wide)
            blocks = [block(narrow, narrow) for _ in range(config.blocks_per_level)]
            self.downs.append(nn.ModuleList([*blocks, attention(level, narrow), down]))
        for level, (narrow, wide) in reversed(list(enumerate(levels))):
            up = conv(wide, narrow, 3, padding=1) if level == 0 else Upsample(dims, wide, narrow)
            blocks = [block(wide + narrow, wide) for _ in range(config.blocks_per_level)]
            self.ups.append(nn.ModuleList([*blocks, attention(level, wide), up]))
        middle = widths[-1]
        self.mid_block1 = block(middle, middle)
        self.mid_attn = Residual(PreNorm(middle, Attention(dims, middle, config.attention_heads,
                                                           config.attention_head_channels)))
        self.mid_block2 = block(middle, middle)
        self.final_res_block = block(base * 2, base)
        self.final_conv = conv(base, out_channels, 1)

    def embed_input(self, x: Tensor) -> Tensor:
        """First 1x1 convolution; the published network's zero input channels add nothing, so they are skipped.

        The layout of the weights is taken up here: one channel lies alike in either, and one map in the other layout
        would be copied in every block that meets it.
        """
        weight, wide = self.init_conv.weight[:, -self.channels:], self.final_res_block.block1.proj.weight
        layout = CHANNELS_LAST[x.ndim - 2] if wide.stride(1) == 1 else torch.contiguous_format
        return self.init_conv._conv_forward(x, weight, self.init_conv.bias).contiguous(memory_format=layout)

    def run(self, part: nn.Module, *inputs: Tensor | None) -> Tensor:
        """part(*inputs); under activation checkpointing its intermediate results are computed again, not kept."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
        return part(*inputs)

    def forward(self, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """(B, channels, *size) -> (B, out_channels, *size)."""
        time = None if timesteps is None else self.time_mlp(timesteps)
        x = first = self.embed_input(x)
        kept = []
        for *blocks, attend, down in map(nn.Module.children, self.downs):
            for block in blocks[:-1]:
                x = self.run(block, x, time)
                kept.append(x)
            x = self.run(attend, self.run(blocks[-1], x, time))
            kept.append(x)
            x = down(x)
        x = self.run(self.mid_block2, self.run(self.mid_attn, self.run(self.mid_block1, x, time)), time)
        for *blocks, attend, up in map(nn.Module.children, self.ups):
            for block in blocks:
                x = self.run(block, torch.cat((x, kept.pop()), dim=1), time)
            x = up(self.run(attend, x))
        x = self.run(self.final_res_block, torch.cat((x, first), dim=1), time)
        return self.final_conv(x)
