"""Triton kernels of `fused_norm`: moments, one affine map with SiLU, and their gradients, over rows of channels.

A map (B, C, *size) in channels-last memory is (B, positions, C): rows of C neighbouring numbers, `stride` apart (more
than C where the map is a slice of a wider one). Sums go in two stages, so that all of a GPU works at a batch of 1 and
none of them depends on the order in which programs run: the same input gives the same bits.

Importing this needs Triton, which comes with torch's CUDA wheels; TRITON_INTERPRET=1 runs the kernels on a CPU.
"""

# mypy: ignore-errors
# A kernel is in Triton's language, not in Python: its values have no Python types.

from __future__ import annotations

import triton
import triton.language as tl

SIZES, COUNTS = ["positions", "rows"], ["positions", "width", "splits"]  # one compiled kernel for all their values
A, D, U, V, H = (tl.constexpr(row) for row in range(5))  # rows of `stats`, (5, B, C) float32, see `finish_moments`


@triton.jit
def activation_gradient(gradient, x, a, d, ACTIVATE: tl.constexpr):
    """The gradient before silu(a x + d), or before a x + d."""
    if ACTIVATE:
        z = x * a + d
        share = 1 / (1 + tl.exp(-z))
        gradient = gradient * share * (1 + z * (1 - share))
    return gradient


