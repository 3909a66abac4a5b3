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
from torch.utils.checkpoint import checkpoint

from core.config.unet import UNet as UNetConfig
from core.networks.convolutions import CHANNELS_LAST, CONV, Downsample, StandardizedConv, Upsample, weight_and_bias
from core.networks.fused_attention import ReadQueries, SeeKeys, fusable_attention
from core.networks.fused_norm import fusable, normalize, on_gpu
from core.networks.fused_weights import fusable_weights, standardized_together


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which operations on `x` keep its type; the meta device knows no autocast."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm, and what follows it, whose output has its input's type: autocast on CUDA would make it float32.

    Statistics are computed in float32 all the same. On a GPU one function of `fused_norm`; the form below it is
    the reference, and what a CPU runs.
    """

    def forward(self, x: Tensor, *, added: Tensor | None = None, scale_shift: Tensor | None = None,
                residual: Tensor | None = None, activate: bool = False) -> Tensor:
        """silu(norm(x + added) * (1 + scale) + shift) + residual, (B, C, *size); see `fused_norm.normalize`."""
        if fusable(x):
            return normalize(x, self.weight, self.bias, self.num_groups, self.eps, added=added,
                             scale_shift=scale_shift, residual=residual, activate=activate)
        place = (-1, *(1,) * (x.ndim - 2))
        if added is not None:
            x = x + added.to(x.dtype).view(place)
        with no_autocast(x):
            x = F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        if scale_shift is not None:
            scale, shift = scale_shift.view(x.shape[0], *place).chunk(2, dim=1)
            x = torch.addcmul(shift, x, scale + 1)
        x = F.silu(x) if activate else x
        return x if residual is None else x + residual


class Block(nn.Module):
    """Standardised convolution, GroupNorm, optional scale and shift, SiLU."""

    def __init__(self, dims: int, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.proj = StandardizedConv(dims, channels_in, channels_out)
        self.norm = GroupNorm(groups, channels_out)

    def forward(self, x: Tensor, scale_shift: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """(B, C, *size) -> (B, C', *size); scale_shift (B, 2 C'). The norm adds the bias where that costs no pass."""
        by_norm = fusable(x)
        return self.norm(self.proj(x, biased=not by_norm), added=self.proj.bias if by_norm else None,
                         scale_shift=scale_shift, residual=residual, activate=True)


class ResidualBlock(nn.Module):
    """Two blocks and a skip; the time embedding scales and shifts after the first norm."""

    def __init__(self, dims: int, channels_in: int, channels_out: int, time_channels: int, groups: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, channels_out * 2))
        self.block1 = Block(dims, channels_in, channels_out, groups)
        self.block2 = Block(dims, channels_out, channels_out, groups)
        same = channels_in == channels_out
        self.res_conv: nn.Module = nn.Identity() if same else CONV[dims](channels_in, channels_out, 1)

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        """`time` (B, time_channels), or None to skip the whole scale-and-shift branch."""
        scale_shift = None if time is None else self.mlp(time)
        skip = x if isinstance(self.res_conv, nn.Identity) else pointwise(self.res_conv, x)
        return self.block2(self.block1(x, scale_shift), residual=skip)


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

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, C, *size) -> (B, C, *size), and `residual` added."""
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.project(x))
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        weight, bias = weight_and_bias(self.to_out)
        out = to_image(F.linear(out, weight.flatten(1), bias), x)
        return out if residual is None else residual + out


