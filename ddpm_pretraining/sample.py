"""Draw images from a pre-trained checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from core.config.limits import LARGEST
from core.config.load import add_config_arguments, load_config
from core.errors import CommandParser, UserError, run_command
from core.networks.weights import load_weights
from core.runs.places import ema_path
from core.runs.requirements import check_memory, check_samples
from core.training.batches import step_generator
from core.training.device import autocast, resolve_device, resolve_precision
from ddpm_pretraining.diffusion import OBJECTIVES
from ddpm_pretraining.sampling import SAMPLERS, grid_picture, sample, sampler_of
from ddpm_pretraining.train import save_picture


def main() -> None:
    """Command line."""
    parser = CommandParser(
        prog="python -m ddpm_pretraining.sample", description=__doc__,
        epilog="example: python -m ddpm_pretraining.sample --config configs/cephalo.json --iteration 8000 --count 16")
    add_config_arguments(parser)
    parser.add_argument("--iteration", type=int, help="which EMA checkpoint (default: the last configured one)")
    parser.add_argument("--weights", type=Path, help="a weights file instead: ours or published")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--sampler", help="default: ddpm.sampler of the config")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="PNG to write (default: below the run's samples/)")
    arguments = parser.parse_args()
    if arguments.count < 1:
        raise UserError(f"--count {arguments.count}: must be 1 or more")
    if not 0 <= arguments.seed <= LARGEST:
        raise UserError(f"--seed {arguments.seed:.0e}: seeds count from 0 to 2^62")
    config = load_config(arguments.config, arguments.set)
    check_memory(config)
    check_samples(config, "--count", arguments.count)
    sampler, samplers = arguments.sampler or sampler_of(config.ddpm), SAMPLERS[config.ddpm.objective]
    if sampler not in samplers:
        raise UserError(f'--sampler {sampler}: with ddpm.objective "{config.ddpm.objective}" choose '
                        f"{' or '.join(samplers)}")
    kept = config.ddpm.checkpoint_iterations
    iteration = max(kept) if arguments.iteration is None else arguments.iteration
    if iteration < 1:
        raise UserError(f"--iteration {iteration}: steps count from 1; choose {', '.join(map(str, kept))}")
    weights = load_weights(arguments.weights or ema_path(config.experiment_dir, iteration))
    if weights.out_channels != weights.channels:
        raise UserError(f"{arguments.weights} draws no images: it has {weights.out_channels} outputs for "
                        f"{weights.channels} inputs, as a trained detector has; name weights of a pre-training")
    device = resolve_device(config.experiment.device)
    model = weights.build(config.dataset.image_size).to(device).eval()
    generator = step_generator(arguments.seed, 0, 0, device)
    shape = (arguments.count, weights.channels, *config.dataset.image_size)
    with autocast(device, resolve_precision(config.experiment.precision, device)):
        process = OBJECTIVES[config.ddpm.objective](config.ddpm, device)
        images = sample(process, model, shape, generator, sampler, "sampling")[-1]
    out = arguments.out or config.experiment_dir / "ddpm" / "samples" / f"drawn_iter{iteration:06d}.png"
    save_picture(out, grid_picture(torch.as_tensor(images), columns=4))
    print(f"{arguments.count} samples: {out}")


if __name__ == "__main__":
    run_command(main)
