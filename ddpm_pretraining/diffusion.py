"""From images to noise: diffusion (Ho et al. 2020) or straight lines (Lipman et al. 2023), and the training loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config.ddpm import DDPM


def linear_betas(steps: int, start: float, end: float) -> Tensor:
    """(steps,) evenly spaced betas (Ho et al. 2020)."""
    return torch.linspace(start, end, steps, dtype=torch.float64)


def quadratic_betas(steps: int, start: float, end: float) -> Tensor:
    """(steps,) betas whose square roots are evenly spaced (Song et al. 2021, Rombach et al. 2022)."""
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2


def sigmoid_betas(steps: int, start: float, end: float) -> Tensor:
    """(steps,) betas on a sigmoid from -6 to 6 (Xu et al. 2022)."""
    return torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64)) * (end - start) + start


def cosine_betas(steps: int, start: float, end: float) -> Tensor:
    """(steps,) betas of the squared-cosine signal level, capped at 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
    times = torch.arange(steps + 1, dtype=torch.float64) / steps
    level = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - level[1:] / level[:-1]).clamp(max=0.999)


SCHEDULES = {"linear": linear_betas, "quadratic": quadratic_betas, "sigmoid": sigmoid_betas, "cosine": cosine_betas}
LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}


class Process(ABC):
    """A way from images to noise on a device, which a network learns to go back. Timesteps begin at the least noise."""

    def __init__(self, config: DDPM, device: torch.device) -> None:
        self.config = config

    @abstractmethod
    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t from x_0. images and noise (B, C, *size), timesteps (B,)."""

    @abstractmethod
    def predict_images(self, noisy: Tensor, predicted: Tensor, timesteps: Tensor) -> Tensor:
        """x_0 from x_t and what the network predicts of it."""

    @abstractmethod
    def target(self, images: Tensor, noise: Tensor) -> Tensor:
        """What the network is to predict."""

    @abstractmethod
    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) uniform training timesteps from min_timestep on."""

    def losses(self, model: nn.Module, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(B,) losses of the prediction; of the noise, paper eq. 5."""
        predicted = model(self.add_noise(images, noise, timesteps), timesteps)
        loss = LOSSES[self.config.loss](predicted.float(), self.target(images, noise), reduction="none")
        return loss.flatten(1).mean(dim=1)


class Diffusion(Process):
    """A noise schedule; the network predicts the noise. Timesteps are 0-based: t = 0 is the least noise."""

    def __init__(self, config: DDPM, device: torch.device) -> None:
        super().__init__(config, device)
        betas = SCHEDULES[config.schedule](config.num_train_timesteps, config.beta_start, config.beta_end)
        self.betas = betas.float().to(device)
        self.signal = torch.cumprod(1 - betas, dim=0).float().to(device)  # alpha bar

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """q(x_t | x_0), paper eq. 2. images and noise (B, C, *size), timesteps (B,)."""
        signal = self.signal[timesteps].view(-1, *(1,) * (images.ndim - 1))
        return signal.sqrt() * images + (1 - signal).sqrt() * noise

    def predict_images(self, noisy: Tensor, predicted: Tensor, timesteps: Tensor) -> Tensor:
        """x_0 from x_t and the (predicted) noise: eq. 2 solved for x_0."""
        signal = self.signal[timesteps].view(-1, *(1,) * (noisy.ndim - 1))
        return (noisy - (1 - signal).sqrt() * predicted) / signal.sqrt()

    def target(self, images: Tensor, noise: Tensor) -> Tensor:
        """The noise."""
        return noise

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) uniform training timesteps from min_timestep on."""
        return torch.randint(self.config.min_timestep, self.config.num_train_timesteps, (count,),
                             generator=generator, device=generator.device)


class Flow(Process):
    """Straight lines x_t = (1 - t) x_0 + t noise; the network predicts their velocity (flow matching).

    Lipman et al. 2023, rectified flow of Liu et al. 2023, with t from the image. A timestep is t times
    num_train_timesteps, not rounded, so that the network is told numbers of the same range as in diffusion.
    """

    def _times(self, timesteps: Tensor, dims: int) -> Tensor:
        return (timesteps / self.config.num_train_timesteps).view(-1, *(1,) * (dims - 1))

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t. images and noise (B, C, *size), timesteps (B,)."""
        return torch.lerp(images, noise, self._times(timesteps, images.ndim))

    def predict_images(self, noisy: Tensor, predicted: Tensor, timesteps: Tensor) -> Tensor:
        """x_0 at the beginning of the line that goes through x_t with the (predicted) velocity."""
        return noisy - self._times(timesteps, noisy.ndim) * predicted

    def target(self, images: Tensor, noise: Tensor) -> Tensor:
        """The velocity."""
        return noise - images

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) uniform timesteps, real numbers from min_timestep on."""
        lowest, highest = self.config.min_timestep, self.config.num_train_timesteps
        return torch.rand(count, generator=generator, device=generator.device) * (highest - lowest) + lowest


OBJECTIVES: dict[str, type[Process]] = {"noise": Diffusion, "flow": Flow}
