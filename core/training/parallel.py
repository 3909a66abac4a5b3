"""One training in several processes: replicated (DDP) or sharded (FSDP2). Equal to a single process but for rounding.

A step's images are dealt to the processes in one row, whatever the micro-batches they belong to: no process holds more
than a micro-batch at once, and the global batch stays what the config says. Each process draws the randomness of a
whole micro-batch and uses its part, so images are augmented and noised alike however many processes there are.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from core.errors import UserError
from core.networks.unet import Residual, ResidualBlock
from core.training.batches import BatchPlan, step_generator
from core.training.device import autocast
from core.training.distributed import Job
from core.training.loop import LoopSettings, Network, Task, Training

# Buffers are the same in every process. The keyword of torch from 2.14 on; older releases have the second alone.
KEEP_BUFFERS: dict[str, Any] = {next(name for name in ("forward_sync_buffers", "broadcast_buffers")
                                     if name in signature(DistributedDataParallel).parameters): False}


class DealtTask(Task, Protocol):
    """A task whose micro-batches can be dealt to several processes."""

    def part_loss(self, model: nn.Module, indices: np.ndarray, generator: torch.Generator, part: slice) -> Tensor:
        """Mean loss of a part of a micro-batch; what is random is drawn for the whole of it."""


def deal(groups: Sequence[np.ndarray], rank: int, count: int) -> list[tuple[int, slice]]:
    """Process `rank`'s images of a step: (micro-batch, part of it) for every micro-batch of which it has some."""
    ends = np.cumsum([len(indices) for indices in groups])
    first, last = (int(ends[-1]) * r // count for r in (rank, rank + 1))
    parts = []
    for micro, (end, indices) in enumerate(zip(ends.tolist(), groups, strict=True)):
        begin = end - len(indices)
        part = slice(max(first, begin) - begin, min(last, end) - begin)
        if part.start < part.stop:
            parts.append((micro, part))
    return parts


class Replicated(Training[Network]):
    """A copy of the network in every process; DistributedDataParallel averages the gradients.

    Raises UserError where a step has fewer images than there are processes, or a process has no GPU.
    """

    task: DealtTask

    def __init__(self, model: Network, task: DealtTask, plan: BatchPlan, settings: LoopSettings, ranks: Job) -> None:
        ranks.check_device(settings.device)
        for step in {0, plan.steps_per_epoch - 1}:  # of an epoch the last step may be smaller
            self.check_shares(plan.groups(step), ranks.count)
        super().__init__(model, task, plan, settings, ranks)

    def check_shares(self, groups: Sequence[np.ndarray], count: int) -> None:
        """UserError where a step on `groups` cannot be dealt to `count` processes."""
        images = sum(map(len, groups))
        if images < count:
            raise UserError(f"a step of {images} images (batch_size x accumulation) leaves nothing to some of {count} "
                            f"processes; start at most {images}, or raise batch_size")

    def prepare(self, model: Network) -> tuple[Network, Network, nn.Module]:
        """See Training."""
        model, average, _ = super().prepare(model)
        devices = [torch.cuda.current_device()] if self.settings.device.type == "cuda" else None
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of 1x1 kernels: one memory
        self.replicas = DistributedDataParallel(model, devices, gradient_as_bucket_view=True, **KEEP_BUFFERS)
        return model, average, self.replicas

    def exchanging(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged at a process' last backward pass of a step."""
        return nullcontext() if last else self.replicas.no_sync()

    def accumulate(self, groups: Sequence[np.ndarray]) -> Tensor:
        """See Training: this process' share, weighted by images; DDP divides by the number of processes."""
        settings, count = self.settings, self.ranks.count
        share = 1.0 if settings.accumulation_reduction == "sum" else 1.0 / len(groups)
        total = torch.zeros((), device=settings.device)
        parts = deal(groups, self.ranks.rank, count)
        for micro, part in parts:
            indices = groups[micro]
            weight = (part.stop - part.start) / len(indices)
            generator = step_generator(settings.seed, self.step, micro, settings.device)
            with self.exchanging(last=micro == parts[-1][0]):
                with autocast(settings.device, settings.precision):
                    loss = self.task.part_loss(self.forward, indices, generator, part)
                (loss * (share * weight * count)).backward()
            total += loss.detach() * weight / len(groups)
        return total

    def recent_losses(self) -> Tensor:
        """See Training: the sum over the processes."""
        losses = super().recent_losses()
        dist.all_reduce(losses)
        return losses


class Sharded(Replicated[Network]):
    """A share of the network, its moving average and its optimiser's state in every process (FSDP2, by blocks).

    Weights lie contiguous, which FSDP asks for. States are saved whole, so they are those of every other kind of run;
    for validation, samples and checkpoints the leader puts the moving average together.
    """

    def __init__(self, model: Network, task: DealtTask, plan: BatchPlan, settings: LoopSettings, ranks: Job) -> None:
        super().__init__(model, task, plan, settings, ranks)
        self.averaged, self.averages = ([share_of(t) for t in tensors] for tensors in (self.averaged, self.averages))

    def check_shares(self, groups: Sequence[np.ndarray], count: int) -> None:
        """See Replicated; the processes' forward passes must also be as many, for they fetch weights together."""
        super().check_shares(groups, count)
        passes = {len(deal(groups, rank, count)) for rank in range(count)}
        if len(passes) > 1:
            raise UserError(f'experiment.sharding "full": {count} processes cannot share micro-batches of '
                            f"{[len(indices) for indices in groups]} images evenly; choose a batch_size or an "
                            f'accumulation that {count} divides (and sampling "stream"), or sharding "none"')

    def prepare(self, model: Network) -> tuple[Network, Network, nn.Module]:
        """See Training."""
        averaged = self.settings.ema_decay is not None
        average = copy.deepcopy(model).requires_grad_(False) if averaged else model
        self.whole = copy.deepcopy(model) if self.ranks.leads else None
        mesh = init_device_mesh(self.settings.device.type, (self.ranks.count,))
        networks = [model] if average is model else [model, average]
        for network in networks:
            for part in network.modules():
                if isinstance(part, ResidualBlock | Residual):
                    fully_shard(part, mesh=mesh)
        self.shares = [fully_shard(network, mesh=mesh) for network in networks]
        return model, average, model

    def exchanging(self, last: bool) -> AbstractContextManager[Any]:
        """See Replicated."""
        self.shares[0].set_requires_gradient_sync(last)
        return nullcontext()

    @contextmanager
    def whole_average(self) -> Iterator[Network | None]:
        """See Training: put together on the leader for as long as it is needed, None on the others."""
        tensors = self._gathered(self.ema.state_dict())
        if self.whole is not None:
            self.whole.load_state_dict(tensors)
            self.whole.to(self.settings.device)
        yield self.whole
        if self.whole is not None:
            self.whole.cpu()

    def _gathered(self, values: Any) -> Any:
        """Nested `values` with every shared tensor whole, in the leader's memory; None on the others."""
        if isinstance(values, dict):
            return {key: self._gathered(value) for key, value in values.items()}
        if not isinstance(values, DTensor):
            return values
        whole = values.full_tensor()
        return whole.cpu() if self.ranks.leads else None

    def state(self) -> dict[str, Any]:
        """See Training: whole on the leader."""
        return self._gathered(super().state())

    def restore(self, state: dict[str, Any], where: Path) -> None:
        """See Training: each process takes its share of a whole state."""
        moments = state["optimizer"]
        by_index = dict(enumerate(self.parameters))
        shares = {index: {name: like(value, by_index.get(index)) for name, value in entry.items()}
                  for index, entry in moments["state"].items()}
        networks = {key: state[key] and shares_like(state[key], network)
                    for key, network in (("model", self.model), ("ema", self.ema))}
        super().restore({**state, **networks, "optimizer": {**moments, "state": shares}}, where)


def share_of(tensor: Tensor) -> Tensor:
    """This process' share of a tensor, in its own memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def like(whole: Tensor, own: Tensor | None) -> Tensor:
    """`whole` shared among the processes as `own` is; scalars, such as a count of steps, are everyone's."""
    if not isinstance(own, DTensor) or whole.ndim == 0:
        return whole
    return distribute_tensor(whole.contiguous(), own.device_mesh, own.placements, src_data_rank=None)


def shares_like(tensors: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A whole state dict shared as `network`'s is."""
    own = network.state_dict()
    return {name: like(tensor, own.get(name)) for name, tensor in tensors.items()}


TRAININGS = {"none": Replicated, "full": Sharded}  # by experiment.sharding
