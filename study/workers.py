"""Several processes of this machine on one study: each claims runs as a launcher of its own would, on its own GPU."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from core.bounds import require_memory
from core.errors import INTERRUPTED, Interrupted, UserError, run_command
from core.files import write_json
from core.runs.claims import held_by
from core.training.run_log import logged
from study import runner
from study.runs import Run
from study.timing import time_left

WORKER_BYTES = 200 << 20  # of a process with its libraries


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES has for them."""
    import torch  # imports for seconds

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in named.split(",")][:count] if named else [str(n) for n in range(count)]


def gpus_of_workers(device: str, workers: int | None, gpus: int | None) -> list[str | None]:
    """The GPU of each worker, or None for the CPU; where there are more workers than GPUs they take turns.

    `device` is experiment.device, `workers` how many processes (None: one for each GPU), `gpus` how many GPUs (None:
    all). Raises UserError where there are fewer.
    """
    for option, number in (("--workers", workers), ("--gpus", gpus)):
        if number is not None and number < 1:
            raise UserError(f"{option} {number}: must be at least 1")
    if ":" in device or (device == "cpu" and gpus is not None):
        raise UserError(f'--workers and --gpus give out GPUs themselves, but experiment.device is "{device}"; choose '
                        "auto or cuda, or cpu with --workers alone")
    if workers is not None:
        require_memory(f"--workers {workers}", workers * WORKER_BYTES, "start fewer")
    names = [] if device == "cpu" else visible_gpus()
    if device != "auto" and device != "cpu" and not names:
        raise UserError(f'experiment.device "{device}": no CUDA GPU is visible; choose auto or cpu')
    if gpus is not None and gpus > len(names):
        raise UserError(f"--gpus {gpus}: this machine has {len(names) or 'no'} CUDA GPU to use; choose "
                        f"{f'at most {len(names)}, or ' if names else ''}--workers for several processes on "
                        f"{'each' if names else 'the CPU'}")
    names = names[:gpus]
    return [names[n % len(names)] if names else None for n in range(workers or len(names))]


def spread(runs: list[Run], failed_before: dict[Path, int | None], gpus: Sequence[str | None]) -> dict[Path, str]:
    """As study.runner.run_all, by a process for each of `gpus`; returns {folder: why it failed}.

    What the workers print goes to <experiment>/logs/worker<n>.log. A run whose worker is killed is continued by another
    one. Raises Interrupted when SIGINT or SIGTERM came and every worker has saved and ended. The diffusion model is
    pre-trained on all GPUs together before the workers start.
    """
    if all(run.done for run in runs):
        return {}
    cards = [gpu for gpu in dict.fromkeys(gpus) if gpu is not None]
    for run in runs:
        if run.stage == "pretrain" and not run.done and len(cards) > 1:
            pretrain_together(run, cards)
    team = Team(runs, failed_before)
    with handing_on(team.stop):
        for number, gpu in enumerate(gpus, 1):
            if not team.stopping:
                team.start(number, gpu, len(gpus))
        team.watch()
    if team.stopping:
        raise Interrupted("all workers have saved and stopped")
    failed = failures(runs, failed_before)
    return failed | {run.folder: "no worker was left to do it; their logs say more"
                     for run in runs if not run.done and run.folder not in failed}


def pretrain_together(run: Run, gpus: list[str]) -> None:
    """Pre-train by one job of a process for each of `gpus`, which claims the run itself.

    Where the job fails, which it has said, the run is left to the workers. Raises Interrupted when SIGINT or SIGTERM
    came and the job has saved and ended.
    """
    from core.training.distributed import distributed_command  # imports for seconds

    images = run.config.ddpm.batch_size * run.config.ddpm.accumulation  # at least one for each process
    gpus = gpus[:images]
    path = run.config.experiment_dir / "logs" / "pretrain.json"
    write_json(path, {**run.config.plain(), "run": {"stage": "ddpm"}})
    print(f"pre-training on GPUs {', '.join(gpus)} together", flush=True)
    job = subprocess.Popen(distributed_command("ddpm_pretraining.train", len(gpus), "--config", str(path)),
                           env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}, start_new_session=True)
    with handing_on(job.send_signal):
        status = job.wait()
    if status == INTERRUPTED:
        raise Interrupted("the pre-training has saved and stopped")
    if status:
        print(f"pre-training on {len(gpus)} GPUs together ended with status {status}; the workers see to it",
              file=sys.stderr, flush=True)


