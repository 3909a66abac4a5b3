"""Peak memory and step time of a training step by input size and base channels, with and without checkpointing.

Every row is measured in a process of its own: the peak of its resident memory (CPU) or of the allocator (CUDA) over
three whole DDPM optimiser steps, less what a step of a tiny network takes (libraries, kernels).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from core.errors import UserError, run_command
from core.files import write_json
from core.runlog import environment
from core.settings import DDPM
from core.settings import UNet as UNetConfig
from core.train_loop import autocast, memory_format, resolve_device, resolve_precision, step_generator
from core.unet import UNet
from ddpm_pretraining.diffusion import Diffusion

STEPS = 3


def measure(size: tuple[int, ...], base: int, batch: int, checkpointing: bool, linear_attention: bool) -> dict:
    """Peak MiB, median seconds of a step and millions of parameters, in this process, which must be fresh."""
    device = resolve_device("auto")
    _train(UNetConfig(base_channels=4), (8,) * len(size), 1, checkpointing, device)
    before = _peak_mib(device)
    config = UNetConfig(base_channels=base, linear_attention=linear_attention)
    seconds, parameters = _train(config, size, batch, checkpointing, device)
    return {"mib": _peak_mib(device) - before, "seconds": seconds, "parameters_m": parameters / 1e6}


def _train(config: UNetConfig, size: tuple[int, ...], batch: int, checkpointing: bool,
           device: torch.device) -> tuple[float, int]:
    """Median seconds of the later ones of a few optimiser steps, and the number of parameters."""
    model = UNet(config, 1, 1, size).to(device, memory_format=memory_format(len(size) + 2, device))
    model.activation_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    diffusion, generator = Diffusion(DDPM(), device), step_generator(0, 0, 0, device)
    images = torch.rand((batch, 1, *size), device=device)
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        noise = torch.randn(images.shape, generator=generator, device=device)
        with autocast(device, resolve_precision("auto", device)):
            loss = diffusion.losses(model, images, noise, diffusion.draw_timesteps(batch, generator)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]), sum(p.numel() for p in model.parameters())


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure_apart(row: dict) -> dict:
    """`measure(**row)` in a fresh process; a row that the memory cannot hold says so."""
    code = f"import json; from benchmarks.memory import measure; print(json.dumps(measure(**{row!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]
        return {"failed": reason}
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table: for each size and base the plain step, the checkpointed one, and their ratios."""
    lines = ["| input | base | batch | parameters | memory | step | checkpointed: memory | step | memory | time |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        plain, saved = row["plain"], row["checkpointed"]
        start = f"| {'x'.join(map(str, row['size']))} | {row['base']} | {row['batch']} |"
        failed = plain.get("failed") or saved.get("failed")
        lines.append(f"{start} failed: {failed} |" if failed else
                     f"{start} {plain['parameters_m']:.1f} M | {plain['mib']:.0f} MiB | {plain['seconds']:.2f} s | "
                     f"{saved['mib']:.0f} MiB | {saved['seconds']:.2f} s | {saved['mib'] / plain['mib']:.2f} x | "
                     f"{saved['seconds'] / plain['seconds']:.2f} x |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.memory --sides 32 48 64 --bases 8 16 32 --batch 1")
    parser.add_argument("--dims", type=int, choices=(2, 3), default=3)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 48, 64], help="pixels along every axis")
    parser.add_argument("--bases", type=int, nargs="+", default=[8, 16, 32], help="base channels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--linear-attention", action="store_true", help="as the published 2D network has it")
    parser.add_argument("--out", type=Path, help="JSON to write the figures to")
    arguments = parser.parse_args()
    if any(side % 8 for side in arguments.sides):
        raise UserError(f"--sides {arguments.sides}: must be multiples of 8")
    machine = environment()
    print(f"{machine['cpu']}, {machine['cores']} cores, {torch.get_num_threads()} threads, GPU {machine['gpu']}, "
          f"precision {resolve_precision('auto', resolve_device('auto'))}")
    rows = []
    for side in arguments.sides:
        for base in arguments.bases:
            setting = {"size": (side,) * arguments.dims, "base": base, "batch": arguments.batch,
                       "linear_attention": arguments.linear_attention}
            plain, saved = (measure_apart({**setting, "checkpointing": on}) for on in (False, True))
            rows.append({**setting, "plain": plain, "checkpointed": saved})
            print(table(rows).splitlines()[-1], flush=True)
    print(table(rows))
    if arguments.out:
        write_json(arguments.out, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    run_command(main)
