"""The config's `slurm` section: what a study launched with --slurm asks of the cluster, by submitit's names."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from core.config.section import Count, Index, Section


class Slurm(Section):
    """A job array whose tasks share the study; no figure depends on it."""

    tasks: Count = Field(4, description="tasks of the array at most, each a launcher of its own on one node")
    partition: str | None = None
    timeout_min: Count = Field(240, description="time limit of a task; one that reaches it saves and is requeued")
    gpus_per_node: Index = Field(1, description="GPUs of a task; 0 = none")
    cpus_per_task: Count = 8
    mem_gb: float = Field(32, gt=0, description="memory of a task")
    parameters: dict[str, Any] = Field({}, description="others by submitit's names, such as slurm_account, slurm_qos, "
                                       "slurm_constraint, slurm_setup, slurm_additional_parameters")