@contextmanager
def handing_on(to: Callable[[int], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `to` while the block runs."""
    handlers = {number: signal.signal(number, lambda number, _: to(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def failures(runs: list[Run], failed_before: dict[Path, int | None]) -> dict[Path, str]:
    """{folder: why} of the runs that failed since `failed_before`, and of those that need them."""
    failed: dict[Path, str] = {}
    for run in runs:  # what is needed comes first
        if run.done:
            continue
        if runner.failed_at(run) not in (None, failed_before[run.folder]):
            failed[run.folder] = str(run.failure())
        elif missing := [folder for folder in run.needs if folder in failed]:
            failed[run.folder] = f"it needs {missing[0]}"
    return failed


class Team:
    """The workers of a launch: started, watched and, when the launch is to stop, told so."""

    def __init__(self, runs: list[Run], failed_before: dict[Path, int | None]) -> None:
        self.runs, self.failed_before = runs, failed_before
        self.logs = runs[0].config.experiment_dir / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.living: dict[SpawnProcess, Path] = {}  # and their logs
        self.doing: dict[SpawnProcess, Run] = {}  # as far as was seen
        self.stopping = False

    def start(self, number: int, gpu: str | None, count: int) -> None:
        """Worker `number` of `count`; the cores are shared out, for threads that wait for each other are slow."""
        environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        if "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // count))
        name = f"worker {number} on {'the CPU' if gpu is None else f'GPU {gpu}'}"
        log = self.logs / f"worker{number}.log"
        process = multiprocessing.get_context("spawn").Process(
            target=work, name=name, args=(self.runs, self.failed_before, environment, log))
        process.start()
        self.living[process] = log
        print(f"{name}: process {process.pid}, output in {log}", flush=True)

    def stop(self, _number: int) -> None:
        """Ask every worker to save and end; a second time: to end at once."""
        self.stopping = True
        for process in self.living:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGINT)

    def watch(self) -> None:
        """Say what is done, what failed, which workers died and, every minute, what they are doing, until all ended."""
        reported: dict[Path, str] = {}
        before, news = None, time.monotonic() + runner.NEWS_SECONDS
        while self.living:
            connection.wait([process.sentinel for process in self.living], runner.POLL_SECONDS)
            self.doing |= {process: run for process in self.living for run in self.runs
                           if holds(process, run)}
            self.bury()
            failed = failures(self.runs, self.failed_before)
            for folder in failed.keys() - reported.keys():
                print(f"failed: {folder}: {failed[folder]}", file=sys.stderr, flush=True)
            reported |= failed
            remaining = [run for run in self.runs if not run.done and run.folder not in failed]
            done = sum(run.done for run in self.runs)
            if before != (before := (done, len(failed))):
                print(f"done {done} of {len(self.runs)} runs; training time to come, for one process: "
                      f"{time_left(remaining)}", flush=True)
            if time.monotonic() > news:
                news = time.monotonic() + runner.NEWS_SECONDS
                self.tell()

    def bury(self) -> None:
        """Take those that have ended off the list, and say so where they should not have."""
        for process, log in list(self.living.items()):
            if process.is_alive():
                continue
            del self.living[process]
            if not process.exitcode or self.stopping:
                continue
            how = f"was killed by {signal.Signals(-process.exitcode).name}" if process.exitcode < 0 else (
                f"ended with status {process.exitcode}: {(log.read_text().splitlines() or [''])[-1]}")
            where = f" in {self.doing[process].folder}" if process in self.doing else ""
            after = f"{len(self.living)} go on with what it left" if self.living else "no other is left"
            print(f"{process.name} {how}{where} (see {log}); {after}", file=sys.stderr, flush=True)

    def tell(self) -> None:
        """What each worker is doing."""
        for process in self.living:
            run = self.doing.get(process)
            if run is not None and holds(process, run):
                step = f"step {logged(run.folder / 'metrics.jsonl')[1]} of {run.steps}" if run.steps else "scoring"
                print(f"{process.name}: {run.folder}: {step}", flush=True)
            else:
                print(f"{process.name}: waits for the others", flush=True)


def holds(process: SpawnProcess, run: Run) -> bool:
    """Whether a worker does `run`, or was killed while it did."""
    return process.pid is not None and held_by(run.folder, process.pid)


def work(runs: list[Run], failed_before: dict[Path, int | None], environment: dict[str, str], log: Path) -> None:
    """What a worker does: its part of `runs`, writing to `log`, until none is left or the launcher is gone."""
    os.setpgrp()  # a terminal's Ctrl-C is for the launcher, which hands it on
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the launcher was started to ignore it
    os.environ.update(environment)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    print(f"--- {datetime.now():%Y-%m-%d %H:%M:%S} {multiprocessing.current_process().name}, process {os.getpid()}")
    run_command(lambda: runner.run_all(runs, failed_before))


def _end_with_launcher() -> None:
    """Save and stop when the launcher has been killed."""
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        connection.wait([launcher.sentinel])
        os.kill(os.getpid(), signal.SIGINT)
