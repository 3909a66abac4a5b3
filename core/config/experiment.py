"""The config's `experiment` section: what the study is called, where it goes and what it runs on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from core.config.section import Index, Section


class Experiment(Section):
    """What the study is called, where it goes and what it runs on."""

    name: str = Field("experiment", pattern=r"^[\w.-]+$", description="folder name below output_dir")
    output_dir: str = "runs"
    seed: Index = 0
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "bf16", "float32"] = Field("auto", description="auto = bf16 where native, else float32")
    sharding: Literal["none", "full"] = Field(
        "none", description="diffusion pre-training by several processes: full = each holds a share of the network")
    compile: bool = Field(False, description="torch.compile the network's training step")
    activation_checkpointing: bool = Field(
        False, description="diffusion U-Net: recompute activations going back: less memory for about a third more time")
