"""Triton kernels of `core.networks.fused_attention`: linear attention that never writes its queries, keys or values.

Rows are (B, positions, C); F = heads * width features. Every program takes the tiles of some of an image's positions;
what it sums up it writes as its own part of (B, splits, ...), which the caller adds up: no order of programs matters.
"""

# mypy: ignore-errors
# A kernel is in Triton's language, not in Python: its values have no Python types.

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = ["positions", "tiles"]  # one compiled kernel for all their values


@triton.jit
def tile_of(ptr, begin, positions, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """(ROWS, CHANNELS) of one image's rows from position `begin` on, 0 where there are none."""
    p, c = begin + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    there = (p < positions)[:, None] & (c < channels)[None, :]
    return tl.load(ptr + p.to(tl.int64)[:, None] * channels + c[None, :], mask=there, other=0)


@triton.jit
def write_tile(ptr, value, begin, positions, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write what `tile_of` would read."""
    p, c = begin + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    there = (p < positions)[:, None] & (c < channels)[None, :]
    tl.store(ptr + p.to(tl.int64)[:, None] * channels + c[None, :], value.to(ptr.dtype.element_ty), mask=there)


@triton.jit
def matrix(ptr, channels, FEATURES: tl.constexpr, CHANNELS: tl.constexpr):
    """(FEATURES, CHANNELS), 0 beyond the channels."""
    f, c = tl.arange(0, FEATURES), tl.arange(0, CHANNELS)
    return tl.load(ptr + f[:, None] * channels + c[None, :], mask=(c < channels)[None, :], other=0)


@triton.jit
def write_matrix(ptr, value, channels, FEATURES: tl.constexpr, CHANNELS: tl.constexpr):
    """Write what `matrix` would read."""
    f, c = tl.arange(0, FEATURES), tl.arange(0, CHANNELS)
    tl.store(ptr + f[:, None] * channels + c[None, :], value, mask=(c < channels)[None, :])


@triton.jit
def product(a, b):
    """a @ b, summed up in float32, without rounding float32 factors to tf32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def head_softmax(scores, ROWS: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr):
    """Softmax over each head's WIDTH features."""
    heads = tl.reshape(scores, (ROWS, FEATURES // WIDTH, WIDTH))
    heads = tl.exp(heads - tl.max(heads, axis=2, keep_dims=True))
    return tl.reshape(heads / tl.sum(heads, axis=2, keep_dims=True), (ROWS, FEATURES))


@triton.jit
def head_sums(values, ROWS: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr):
    """For each feature the sum over those of its head."""
    heads = tl.reshape(values, (ROWS, FEATURES // WIDTH, WIDTH))
    total = tl.sum(heads, axis=2, keep_dims=True)
    return tl.reshape(tl.broadcast_to(total, (ROWS, FEATURES // WIDTH, WIDTH)), (ROWS, FEATURES))


@triton.jit(do_not_specialize=COUNTS)
def see_keys(rows_ptr, to_key_ptr, peaks_ptr, totals_ptr, seen_ptr, positions, channels, tiles, ROWS: tl.constexpr,
             FEATURES: tl.constexpr, CHANNELS: tl.constexpr):
    """Of `tiles` tiles: each key's peak over positions m, the sum of exp(k - m), and exp(k - m)^T rows."""
    image, part = tl.program_id(1), tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    rows_ptr += image.to(tl.int64) * positions * channels
    to_key = matrix(to_key_ptr, channels, FEATURES, CHANNELS).T
    peak = tl.full((FEATURES,), -float("inf"), tl.float32)
    total = tl.zeros((FEATURES,), tl.float32)
    seen = tl.zeros((FEATURES, CHANNELS), tl.float32)
    first = tl.program_id(0) * tiles * ROWS
    for begin in range(first, tl.minimum(first + tiles * ROWS, positions), ROWS):
        rows = tile_of(rows_ptr, begin, positions, channels, ROWS, CHANNELS)
        there = (begin + tl.arange(0, ROWS) < positions)[:, None]
        keys = tl.where(there, product(rows, to_key), -float("inf"))
        higher = tl.maximum(peak, tl.max(keys, axis=0))
        keys = tl.exp(keys - higher[None, :])
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(keys, axis=0)
        seen = seen * shrink[:, None] + product(keys.to(rows.dtype).T, rows)
        peak = higher
    f = tl.arange(0, FEATURES)
    tl.store(peaks_ptr + part * FEATURES + f, peak)
    tl.store(totals_ptr + part * FEATURES + f, total)
    write_matrix(seen_ptr + part * FEATURES * channels, seen, channels, FEATURES, CHANNELS)


@triton.jit(do_not_specialize=COUNTS)
def key_gradients(rows_ptr, to_key_ptr, levels_ptr, to_seen_ptr, means_ptr, to_rows_ptr, to_weight_ptr, positions,
                  channels, tiles, ROWS: tl.constexpr, FEATURES: tl.constexpr, CHANNELS: tl.constexpr):
    """Gradients of the rows and (parts of) the keys' weights, from those of seen = k^T rows, k = exp(scores - level).

    `means` (B, F) is the gradient of each key summed over positions with the keys as weights: seen * to_seen summed.
    """
    image, part = tl.program_id(1), tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    rows_ptr += image.to(tl.int64) * positions * channels
    to_rows_ptr += image.to(tl.int64) * positions * channels
    f = tl.arange(0, FEATURES)
    level = tl.load(levels_ptr + image * FEATURES + f)[None, :]
    mean = tl.load(means_ptr + image * FEATURES + f)[None, :]
    to_key = matrix(to_key_ptr, channels, FEATURES, CHANNELS)
    to_seen = matrix(to_seen_ptr + image * FEATURES * channels, channels, FEATURES, CHANNELS)
    to_weight = tl.zeros((FEATURES, CHANNELS), tl.float32)
    first = tl.program_id(0) * tiles * ROWS
    for begin in range(first, tl.minimum(first + tiles * ROWS, positions), ROWS):
        rows = tile_of(rows_ptr, begin, positions, channels, ROWS, CHANNELS)
        there = (begin + tl.arange(0, ROWS) < positions)[:, None]
        keys = tl.where(there, tl.exp(product(rows, to_key.T) - level), 0)
        gradient = (keys * (product(rows, to_seen.T) - mean)).to(rows.dtype)
        to_rows = product(gradient, to_key) + product(keys.to(rows.dtype), to_seen)
        write_tile(to_rows_ptr, to_rows, begin, positions, channels, ROWS, CHANNELS)
        to_weight += product(gradient.T, rows)  # rows beyond the last are 0
    write_matrix(to_weight_ptr + part * FEATURES * channels, to_weight, channels, FEATURES, CHANNELS)


@triton.jit(do_not_specialize=COUNTS)
def read_queries(rows_ptr, to_query_ptr, read_ptr, out_ptr, positions, channels, tiles, ROWS: tl.constexpr,
                 FEATURES: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """out (B, positions, C) = q read, q the softmax of the queries over each head's features."""
    image = tl.program_id(1)
    rows_ptr += image.to(tl.int64) * positions * channels
    out_ptr += image.to(tl.int64) * positions * channels
    to_query = matrix(to_query_ptr, channels, FEATURES, CHANNELS).T
    read = matrix(read_ptr + image * FEATURES * channels, channels, FEATURES, CHANNELS)
    first = tl.program_id(0) * tiles * ROWS
    for begin in range(first, tl.minimum(first + tiles * ROWS, positions), ROWS):
        rows = tile_of(rows_ptr, begin, positions, channels, ROWS, CHANNELS)
        query = head_softmax(product(rows, to_query), ROWS, FEATURES, WIDTH)
        write_tile(out_ptr, product(query.to(rows.dtype), read), begin, positions, channels, ROWS, CHANNELS)


@triton.jit(do_not_specialize=COUNTS)
def query_gradients(rows_ptr, to_query_ptr, read_ptr, gradient_ptr, to_rows_ptr, to_read_ptr, to_weight_ptr, positions,
                    channels, tiles, ROWS: tl.constexpr, FEATURES: tl.constexpr, CHANNELS: tl.constexpr,
                    WIDTH: tl.constexpr):
    """Gradients of the rows and (parts of) those of `read` and the queries' weights, from the output's."""
    image, part = tl.program_id(1), tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    shift = image.to(tl.int64) * positions * channels
    to_query = matrix(to_query_ptr, channels, FEATURES, CHANNELS)
    read = matrix(read_ptr + image * FEATURES * channels, channels, FEATURES, CHANNELS)
    to_weight = tl.zeros((FEATURES, CHANNELS), tl.float32)
    to_read = tl.zeros((FEATURES, CHANNELS), tl.float32)
    first = tl.program_id(0) * tiles * ROWS
    for begin in range(first, tl.minimum(first + tiles * ROWS, positions), ROWS):
        rows = tile_of(rows_ptr + shift, begin, positions, channels, ROWS, CHANNELS)
        gradient = tile_of(gradient_ptr + shift, begin, positions, channels, ROWS, CHANNELS)
        query = head_softmax(product(rows, to_query.T), ROWS, FEATURES, WIDTH)
        to_read += product(query.to(rows.dtype).T, gradient)
        along = product(gradient, read.T)
        along = (query * (along - head_sums(query * along, ROWS, FEATURES, WIDTH))).to(rows.dtype)
        write_tile(to_rows_ptr + shift, product(along, to_query), begin, positions, channels, ROWS, CHANNELS)
        to_weight += product(along.T, rows)
    write_matrix(to_read_ptr + part * FEATURES * channels, to_read, channels, FEATURES, CHANNELS)
    write_matrix(to_weight_ptr + part * FEATURES * channels, to_weight, channels, FEATURES, CHANNELS)
