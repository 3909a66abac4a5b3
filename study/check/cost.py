"""What a study costs on this machine, by a few steps of each kind of run, taken in a process of its own.

A step that would take long is timed on one image and counted up to its batch. What the process prints is read up to
the time limit, so that nothing here can hold a launch up for longer, nor take a GPU's memory from it.

On a CPU that other programs use, too, a step of half a second may take ten: the clock tells how busy the machine is at
this moment, and the days that a study then seems to need are not those it takes. So the figure is the time that the
step was computed, and how many times longer the clock said is told beside it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from core.config.config import Config
from core.config.ddpm import DDPM
from core.config.finetune import Finetune
from core.config.load import parse_recorded_config
from core.config.ssl import SSL
from core.config.starts import BACKBONES
from core.errors import UserError, run_command
from core.files import parse_json
from study.runs import Run, study_runs
from study.timing import duration, seconds_per_step, steps_left

WORTH_TIMING = 50  # steps of a study; of fewer the timing would take as long as they do
SECONDS = 120.0  # for all kinds together
KIND_SECONDS, MOST_STEPS, WARM = 4.0, 20, 2  # of a kind; steps at most; left out, being slower than the others
SLOW = 2.0  # seconds of a step of one image, from which on its batch is not tried
VERY_SLOW = 40.0  # seconds of the first step, from which on no second one is waited for
LONG_ON_CPU = 24 * 3600.0
BUSY = 1.5  # times as long by the clock as computed, from which on it is said
STAND_INS = {"unet": "scratch", "encoder_unet": "random"}  # the same network, whose weights need not be there yet


class Pace(NamedTuple):
    """Seconds a step with the machine to itself, and by the clock, with all that runs beside it."""

    alone: float
    clock: float


class Cost(NamedTuple):
    """Steps to come of each kind, and seconds a step, None where it could not be timed; `device`: cpu or cuda.

    `slowed`: how many times as long the steps that were timed took by the clock, for other programs on the machine.
    """

    device: str
    steps: dict[str, int]
    seconds: dict[str, float | None]
    slowed: float = 1.0

    @property
    def total(self) -> float:
        """Seconds of what could be timed."""
        return sum(steps * (self.seconds[kind] or 0.0) for kind, steps in self.steps.items())

    def lines(self) -> list[str]:
        """For a text: one line, and another where a CPU is asked for days."""
        parts = [f"{kind} {self.steps[kind]} steps x {seconds:.3g} s = {duration(self.steps[kind] * seconds)}"
                 for kind, seconds in self.seconds.items() if seconds is not None]
        unknown = [kind for kind, seconds in self.seconds.items() if seconds is None]
        if not self.steps:
            return ["cost  nothing is left to train"]
        said = [f"cost  on this machine's {self.device}: about {duration(self.total)} of training, {'; '.join(parts)}"
                if parts else f"cost  on this machine's {self.device}: not known"]
        if unknown:
            said[0] += f" (not timed: {', '.join(unknown)})"
        if self.slowed > BUSY:
            said.append(f"busy  other programs run here: as now, steps take {self.slowed:.2g} times as long, in all "
                        f"{duration(self.total * self.slowed)}")
        if self.device == "cpu" and self.total > LONG_ON_CPU:
            said.append(f"long  {duration(self.total)} on a CPU: this config is meant for a GPU; configs/cpu.json has "
                        "settings for a CPU, configs/quick.json takes minutes")
        return said


def cost_of(config: Config, stages: tuple[str, ...], runs: Sequence[Run]) -> Cost:
    """The cost of what is left of `runs`: by the steps they have logged, else by steps taken now."""
    from core.training.device import resolve_device

    try:
        device = resolve_device(config.experiment.device).type
    except UserError:  # another machine's
        return Cost(f"{config.experiment.device} (which is not here)", *_unknown(runs))
    steps, _ = _unknown(runs)
    seconds = {kind: seconds_per_step(kind, list(runs)) for kind in steps}
    missing = [kind for kind, value in seconds.items() if value is None]
    slowed = 1.0
    if missing and sum(steps.values()) >= WORTH_TIMING:
        paces = timed_apart(config, stages, missing)
        seconds |= {kind: pace.alone for kind, pace in paces.items()}
        alone, clock = (sum(steps[kind] * getattr(pace, by) for kind, pace in paces.items()) for by in Pace._fields)
        slowed = clock / alone if alone else 1.0
    return Cost(device, steps, seconds, slowed)


def _unknown(runs: Sequence[Run]) -> tuple[dict[str, int], dict[str, float | None]]:
    """Steps left by kind, and nothing known of how long they take."""
    steps: dict[str, int] = {}
    for run in runs:
        left = steps_left(run)
        if left:
            steps[run.kind] = steps.get(run.kind, 0) + left
    return steps, dict.fromkeys(steps)


def timed_apart(config: Config, stages: tuple[str, ...], kinds: Sequence[str]) -> dict[str, Pace]:
    """The pace of each of `kinds` that could be timed within SECONDS, by a process that ends then."""
    asked = json.dumps({"config": config.plain(), "stages": stages, "kinds": list(kinds)})
    command = [sys.executable, "-m", "study.check.cost"]
    try:
        said = subprocess.run(command, input=asked.encode(), capture_output=True, timeout=SECONDS, check=False).stdout
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
    found: dict[str, Sequence[float]] = {}
    for line in said.splitlines():
        with suppress(ValueError):  # of a library that speaks, too
            value = parse_json(line)
            found |= value if isinstance(value, dict) else {}
    return {kind: Pace(*map(float, found[kind])) for kind in kinds if kind in found}


def pace_of(run: Run, folder: Path) -> Pace:
    """Of one optimiser step of `run`, timed here; `folder` is for what a training may write."""
    one = _training(run, folder, 1)
    first = _timed(one, 1)
    if first.clock < VERY_SLOW:  # the first step of a process also waits for much that later ones have
        first = min(first, _timed(one, 1))
    config = run.config
    section: DDPM | SSL | Finetune = (config.ddpm if run.stage == "pretrain" else config.ssl if run.stage == "ssl"
                                      else _recipe(run).finetune)
    images = section.batch_size * section.accumulation
    if images == 1 or run.stage == "ssl":
        return _timed(one, MOST_STEPS) if first.alone < SLOW else first
    if first.alone > SLOW or first.alone * images > KIND_SECONDS * 4:
        return Pace(first.alone * images, first.clock * images)
    return _timed(_training(run, folder, None), MOST_STEPS)


def _timed(training: Any, most: int) -> Pace:
    """The medians of up to `most` steps within KIND_SECONDS, the first ones left out where there are more."""
    paces: list[Pace] = []
    while len(paces) < most and sum(pace.clock for pace in paces) < KIND_SECONDS:
        clock, computed = time.perf_counter(), time.process_time()
        training.optimiser_step()
        training.check_losses()  # waits for a GPU
        clock, computed = time.perf_counter() - clock, time.process_time() - computed
        paces.append(Pace(alone(clock, computed, training.settings.device.type), clock))
    counted = paces[WARM:] or paces[-1:]
    return Pace(*(statistics.median(each) for each in zip(*counted, strict=True)))


def alone(clock: float, computed: float, device: str) -> float:
    """Seconds of a step that took `clock` and was `computed` for so many, all threads together, if nothing else ran.

    The threads share the work, and one that waits for another counts as computing. On a GPU the clock alone tells.
    """
    import torch

    return clock if device != "cpu" else min(clock, computed / torch.get_num_threads())


def _recipe(run: Run) -> Config:
    from core.config.recipes import recipe

    return recipe(run.config, run.arguments[0].backbone)


def _training(run: Run, folder: Path, batch: int | None) -> Any:
    """The run's training before its first step, on the first images of the data; `batch` images a step, None: as it is.

    Self-supervision compares the images of a batch: its batches stay as they are.
    """
    from core.data.source import load_source

    source = load_source(run.config.dataset)
    if run.stage == "pretrain":
        return _denoising(run.config, source, folder, batch)
    if run.stage == "ssl":
        from ssl_baselines.train import build_task

        settings = run.config.ssl.model_copy(update={"workers": 0})
        few = replace(source, unlabelled=(), splits={**source.splits, "validation": ()})
        few = few if few.splits["train"] else source
        return build_task(run.config.model_copy(update={"ssl": settings}), run.arguments[0], few).training
    return _landmarks(run, source, folder, batch)


def _denoising(config: Config, source: Any, folder: Path, batch: int | None) -> Any:
    from core.data.dataset import load_images
    from core.networks.unet import UNet
    from core.training.batches import BatchPlan
    from core.training.loop import Training
    from ddpm_pretraining.train import Denoising, fitting, loop_settings

    ddpm = config.ddpm
    if batch is not None:
        ddpm = ddpm.model_copy(update={"batch_size": batch, "accumulation": 1})
        config = config.model_copy(update={"ddpm": ddpm})
    images = load_images(source.pretraining_records()[: max(2, ddpm.batch_size)], config.dataset)
    task = Denoising(config, folder, images, None)
    channels = task.shown.shape[1]
    model = UNet(config.unet, channels, channels, config.dataset.image_size)
    plan = BatchPlan(len(images.records), ddpm.batch_size, ddpm.accumulation, ddpm.sampling, True, 0)
    training = Training(model, task, plan, fitting(model, config, loop_settings(config)))
    task.follow(training)
    return training


def _stand_in(backbone: str) -> str:
    return STAND_INS.get(BACKBONES[backbone], backbone)


def _landmarks(run: Run, source: Any, folder: Path, batch: int | None) -> Any:
    from core.training.loop import Training
    from landmarks_finetuning.detectors.registry import kind_of
    from landmarks_finetuning.stages import CellData, batch_plan, fitting, fresh_detector, loop_settings

    cell, config = run.arguments[0], run.config
    cell = replace(cell, backbone=_stand_in(cell.backbone))
    if batch is not None:
        finetune = config.finetune.model_copy(update={"batch_size": batch, "accumulation": 1})
        config = config.model_copy(update={"finetune": finetune})
    data = CellData(source.splits["train"][: max(2, cell.shots)], (), source.landmark_names, {})
    images, _ = data.load(config)
    kind = kind_of(cell.backbone)
    model, header = fresh_detector(config, cell, data, images, kind)
    task = kind.task(config, folder, header, images, None, kind)
    plan = batch_plan(config, cell, task.count, kind)
    return Training(model, task, plan, fitting(model, config, loop_settings(config, cell, plan, "", False)))


def main() -> None:
    """What is asked for comes as JSON from stdin, every answer leaves as a line of JSON as soon as it is known."""
    from core.training.threads import use_threads

    asked = parse_json(sys.stdin.buffer.read())
    use_threads()  # as a training will
    config = parse_recorded_config(asked["config"], "stdin")
    runs = study_runs(config, tuple(asked["stages"]))
    known: dict[tuple[str, str], Pace] = {}
    for kind in asked["kinds"]:
        run = next(run for run in runs if run.kind == kind and run.steps)
        network = run.stage, _stand_in(run.arguments[0].backbone) if run.stage == "finetune" else kind
        with tempfile.TemporaryDirectory() as folder, suppress(UserError, ValueError, RuntimeError):
            known[network] = known.get(network) or pace_of(run, Path(folder))
            print(json.dumps({kind: known[network]}), flush=True)


if __name__ == "__main__":
    run_command(main)
