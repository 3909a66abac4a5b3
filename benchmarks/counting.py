"""What a training step asks of a GPU, counted on fake tensors: operations, bytes, copies; and how long that takes.

Every operation is classed, its FLOPs and the bytes of its inputs and outputs are added up; views cost nothing. What
CUDA does besides is added: GroupNorm and convolutions copy maps that do not lie as their kernels want them. The times
are a roofline: an operation takes what its FLOPs or its bytes take, the longer, and a launch.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.accounting import lie_channels_last
from benchmarks.measuring import table
from benchmarks.networks import NETWORKS, TrainingStep
from core.errors import CommandParser, run_command
from core.networks.convolutions import CHANNELS_LAST
from core.networks.fused_norm import switched

# One H100 80 GB, bf16: what its convolutions and its passes over large maps reach, and the least time of a kernel.
FLOPS_PER_SECOND, BYTES_PER_SECOND, SECONDS_PER_KERNEL = 6.0e14, 2.1e12, 2.5e-6
SLOW_BYTES_PER_SECOND = {"layout copies": 6.1e11, "PyTorch's GroupNorm": 6.5e11}  # 109 and 63 ms of 303
# A softmax along an axis that is not the last: one thread walks a column, forwards and back (295 ms for 174,080).
SECONDS_PER_STRIDED_POSITION = 1.69e-6
PRODUCTS = ("convolution", "mm", "bmm", "addmm", "baddbmm", "attention")
NORMS = ("norm", "softmax", "standardize", "var_mean")
PASSES = {"norm": 2, "norm_backward": 2}  # how often a kernel of ours reads the maps it is given
KERNELS = {"norm": 3, "norm_backward": 4, "see_keys": 9, "convolution": 2, "convolution_backward": 5,
           "standardize_backward": 1, "_fused_adamw_": 10, "_foreach_lerp_": 10}
SEES_PRODUCTS = {"see_keys": 2, "see_keys_backward": 5, "read_queries": 2, "read_queries_backward": 5}


@dataclass
class Totals:
    """Of one class of operations: how many, kernels, FLOPs, bytes, seconds on an H100."""

    operations: int = 0
    kernels: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    shapes: list[torch.Size] = field(default_factory=list)  # of what comes out


def nbytes(values: Any) -> int:
    """Bytes of all tensors in nested `values`; a number seen through an expanded axis counts once."""
    total = 0
    for tensor in tree_leaves(values):
        if isinstance(tensor, Tensor):
            shown = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0]
            total += torch.Size(shown).numel() * tensor.element_size()
    return total


def lies_densely(x: Tensor) -> bool:
    """Whether a map (B, C, *size) lies channels last without gaps."""
    return x.ndim not in (4, 5) or x.is_contiguous(memory_format=CHANNELS_LAST[x.ndim - 2])


def free(function: Any) -> bool:
    """Whether an operation moves nothing: views, questions, memory taken and not yet written."""
    returns, name = function._schema.returns, function._schema.name
    view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
    return view or name.startswith("prim::") or "empty" in name or name == "aten::_unsafe_view"


class Counted(TorchDispatchMode):
    """`kinds`: Totals by class. A layout copy has unlike orders of axes on its two sides, a slice copy has not."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[str, Totals] = defaultdict(Totals)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        out = function(*args, **(kwargs or {}))
        if not free(function):
            self.count(function, args, kwargs or {}, out)
        return out

    def count(self, function: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Add one operation to its class."""
        name = function._schema.name.rpartition("::")[2]
        moved = nbytes((args, kwargs)) * PASSES.get(name, 1) + nbytes(out)
        flops = 0
        if name in SEES_PRODUCTS:
            flops = 2 * SEES_PRODUCTS[name] * args[0].numel() * len(args[1])
        elif function._overloadpacket in flop_registry:
            flops = flop_registry[function._overloadpacket](*args, **kwargs, out_val=out)
        shapes = [tensor.shape for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        self.add(self.kind_of(name, args, out), KERNELS.get(name, 1), flops, moved, shapes)
        if name == "convolution" and args[2] is not None:
            self.add("other elementwise", 1, 0, 2 * nbytes(out), [out.shape])
        if name in ("convolution", "convolution_backward", "native_group_norm", "native_group_norm_backward"):
            self.add_copies(name, [x for x in args[:2] if isinstance(x, Tensor)])

    def kind_of(self, name: str, args: Any, out: Any) -> str:
        """The class of an operation."""
        if name in ("clone", "copy_", "_to_copy"):
            source = args[1] if name == "copy_" else args[0]
            target = args[0] if name == "copy_" else out
            if order(source) != order(target):
                return "layout copies"
            return "other elementwise" if lies_densely(source) else "slice copies"
        if name in SEES_PRODUCTS or any(name.startswith(word) or word in name for word in PRODUCTS):
            return "convolutions and products"
        if "native_group_norm" in name:
            return "PyTorch's GroupNorm"
        return "normalisation" if any(word in name for word in NORMS) else "other elementwise"

    def add_copies(self, name: str, maps: list[Tensor]) -> None:
        """What CUDA's convolutions and GroupNorm copy first: maps that do not lie as they want them."""
        for x in maps:
            if x.ndim not in (4, 5) or x.shape[1] == 1:
                continue
            wanted = x.is_contiguous() if "group_norm" in name else lies_densely(x)
            if not wanted:
                contiguous = order(x) == tuple(range(x.ndim)) or "group_norm" in name
                self.add("layout copies" if contiguous else "slice copies", 1, 0, 2 * nbytes(x), [x.shape])

    def add(self, kind: str, kernels: int, flops: float, moved: float, shapes: list[torch.Size]) -> None:
        """Add figures to a class."""
        totals = self.kinds[kind]
        totals.shapes += shapes
        totals.operations += 1
        totals.kernels += kernels
        totals.flops += flops
        totals.bytes += moved
        moving = moved / SLOW_BYTES_PER_SECOND.get(kind, BYTES_PER_SECOND)
        totals.seconds += max(flops / FLOPS_PER_SECOND, moving) + kernels * SECONDS_PER_KERNEL


def order(x: Tensor) -> tuple[int, ...]:
    """Its axes longer than 1 from the slowest to the fastest."""
    return tuple(sorted((axis for axis in range(x.ndim) if x.shape[axis] > 1), key=lambda axis: -x.stride()[axis]))


def count_step(name: str, base: int, size: tuple[int, ...], batch: int, linear_attention: bool = True,
               precision: str = "bf16", fused: bool = True) -> dict[str, Totals]:
    """Totals by class of one optimiser step of a network of `benchmarks.networks`, as a GPU would run it.

    Not `fused`: with PyTorch's own normalisation, activations and standardisation, as on a CPU.
    """
    with ExitStack() as stack:
        for context in (FakeTensorMode(), switched("on", fused), switched("fake", True)):
            stack.enter_context(context)
        network: nn.Module = NETWORKS[name](base, size, linear_attention)
        if name == "ours":
            lie_channels_last(network)
        step = TrainingStep(network, torch.rand((batch, 1, *size)))
        step(precision)
        with Counted() as counted:
            step(precision)
    return dict(counted.kinds)


def seconds(kinds: dict[str, Totals], strided_positions: int = 0) -> float:
    """Estimated seconds of a step on an H100; `strided_positions`: of softmaxes along strided axes."""
    return sum(t.seconds for t in kinds.values()) + strided_positions * SECONDS_PER_STRIDED_POSITION


def positions_of_keys(side: int, dims: int, levels: int = 4) -> int:
    """Positions over which the keys of linear attention are normalised, all levels down and up."""
    return 2 * sum((side // 2**level) ** dims for level in range(levels))


@dataclass(frozen=True)
class Case:
    """A step that one H100 80 GB (torch 2.11, bf16) has run: what was run, and milliseconds (None: not yet).

    `strided`: the keys' softmax walked along a strided axis, as up to November 2026.
    """

    title: str
    milliseconds: float | None
    name: str
    base: int
    size: tuple[int, ...]
    batch: int
    linear_attention: bool = True
    fused: bool = True
    strided: bool = False

    def count(self) -> dict[str, Totals]:
        """See `count_step`."""
        return count_step(self.name, self.base, self.size, self.batch, self.linear_attention, fused=self.fused)

    def estimate(self, kinds: dict[str, Totals]) -> float:
        """Milliseconds that the counted step is estimated to take."""
        positions = positions_of_keys(self.size[0], len(self.size)) if self.strided else 0
        return 1000 * seconds(kinds, positions)


FLAT = (256, 256)
CASES = (
    Case("before", 602, "ours", 64, FLAT, 32, fused=False, strided=True),
    Case("before, without linear attention", 227, "ours", 64, FLAT, 32, False, fused=False),
    Case("before", 403, "ours", 64, FLAT, 8, fused=False, strided=True),
    Case("before", 659, "ours", 128, FLAT, 16, fused=False, strided=True),
    Case("before", 799, "ours", 256, FLAT, 8, fused=False, strided=True),
    Case("before, keys' softmax along the last axis", 306, "ours", 64, FLAT, 32, fused=False),
    Case("MONAI", 291, "monai", 64, FLAT, 32), Case("lucidrains", 450, "lucidrains", 64, FLAT, 32),
    Case("now", 89.9, "ours", 64, FLAT, 32), Case("now", 28.9, "ours", 64, FLAT, 8),
    Case("now", 114.8, "ours", 128, FLAT, 16), Case("now", 189.7, "ours", 256, FLAT, 8),
    Case("now", 35.4, "ours", 32, (96, 96, 96), 1))


def row_of(case: Case) -> list[str]:
    """What is shown of one case."""
    kinds = case.count()
    estimate = case.estimate(kinds)
    known = ["", ""] if case.milliseconds is None else [
        f"{case.milliseconds:g}", f"{estimate / case.milliseconds:.2f}"]
    copies = kinds.get("layout copies", Totals())
    return [case.title, str(case.base), "x".join(map(str, case.size)), str(case.batch),
            str(sum(t.kernels for t in kinds.values())), str(copies.operations), f"{copies.bytes / 1e9:.1f}",
            f"{sum(t.bytes for t in kinds.values()) / 1e9:.0f}", f"{sum(t.flops for t in kinds.values()) / 1e12:.1f}",
            f"{estimate:.0f}", *known]


def main() -> None:
    """Command line."""
    parser = CommandParser(prog="python -m benchmarks.counting", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter,
                           epilog="example: python -m benchmarks.counting --networks ours")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=["ours", "monai", "lucidrains"])
    options = parser.parse_args()
    rows = [row_of(case) for case in CASES if case.name in options.networks]
    print(table(["network", "base", "size", "batch", "kernels", "layout copies", "GB of them", "GB in all", "TFLOP",
                 "estimated ms", "measured ms", "estimated / measured"], rows))


if __name__ == "__main__":
    run_command(main)
