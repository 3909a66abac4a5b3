"""What every suite measures with: interleaved medians, counted FLOPs, the machine's own peaks, memory by process."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from core.networks.convolutions import CONV
from core.runs.record import environment
from core.training.device import memory_format

WARM_UP = 1
PRECISIONS = ("bf16", "float32")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def wait_for(device: torch.device) -> None:
    """Return when all work given to `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_interleaved(functions: dict[str, Callable[[], None]], rounds: int,
                     device: torch.device) -> dict[str, list[float]]:
    """Seconds of each function in `rounds` rounds, run in turn so that a drift of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(WARM_UP + rounds):
        for name, function in functions.items():
            wait_for(device)
            started = time.perf_counter()
            function()
            wait_for(device)
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def count_flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of the products and convolutions in `function`, which may run on the meta device."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_functions(device: torch.device, dims: int) -> dict[str, tuple[Callable[[], None], int]]:
    """For each precision a large matrix product and a large 3^D convolution, with the FLOPs of one call."""
    side = 8192 if device.type == "cuda" else 2048
    batch, channels, positions = (64 if device.type == "cuda" else 4), 256, 4096
    edge = round(positions ** (1 / dims))
    image = torch.rand((batch, channels, *(edge,) * dims), device=device)
    layout = memory_format(image.ndim, device)
    peaks: dict[str, tuple[Callable[[], None], int]] = {}
    for precision in PRECISIONS:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        matrix = torch.rand((side, side), device=device, dtype=dtype)
        layer = CONV[dims](channels, channels, 3, padding=1, bias=False).to(device, dtype).to(memory_format=layout)
        x = image.to(dtype, memory_format=layout)
        peaks[f"matrix product, {precision}"] = (_without_grad(torch.mm, matrix, matrix), 2 * side**3)
        peaks[f"convolution, {precision}"] = (
            _without_grad(layer, x), 2 * batch * edge**dims * channels**2 * 3**dims)
    return peaks


def _without_grad(function: Callable[..., Any], *inputs: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            function(*inputs)

    return call


def peak_mib(device: torch.device) -> float:
    """The most memory so far: of the allocator (CUDA) or resident, of this process alone (CPU)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text(encoding="utf8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 2**10


def measure_apart(function: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """benchmarks.<function>(**arguments), a dict, in a fresh process; {"failed": why} where it ends badly."""
    module, _, name = function.rpartition(".")
    code = (f"import json; from benchmarks.{module} import {name}; "
            f"print(json.dumps({name}(**json.loads({json.dumps(arguments)!r}))))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]
        return {"failed": reason}
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine(device: torch.device) -> dict[str, Any]:
    """`environment()`, the device, the number of threads and the CPU's flags that count here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf8").splitlines() if info.is_file() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {**environment(), "device": str(device), "threads": torch.get_num_threads(),
            "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
            "date": time.strftime("%Y-%m-%d")}


def median_ms(seconds: list[float]) -> float:
    """Median in milliseconds."""
    return statistics.median(seconds) * 1000


def parameters(network: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in network.parameters())


def table(headings: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


