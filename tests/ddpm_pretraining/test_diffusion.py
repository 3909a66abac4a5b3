"""The diffusion process and its samplers against diffusers, torch and closed forms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler

from core.config.ddpm import DDPM
from ddpm_pretraining.diffusion import LOSSES, SCHEDULES, Diffusion
from ddpm_pretraining.sampling import ddim_steps, ddpm_steps, denoising_strip, grid_picture, sample

CPU = torch.device("cpu")
THEIR_NAMES = {"linear": "linear", "quadratic": "scaled_linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}


def make(**changes):
    """A process of 50 steps (or as `changes` say)."""
    settings = {"num_train_timesteps": 50, "sampling_steps": 5, "beta_start": 1e-4, "beta_end": 0.02}
    return Diffusion(DDPM(**settings | changes), CPU)


def theirs(kind, schedule="linear", steps=50, **changes):
    return kind(num_train_timesteps=steps, beta_start=1e-4, beta_end=0.02, beta_schedule=THEIR_NAMES[schedule],
                clip_sample=False, **changes)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Oracle(torch.nn.Module):
    """The perfect noise predictor when every image is `image`: the noise that leads from it to x_t."""

    def __init__(self, diffusion, image):
        super().__init__()
        self.diffusion, self.image = diffusion, image

    def forward(self, noisy, timesteps):
        signal = self.diffusion.signal[timesteps].view(-1, 1, 1, 1)
        return (noisy - signal.sqrt() * self.image) / (1 - signal).sqrt()


@pytest.mark.parametrize("schedule", sorted(THEIR_NAMES))
@pytest.mark.parametrize("steps", [50, 500])
def test_schedules(schedule, steps):
    ours, other = make(schedule=schedule, num_train_timesteps=steps), theirs(DDPMScheduler, schedule, steps)
    assert set(SCHEDULES) == set(THEIR_NAMES)
    torch.testing.assert_close(ours.betas, other.betas, rtol=2e-4, atol=1e-7)  # theirs are computed in float32
    torch.testing.assert_close(ours.signal, other.alphas_cumprod, rtol=2e-3, atol=1e-7)


def test_linear_schedule_by_hand():
    diffusion = make(num_train_timesteps=3, sampling_steps=2, beta_start=0.1, beta_end=0.3)
    torch.testing.assert_close(diffusion.betas, torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(diffusion.signal, torch.tensor([0.9, 0.72, 0.504]))


@pytest.mark.parametrize("size", [(6, 4), (3, 4, 5)])
def test_noise_goes_on_and_off(size):
    diffusion, other = make(), theirs(DDPMScheduler)
    images, noise = torch.rand(3, 1, *size, generator=generator()), torch.randn(3, 1, *size, generator=generator(1))
    times = torch.tensor([0, 20, 49])
    noisy = diffusion.add_noise(images, noise, times)
    torch.testing.assert_close(noisy, other.add_noise(images, noise, times), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(diffusion.predict_images(noisy, noise, times), images, rtol=1e-5, atol=1e-5)


def test_ancestral_step(monkeypatch):
    """One step from t = 49 has the mean and the variance that diffusers gives, where x_0 is not clipped."""
    diffusion, other = make(), theirs(DDPMScheduler)
    image = torch.full((1, 1, 4, 4), 0.4)
    noise = torch.randn(image.shape, generator=generator(1))
    noisy = diffusion.add_noise(image, noise, torch.tensor([49]))
    seen = []

    def predict(x, times):
        seen.append((x, int(times[0])))
        return noise

    drawn = torch.zeros_like(noise)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: drawn)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: drawn)
    for drawn_value in (0.0, 1.0):  # the mean, then mean + standard deviation
        drawn = torch.full_like(noise, drawn_value)
        seen.clear()
        steps = ddpm_steps(diffusion, predict, noisy, generator())
        assert next(steps).allclose(image, atol=1e-5)
        next(steps)
        wanted = other.step(noise, 49, noisy).prev_sample
        assert [time for _, time in seen] == [49, 48]
        torch.testing.assert_close(seen[1][0], wanted, rtol=1e-5, atol=1e-6)


def test_deterministic_steps():
    """Every DDIM step over a list of times equals that of diffusers, where x_0 is not clipped."""
    diffusion = make()
    other = theirs(DDIMScheduler, set_alpha_to_one=True, timestep_spacing="linspace")
    other.set_timesteps(5)
    image = torch.full((1, 1, 4, 4), 0.5)
    noisy = diffusion.add_noise(image, torch.randn(image.shape, generator=generator(1)), torch.tensor([49]))
    oracle, seen = Oracle(diffusion, image), []

    def predict(x, times):
        seen.append((x, int(times[0])))
        return oracle(x, times) + 0.01  # not perfect, so that the steps differ from one another

    list(ddim_steps(diffusion, predict, noisy, generator()))
    assert [time for _, time in seen] == other.timesteps.tolist() == [49, 37, 24, 12, 0]
    for (x, time), (following, next_time) in zip(seen, seen[1:], strict=False):
        signal, target = other.alphas_cumprod[time], other.alphas_cumprod[next_time]
        predicted = oracle(x, torch.tensor([time])) + 0.01
        x_0 = (x - (1 - signal).sqrt() * predicted) / signal.sqrt()
        assert x_0.min() > 0 and x_0.max() < 1  # nothing was clipped
        torch.testing.assert_close(following, target.sqrt() * x_0 + (1 - target).sqrt() * predicted, rtol=1e-4,
                                   atol=1e-5)
    other.num_inference_steps = 50  # their previous time is t - 1
    single = make(sampling_steps=50)
    seen.clear()
    list(ddim_steps(single, predict, noisy, generator()))
    for (x, time), (following, _) in zip(seen, seen[1:], strict=False):
        wanted = other.step(oracle(x, torch.tensor([time])) + 0.01, time, x, eta=0.0).prev_sample
        torch.testing.assert_close(following, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_samplers_find_the_only_image(sampler, schedule):
    diffusion = make(schedule=schedule)
    image = torch.rand(1, 1, 6, 4, generator=generator(2))
    states = sample(diffusion, Oracle(diffusion, image), (3, 1, 6, 4), generator(), sampler)
    assert len(states) == {"ddpm": 50, "ddim": 5}[sampler]
    torch.testing.assert_close(states[-1], image.expand(3, 1, 6, 4), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samples_stay_in_range_and_follow_the_seed(sampler):
    diffusion = make()
    model = torch.nn.Conv2d(1, 1, 3, padding=1).requires_grad_(False)

    def predict(x, _):
        return model(x)

    first, again, other = (sample(diffusion, predict, (2, 1, 6, 4), generator(seed), sampler)[-1] for seed in (0, 0, 1))
    assert first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("name, other", [("l1", F.l1_loss), ("l2", F.mse_loss), ("huber", F.huber_loss)])
def test_losses(name, other):
    assert set(LOSSES) == {"l1", "l2", "huber"}
    diffusion = make(loss=name)
    images, noise = torch.rand(3, 1, 4, 4, generator=generator()), torch.randn(3, 1, 4, 4, generator=generator(1)) * 2
    times = torch.tensor([0, 7, 49])
    called = []

    def model(noisy, timesteps):
        called.append((noisy, timesteps))
        return torch.full_like(noisy, 0.3)

    losses = diffusion.losses(model, images, noise, times)
    wanted = torch.stack([other(torch.full((1, 4, 4), 0.3), target) for target in noise])
    torch.testing.assert_close(losses, wanted)
    assert torch.equal(called[0][0], diffusion.add_noise(images, noise, times)) and called[0][1] is times


@pytest.mark.parametrize("lowest", [0, 1, 3])
def test_drawn_timesteps(lowest):
    times = make(num_train_timesteps=6, min_timestep=lowest).draw_timesteps(6000, generator())
    counts = torch.bincount(times, minlength=6).tolist()
    assert counts[:lowest] == [0] * lowest and len(counts) == 6
    expected = 6000 / (6 - lowest)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts[lowest:])


def test_grid_picture():
    tiles = torch.stack([torch.full((1, 2, 3), value) for value in (0.0, 0.2, 0.4, 0.6, 1.5)])
    tiles[1, 0, 0, 2] = -1
    sheet = np.asarray(grid_picture(tiles, columns=2))
    assert sheet.dtype == np.uint8
    assert sheet.tolist() == [[0, 0, 0, 51, 51, 0], [0, 0, 0, 51, 51, 51], *[[102] * 3 + [153] * 3] * 2,
                              *[[255] * 3 + [0] * 3] * 2]
    volume = torch.zeros(1, 1, 5, 2, 3)
    volume[:, :, 2] = 1
    assert np.asarray(grid_picture(volume, 1)).tolist() == [[255] * 3] * 2


def test_denoising_strip():
    """Rows: noisy, clean, error; a perfect predictor gives the image itself and a black row."""
    diffusion = make()
    image = torch.full((1, 1, 2, 2), 0.4)
    sheet = np.asarray(denoising_strip(diffusion, Oracle(diffusion, image), image, generator(), levels=3))
    assert sheet.shape == (6, 6)
    assert (sheet[2:4] == 102).all() and (sheet[4:] == 0).all() and len(np.unique(sheet[:2])) > 2
