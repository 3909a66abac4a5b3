"""Memory of a training step by counting every tensor's bytes, without computing or allocating anything.

The step runs on fake tensors (shapes only); each storage counts from its first appearance until it is freed, as in a
caching allocator's "allocated". Not seen: what libraries take inside one operation, rounding, fragmentation.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from benchmarks.measuring import parameters
from benchmarks.networks import TrainingStep, ours
from core.networks.convolutions import CHANNELS_LAST
from core.networks.fused_norm import switched
from core.training.memory import LiveBytes


def lie_channels_last(network: nn.Module) -> None:
    """As `network.to(memory_format=...)`, which fake tensors do not allow."""
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.ndim > 3:
                layout = CHANNELS_LAST[weight.ndim - 2]
                module._parameters[name] = nn.Parameter(weight.detach().contiguous(memory_format=layout))


def account(base: int, size: list[int], batch: int, linear_attention: bool, precision: str,
            checkpointing: bool, gpu: bool) -> dict[str, float]:
    """MiB of the peak of the second optimiser step of our network, and what it consists of, on a GPU or a CPU.

    `rest` is what the peak holds beyond weights, their gradients, moving average and AdamW's two averages: mostly
    activations; where the peak is not at the end of the backward pass, gradients not yet made leave room in it.
    """
    with FakeTensorMode(), switched("fake", gpu), LiveBytes() as bytes_:
        network = ours(base, tuple(size), linear_attention)
        network.activation_checkpointing = checkpointing
        lie_channels_last(network)
        step = TrainingStep(network, torch.rand((batch, 1, *size)))
        step(precision)
        bytes_.peak = bytes_.live
        step(precision)
        weights = 4 * parameters(network)
    sizes = {"weights": weights, "gradients": weights, "average": weights, "adamw": 2 * weights, "peak": bytes_.peak,
             "rest": bytes_.peak - 5 * weights}
    return {name: value / 2**20 for name, value in sizes.items()}
