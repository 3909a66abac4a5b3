"""The networks that are compared: ours and three libraries', with as many parameters, and one training step of each.

A library is imported where its network is made: what is not installed is missed by those alone who ask for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measuring import count_flops, parameters
from core.config.ddpm import DDPM
from core.config.unet import UNet as UNetConfig
from core.networks.unet import UNet
from core.training.batches import step_generator
from core.training.cuda_graphs import Batches, Replayed
from core.training.device import autocast, memory_format
from core.training.loop import averaged_tensors
from ddpm_pretraining.diffusion import Diffusion

MULTIPLIERS = (1, 2, 4, 8)
DECAY = DDPM().ema_decay


def ours(base: int, size: tuple[int, ...], linear_attention: bool) -> UNet:
    """Our network; linear attention on every level is the published network's."""
    return UNet(UNetConfig(base_channels=base, linear_attention=linear_attention), 1, 1, size)


def lucidrains(base: int, size: tuple[int, ...], linear_attention: bool) -> nn.Module:
    """Unet of denoising-diffusion-pytorch with its default settings: our base channels are its `dim`."""
    from denoising_diffusion_pytorch import Unet

    return Unet(dim=base, channels=1, dim_mults=MULTIPLIERS)


def diffusers(base: int, size: tuple[int, ...], linear_attention: bool) -> nn.Module:
    """UNet2DModel of diffusers, attention on its last level, as wide as gives our number of parameters."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    blocks = len(MULTIPLIERS) - 1

    def build(width: int) -> nn.Module:
        return UNet2DModel(size, 1, 1, block_out_channels=tuple(width * m for m in MULTIPLIERS), norm_num_groups=8,
                           attention_head_dim=32, layers_per_block=2,
                           down_block_types=("DownBlock2D",) * blocks + ("AttnDownBlock2D",),
                           up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * blocks)

    return build(equal_width(build, parameters_of_ours(base, size, linear_attention)))


def monai(base: int, size: tuple[int, ...], linear_attention: bool) -> nn.Module:
    """DiffusionModelUNet of MONAI, attention on its last level, as wide as gives our number of parameters."""
    from monai.networks.nets import DiffusionModelUNet

    def build(width: int) -> nn.Module:
        return DiffusionModelUNet(len(size), 1, 1, num_res_blocks=2, channels=[width * m for m in MULTIPLIERS],
                                  attention_levels=[False] * (len(MULTIPLIERS) - 1) + [True], norm_num_groups=8,
                                  num_head_channels=32)

    return build(equal_width(build, parameters_of_ours(base, size, linear_attention)))


NETWORKS = {"ours": ours, "lucidrains": lucidrains, "monai": monai, "diffusers": diffusers}
ONLY_2D = ("lucidrains", "diffusers")


def parameters_of_ours(base: int, size: tuple[int, ...], linear_attention: bool) -> int:
    """How many parameters our network has."""
    with torch.device("meta"):
        return parameters(ours(base, size, linear_attention))


def equal_width(build: Callable[[int], nn.Module], wanted: int, step: int = 8) -> int:
    """The multiple of `step` for which `build` gives the number of parameters nearest to `wanted`."""

    def count(width: int) -> int:
        with torch.device("meta"):
            return parameters(build(width))

    width = step
    while count(width) < wanted:
        width += step
    return min(width, max(step, width - step), key=lambda w: abs(count(w) - wanted))


def call(network: nn.Module, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """The predicted noise."""
    out = network(noisy, timesteps)
    return out if isinstance(out, Tensor) else out.sample


def placed(network: nn.Module, images: Tensor) -> nn.Module:
    """The network on the images' device, its weights lying as its makers have them: ours as in training."""
    layout = memory_format(images.ndim, images.device) if isinstance(network, UNet) else torch.contiguous_format
    return network.to(images.device).to(memory_format=layout)


class TrainingStep:
    """One DDPM optimiser step of a network: noise, forward, L2 loss, backward, AdamW, moving average.

    All take the same images, noise, fused AdamW and averaging, but diffusers brings its own scheduler and average.
    On a GPU ours are replayed as CUDA graphs, as `core.training.loop` does, unless `replaying` is false.
    """

    def __init__(self, network: nn.Module, images: Tensor, replaying: bool = True) -> None:
        device = images.device
        self.network, self.images, self.replaying = network, images, replaying and isinstance(network, UNet)
        self.gradients: dict[str, Replayed] = {}
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
        self.diffusion, self.generator = Diffusion(DDPM(), device), step_generator(0, 0, 0, device)
        self.add_noise = self.diffusion.add_noise
        if type(network).__name__ == "UNet2DModel":
            from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
            from diffusers.training_utils import EMAModel

            self.add_noise = DDPMScheduler(DDPM().num_train_timesteps).add_noise
            self.average = partial(EMAModel(network.parameters(), decay=DECAY).step, network.parameters())
        else:
            averages = [tensor.detach().clone() for tensor in averaged_tensors(network)]
            self.average = partial(torch._foreach_lerp_, averages, averaged_tensors(network), 1 - DECAY)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Fresh noise and timesteps."""
        timesteps = self.diffusion.draw_timesteps(len(self.images), self.generator)
        return torch.randn(self.images.shape, generator=self.generator, device=self.images.device), timesteps

    def loss(self, precision: str, batches: Batches) -> Tensor:
        """The loss on the images with the drawn noise, once its gradients are there."""
        noise, timesteps = batches[0]
        with autocast(self.images.device, precision):
            predicted = call(self.network, self.add_noise(self.images, noise, timesteps), timesteps)
            loss = nn.functional.mse_loss(predicted.float(), noise)
        loss.backward()
        return loss.detach()

    def __call__(self, precision: str) -> None:
        """One step."""
        loss = partial(self.loss, precision)
        if self.replaying:
            self.gradients.setdefault(precision, Replayed(loss, list(self.network.parameters())))([self.draw()])
        else:
            loss([self.draw()])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.average()


def step_flops(name: str, base: int, size: tuple[int, ...], batch: int, linear_attention: bool) -> int:
    """FLOPs of the products and convolutions in forward and backward pass, counted on the meta device."""
    with torch.device("meta"):
        network = NETWORKS[name](base, size, linear_attention)
        images, timesteps = torch.empty((batch, 1, *size)), torch.zeros(batch, dtype=torch.long)
    return count_flops(lambda: call(network, images, timesteps).sum().backward())
