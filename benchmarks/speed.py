"""Speed against a peer and of the data path, as ratios within one run on one machine.

1. One optimiser step (forward, backward, AdamW) of our U-Net and of `Unet` of the PyPI package
   denoising-diffusion-pytorch, the same tensors, loss, optimiser and number of threads, interleaved.
2. One epoch over the images of a data set from the decoded cache, against decoding and resizing every image.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from denoising_diffusion_pytorch import Unet as PeerUNet
from torch import Tensor, nn

from core.config import add_config_arguments, load_config
from core.dataset import load_images, load_source, resize
from core.errors import run_command
from core.images import read_image
from core.runlog import environment
from core.settings import DDPM, Config
from core.settings import UNet as UNetConfig
from core.train_loop import BatchPlan, autocast, resolve_device, resolve_precision, step_generator
from core.unet import UNet
from ddpm_pretraining.diffusion import Diffusion


def optimiser_step(model: nn.Module, images: Tensor, precision: str) -> Callable[[], None]:
    """A function that does one whole DDPM optimiser step of `model` and waits for the device."""
    device = images.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    diffusion, generator = Diffusion(DDPM(), device), step_generator(0, 0, 0, device)

    def step() -> None:
        timesteps = diffusion.draw_timesteps(len(images), generator)
        noise = torch.randn(images.shape, generator=generator, device=device)
        with autocast(device, precision):
            loss = diffusion.losses(model, images, noise, timesteps).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def time_interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, run in turn so that a drift of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare_networks(base: int, side: int, batch: int, rounds: int) -> None:
    """Print the step times of ours (default precision, float32) and the peer's (float32)."""
    device = resolve_device("auto")
    images = torch.rand(batch, 1, side, side, device=device)
    fast = images.contiguous(memory_format=torch.channels_last)
    size = (side, side)
    ours = [UNet(UNetConfig(base_channels=base), 1, 1, size).to(device) for _ in range(2)]
    ours[0] = ours[0].to(memory_format=torch.channels_last)
    peer = PeerUNet(dim=base, channels=1, dim_mults=(1, 2, 4, 8)).to(device)
    default = resolve_precision("auto", device)
    count = {"ours": sum(p.numel() for p in ours[0].parameters()), "peer": sum(p.numel() for p in peer.parameters())}
    medians = time_interleaved({
        f"ours, {default}": optimiser_step(ours[0], fast, default),
        "ours, float32": optimiser_step(ours[1], images, "float32"),
        "peer, float32": optimiser_step(peer, images, "float32"),
    }, rounds)
    print(f"optimiser step, base {base}, {side}x{side}, batch {batch}, {torch.get_num_threads()} threads, "
          f"parameters {count['ours'] / 1e6:.2f} M (ours) {count['peer'] / 1e6:.2f} M (peer), median of {rounds}:")
    for name, seconds in medians.items():
        print(f"  {name:<16}{seconds * 1000:8.0f} ms   {medians['peer, float32'] / seconds:5.2f} x the peer")


def compare_epochs(config: Config) -> None:
    """Print an epoch of decoding and resizing each image, the first epoch into the cache and one from it."""
    records = load_source(config.dataset).pretraining_records()
    size = config.dataset.image_size
    started = time.perf_counter()
    for record in records:
        resize(read_image(record.image), size)
    decoding = time.perf_counter() - started
    started = time.perf_counter()
    images = load_images(records, config.dataset).images
    loading = time.perf_counter() - started
    plan = BatchPlan(len(records), config.ddpm.batch_size, 1, "stream", True, 0)
    started = time.perf_counter()
    for step in range(plan.steps_per_epoch):
        images[torch.from_numpy(plan.groups(step)[0])].sum()
    epoch = time.perf_counter() - started
    print(f"{len(records)} images of {config.dataset.name} to {size[0]}x{size[1]}: decode and resize each "
          f"{decoding:.3f} s, start of a run with a warm cache {loading:.3f} s, an epoch of batches {epoch:.4f} s "
          f"({decoding / epoch:.0f} x faster)")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="example: python -m benchmarks.speed --config configs/cephalo.json")
    add_config_arguments(parser)
    parser.add_argument("--base", type=int, default=32)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)
    machine = environment()
    print(f"{machine['cpu']}, {machine['cores']} cores, GPU {machine['gpu']}, torch {machine['packages']['torch']}")
    compare_networks(arguments.base, arguments.side, arguments.batch, arguments.rounds)
    load_images(load_source(config.dataset).pretraining_records(), config.dataset)  # fills the cache
    compare_epochs(config)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    run_command(main)