class LinearAttention(Attention):
    """Attention of linear cost (Shen et al. 2021): softmax of q over features and of k over positions."""

    own_head: Tensor

    def __init__(self, dims: int, channels: int, heads: int, head_channels: int) -> None:
        super().__init__(dims, channels, heads, head_channels)
        self.scale = head_channels**-0.5
        self.to_out = nn.Sequential(CONV[dims](heads * head_channels, channels, 1), GroupNorm(1, channels))
        own_head = torch.block_diag(*[torch.full((head_channels, head_channels), self.scale)] * heads)
        self.register_buffer("own_head", own_head, persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, C, *size) -> (B, C, *size), and `residual` added.

        Products associate: neither the values nor what each position reads of them are ever formed. Keys meet the
        input itself, the small (features, C) result meets both weights, `own_head` keeping each head to its own.
        """
        rows = x.flatten(2).transpose(1, 2)
        to_query, to_key, to_value = self.to_qkv.weight.flatten(1).chunk(3)
        features, width = len(to_key), len(to_key) // self.heads
        fused = fusable_attention(x, features, width)
        seen = SeeKeys.apply(rows, to_key) if fused else self.see(rows, to_key)
        project, norm = self.to_out.children()
        weight, bias = weight_and_bias(project)
        read = (F.linear(seen, to_value) * self.own_head) @ weight.flatten(1).t()
        if fused:
            out = ReadQueries.apply(rows, to_query, read, width)
        else:
            query = F.linear(rows, to_query)
            with no_autocast(x):  # as in GroupNorm
                query = query.unflatten(2, (self.heads, -1)).softmax(dim=3).flatten(2)
            out = query @ read if fusable(x) else torch.baddbmm(bias, query, read)
        return norm(to_image(out, x), added=bias if fusable(x) else None, residual=residual)

    def see(self, rows: Tensor, to_key: Tensor) -> Tensor:
        """(B, positions, C), (F, C) -> (B, F, C): rows weighted by each key's softmax over positions.

        Keys lie (B, F, positions): CUDA's softmax walks along an axis that is not the last with one thread.
        """
        keys = torch.bmm(to_key.expand(rows.shape[0], -1, -1), rows.transpose(1, 2))
        with no_autocast(rows):
            return torch.bmm(keys.softmax(dim=2), rows.to(keys.dtype))


def pointwise(convolution: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution; of maps in channels-last memory on a GPU a matrix product, which adds its bias in passing."""
    if not fusable(x):
        return convolution(x)
    weight, bias = weight_and_bias(convolution)
    return to_image(F.linear(x.flatten(2).transpose(1, 2), weight.flatten(1), bias), x)


def to_image(rows: Tensor, like: Tensor) -> Tensor:
    """(B, positions, C) -> (B, C, *size) with the spatial size of `like`; a view in channels-last memory."""
    return rows.transpose(1, 2).unflatten(2, like.shape[2:])


class PreNorm(nn.Module):
    """GroupNorm(1) before `fn`; named as in the published weights."""

    def __init__(self, channels: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = GroupNorm(1, channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, C, *size) -> (B, C, *size), and `residual` added."""
        return self.fn(self.norm(x), residual)


class Residual(nn.Module):
    """x + fn(x), which `fn` adds."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size)."""
        return self.fn(x, residual=x)


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
        self.standardized = [module for module in self.modules() if isinstance(module, StandardizedConv)]

    def embed_input(self, x: Tensor) -> Tensor:
        """First 1x1 convolution; the published network's zero input channels add nothing, so they are skipped.

        On a GPU its result lies channels last. Elsewhere the layout of the weights is taken up here: one channel lies
        alike in either, and one map in the other layout would be copied in every block that meets it.
        """
        weight, wide = self.init_conv.weight[:, -self.channels:], self.final_res_block.block1.proj.weight
        if on_gpu(x) and x.ndim > 3:
            return to_image(F.linear(x.flatten(2).transpose(1, 2), weight.flatten(1), self.init_conv.bias), x)
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
        first = self.embed_input(x)
        together = fusable(first) and not self.activation_checkpointing and fusable_weights(self.standardized)
        with standardized_together(self.standardized, first.dtype) if together else nullcontext():
            return self.transform(first, time)

    def transform(self, first: Tensor, time: Tensor | None) -> Tensor:
        """(B, base, *size) -> (B, out_channels, *size): all levels down and up."""
        x, kept = first, []
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
        return pointwise(self.final_conv, x)
