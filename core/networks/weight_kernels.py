"""Triton kernels of `core.networks.fused_weights`: the filters of many convolutions standardised by one launch.

A filter is a row of neighbouring numbers wherever it lies: `table` (filters, 3) int64 holds for each its address, its
length and its place in a flat output. The weights stay where the optimiser has them.
"""

# mypy: ignore-errors
# A kernel is in Triton's language, not in Python: its values have no Python types.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def standardize_filters(table_ptr, out_ptr, moments_ptr, eps, BLOCK: tl.constexpr):
    """out = (weight - mean) / sqrt(variance + eps) of each filter; moments (filters, 2): mean, 1 / root."""
    row = tl.program_id(0).to(tl.int64)
    weight_ptr = tl.load(table_ptr + 3 * row).to(tl.pointer_type(tl.float32))
    length = tl.load(table_ptr + 3 * row + 1)
    out_ptr += tl.load(table_ptr + 3 * row + 2)
    k = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, length, BLOCK):
        total += tl.load(weight_ptr + begin + k, mask=begin + k < length, other=0)
    mean = tl.sum(total, axis=0) / length
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, length, BLOCK):
        centred = tl.load(weight_ptr + begin + k, mask=begin + k < length, other=0) - mean
        total += tl.where(begin + k < length, centred * centred, 0)
    inverse = 1 / tl.sqrt(tl.sum(total, axis=0) / length + eps)
    for begin in range(0, length, BLOCK):
        value = (tl.load(weight_ptr + begin + k, mask=begin + k < length, other=0) - mean) * inverse
        tl.store(out_ptr + begin + k, value.to(out_ptr.dtype.element_ty), mask=begin + k < length)
    tl.store(moments_ptr + 2 * row, mean)
    tl.store(moments_ptr + 2 * row + 1, inverse)


@triton.jit
def filter_gradients(table_ptr, moments_ptr, gradient_ptr, out_ptr, BLOCK: tl.constexpr):
    """With s the standardised filter and g its gradient: out = (g - mean(g) - s mean(g s)) / root."""
    row = tl.program_id(0).to(tl.int64)
    weight_ptr = tl.load(table_ptr + 3 * row).to(tl.pointer_type(tl.float32))
    length = tl.load(table_ptr + 3 * row + 1)
    place = tl.load(table_ptr + 3 * row + 2)
    gradient_ptr += place
    out_ptr += place
    mean, inverse = tl.load(moments_ptr + 2 * row), tl.load(moments_ptr + 2 * row + 1)
    k = tl.arange(0, BLOCK)
    one = tl.zeros((BLOCK,), tl.float32)
    two = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, length, BLOCK):
        there = begin + k < length
        gradient = tl.load(gradient_ptr + begin + k, mask=there, other=0).to(tl.float32)
        one += gradient
        two += gradient * (tl.load(weight_ptr + begin + k, mask=there, other=0) - mean) * inverse
    along_one = tl.sum(one, axis=0) / length
    along_weight = tl.sum(two, axis=0) / length
    for begin in range(0, length, BLOCK):
        there = begin + k < length
        gradient = tl.load(gradient_ptr + begin + k, mask=there, other=0).to(tl.float32)
        weight = (tl.load(weight_ptr + begin + k, mask=there, other=0) - mean) * inverse
        tl.store(out_ptr + begin + k, (gradient - along_one - weight * along_weight) * inverse, mask=there)