@triton.jit(do_not_specialize=SIZES)
def partial_moments(x_ptr, sums_ptr, positions, channels, stride, rows, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """sums (B, splits, 2, C): of x - first row and of its square, over `rows` positions of one image."""
    split, image = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    x_ptr += image.to(tl.int64) * positions * stride
    first = tl.load(x_ptr + c, mask=inside, other=0).to(tl.float32)
    one = tl.zeros((ROWS, CHANNELS), tl.float32)
    two = tl.zeros((ROWS, CHANNELS), tl.float32)
    for begin in range(split * rows, tl.minimum(split * rows + rows, positions), ROWS):
        p = begin + tl.arange(0, ROWS)
        there = (p < positions)[:, None] & inside[None, :]
        place = p.to(tl.int64)[:, None] * stride + c[None, :]
        x = tl.load(x_ptr + place, mask=there, other=0).to(tl.float32)
        x = tl.where(there, x - first[None, :], 0)
        one += x
        two += x * x
    sums_ptr += (image * tl.num_programs(0) + split) * 2 * channels
    tl.store(sums_ptr + c, tl.sum(one, axis=0), mask=inside)
    tl.store(sums_ptr + channels + c, tl.sum(two, axis=0), mask=inside)


@triton.jit
def added_up(sums_ptr, c, inside, splits, channels, SPLITS: tl.constexpr, CHANNELS: tl.constexpr):
    """Both sums of one image's channels `c` over its splits."""
    one = tl.zeros((SPLITS, CHANNELS), tl.float32)
    two = tl.zeros((SPLITS, CHANNELS), tl.float32)
    for begin in range(0, splits, SPLITS):
        s = begin + tl.arange(0, SPLITS)
        there = (s < splits)[:, None] & inside[None, :]
        place = s[:, None] * 2 * channels + c[None, :]
        one += tl.load(sums_ptr + place, mask=there, other=0)
        two += tl.load(sums_ptr + place + channels, mask=there, other=0)
    return tl.sum(one, axis=0), tl.sum(two, axis=0)


@triton.jit(do_not_specialize=COUNTS)
def finish_moments(x_ptr, sums_ptr, added_ptr, weight_ptr, bias_ptr, scale_shift_ptr, stats_ptr, positions, channels,
                   width, stride, splits, eps, ADDED: tl.constexpr, SCALED: tl.constexpr, SPLITS: tl.constexpr,
                   CHANNELS: tl.constexpr):
    """stats of one image's group of `width` channels: the norm's output is A x + D, its normalised input U x + V.

    `added` (C) is the bias of the convolution that made x, not yet added to it; H the normalised channel's mean.
    """
    image, group = tl.program_id(0), tl.program_id(1)
    k = tl.arange(0, CHANNELS)
    inside = k < width
    c = group * width + k
    one, two = added_up(sums_ptr + image * splits * 2 * channels, c, inside, splits, channels, SPLITS, CHANNELS)
    one, two = one / positions, two / positions
    mean_of_channel = tl.load(x_ptr + image.to(tl.int64) * positions * stride + c, mask=inside, other=0).to(tl.float32)
    mean_of_channel += one
    added = tl.zeros((CHANNELS,), tl.float32)
    if ADDED:
        added = tl.load(added_ptr + c, mask=inside, other=0).to(tl.float32)
    mean_of_channel += added
    mean = tl.sum(tl.where(inside, mean_of_channel, 0), axis=0) / width
    between = mean_of_channel - mean
    within = tl.maximum(two - one * one, 0)
    variance = tl.sum(tl.where(inside, within + between * between, 0), axis=0) / width
    inverse = 1 / tl.sqrt(variance + eps)
    gain = tl.load(weight_ptr + c, mask=inside, other=0).to(tl.float32)
    offset = tl.load(bias_ptr + c, mask=inside, other=0).to(tl.float32)
    if SCALED:
        scale_shift_ptr += image * 2 * channels
        scale = 1 + tl.load(scale_shift_ptr + c, mask=inside, other=0).to(tl.float32)
        gain = gain * scale
        offset = offset * scale + tl.load(scale_shift_ptr + channels + c, mask=inside, other=0).to(tl.float32)
    moved = (added - mean) * inverse
    stats_ptr += image * channels + c
    step = tl.num_programs(0) * channels
    tl.store(stats_ptr + A * step, gain * inverse, mask=inside)
    tl.store(stats_ptr + D * step, gain * moved + offset, mask=inside)
    tl.store(stats_ptr + U * step, tl.zeros((CHANNELS,), tl.float32) + inverse, mask=inside)
    tl.store(stats_ptr + V * step, moved, mask=inside)
    tl.store(stats_ptr + H * step, between * inverse, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def apply_affine(x_ptr, other_ptr, stats_ptr, out_ptr, positions, channels, stride, other_stride, rows,
                 ACTIVATE: tl.constexpr, OTHER: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """out (B, positions, C) = silu(A x + D) + other, without what ACTIVATE and OTHER leave out."""
    image = tl.program_id(2)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    step = tl.num_programs(2) * channels
    a = tl.load(stats_ptr + A * step + image * channels + c, mask=inside, other=0)[None, :]
    d = tl.load(stats_ptr + D * step + image * channels + c, mask=inside, other=0)[None, :]
    x_ptr += image.to(tl.int64) * positions * stride
    other_ptr += image.to(tl.int64) * positions * other_stride
    out_ptr += image.to(tl.int64) * positions * channels
    first = tl.program_id(0) * rows
    for begin in range(first, tl.minimum(first + rows, positions), ROWS):
        p = begin + tl.arange(0, ROWS)
        there = (p < positions)[:, None] & inside[None, :]
        p = p.to(tl.int64)[:, None]
        out = tl.load(x_ptr + p * stride + c[None, :], mask=there, other=0).to(tl.float32) * a + d
        if ACTIVATE:
            out = out / (1 + tl.exp(-out))
        if OTHER:
            out += tl.load(other_ptr + p * other_stride + c[None, :], mask=there, other=0).to(tl.float32)
        tl.store(out_ptr + p * channels + c[None, :], out.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=SIZES)
def partial_gradients(x_ptr, gradient_ptr, stats_ptr, sums_ptr, positions, channels, stride, gradient_stride, rows,
                      ACTIVATE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """sums (B, splits, 2, C) over `rows` positions: of the gradient before SiLU, and of it times the normalised x."""
    split, image = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    step = tl.num_programs(2) * channels
    a = tl.load(stats_ptr + A * step + image * channels + c, mask=inside, other=0)[None, :]
    d = tl.load(stats_ptr + D * step + image * channels + c, mask=inside, other=0)[None, :]
    u = tl.load(stats_ptr + U * step + image * channels + c, mask=inside, other=0)[None, :]
    v = tl.load(stats_ptr + V * step + image * channels + c, mask=inside, other=0)[None, :]
    x_ptr += image.to(tl.int64) * positions * stride
    gradient_ptr += image.to(tl.int64) * positions * gradient_stride
    one = tl.zeros((ROWS, CHANNELS), tl.float32)
    two = tl.zeros((ROWS, CHANNELS), tl.float32)
    for begin in range(split * rows, tl.minimum(split * rows + rows, positions), ROWS):
        p = begin + tl.arange(0, ROWS)
        there = (p < positions)[:, None] & inside[None, :]
        p = p.to(tl.int64)[:, None]
        x = tl.load(x_ptr + p * stride + c[None, :], mask=there, other=0).to(tl.float32)
        gradient = tl.load(gradient_ptr + p * gradient_stride + c[None, :], mask=there, other=0).to(tl.float32)
        gradient = activation_gradient(gradient, x, a, d, ACTIVATE)
        one += gradient
        two += gradient * (x * u + v)
    sums_ptr += (image * tl.num_programs(0) + split) * 2 * channels
    tl.store(sums_ptr + c, tl.sum(one, axis=0), mask=inside)
    tl.store(sums_ptr + channels + c, tl.sum(two, axis=0), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def finish_gradients(sums_ptr, stats_ptr, weight_ptr, bias_ptr, scale_shift_ptr, slopes_ptr, small_ptr, scaled_ptr,
                     positions, channels, width, splits, SCALED: tl.constexpr, SPLITS: tl.constexpr,
                     CHANNELS: tl.constexpr):
    """Of one image's group: slopes (2, B, C), small (3, B, C) and scaled (B, 2 C).

    The gradient of x is A g + slopes[0] x + slopes[1], g the gradient before SiLU. small: the gradients of the norm's
    weight and bias and of the convolution's bias, of this image alone; scaled: those of its scale and shift.
    """
    image, group = tl.program_id(0), tl.program_id(1)
    k = tl.arange(0, CHANNELS)
    inside = k < width
    c = group * width + k
    one, two = added_up(sums_ptr + image * splits * 2 * channels, c, inside, splits, channels, SPLITS, CHANNELS)
    gain = tl.load(weight_ptr + c, mask=inside, other=0).to(tl.float32)
    scale = tl.zeros((CHANNELS,), tl.float32) + 1
    if SCALED:
        offset = tl.load(bias_ptr + c, mask=inside, other=0).to(tl.float32)
        tl.store(scaled_ptr + image * 2 * channels + c, gain * two + offset * one, mask=inside)
        tl.store(scaled_ptr + image * 2 * channels + channels + c, one, mask=inside)
        scale += tl.load(scale_shift_ptr + image * 2 * channels + c, mask=inside, other=0).to(tl.float32)
        gain = gain * scale
    step = tl.num_programs(0) * channels
    place = image * channels + c
    a = tl.load(stats_ptr + A * step + place, mask=inside, other=0)
    u = tl.load(stats_ptr + U * step + place, mask=inside, other=0)
    v = tl.load(stats_ptr + V * step + place, mask=inside, other=0)
    h = tl.load(stats_ptr + H * step + place, mask=inside, other=0)
    count = positions * width
    constant = -u * (tl.sum(tl.where(inside, gain * one, 0), axis=0) / count)
    slope = -u * (tl.sum(tl.where(inside, gain * two, 0), axis=0) / count)
    tl.store(slopes_ptr + place, slope * u, mask=inside)
    tl.store(slopes_ptr + step + place, slope * v + constant, mask=inside)
    tl.store(small_ptr + place, scale * two, mask=inside)
    tl.store(small_ptr + step + place, scale * one, mask=inside)
    tl.store(small_ptr + 2 * step + place, a * one + (slope * h + constant) * positions, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def apply_gradient(x_ptr, gradient_ptr, stats_ptr, slopes_ptr, out_ptr, positions, channels, stride, gradient_stride,
                   rows, ACTIVATE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """out (B, positions, C), the gradient of x: A g + slopes[0] x + slopes[1]."""
    image = tl.program_id(2)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    step = tl.num_programs(2) * channels
    place = image * channels + c
    a = tl.load(stats_ptr + A * step + place, mask=inside, other=0)[None, :]
    d = tl.load(stats_ptr + D * step + place, mask=inside, other=0)[None, :]
    slope = tl.load(slopes_ptr + place, mask=inside, other=0)[None, :]
    constant = tl.load(slopes_ptr + step + place, mask=inside, other=0)[None, :]
    x_ptr += image.to(tl.int64) * positions * stride
    gradient_ptr += image.to(tl.int64) * positions * gradient_stride
    out_ptr += image.to(tl.int64) * positions * channels
    first = tl.program_id(0) * rows
    for begin in range(first, tl.minimum(first + rows, positions), ROWS):
        p = begin + tl.arange(0, ROWS)
        there = (p < positions)[:, None] & inside[None, :]
        p = p.to(tl.int64)[:, None]
        x = tl.load(x_ptr + p * stride + c[None, :], mask=there, other=0).to(tl.float32)
        gradient = tl.load(gradient_ptr + p * gradient_stride + c[None, :], mask=there, other=0).to(tl.float32)
        out = activation_gradient(gradient, x, a, d, ACTIVATE) * a + x * slope + constant
        tl.store(out_ptr + p * channels + c[None, :], out.to(out_ptr.dtype.element_ty), mask=there)
