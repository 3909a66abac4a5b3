"""A study as a SLURM job array, through submitit: each task is a launcher of its own, so tasks share it by claims."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from submitit import AutoExecutor, Job, JobEnvironment
from submitit.helpers import Checkpointable

from core.config.config import Config
from core.errors import Interrupted, UserError
from study.prepare import prepare
from study.run import failures_so_far, run_study

PRETRAINING = ("pretrain", "ssl")
REQUEUES = 100  # how often a task may reach its time limit


class StudyTask(Checkpointable):
    """One task of the array. Checkpointable: requeued, it is called again, and the study's files are its state."""

    def __init__(self, config: Config, stages: tuple[str, ...], failed_before: dict[Path, int | None]) -> None:
        self.config, self.stages, self.failed_before = config, stages, failed_before

    def __call__(self) -> str | None:
        """Do what is left of the study and nobody else does, then the report; returns its page.

        At the signal that submitit asks for before the time limit (or a preemption) training saves and stops, then
        submitit's own handler requeues the task. SIGTERM, as from scancel, saves and ends it.
        """
        number = getattr(signal, f"SIG{JobEnvironment.USR_SIG}")
        requeue, task = signal.getsignal(number), os.getpid()
        asked: list[bool] = []

        def stop(_number: int, _frame: FrameType | None) -> None:
            if os.getpid() == task and not asked:  # SLURM signals a task's children as well
                asked.append(True)
                signal.raise_signal(signal.SIGINT)

        signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the job was started to ignore it
        signal.signal(number, stop)
        try:
            page = run_study(self.config, self.stages, failed_before=self.failed_before)
        except (Interrupted, KeyboardInterrupt):
            if not asked or not callable(requeue):
                raise
            requeue(number, None)  # ends the process
            return None
        return None if page is None else str(page)


def submit(config: Config, stages: tuple[str, ...], cluster: str = "slurm") -> list[Job[str | None]]:
    """Check the study, print its plan and submit what is left of it; returns the array's tasks, none when all is done.

    What is pre-trained is a job of its own with a task for each network, which the array waits for, so that no GPU is
    held idle meanwhile; the array does it where that job did not. `cluster` is submitit's name of an executor. Raises
    UserError where there is no SLURM, and for what submitit or sbatch refuse.
    """
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise UserError("--slurm: this machine has no sbatch; launch on a login node of the cluster, or without it")
    task = StudyTask(config, stages, failures_so_far(config, stages))
    remaining = [run for run in prepare(config, stages) if not run.done]
    first = [run for run in remaining if run.stage in PRETRAINING]
    count, after = len(remaining) - len(first), {}
    if first and count:
        stage = tuple(stage for stage in PRETRAINING if stage in stages)
        jobs = submitted(config, [StudyTask(config, stage, task.failed_before)] * len(first), cluster)
        after = {"slurm_dependency": f"afterany:{jobs[0].job_id.partition('_')[0]}"}
    count = min(config.slurm.tasks, count or len(first))
    return submitted(config, [task] * count, cluster, **after) if count else []


def submitted(config: Config, tasks: list[StudyTask], cluster: str, **more: Any) -> list[Job[str | None]]:
    """Submit `tasks` as one array, as config.slurm says; submitit's files and the logs go to <experiment>/slurm."""
    folder, settings = config.experiment_dir / "slurm", config.slurm
    try:
        executor = AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=REQUEUES)
        executor.update_parameters(**{
            "name": config.experiment.name, "timeout_min": settings.timeout_min, "mem_gb": settings.mem_gb,
            "cpus_per_task": settings.cpus_per_task, "gpus_per_node": settings.gpus_per_node or None,
            "slurm_partition": settings.partition, **settings.parameters, **more})
        jobs = executor.submit_array(tasks)
    except (NameError, AssertionError, TypeError, ValueError) as error:
        raise UserError(f"slurm.parameters: {'; '.join(str(error).splitlines())}") from None
    except RuntimeError as error:  # what sbatch said
        raise UserError(f"--slurm: {' '.join(str(error).split())}") from None
    number = jobs[0].job_id.partition("_")[0]
    print(f"submitted job {number}: {len(jobs)} task(s) for {' '.join(tasks[0].stages)}"
          f"{', ' + more['slurm_dependency'] if more else ''}; logs in {folder}", flush=True)
    return jobs
