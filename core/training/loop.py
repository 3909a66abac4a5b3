"""The only training loop: precision, accumulation, clipping, EMA, schedules, validation, logging, exact resume.

Batches, augmentation and noise are pure functions of (seed, step), so a state needs no random-number state and a
resumed run equals an uninterrupted one bit for bit on a CPU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from core.background import finish_writing, writing_in_background
from core.config.section import Clip
from core.errors import Interrupted, UserError
from core.training.batches import BatchPlan, step_generator
from core.training.cuda_graphs import Batches, Replayed
from core.training.device import autocast, memory_format
from core.training.distributed import ALONE, Ranks
from core.training.memory import parts_of
from core.training.run_log import NoLog, RunLog
from core.training.schedules import cosine_restarts, triangle
from core.training.state import check_identity, fit_moments, load_state, save_state
from core.training.stop_signal import StopSignal
from core.training.threads import use_threads

Network = TypeVar("Network", bound=nn.Module)


class Task(Protocol):
    """What a stage trains: the loop asks it for losses and tells it when steps are done."""

    def loss(self, model: nn.Module, indices: np.ndarray, generator: torch.Generator) -> Tensor:
        """Scalar loss of one micro-batch."""

    def names(self, indices: np.ndarray) -> list[str]:
        """File names of a micro-batch, for error messages."""

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Figures for the log, with "validation_loss" where there is something to validate on; may be empty."""

    def milestone(self, model: nn.Module, step: int) -> None:
        """Called at the steps of LoopSettings.milestones with the weights that count (EMA where there is one)."""

    def improved(self, model: nn.Module, step: int) -> None:
        """Called when the validation loss is the lowest so far."""


@runtime_checkable
class SplitTask(Task, Protocol):
    """A task that draws what is random apart from the loss of it, so that a GPU's steps can be replayed as graphs."""

    def draw(self, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, ...]:
        """A micro-batch on the device, augmented, with all that the loss needs."""

    def loss_of(self, model: nn.Module, *drawn: Tensor) -> Tensor:
        """Scalar loss of what was drawn; waits for nothing and draws nothing."""

    def terms(self, *drawn: Tensor) -> Tensor | int:
        """Over how many terms `loss_of` is the mean: a part of a micro-batch counts by its share of them."""


@dataclass(frozen=True)
class LoopSettings:
    """Everything the loop needs beside model and task; iterations are optimiser steps."""

    title: str
    identity: str  # which run this is, in words: a saved state of another one is refused
    iterations: int
    seed: int
    device: torch.device
    precision: str
    learning_rate: float
    weight_decay: float
    clip: Clip
    accumulation_reduction: str
    ema_decay: float | None
    log_every: int
    save_every: int
    validate_every: int
    scheduler: str = "constant"
    cycle_iterations: int = 1
    optimizer: str = "adamw"
    warmup_iterations: int = 0
    plateau_factor: float = 0.5
    plateau_patience: int = 13
    early_stop_patience: int | None = None
    compile: bool = False
    cuda_graphs: bool = True
    ema_schedule: str = "constant"
    most_images: int | None = None  # that pass the network at once; larger micro-batches do so in parts
    milestones: frozenset[int] = frozenset()
    made_with: Mapping[str, Any] = field(default_factory=dict)  # settings that make another run, refused as `identity`


def averaged_tensors(model: nn.Module) -> list[Tensor]:
    """What an EMA averages: parameters and floating buffers, such as the statistics of batch normalisation."""
    return [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "amsgrad": partial(torch.optim.Adam, amsgrad=True)}


