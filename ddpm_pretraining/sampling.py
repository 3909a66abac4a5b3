"""Drawing images from a trained network: ancestral (DDPM), deterministic (DDIM) and along a flow, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from core.config.ddpm import DDPM
from core.training.cuda_graphs import Replayed
from ddpm_pretraining.diffusion import Diffusion, Flow, Process

Predict = Callable[[Tensor, Tensor], Tensor]


def ddpm_steps(diffusion: Diffusion, predict: Predict, noisy: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2; posterior variance, x_0 clipped to [0, 1]); yields every x_0."""
    for step in reversed(range(diffusion.config.num_train_timesteps)):
        timesteps = torch.full((noisy.shape[0],), step, device=noisy.device)
        images = diffusion.predict_images(noisy, predict(noisy, timesteps), timesteps).clamp(0, 1)
        beta, signal = diffusion.betas[step], diffusion.signal[step]
        previous = diffusion.signal[step - 1] if step else torch.ones_like(signal)
        mean = (previous.sqrt() * beta * images + (1 - beta).sqrt() * (1 - previous) * noisy) / (1 - signal)
        noise = torch.randn(noisy.shape, generator=generator, device=noisy.device)
        noisy = mean + ((1 - previous) / (1 - signal) * beta).sqrt() * noise
        yield images


def ddim_steps(diffusion: Diffusion, predict: Predict, noisy: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Deterministic sampling (Song et al. 2021, eq. 12, eta 0) in config.sampling_steps steps; yields every x_0."""
    last = diffusion.config.num_train_timesteps - 1
    times = np.unique(np.linspace(0, last, diffusion.config.sampling_steps).round().astype(int))[::-1].tolist()
    for step, following in zip(times, [*times[1:], -1], strict=True):
        timesteps = torch.full((noisy.shape[0],), step, device=noisy.device)
        images = diffusion.predict_images(noisy, predict(noisy, timesteps), timesteps).clamp(0, 1)
        signal = diffusion.signal[step]
        noise = (noisy - signal.sqrt() * images) / (1 - signal).sqrt()
        target = diffusion.signal[following] if following >= 0 else torch.ones_like(signal)
        noisy = target.sqrt() * images + (1 - target).sqrt() * noise
        yield images


def euler_steps(flow: Flow, predict: Predict, noisy: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """The flow from noise to an image in config.sampling_steps equal steps of Euler's; yields every x_0, clipped."""
    steps = flow.config.sampling_steps
    for left in range(steps, 0, -1):
        time = left / steps * flow.config.num_train_timesteps
        timesteps = torch.full((noisy.shape[0],), time, device=noisy.device)
        velocity = predict(noisy, timesteps)
        yield flow.predict_images(noisy, velocity, timesteps).clamp(0, 1)
        noisy = noisy - velocity / steps


SAMPLERS: dict[str, dict[str, Callable[..., Iterator[Tensor]]]] = {  # by ddpm.objective
    "noise": {"ddpm": ddpm_steps, "ddim": ddim_steps}, "flow": {"euler": euler_steps}}


def sampler_of(config: DDPM) -> str:
    """ddpm.sampler, or the only one that the objective has."""
    samplers = SAMPLERS[config.objective]
    return config.sampler if config.sampler in samplers else next(iter(samplers))


@torch.no_grad()
def sample(process: Process, model: nn.Module, shape: tuple[int, ...], generator: torch.Generator,
           sampler: str, progress: str | None = None) -> list[Tensor]:
    """The clean-image estimates (B, C, *size) of every sampling step, the last one being the samples."""
    noisy = torch.randn(shape, generator=generator, device=generator.device)
    predict = Replayed(lambda batches: model(*batches[0]).float())
    steps = SAMPLERS[process.config.objective][sampler](process, lambda x, t: predict([(x, t)]), noisy, generator)
    return list(tqdm(steps, desc=progress, disable=progress is None, leave=False))


def grid_picture(images: Tensor, columns: int) -> Image.Image:
    """(B, C, *size) in [0, 1] -> one grey picture; of volumes the middle slice of the first axis."""
    tiles = images[:, 0].float().cpu()
    while tiles.ndim > 3:
        tiles = tiles[:, tiles.shape[1] // 2]
    rows = -(-len(tiles) // columns)
    height, width = tiles.shape[1:]
    sheet = np.zeros((rows * height, columns * width), dtype=np.uint8)
    for index, tile in enumerate(tiles.clamp(0, 1).mul(255).round().to(torch.uint8).numpy()):
        row, column = divmod(index, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = tile
    return Image.fromarray(sheet)


def denoising_strip(process: Process, model: nn.Module, images: Tensor, generator: torch.Generator,
                    levels: int = 6) -> Image.Image:
    """Each image in three rows over rising noise levels: noisy input, one-step estimate of x_0, absolute error x 4."""
    times = torch.linspace(0, process.config.num_train_timesteps - 1, levels + 1)[1:].long().tolist()
    rows: list[Tensor] = []
    for image in images:
        batch = image.expand(levels, *image.shape)
        timesteps = torch.tensor(times, device=image.device)
        noise = torch.randn(batch.shape, generator=generator, device=image.device)
        noisy = process.add_noise(batch, noise, timesteps)
        with torch.no_grad():
            clean = process.predict_images(noisy, model(noisy, timesteps).float(), timesteps).clamp(0, 1)
        rows += [noisy, clean, (clean - batch).abs() * 4]
    return grid_picture(torch.cat(rows), columns=levels)
