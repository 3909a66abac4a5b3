"""The config's `ddpm` section: denoising diffusion pre-training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from core.config.section import Augmentation, NormClip, Section


class DDPM(Section):
    """Denoising diffusion pre-training."""

    num_train_timesteps: int = Field(500, gt=1)
    min_timestep: int = Field(0, ge=0, description="smallest timestep drawn in training (the published code: 1)")
    schedule: Literal["linear", "cosine", "quadratic", "sigmoid"] = "linear"
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    loss: Literal["l1", "l2", "huber"] = "l2"
    iterations: int = Field(10000, gt=0, description="optimiser steps")
    checkpoint_iterations: tuple[int, ...] = (4000, 6000, 8000, 10000)
    learning_rate: float = Field(1e-4, gt=0)
    warmup_iterations: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    batch_size: int = Field(8, gt=0)
    accumulation: int = Field(1, gt=0)
    accumulation_reduction: Literal["mean", "sum"] = "mean"
    sampling: Literal["stream", "epoch"] = Field(
        "stream", description="stream: endless permutations; epoch: drop_last and a step for the last partial group"
    )
    clip: NormClip = NormClip()
    ema_decay: float = Field(0.995, ge=0, lt=1)
    augmentation: Augmentation = Augmentation()
    log_every: int = Field(20, gt=0)
    validate_every: int = Field(1000, gt=0)
    sample_every: int = Field(2000, gt=0)
    save_every: int = Field(500, gt=0)
    sampler: Literal["ddpm", "ddim"] = "ddim"
    sampling_steps: int = Field(50, gt=0, description="DDIM steps")
    sample_count: int = Field(8, gt=0)

    @model_validator(mode="after")
    def _iterations_fit(self) -> DDPM:
        late = [i for i in self.checkpoint_iterations if not 0 < i <= self.iterations]
        if late or not self.checkpoint_iterations:
            raise ValueError(f"ddpm.checkpoint_iterations {late} must lie in 1..ddpm.iterations ({self.iterations})")
        if self.min_timestep >= self.num_train_timesteps:
            raise ValueError("ddpm.min_timestep must be below ddpm.num_train_timesteps")
        if self.sampling_steps > self.num_train_timesteps:
            raise ValueError("ddpm.sampling_steps must not exceed ddpm.num_train_timesteps")
        return self
