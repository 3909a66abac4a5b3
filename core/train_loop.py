"""The only training loop: precision, accumulation, clipping, EMA, schedules, validation, logging, exact resume.

Batches, augmentation and noise are pure functions of (seed, step), so a state needs no random-number state and a
resumed run equals an uninterrupted one bit for bit on a CPU.
"""

from __future__ import annotations

import copy
import math
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from core.checkpoint import load_state, save_state
from core.errors import Interrupted, UserError
from core.runlog import RunLog
from core.section import Clip


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


@dataclass(frozen=True)
class BatchPlan:
    """Which images each optimiser step sees: a pure function of the step.

    `stream` draws from endless permutations, every micro-batch full. `epoch` cuts each permutation into micro-batches
    (`drop_last` as given), groups them by `accumulation`, and the last partial group steps too (the published code).
    """

    count: int
    batch_size: int
    accumulation: int
    sampling: str
    drop_last: bool
    seed: int

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in which every image is seen about once."""
        return max(1, math.ceil(self._micro_batches / self.accumulation))

    @property
    def smallest_batch(self) -> int:
        """Images in the smallest micro-batch."""
        full = self.sampling == "stream" or (self.drop_last and self.count >= self.batch_size)
        return self.batch_size if full else self.count % self.batch_size or self.batch_size

    @property
    def _micro_batches(self) -> int:
        whole = self.count // self.batch_size if self.drop_last else math.ceil(self.count / self.batch_size)
        return max(1, whole)

    def groups(self, step: int) -> list[np.ndarray]:
        """The micro-batches (index arrays) of optimiser step `step` (0-based)."""
        if self.sampling == "epoch":
            epoch, group = divmod(step, self.steps_per_epoch)
            order = self._permutation(epoch)
            first, last = group * self.accumulation, min((group + 1) * self.accumulation, self._micro_batches)
            return [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(first, last)]
        start = step * self.batch_size * self.accumulation
        positions = np.arange(start, start + self.batch_size * self.accumulation)
        epochs, offsets = np.divmod(positions, self.count)
        orders = {int(epoch): self._permutation(int(epoch)) for epoch in np.unique(epochs)}
        drawn = np.array([orders[int(e)][o] for e, o in zip(epochs, offsets, strict=True)])
        return list(drawn.reshape(self.accumulation, self.batch_size))


@dataclass(frozen=True)
class LoopSettings:
    """Everything the loop needs beside model and task; iterations are optimiser steps."""

    title: str
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
    warmup_iterations: int = 0
    plateau_factor: float = 0.5
    plateau_patience: int = 13
    early_stop_patience: int | None = None
    compile: bool = False
    ema_schedule: str = "constant"
    milestones: frozenset[int] = frozenset()


def resolve_device(name: str) -> torch.device:
    """"auto" -> CUDA where there is one; UserError for a device this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'experiment.device "{name}" is not a device; choose auto, cpu, cuda or cuda:N') from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f'experiment.device "{name}" is not supported; choose auto, cpu, cuda or cuda:N')
    visible = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= visible:
        raise UserError(f'experiment.device "{name}": {visible or "no"} CUDA GPU is visible; choose auto or cpu')
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """"auto" -> bf16 where the hardware has it natively, else float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "float32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The mixed-precision context of a run."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def step_generator(seed: int, step: int, micro: int, device: torch.device) -> torch.Generator:
    """Randomness as a function of (seed, step, micro-batch)."""
    entropy = np.random.SeedSequence([seed, step, micro]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(entropy >> np.uint64(1)))


def memory_format(ndim: int, device: torch.device) -> torch.memory_format:
    """How weights of `ndim` axes lie in memory: channels last, but for 3D convolutions on a CPU, faster contiguous."""
    if ndim == 5:
        return torch.channels_last_3d if device.type == "cuda" else torch.contiguous_format
    return torch.channels_last if ndim == 4 else torch.contiguous_format


def averaged_tensors(model: nn.Module) -> list[Tensor]:
    """What an EMA averages: parameters and floating buffers, such as the statistics of batch normalisation."""
    return [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]


class StopSignal:
    """SIGINT and SIGTERM ask the loop to save and stop after the step in hand; the same one again stops at once."""

    def __init__(self) -> None:
        self.received: set[int] = set()
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number in self.received:  # a worker may get SIGTERM from the system, then SIGINT from its launcher
            raise KeyboardInterrupt
        self.received.add(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Training:
    """Model, EMA, optimiser and schedule of one run, and how they are stepped, saved and restored."""

    def __init__(self, model: nn.Module, task: Task, plan: BatchPlan, settings: LoopSettings) -> None:
        self.task, self.plan, self.settings = task, plan, settings
        layout = memory_format(next(model.parameters()).ndim, settings.device)
        self.model = model.to(settings.device, memory_format=layout)
        self.forward = torch.compile(self.model) if settings.compile else self.model
        decayed = settings.ema_decay is not None
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if decayed else self.model
        self.parameters = list(self.model.parameters())
        self.averaged, self.averages = averaged_tensors(self.model), averaged_tensors(self.ema)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate,
                                           weight_decay=settings.weight_decay, fused=True)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=settings.plateau_factor, patience=settings.plateau_patience)
        self.step, self.best, self.since_best = 0, math.inf, 0
        self.pending: list[Tensor] = []  # losses of the steps since the last check, on the device

    def state(self) -> dict[str, Any]:
        """Everything stateful, for last.pt."""
        return {"step": self.step, "best": self.best, "since_best": self.since_best,
                "model": self.model.state_dict(),
                "ema": None if self.ema is self.model else self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(), "plateau": self.plateau.state_dict()}

    def restore(self, state: dict[str, Any], where: Path) -> None:
        """Take over a saved state; UserError when it belongs to another network."""
        try:
            self.model.load_state_dict(state["model"])
            if state["ema"] is not None:
                self.ema.load_state_dict(state["ema"])
        except RuntimeError as error:
            raise UserError(f"{where}: the saved state is of another network than the config's: "
                            f"{' '.join(str(error).split())[:160]}") from None
        self.optimizer.load_state_dict(state["optimizer"])
        self.plateau.load_state_dict(state["plateau"])
        self.step, self.best, self.since_best = state["step"], state["best"], state["since_best"]

    def learning_rate_factor(self) -> float:
        """Warm-up, then constant or cosine to 0; a pure function of the step."""
        warm = self.settings.warmup_iterations
        if self.step < warm:
            return (self.step + 1) / warm
        if self.settings.scheduler == "cosine":
            progress = (self.step - warm) / max(1, self.settings.iterations - warm)
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0

    def averaging(self) -> float:
        """How far the moving average goes to the weights; with schedule "cosine" falling to 0 at the last step."""
        share = 1 - self.settings.ema_decay
        if self.settings.ema_schedule == "cosine":
            share *= 0.5 * (1 + math.cos(math.pi * self.step / self.settings.iterations))
        return share

    def optimiser_step(self) -> int:
        """Accumulate the step's micro-batches, clip, step, average; returns the number of images seen."""
        settings = self.settings
        if settings.scheduler != "plateau":
            for group in self.optimizer.param_groups:
                group["lr"] = settings.learning_rate * self.learning_rate_factor()
        groups = self.plan.groups(self.step)
        share = 1.0 if settings.accumulation_reduction == "sum" else 1.0 / len(groups)
        total = torch.zeros((), device=settings.device)
        for micro, indices in enumerate(groups):
            generator = step_generator(settings.seed, self.step, micro, settings.device)
            with autocast(settings.device, settings.precision):
                loss = self.task.loss(self.forward, indices, generator)
            (loss * share).backward()
            total += loss.detach() / len(groups)
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

    def check_losses(self) -> float:
        """Mean loss since the last check; UserError with step and files at the first non-finite one."""
        losses = torch.stack(self.pending).tolist()
        for offset, loss in enumerate(losses):
            if not math.isfinite(loss):
                step = self.step - len(losses) + offset
                files = [name for indices in self.plan.groups(step) for name in self.task.names(indices)]
                raise UserError(f"loss is {loss} at step {step + 1}, batch of {', '.join(files)}; what was saved "
                                "before that step is kept (lower the learning rate, or look at these images)")
        self.pending.clear()
        return sum(losses) / len(losses)

    def validate(self, log: RunLog) -> None:
        """Log the task's figures, keep the best, step the plateau schedule."""
        self.ema.eval()
        with torch.no_grad(), autocast(self.settings.device, self.settings.precision):
            figures = self.task.validate(self.ema, self.step)
        self.ema.train()
        self.model.train()
        if not figures:
            return
        log.write(self.step, figures)
        loss = figures["validation_loss"]
        if self.settings.scheduler == "plateau":
            self.plateau.step(loss)
        self.since_best += 1
        if loss < self.best:
            self.best, self.since_best = loss, 0
            self.task.improved(self.ema, self.step)

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
    settings, task = training.settings, training.task
    if resume:
        training.restore(load_state(run_dir, resume, resume_command), run_dir / f"{resume}.pt")
    run_dir.mkdir(parents=True, exist_ok=True)
    with RunLog(run_dir, settings.title, training.step, settings.iterations) as log, StopSignal() as stop:
        while not training.finished:
            log.advance(training.optimiser_step())
            stopping = bool(stop.received)  # read once: a signal that comes later waits for the next step
            validating = training.due(settings.validate_every)
            saving = training.due(settings.save_every) or stopping or training.finished
            milestone = training.step in settings.milestones
            if training.due(settings.log_every) or validating or saving or milestone:
                log.write(training.step, {"loss": training.check_losses(), **log.interval(),
                                          "learning_rate": training.optimizer.param_groups[0]["lr"]})
            if milestone:
                task.milestone(training.ema, training.step)
            if validating or training.finished:
                training.validate(log)
            if saving or training.finished:
                save_state(run_dir, training.state())
            if stopping and not training.finished:
                raise Interrupted(f"saved at step {training.step} of {settings.iterations}; "
                                  f"continue with: {resume_command} --resume")
