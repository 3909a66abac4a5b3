"""What a training step takes of a GPU's memory, counted beforehand; and how it is made to fit.

The step's forward and backward passes run on fake tensors: shapes and lifetimes without numbers, as a GPU's allocator
would see them. Where the step is too large, its micro-batches are taken apart, and then activations are recomputed.
"""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from core.errors import UserError
from core.networks.fused_norm import switched
from core.networks.unet import UNet
from core.training.device import autocast, memory_format

# What an H100's allocator held beyond weights, average and AdamW was 1.01 to 1.24 times what is counted (batch 32 and 8
# at base 64, batch 8 at base 256): libraries' workspaces, and a captured graph beside the launched steps before it.
MARGIN = 1.3
RESERVED_BYTES = 2**30  # for validation, pictures, a process that scores, and gaps between blocks
MOST_PARTS = 4  # of a micro-batch before activations are recomputed, which costs a third more time

Setting = Literal["auto"] | bool
_counts: dict[Hashable, int] = {}


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
            if isinstance(value, Tensor):
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


class Step(NamedTuple):
    """A training step of one micro-batch, for counting.

    `inputs(images)` are what the network takes for so many of them, `loss` makes a number of its outputs; both are
    called on fake tensors. `averaged`: there is a moving average of the weights.
    """

    network: UNet
    inputs: Callable[[int], tuple[Tensor, ...]]
    loss: Callable[[Tensor], Tensor]
    precision: str
    averaged: bool


class Fit(NamedTuple):
    """How a step fits: images that pass the network at once, whether activations are recomputed, and bytes it takes."""

    images: int
    recomputing: bool
    needed: int


def fake_copy(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with fake weights, which lie as they will on `device`; call it within a FakeTensorMode."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        layout = memory_format(tensor.ndim, device)
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, memory_format=layout)
        memo[id(tensor)] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(network, memo)


def counted_pass(step: Step, images: int, recomputing: bool, device: torch.device) -> int:
    """Bytes of the peak of a forward and backward pass of `images` images, gradients included, weights not."""
    with FakeTensorMode(), switched("fake", device.type == "cuda"):
        inputs = step.inputs(images)
        shapes = tuple(tensor.shape for tensor in inputs)
        key = (repr(step.network), images, recomputing, step.precision, device.type, shapes)
        if key not in _counts:
            network = fake_copy(step.network, device)
            network.activation_checkpointing = recomputing  # type: ignore[assignment]  # no tensor
            with LiveBytes() as bytes_:
                for tensor in (*network.parameters(), *network.buffers()):
                    bytes_.known[tensor.untyped_storage()] = 0
                with autocast(torch.device("cpu"), step.precision):
                    loss = step.loss(network(*inputs))
                loss.backward()
                _counts[key] = bytes_.peak
    return _counts[key]


def step_bytes(step: Step, images: int, recomputing: bool, device: torch.device) -> int:
    """Bytes that a training takes of `device` where `images` images pass the network at once."""
    weights = sum(parameter.nbytes for parameter in step.network.parameters())
    kept = weights * (4 if step.averaged else 3)  # with AdamW's two averages
    return kept + math.ceil(MARGIN * counted_pass(step, images, recomputing, device)) + RESERVED_BYTES


def splits(batch: int) -> list[int]:
    """Images at once, from all of a micro-batch down to one, as it is taken apart into 1, 2, 3, ... even parts."""
    return sorted({math.ceil(batch / parts) for parts in range(1, batch + 1)}, reverse=True)


def fit(needed: Callable[[int, bool], int], batch: int, setting: Setting, free: int) -> Fit | None:
    """The fastest way in which a micro-batch of `batch` images fits into `free` bytes; None where none does.

    `needed(images, recomputing)` are the bytes where so many images pass the network at once. Where `setting` leaves it
    open, a micro-batch is taken apart into MOST_PARTS before activations are recomputed.
    """
    few = math.ceil(batch / MOST_PARTS)
    ways = [(images, recomputing) for recomputing in ([False, True] if setting == "auto" else [setting])
            for images in splits(batch) if setting != "auto" or recomputing or images >= few]
    for images, recomputing in ways:
        bytes_ = needed(images, recomputing)
        if bytes_ <= free:
            return Fit(images, recomputing, bytes_)
    return None


def free_bytes(device: torch.device) -> int:
    """Of a GPU's memory, what this process can take now."""
    gc.collect()  # the training before: its graphs hold its network, which holds them
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def fit_step(step: Step, batch: int, setting: Setting, device: torch.device, key: str, free: int | None = None
             ) -> int | None:
    """Images that may pass the network at once, None = any number; says so, and sets activation_checkpointing.

    `setting` is experiment.activation_checkpointing, `key` that of the micro-batch's size, `free` the bytes there are
    (None: what a GPU has; on a CPU nothing is counted). Raises UserError where not even one image fits.
    """
    step.network.activation_checkpointing = setting is True
    if free is None:
        if device.type != "cuda":
            return None
        free = free_bytes(device)
    chosen = fit(lambda images, recomputing: step_bytes(step, images, recomputing, device), batch, setting, free)
    if chosen is None:
        least = step_bytes(step, 1, setting in ("auto", True), device)
        advice = "" if setting in ("auto", True) else 'set experiment.activation_checkpointing to "auto", or '
        raise UserError(f"{key} {batch}: a training step needs about {gib(least)} of the GPU's memory even for one "
                        f"image at a time, and {gib(free)} are free; {advice}choose a smaller dataset.image_size or "
                        "unet.base_channels, or end what else uses the GPU")
    step.network.activation_checkpointing = chosen.recomputing
    parts = "" if chosen.images >= batch else f", {chosen.images} of {batch} images at a time"
    recomputed = ", activations recomputed" if chosen.recomputing else ""
    print(f"memory: a step takes about {gib(chosen.needed)} of {gib(free)}{parts}{recomputed}", flush=True)
    return chosen.images


def gib(bytes_: int) -> str:
    """Bytes as people read them."""
    return f"{bytes_ / 2**30:.1f} GiB"


def parts_of(drawn: Sequence[Tensor], most: int | None) -> list[tuple[Tensor, ...]]:
    """A micro-batch, all of whose tensors have its images along the first axis, in even parts of at most `most`."""
    images = len(drawn[0])
    if most is None or images <= most:
        return [tuple(drawn)]
    return list(zip(*(tensor.tensor_split(math.ceil(images / most)) for tensor in drawn), strict=True))
