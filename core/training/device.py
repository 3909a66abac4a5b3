"""Where a run computes: device, precision and memory layout."""

from __future__ import annotations

import torch

from core.errors import UserError


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


def autocast(device: torch.device, precision: str, keep_casts: bool = True) -> torch.autocast:
    """The mixed-precision context of a run.

    Weights cast to bf16 are kept until the outermost context ends. A CUDA graph that is captured within another context
    must not take them from there, for it would go on reading weights of then: keep_casts=False.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=keep_casts)


def memory_format(ndim: int, device: torch.device) -> torch.memory_format:
    """How weights of `ndim` axes lie in memory: channels last, but for 3D convolutions on a CPU, faster contiguous."""
    if ndim == 5:
        return torch.channels_last_3d if device.type == "cuda" else torch.contiguous_format
    return torch.channels_last if ndim == 4 else torch.contiguous_format