class Training(Generic[Network]):
    """Model, EMA, optimiser and schedule of one run, and how they are stepped, saved and restored."""

    forward: nn.Module

    def __init__(self, model: Network, task: Task, plan: BatchPlan, settings: LoopSettings,
                 ranks: Ranks = ALONE) -> None:
        self.task, self.plan, self.settings, self.ranks = task, plan, settings, ranks
        self.model, self.ema, forward = self.prepare(model)
        self.forward = forward
        if settings.compile:
            self.forward = torch.compile(forward)  # type: ignore[assignment]  # a module of a module, its stub does not say
        self.parameters = list(self.model.parameters())
        self.averaged, self.averages = averaged_tensors(self.model), averaged_tensors(self.ema)
        self.optimizer = OPTIMIZERS[settings.optimizer](self.parameters, lr=settings.learning_rate,
                                                        weight_decay=settings.weight_decay, fused=True)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=settings.plateau_factor, patience=settings.plateau_patience)
        self.step, self.best, self.since_best = 0, math.inf, 0
        replaying = settings.device.type == "cuda" and settings.cuda_graphs and not settings.compile
        self.gradients = Replayed(self.add_up, self.parameters) if replaying else self.add_up
        self.pending: list[Tensor] = []  # losses of the steps since the last check, on the device

    def prepare(self, model: Network) -> tuple[Network, Network, nn.Module]:
        """The network, its moving average and what is called to train it, on the device."""
        layout = memory_format(next(model.parameters()).ndim, self.settings.device)
        model = model.to(self.settings.device).to(memory_format=layout)
        averaged = self.settings.ema_decay is not None
        return model, copy.deepcopy(model).requires_grad_(False) if averaged else model, model

    def state(self) -> dict[str, Any]:
        """Everything stateful, for last.pt."""
        return {"step": self.step, "best": self.best, "since_best": self.since_best,
                "model": self.model.state_dict(),
                "ema": None if self.ema is self.model else self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(), "plateau": self.plateau.state_dict(),
                "threads": torch.get_num_threads() if self.settings.device.type == "cpu" else None}

    def restore(self, state: dict[str, Any], where: Path) -> None:
        """Take over a saved state; UserError when it belongs to another network, or is not whole."""
        try:
            self.model.load_state_dict(state["model"])
            if state["ema"] is not None:
                self.ema.load_state_dict(state["ema"])
        except RuntimeError as error:
            raise UserError(f"{where}: the saved state is of another network than the config's: "
                            f"{' '.join(str(error).split())[:160]}") from None
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.plateau.load_state_dict(state["plateau"])
            self.step, self.best, self.since_best = state["step"], state["best"], state["since_best"]
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{where} is damaged: it does not hold what this training's state holds ({error!r:.160})"
                            ) from None
        fit_moments(self.optimizer, where)

    def learning_rate_factor(self) -> float:
        """Warm-up, then constant, cosine to 0, or cycles; a pure function of the step."""
        warm, cycle = self.settings.warmup_iterations, self.settings.cycle_iterations
        if self.step < warm:
            return (self.step + 1) / warm
        if self.settings.scheduler == "cyclic":
            return triangle(self.step - warm, cycle)
        if self.settings.scheduler == "restarts":
            return cosine_restarts(self.step - warm, cycle)
        if self.settings.scheduler == "cosine":
            progress = (self.step - warm) / max(1, self.settings.iterations - warm)
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0

    def averaging(self) -> float:
        """How far the moving average goes to the weights; with schedule "cosine" falling to 0 at the last step."""
        decay = self.settings.ema_decay
        share = 0.0 if decay is None else 1 - decay  # without one nothing moves
        if self.settings.ema_schedule == "cosine":
            share *= 0.5 * (1 + math.cos(math.pi * self.step / self.settings.iterations))
        return share

    def optimiser_step(self) -> int:
        """Accumulate the step's micro-batches, clip, step, average; returns the number of images seen."""
        settings = self.settings
        if settings.scheduler != "plateau" or self.step < settings.warmup_iterations:
            for group in self.optimizer.param_groups:
                group["lr"] = settings.learning_rate * self.learning_rate_factor()
        groups = self.plan.groups(self.step)
        total = self.accumulate(groups)
        if settings.clip.mode == "value":
            nn.utils.clip_grad_value_(self.parameters, settings.clip.limit)
        elif settings.clip.mode == "norm":
            nn.utils.clip_grad_norm_(self.parameters, settings.clip.limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if settings.ema_decay is not None:
            with torch.no_grad():  # or autograd's graph would grow by every step
                torch._foreach_lerp_(self.averages, self.averaged, self.averaging())
        self.pending.append(total)
        self.step += 1
        return sum(len(indices) for indices in groups)

    def own_batches(self, step: int) -> list[np.ndarray]:
        """The images that this process sees at a step, micro-batch by micro-batch."""
        return self.plan.groups(step)

    def accumulate(self, groups: Sequence[np.ndarray]) -> Tensor:
        """Add up the gradients of a step's micro-batches; returns their mean loss, on the device."""
        settings, task = self.settings, self.task
        generators = [step_generator(settings.seed, self.step, micro, settings.device) for micro in range(len(groups))]
        if isinstance(task, SplitTask):
            drawn = [task.draw(indices, generator) for indices, generator in zip(groups, generators, strict=True)]
            return self.gradients(drawn).clone()
        total = torch.zeros((), device=settings.device)
        for indices, generator in zip(groups, generators, strict=True):
            with autocast(settings.device, settings.precision):
                loss = task.loss(self.forward, indices, generator)
            (loss * self.share(groups)).backward()
            total += loss.detach() / len(groups)
        return total

    def share(self, groups: Sequence[Any]) -> float:
        """The weight of a micro-batch's loss."""
        return 1.0 if self.settings.accumulation_reduction == "sum" else 1.0 / len(groups)

    def add_up(self, batches: Batches) -> Tensor:
        """`accumulate` for drawn micro-batches."""
        settings, task = self.settings, self.task
        assert isinstance(task, SplitTask)
        total = torch.zeros((), device=settings.device)
        for drawn in batches:
            parts = parts_of(drawn, settings.most_images)
            terms = [task.terms(*part) for part in parts]
            for part, own in zip(parts, terms, strict=True):
                with autocast(settings.device, settings.precision):
                    loss = task.loss_of(self.forward, *part)
                weight = own / sum(terms) if len(parts) > 1 else 1.0
                (loss * (self.share(batches) * weight)).backward()
                total += loss.detach() * weight / len(batches)
        return total

    def recent_losses(self) -> Tensor:
        """(steps,) losses of the steps since the last check."""
        return torch.stack(self.pending)

    def check_losses(self) -> float:
        """Mean loss since the last check; UserError with step and files at the first non-finite one."""
        losses = self.recent_losses().tolist()
        for offset, loss in enumerate(losses):
            if not math.isfinite(loss):
                step = self.step - len(losses) + offset
                files = [name for indices in self.plan.groups(step) for name in self.task.names(indices)]
                raise UserError(f"loss is {loss} at step {step + 1}, batch of {', '.join(files)}; what was saved "
                                "before that step is kept (lower the learning rate, or look at these images)")
        self.pending.clear()
        return sum(losses) / len(losses)

    @contextmanager
    def whole_average(self) -> Iterator[Network | None]:
        """The weights that count (EMA where there is one) for the leader's use, None on the others."""
        yield self.ema if self.ranks.leads else None

    def validate(self, log: RunLog | NoLog) -> None:
        """Log the task's figures, keep the best, step the plateau schedule."""
        with self.whole_average() as average:
            figures = self.ranks.told({} if average is None else self._figures(average))
            if not figures:
                return
            log.write(self.step, figures)
            loss = figures["validation_loss"]
            if self.settings.scheduler == "plateau" and self.step >= self.settings.warmup_iterations:
                self.plateau.step(loss)
            self.since_best += 1
            if loss < self.best:
                self.best, self.since_best = loss, 0
                if average is not None:
                    self.task.improved(average, self.step)
                self.ranks.wait()

    def _figures(self, average: nn.Module) -> dict[str, float]:
        average.eval()
        with torch.no_grad(), autocast(self.settings.device, self.settings.precision):
            figures = self.task.validate(average, self.step)
        average.train()
        self.model.train()
        return figures

    def milestone(self) -> None:
        """Let the task keep the weights that count, and look at them."""
        with self.whole_average() as average:
            if average is not None:
                self.task.milestone(average, self.step)
            self.ranks.wait()

    def save(self, run_dir: Path) -> None:
        """Write last.pt."""
        state = self.state()
        if self.ranks.leads:
            save_state(run_dir, {**state, "identity": self.settings.identity,
                                 "made_with": dict(self.settings.made_with)})
        self.ranks.wait()

    def due(self, every: int) -> bool:
        """Whether something done every `every` steps is due now."""
        return self.step % every == 0

    @property
    def finished(self) -> bool:
        """All iterations done, or early stopping has spoken."""
        patience = self.settings.early_stop_patience
        return self.step >= self.settings.iterations or (patience is not None and self.since_best >= patience)


def train(training: Training, run_dir: Path, resume: str | None, resume_command: str) -> None:
    """Run or resume a training to its end in `run_dir`.

    `resume` is None (start), "last" or "previous". Raises Interrupted after saving when SIGINT or SIGTERM came, and
    UserError for a non-finite loss or a damaged state.
    """
    settings, ranks = training.settings, training.ranks
    threads: int | None = None
    if resume:
        state, path = load_state(run_dir, resume, resume_command), run_dir / f"{resume}.pt"
        check_identity(path, state, settings.identity, settings.made_with)
        training.restore(state, path)
        threads = state.get("threads")
        if training.step != ranks.told(training.step):
            raise UserError(f"{run_dir} holds another step here than on rank 0: all machines must share that folder")
    if ranks.leads:
        run_dir.mkdir(parents=True, exist_ok=True)
    if settings.device.type == "cpu" and not training.finished:
        chosen = use_threads(threads)
        if ranks.leads:
            print(chosen, flush=True)
    open_log = RunLog if ranks.leads else NoLog
    with (open_log(run_dir, settings.title, training.step, settings.iterations) as log,
          StopSignal(once=ranks.count > 1) as stop, writing_in_background(settings.device.type == "cuda")):
        while not training.finished:
            log.advance(training.optimiser_step())
            stopping = ranks.any(bool(stop.received))  # read once: a signal that comes later waits for the next step
            validating = training.due(settings.validate_every)
            saving = training.due(settings.save_every) or stopping or training.finished
            milestone = training.step in settings.milestones
            if training.due(settings.log_every) or validating or saving or milestone:
                log.write(training.step, {"loss": training.check_losses(), **log.interval(),
                                          "learning_rate": training.optimizer.param_groups[0]["lr"]})
            if validating or training.finished:
                training.validate(log)
            if milestone:  # after all else that comes with this step: where its weights are, it is done
                training.milestone()
            if saving or training.finished:
                training.save(run_dir)
            if stopping and not training.finished:
                finish_writing()
                raise Interrupted(f"saved at step {training.step} of {settings.iterations}",
                                  f"{resume_command} --resume")
