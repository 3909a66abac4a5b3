"""Functions of tensors of fixed shapes, replayed as CUDA graphs: one launch in place of a thousand.

A graph holds what was launched while it was captured, with the addresses it used. So its inputs are copied to the
same place every time, and what it returns is overwritten by the next replay.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

WARM_UP = 3  # calls of a shape before it is captured: kernels are compiled and libraries choose algorithms in these
MOST_GRAPHS = 8  # shapes of which graphs are kept; others run launch by launch


Batches = Sequence[Sequence[Tensor]]


class Graph(NamedTuple):
    """A captured call: where its batches go, what it returns, and the gradients that it leaves in the parameters."""

    graph: torch.cuda.CUDAGraph
    batches: list[list[Tensor]]
    output: Tensor
    gradients: list[Tensor | None]


class Replayed:
    """`function` of batches (groups of tensors) on a GPU, replayed from the fourth call of the same shapes on.

    The function must not wait for the device, draw random numbers, or depend on anything but its batches and the values
    of `parameters`, whose gradients it may set (they must be None when it is called). Returns a tensor that the next
    call overwrites. Elsewhere, and while shapes still change, it is simply called.
    """

    def __init__(self, function: Callable[[Batches], Tensor], parameters: Sequence[nn.Parameter] = ()) -> None:
        self.function, self.parameters = function, parameters
        self.calls: dict[Hashable, int] = {}
        self.graphs: dict[Hashable, Graph] = {}

    def __call__(self, batches: Batches) -> Tensor:
        """function(batches)."""
        if not all(tensor.is_cuda for batch in batches for tensor in batch):
            return self.function(batches)
        shapes = tuple(tuple((tensor.shape, tensor.dtype, tensor.stride()) for tensor in batch) for batch in batches)
        if shapes not in self.graphs:
            self.calls[shapes] = self.calls.get(shapes, 0) + 1
            if self.calls[shapes] <= WARM_UP or len(self.graphs) >= MOST_GRAPHS:
                return self.function(batches)
            self.graphs[shapes] = self.capture(batches)
        graph = self.graphs[shapes]
        for places, batch in zip(graph.batches, batches, strict=True):
            torch._foreach_copy_(places, list(batch))
        graph.graph.replay()
        for parameter, gradient in zip(self.parameters, graph.gradients, strict=True):
            parameter.grad = gradient
        return graph.output

    def capture(self, batches: Batches) -> Graph:
        """The graph of one call."""
        places = [[tensor.clone() for tensor in batch] for batch in batches]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self.function(places)
        return Graph(graph, places, output, [parameter.grad for parameter in self.parameters])
