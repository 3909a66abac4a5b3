"""The only diffusion U-Net: any number of spatial dimensions, optional timestep embedding.

Parameter names are those of the published weights, so its checkpoints load without renaming.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.settings import UNet as UNetConfig


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0) -> Tensor:
    """F.conv3d, in float32 where torch's bf16 weight gradient is wrong: on a CPU, inputs of depth 2 (torch 2.14)."""
    if x.shape[2] == 2 and x.device.type == "cpu" and x.dtype != torch.float64:
        with torch.autocast("cpu", enabled=False):
            return F.conv3d(x.float(), weight.float(), None if bias is None else bias.float(), padding=padding)
    return F.conv3d(x, weight, bias, padding=padding)


class Conv3d(nn.Conv3d):
    """nn.Conv3d of stride 1 through `conv3d`."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv3d(x, weight, bias, self.padding[0])


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: Conv3d}
CONV_FUNCTION = {1: F.conv1d, 2: F.conv2d, 3: conv3d}


class StandardizedConv(nn.Module):
    """3^D convolution whose weights are standardised over each filter (Qiao et al. 2019): biased variance."""

    def __init__(self, dims: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        reference = CONV[dims](channels_in, channels_out, 3, padding=1)
        self.weight, self.bias = reference.weight, reference.bias
        self.convolve = CONV_FUNCTION[dims]

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, *size) -> (B, channels_out, *size); eps is 1e-3 in half precision, else 1e-5."""
        eps = 1e-5 if x.dtype in (torch.float32, torch.float64) else 1e-3
        weight = self.weight.flatten(1)
        if weight.dtype == torch.bfloat16:
            weight = weight.float()
        variance, mean = torch.var_mean(weight, dim=1, keepdim=True, correction=0)
        weight = ((weight - mean) * torch.rsqrt(variance + eps)).view_as(self.weight)
        return self.convolve(x, weight.to(x.dtype), self.bias.to(x.dtype), padding=1)


class Block(nn.Module):
    """Standardised convolution, GroupNorm, optional scale and shift, SiLU."""

    def __init__(self, dims: int, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.proj = StandardizedConv(dims, channels_in, channels_out)
        self.norm = nn.GroupNorm(groups, channels_out)

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, C, *size) -> (B, C', *size)."""
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
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
        return to_image(F.linear(out, self.to_out.weight.flatten(1), self.to_out.bias), x)


class LinearAttention(Attention):
    """Attention of linear cost (Shen et al. 2021): softmax of q over features and of k over positions."""

    def __init__(self, dims: int, channels: int, heads: int, head_channels: int) -> None:
        super().__init__(dims, channels, heads, head_channels)
        self.scale = head_channels**-0.5
        self.to_out = nn.Sequential(CONV[dims](heads * head_channels, channels, 1), nn.GroupNorm(1, channels))
        own_head = torch.block_diag(*[torch.ones(head_channels, head_channels)] * heads)
        self.register_buffer("own_head", own_head, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C, *size). All heads share one product; `own_head` keeps each to its own features."""
        query, key, value = self.project(x)
        query = query.unflatten(2, (self.heads, -1)).softmax(dim=3).flatten(2) * self.scale
        context = key.softmax(dim=1).transpose(1, 2) @ value
        project, norm = self.to_out
        out = F.linear(query @ (context * self.own_head), project.weight.flatten(1), project.bias)
        return norm(to_image(out, x))


def to_image(rows: Tensor, like: Tensor) -> Tensor:
    """(B, positions, C) -> (B, C, *size) with the spatial size of `like`; a view in channels-last memory."""
    return rows.transpose(1, 2).unflatten(2, like.shape[2:])


class PreNorm(nn.Module):
    """GroupNorm(1) before `fn`; named as in the published weights."""

    def __init__(self, channels: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.GroupNorm(1, channels)

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


class Unshuffle(nn.Module):
    """2^D pixels to channels, order (channel, offsets in axis order)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C * 2^D, *size / 2)."""
        dims = x.ndim - 2
        halves = [n for size in x.shape[2:] for n in (size // 2, 2)]
        x = x.reshape(*x.shape[:2], *halves)
        offsets, positions = range(3, 3 + 2 * dims, 2), range(2, 2 + 2 * dims, 2)
        return x.permute(0, 1, *offsets, *positions).flatten(1, 1 + dims)


class SinusoidalEmbedding(nn.Module):
    """sin half, then cos half, frequencies exp(-ln(10000) k / (C/2 - 1))."""

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
            down = conv(narrow, wide, 3, padding=1) if last else nn.Sequential(
                Unshuffle(), conv(narrow * 2**dims, wide, 1))
            blocks = [block(narrow, narrow) for _ in range(config.blocks_per_level)]
            self.downs.append(nn.ModuleList([*blocks, attention(level, narrow), down]))
        for level, (narrow, wide) in reversed(list(enumerate(levels))):
            up = conv(wide, narrow, 3, padding=1) if level == 0 else nn.Sequential(
                nn.Upsample(scale_factor=2, mode="nearest"), conv(wide, narrow, 3, padding=1))
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
        """First 1x1 convolution; the published network's zero input channels add nothing, so they are skipped."""
        weight = self.init_conv.weight[:, -self.channels:]
        return self.init_conv._conv_forward(x, weight, self.init_conv.bias)

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
        for *blocks, attend, down in self.downs:
            for block in blocks[:-1]:
                x = self.run(block, x, time)
                kept.append(x)
            x = self.run(attend, self.run(blocks[-1], x, time))
            kept.append(x)
            x = down(x)
        x = self.run(self.mid_block2, self.run(self.mid_attn, self.run(self.mid_block1, x, time)), time)
        for *blocks, attend, up in self.ups:
            for block in blocks:
                x = self.run(block, torch.cat((x, kept.pop()), dim=1), time)
            x = up(self.run(attend, x))
        x = self.run(self.final_res_block, torch.cat((x, first), dim=1), time)
        return self.final_conv(x)
