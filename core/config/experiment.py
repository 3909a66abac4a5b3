"""The config's `experiment` section: what the study is called, where it goes and what it runs on."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator

from core.config.section import Index, Section, folder_name, setting
from core.config.starts import BACKBONES


class Experiment(Section):
    """What the study is called, where it goes and what it runs on."""

    name: str = setting("experiment", "folder name of the study, below output_dir", pattern=r"^[\w.-]+$")
    output_dir: str = setting("runs", "folder that holds the studies")
    seed: Index = setting(0, "seed of every stage and of the bootstrap; a cell adds its own seed and draw",
                          counts_for=("pretraining", "ssl", "training"), backbones=tuple(BACKBONES))
    device: str = setting("auto", "auto (a GPU where there is one), cpu, cuda or cuda:N")
    precision: Literal["auto", "bf16", "float32"] = setting(
        "auto", "auto: bf16 where the hardware has it natively, else float32")
    sharding: Literal["none", "full"] = setting(
        "none", "diffusion pre-training by several processes: full = each holds a share of the network")
    compile: bool = setting(False, "torch.compile the network's training step")
    cuda_graphs: bool = setting(True, "on a GPU: replay training steps of one shape as one launch")
    activation_checkpointing: Literal["auto"] | bool = setting(
        "auto", "diffusion U-Net: recompute activations going back: less memory for about a third more time; auto: in "
                "one process on a GPU, where a step does not fit otherwise, even in parts")

    @field_validator("name")
    @classmethod
    def _is_a_folder(cls, name: str) -> str:
        return folder_name("experiment.name", name)

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", device):
            raise ValueError(f'experiment.device "{device[:40]}" is not supported; choose auto, cpu, cuda or cuda:N')
        return device
