"""The config's `ddpm` section: denoising diffusion pre-training."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from core.config.section import (
    FREE,
    Augmentation,
    Count,
    Fraction,
    Index,
    NormClip,
    Rate,
    Section,
    only,
    setting,
    unless,
)


class DDPM(Section):
    """Denoising diffusion pre-training."""

    objective: Literal["noise", "flow"] = setting(
        "noise", "what the network learns: the noise that a schedule added (Ho et al. 2020), or the velocity of a "
        "straight line from the image to noise (flow matching, Lipman et al. 2023)", before="noise")
    num_train_timesteps: int = setting(500, "steps of the noise schedule; of a flow the largest number that the "
                                       "network is told as its time", gt=1)
    min_timestep: Index = setting(0, "smallest timestep drawn in training (the published code: 1)")
    schedule: Literal["linear", "cosine", "quadratic", "sigmoid"] = setting(
        "linear", "how the noise grows with the timestep; cosine knows no beta_start and beta_end",
        acts=[only("objective", "noise")])
    beta_start: float = setting(1e-4, "variance of the noise that the first timestep adds", gt=0, lt=1,
                                acts=[only("objective", "noise"), unless("schedule", "cosine")])
    beta_end: float = setting(0.02, "variance of the noise that the last timestep adds", gt=0, lt=1,
                              acts=[only("objective", "noise"), unless("schedule", "cosine")])
    loss: Literal["l1", "l2", "huber"] = setting("l2", "distance of the prediction from the noise, or the velocity")
    iterations: Count = setting(10000, "optimiser steps", counts_for=FREE)
    checkpoint_iterations: tuple[int, ...] = setting(
        (4000, 6000, 8000, 10000), "steps at which the averaged weights are kept; fine-tuning starts from the last one",
        counts_for=("training",), backbones=("ddpm",))
    learning_rate: Rate = setting(1e-4, "AdamW's learning rate")
    warmup_iterations: Index = setting(0, "steps over which the learning rate rises to its value")
    weight_decay: float = setting(0.01, "AdamW's weight decay", ge=0)
    batch_size: Count = setting(8, "images of a micro-batch")
    accumulation: Count = setting(1, "micro-batches of an optimiser step")
    accumulation_reduction: Literal["mean", "sum"] = setting(
        "mean", "how the micro-batches' gradients are joined", acts=[unless("accumulation", 1)])
    sampling: Literal["stream", "epoch"] = setting(
        "stream", "stream: endless permutations; epoch: drop_last and a step for the last partial group")
    clip: NormClip = setting(NormClip(), "gradient clipping")
    ema_decay: Fraction = setting(0.995, "decay of the moving average of the weights, each step")
    augmentation: Augmentation = setting(Augmentation(), "random changes of the images")
    log_every: Count = setting(20, "steps between lines of the log", counts_for=FREE)
    validate_every: Count = setting(1000, "steps between losses on the validation images", counts_for=FREE)
    sample_every: Count = setting(2000, "steps between pictures of sampled images; the last step draws some too",
                                  counts_for=FREE)
    save_every: Count = setting(500, "steps between saved states, from which a run can be continued", counts_for=FREE)
    sampler: Literal["ddpm", "ddim"] = setting(
        "ddim", "how images are sampled: ddpm goes through every timestep, ddim through sampling_steps of them",
        counts_for=FREE, acts=[only("objective", "noise")])
    sampling_steps: Count = setting(50, "timesteps that DDIM goes through, or Euler's steps of a flow", counts_for=FREE,
                                    acts=[only("sampler", "ddim")])
    sample_count: Count = setting(8, "images sampled for a picture", counts_for=FREE)

    @model_validator(mode="after")
    def _iterations_fit(self) -> DDPM:
        late = [i for i in self.checkpoint_iterations if not 0 < i <= self.iterations]
        if late or not self.checkpoint_iterations:
            raise ValueError(f"ddpm.checkpoint_iterations {late} must lie in 1..ddpm.iterations ({self.iterations})")
        if self.min_timestep >= self.num_train_timesteps:
            raise ValueError("ddpm.min_timestep must be below ddpm.num_train_timesteps")
        if self.objective == "noise" and self.schedule != "cosine" and self.beta_start > self.beta_end:
            raise ValueError(f"ddpm.beta_start {self.beta_start:g} must not be above ddpm.beta_end {self.beta_end:g}")
        if self.sampling_steps > self.num_train_timesteps:
            raise ValueError("ddpm.sampling_steps must not exceed ddpm.num_train_timesteps")
        return self
