"""Flow matching against hand computations and a Gaussian whose best velocity is known in closed form."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core.config.ddpm import DDPM
from core.config.load import CONFIG_DIR, load_config
from ddpm_pretraining.diffusion import OBJECTIVES, Flow
from ddpm_pretraining.sampling import denoising_strip, sample, sampler_of
from ddpm_pretraining.train import pretrain
from tests.conftest import error_of

CPU = torch.device("cpu")
MEAN, SPREAD = 0.45, 0.08  # of the toy's pixels, so that few lie outside [0, 1]


def make(**changes):
    """A flow that counts time to 100."""
    return Flow(DDPM(**{"objective": "flow", "num_train_timesteps": 100, "sampling_steps": 50, **changes}), CPU)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian_velocity(x, timesteps):
    """E[noise - x_0 | x_t = x] where x_0 is normal with MEAN and SPREAD, by regression of normal numbers."""
    t = (timesteps / 100).view(-1, *(1,) * (x.ndim - 1)).double()
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    covariance = t - (1 - t) * SPREAD**2
    return (covariance / variance * (x.double() - (1 - t) * MEAN) - MEAN).float()


@pytest.mark.parametrize("size", [(6, 4), (3, 4, 5)], ids=["2d", "3d"])
def test_noise_goes_on_and_off_along_a_line(size):
    flow, images, noise = make(), torch.rand(3, 1, *size), torch.randn(3, 1, *size)
    times = torch.tensor([0.0, 25.0, 100.0])
    noisy = flow.add_noise(images, noise, times)
    for image, eps, t, x in zip(images, noise, (0.0, 0.25, 1.0), noisy, strict=True):
        torch.testing.assert_close(x, (1 - t) * image + t * eps)
    torch.testing.assert_close(flow.predict_images(noisy, noise - images, times), images, rtol=0, atol=1e-6)
    whole = flow.add_noise(images, noise, torch.tensor([0, 25, 100]))  # as the denoising strip counts
    assert torch.equal(whole, noisy)


@pytest.mark.parametrize("name, other", [("l1", F.l1_loss), ("l2", F.mse_loss)])
def test_the_loss_by_hand(name, other):
    """One pixel: x_0 = 0.2, noise 1.2, t = 0.75 is x_t = 0.95, and the velocity is 1."""
    flow, seen = make(loss=name), []

    def model(noisy, timesteps):
        seen.append((noisy, timesteps))
        return torch.full_like(noisy, 0.6)

    images, noise, times = torch.full((1, 1, 1, 1), 0.2), torch.full((1, 1, 1, 1), 1.2), torch.tensor([75.0])
    loss = flow.losses(model, images, noise, times)
    assert loss.item() == pytest.approx({"l1": 0.4, "l2": 0.16}[name])
    assert seen[0][0].item() == pytest.approx(0.95) and seen[0][1] is times
    images, noise = torch.rand(4, 1, 5, 5), torch.randn(4, 1, 5, 5)
    losses = flow.losses(model, images, noise, torch.rand(4) * 100)
    wanted = [other(torch.full((1, 5, 5), 0.6), eps - image) for image, eps in zip(images, noise, strict=True)]
    torch.testing.assert_close(losses, torch.stack(wanted))


@pytest.mark.parametrize("lowest", [0, 30])
def test_times_are_uniform(lowest):
    times = make(min_timestep=lowest).draw_timesteps(20000, generator())
    assert times.dtype == torch.float32 and times.min() >= lowest and times.max() <= 100
    counts, _ = np.histogram(times, bins=10, range=(lowest, 100))
    assert np.abs(counts - 2000).max() < 5 * 2000**0.5 and len(times.unique()) > 15000


def test_euler_s_steps_by_hand():
    """Of noise z along the velocity 0.3: at times 1, 2/3 and 1/3 it is z, z - 0.1, z - 0.2, and it ends at z - 0.3."""
    seen = []

    def predict(x, timesteps):
        seen.append((x, timesteps))
        return torch.full_like(x, 0.3)

    shape = (2, 1, 4, 4)
    noise = torch.randn(shape, generator=generator())
    states = sample(make(sampling_steps=3), predict, shape, generator(), "euler")
    assert [(x - noise).mean().item() for x, _ in seen] == pytest.approx([0, -0.1, -0.2], abs=1e-6)
    assert [times.tolist() for _, times in seen] == [pytest.approx([t, t]) for t in (100, 200 / 3, 100 / 3)]
    for state in states:
        torch.testing.assert_close(state, (noise - 0.3).clamp(0, 1))


def test_euler_s_steps_lead_from_noise_to_the_gaussian():
    """Mean and standard deviation; and the flow takes every sample of noise z to MEAN + SPREAD z."""
    flow, shape = make(sampling_steps=100), (64, 1, 12, 12)
    states = sample(flow, gaussian_velocity, shape, generator(), "euler")
    noise = torch.randn(shape, generator=generator())
    assert len(states) == 100
    drawn = states[-1]
    assert drawn.mean().item() == pytest.approx(MEAN, abs=3 * SPREAD / noise.numel() ** 0.5)
    assert drawn.std().item() == pytest.approx(SPREAD, rel=0.06)
    errors = []
    for steps in (20, 40, 80):
        drawn = sample(make(sampling_steps=steps), gaussian_velocity, shape, generator(), "euler")[-1]
        errors.append((drawn - (MEAN + SPREAD * noise)).abs().mean().item())
    assert errors[2] < 0.007 and 1.6 < errors[0] / errors[1] < 2.4 and 1.6 < errors[1] / errors[2] < 2.4  # first order


def test_the_best_velocity_has_the_lowest_loss():
    """Its mean square is the variance that is left of noise - x_0 when x_t is known; any other has more."""
    flow = make()
    images, noise = MEAN + SPREAD * torch.randn(400, 1, 8, 8, generator=generator()), torch.randn(400, 1, 8, 8)
    times = torch.full((400,), 60.0)
    best = flow.losses(gaussian_velocity, images, noise, times).mean()
    t, s = 0.6, SPREAD
    left = s**2 + 1 - (t - (1 - t) * s**2) ** 2 / ((1 - t) ** 2 * s**2 + t**2)
    assert best.item() == pytest.approx(left, rel=0.03)
    for other in (lambda x, u: gaussian_velocity(x, u) * 1.1, lambda x, u: gaussian_velocity(x, u) + 0.02):
        assert flow.losses(other, images, noise, times).mean() > best


def test_the_denoising_strip_of_a_perfect_prediction_is_black_below():
    flow, image = make(), torch.full((1, 1, 2, 2), 0.4)

    def model(noisy, timesteps):
        return (noisy - 0.4) / (timesteps / 100).view(-1, 1, 1, 1)

    sheet = np.asarray(denoising_strip(flow, model, image, generator(), levels=3))
    assert (sheet[2:4] == 102).all() and (sheet[4:] == 0).all() and len(np.unique(sheet[:2])) > 2


def test_objective_and_sampler_of_a_config():
    assert OBJECTIVES[DDPM().objective].__name__ == "Diffusion" and sampler_of(DDPM()) == "ddim"
    assert sampler_of(DDPM(sampler="ddpm")) == "ddpm" and sampler_of(DDPM(objective="flow")) == "euler"


@pytest.mark.parametrize("setting", ["schedule=cosine", "beta_start=0.001", "beta_end=0.03", "sampler=ddpm"])
def test_the_schedule_does_not_act(setting):
    overrides = ["ddpm.objective=flow", f"ddpm.{setting}"]
    said = error_of(lambda: load_config(CONFIG_DIR / "demo.json", overrides))
    assert 'has no effect: ddpm.objective is "flow"' in said
    load_config(CONFIG_DIR / "demo.json", [*overrides[1:]])
    load_config(CONFIG_DIR / "demo.json", ["ddpm.objective=flow", "ddpm.sampling_steps=7"])


def test_pretraining_and_drawing_from_it(config_file, run_main):
    """From the command down to files, on the phantom."""
    path = config_file(ddpm={"objective": "flow", "sampling_steps": 3})
    config = load_config(path)
    samples = pretrain(config) / "samples"
    iteration = config.ddpm.iterations
    assert {f"{name}_iter{iteration:06d}.png" for name in ("samples", "strip")} <= {
        picture.name for picture in samples.iterdir()}
    drawn = ("ddpm_pretraining.sample", "--config", path, "--count", 2)
    assert run_main(*drawn)[0] == 0 and (samples / f"drawn_iter{iteration:06d}.png").is_file()
    status, _, said = run_main(*drawn, "--sampler", "ddim")
    assert status == 2 and '--sampler ddim: with ddpm.objective "flow" choose euler' in said
