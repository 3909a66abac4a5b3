"""The config's `slurm` section: what a study launched with --slurm asks of the cluster, by submitit's names."""

from __future__ import annotations

from typing import Any

from core.config.section import Count, Index, Section, setting


class Slurm(Section):
    """A job array whose tasks share the study; no figure depends on it."""

    tasks: Count = setting(4, "tasks of the array at most, each a launcher of its own on one node")
    partition: str | None = setting(None, "the cluster's partition; null = its default")
    timeout_min: Count = setting(240, "time limit of a task in minutes; one that reaches it saves and is requeued")
    gpus_per_node: Index = setting(1, "GPUs of a task; 0 = none")
    cpus_per_task: Count = setting(8, "CPU cores of a task")
    mem_gb: float = setting(32, "memory of a task in GB", gt=0)
    parameters: dict[str, Any] = setting({}, "others by submitit's names, such as slurm_account, slurm_qos, "
                                         "slurm_constraint, slurm_setup, slurm_additional_parameters")
