"""Convolutions of the diffusion U-Net in any number of dimensions: plain, standardised, to half and double size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.conv import _ConvNd


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> Tensor:
    """F.conv3d, in float32 where torch's bf16 weight gradient is wrong: on a CPU, inputs of depth 2 (torch 2.14)."""
    if x.shape[2] == 2 and x.device.type == "cpu" and x.dtype != torch.float64:
        with torch.autocast("cpu", enabled=False):
            return F.conv3d(x.float(), weight.float(), None if bias is None else bias.float(), stride, padding)
    return F.conv3d(x, weight, bias, stride, padding)


class Conv3d(nn.Conv3d):
    """nn.Conv3d of stride 1 through `conv3d`."""

    padding: tuple[int, ...]  # in pixels, never by name

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv3d(x, weight, bias, 1, self.padding[0])


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: Conv3d}
ANY_CONV: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}  # of any stride, dilation and groups
BATCH_NORM: dict[int, Callable[[int], nn.Module]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
AVERAGE_POOL: dict[int, Callable[[int], nn.Module]] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAX_POOL: dict[int, Callable[..., Tensor]] = {2: F.max_pool2d, 3: F.max_pool3d}
LINEAR = {2: "bilinear", 3: "trilinear"}
CONV_FUNCTION: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: conv3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def weight_and_bias(part: nn.Module) -> tuple[Tensor, Tensor]:
    """Those of a convolution that has both; TypeError for any other part of a network."""
    if not isinstance(part, _ConvNd) or part.bias is None:
        raise TypeError(f"{type(part).__name__} is no convolution with a bias")
    return part.weight, part.bias


class Standardize(torch.autograd.Function):
    """(weight - mean) / sqrt(variance + eps) over each filter, biased variance."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """(O, I, *kernel) -> the same in `dtype`."""
        filters = tuple(range(1, weight.ndim))
        mean = weight.mean(filters, keepdim=True)
        centred = weight - mean
        norm = torch.linalg.vector_norm(centred, dim=filters, keepdim=True)  # ten times as fast as var_mean on a CPU
        inverse = torch.rsqrt(norm.square() / weight[0].numel() + eps)
        ctx.save_for_backward(weight, mean, inverse)
        return centred.mul_(inverse).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """With s the standardised weight and g its gradient: inverse * (g - mean(g) - s * mean(g * s))."""
        weight, mean, inverse = ctx.saved_tensors
        filters = tuple(range(1, weight.ndim))
        gradient = gradient.to(weight.dtype)
        along_one = gradient.mean(filters, keepdim=True)
        along_weight = ((gradient * weight).mean(filters, keepdim=True) - along_one * mean) * inverse
        slope = -inverse.square() * along_weight
        constant = -along_one * inverse - mean * slope
        return torch.addcmul(constant, weight, slope).addcmul_(gradient, inverse), None, None


def standardization_eps(dtype: torch.dtype) -> float:
    """What is added to a filter's variance: 1e-3 in half precision, else 1e-5."""
    return 1e-5 if dtype in (torch.float32, torch.float64) else 1e-3


class StandardizedConv(nn.Module):
    """3^D convolution whose weights are standardised over each filter (Qiao et al. 2019): biased variance.

    `ready`: the standardised weights, where a network has made those of all its convolutions at once.
    """

    ready: Tensor | None = None

    def __init__(self, dims: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        reference = CONV[dims](channels_in, channels_out, 3, padding=1)
        self.weight, self.bias = reference.weight, reference.bias
        self.convolve = CONV_FUNCTION[dims]

    def forward(self, x: Tensor, biased: bool = True) -> Tensor:
        """(B, channels_in, *size) -> (B, channels_out, *size); without its bias where the caller adds that."""
        weight = self.ready
        if weight is None:
            weight = self.weight.float() if self.weight.dtype == torch.bfloat16 else self.weight
            weight = Standardize.apply(weight, standardization_eps(x.dtype), x.dtype)
        bias = self.bias.to(x.dtype) if biased and self.bias is not None else None
        return self.convolve(x, weight, bias, padding=1)


class Downsample(nn.Sequential):
    """2^D pixels to channels, order (channel, offsets in axis order), then a 1x1 convolution: one strided convolution.

    The convolution is child 1, as in the published weights.
    """

    def __init__(self, dims: int, channels_in: int, channels_out: int) -> None:
        super().__init__(nn.Identity(), CONV[dims](channels_in * 2**dims, channels_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C', *size / 2)."""
        dims, (weight, bias) = x.ndim - 2, weight_and_bias(self[1])
        weight = weight.flatten(1).unflatten(1, (-1, *(2,) * dims))
        return CONV_FUNCTION[dims](x, weight, bias, stride=2)


class Upsample(nn.Sequential):
    """Every pixel repeated 2^D times, then a 3^D convolution: one transposed convolution, with 2^D
    products a pixel in place of 3^D.

    A kernel of 3 over pairs of equal pixels has the weights (c, b + c, a + b, a) over the pixels themselves. The
    convolution is child 1, as in the published weights.
    """

    def __init__(self, dims: int, channels_in: int, channels_out: int) -> None:
        super().__init__(nn.Identity(), CONV[dims](channels_in, channels_out, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *size) -> (B, C', 2 * *size)."""
        dims, (weight, bias) = x.ndim - 2, weight_and_bias(self[1])
        for _ in range(dims):
            a, b, c = weight.unbind(2)
            weight = torch.stack((c, b + c, a + b, a), dim=-1)
        return CONV_TRANSPOSE[dims](x, weight.transpose(0, 1), bias, stride=2, padding=1)
