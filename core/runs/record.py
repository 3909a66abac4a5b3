"""What a run leaves to say what it was: config.json, with packages, code commit and hardware."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from core.files import code_version, write_json

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "pandas", "scipy", "safetensors", "pydantic")


def write_run_config(run_dir: Path, config: dict[str, Any], run: dict[str, Any]) -> None:
    """Leave config.json: the study's config, this run's identity, packages, code commit and hardware."""
    write_json(run_dir / "config.json", {**config, "run": run, "environment": environment()})


def environment() -> dict[str, Any]:
    """Package versions, code commit and hardware."""
    import torch  # imports for seconds: the launcher reads logs without it

    versions = {name: metadata.version(name) for name in PACKAGES}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"python": platform.python_version(), "packages": versions, "code_version": code_version(),
            "platform": platform.platform(), "cpu": _cpu_name(), "cores": os.cpu_count(), "gpu": gpu}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
