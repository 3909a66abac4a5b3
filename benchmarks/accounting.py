"""Memory of a training step by counting every tensor's bytes, without computing or allocating anything.

The step runs on fake tensors (shapes only); each storage counts from its first appearance until it is freed, as in a
caching allocator's "allocated". Not seen: what libraries take inside one operation, rounding, fragmentation.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import UntypedStorage, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.measuring import parameters
from benchmarks.networks import TrainingStep, ours
from core.convolutions import CHANNELS_LAST


class LiveBytes(TorchDispatchMode):
    """`live`: bytes of all storages that operations have given out and that are still held; `peak`: its maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it gives out."""
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.count(value.untyped_storage())
        return out

    def count(self, storage: UntypedStorage) -> None:
        """Add a storage not seen before, and take it off again when nothing holds it any more."""
        if storage not in self.known:
            size = storage.nbytes()
            self.known[storage] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.freed, size)

    def freed(self, size: int) -> None:
        """A storage of `size` bytes is gone."""
        self.live -= size


def lie_channels_last(network: nn.Module) -> None:
    """As `network.to(memory_format=...)`, which fake tensors do not allow."""
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.ndim > 3:
                layout = CHANNELS_LAST[weight.ndim - 2]
                module._parameters[name] = nn.Parameter(weight.detach().contiguous(memory_format=layout))


def account(base: int, size: list[int], batch: int, linear_attention: bool, precision: str,
            checkpointing: bool) -> dict[str, float]:
    """MiB of the peak of the second optimiser step of our network, and what it consists of.

    `rest` is what the peak holds beyond weights, their gradients, moving average and AdamW's two averages: mostly
    activations; where the peak is not at the end of the backward pass, gradients not yet made leave room in it.
    """
    with FakeTensorMode(), LiveBytes() as bytes_:
        network = ours(base, tuple(size), linear_attention)
        network.activation_checkpointing = checkpointing
        lie_channels_last(network)
        step = TrainingStep(network, torch.rand((batch, 1, *size)))
        step(precision)
        bytes_.peak = bytes_.live
        step(precision)
        weights = 4 * parameters(network)
    found = {"weights": weights, "gradients": weights, "average": weights, "adamw": 2 * weights, "peak": bytes_.peak,
             "rest": bytes_.peak - 5 * weights}
    return {name: value / 2**20 for name, value in found.items()}
