"""Whether a study can be run at all: the memory that its settings take at least, and names that a disk can hold.

Figures are lower bounds, from the settings alone: what they refuse cannot work, and nothing is allocated to find out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from core.bounds import require_memory
from core.config.config import Config
from core.config.unet import UNet
from core.errors import UserError

FLOAT = 4  # bytes
COPIES = 4  # of weights while they are trained: themselves, gradients, two averages of AdamW
OF_STEP = 2  # images, and their noise or targets, of all micro-batches of a step
TABLE = 8 * 8  # bytes of a timestep in the tables of a schedule
FILE_BYTES, PATH_BYTES = 255, 4095  # of a name, and of a path
BESIDE = 60  # bytes that files of a run add to the path of its folder


def unet_weights(unet: UNet, dims: int) -> int:
    """Numbers in the network's largest kernels: fewer than it has, and most of them.

    Of each level the convolutions of its blocks, going down from its narrow width and up from its wide one.
    """
    base, kernel = unet.base_channels, 3**dims
    widths = [base, *(base * factor for factor in unet.channel_multipliers)]
    blocks = sum(2 * narrow**2 + 2 * wide**2 + wide * narrow
                 for narrow, wide in zip(widths[:-1], widths[1:], strict=True))
    heads = unet.attention_heads * unet.attention_head_channels
    return kernel * unet.blocks_per_level * blocks + kernel * 4 * widths[-1] ** 2 + 4 * heads * widths[-1]


def check_memory(config: Config) -> None:
    """UserError where the settings take more memory than this machine has, whatever the images are."""
    size, unet, ddpm = config.dataset.image_size, config.unet, config.ddpm
    whole = math.prod(config.dataset.whole_size)
    given = {"dataset.image_size": whole, "dataset.phantom.size": math.prod(config.dataset.phantom.size)
             if config.dataset.phantom else 0}
    for key, pixels in given.items():
        require_memory(f"{key}, a single image of {pixels} pixels,", FLOAT * pixels, "choose a smaller one")
    maps = f"unet.base_channels {unet.base_channels} at dataset.image_size {list(size)}"
    weights = FLOAT * COPIES * unet_weights(unet, len(size))
    require_memory(f"training the network of unet.base_channels {unet.base_channels}, channel_multipliers "
                   f"{list(unet.channel_multipliers)[:8]} and blocks_per_level {unet.blocks_per_level}", weights,
                   "choose a smaller network")
    require_memory(f"{maps}, one image in the network,", FLOAT * unet.base_channels * math.prod(size),
                   "choose a smaller one")
    require_memory(f"ddpm.num_train_timesteps {ddpm.num_train_timesteps}", TABLE * ddpm.num_train_timesteps,
                   "choose a smaller number")
    check_samples(config, "ddpm.sample_count", ddpm.sample_count)
    for name, stage in (("ddpm", ddpm), ("ssl", config.ssl), ("finetune", config.finetune)):
        if getattr(stage, "sampling", "stream") == "stream":
            images = stage.batch_size * stage.accumulation
            require_memory(f"{name}.batch_size {stage.batch_size} x {name}.accumulation {stage.accumulation}, "
                           f"{images} images in a step,", FLOAT * OF_STEP * images * math.prod(size),
                           "choose smaller ones")


def check_samples(config: Config, key: str, count: int) -> None:
    """UserError where so many images cannot be drawn from noise at once."""
    one = FLOAT * math.prod(config.dataset.image_size) * config.unet.base_channels
    require_memory(f"{key} {count}, drawn side by side,", one * count, "draw fewer")


def check_places(folders: Iterable[Path]) -> None:
    """UserError where a folder's name, or its whole path with its files, is longer than file systems allow."""
    for folder in folders:
        part = max(folder.parts, key=lambda name: len(name.encode()))
        if len(part.encode()) > FILE_BYTES:
            raise UserError(f'a run\'s folder would be called "{part[:60]}...", {len(part.encode())} bytes where file '
                            f"systems allow {FILE_BYTES}; shorten experiment.output_dir, or the names of the files "
                            "that finetune names")
        if len(str(folder.absolute()).encode()) + BESIDE > PATH_BYTES:
            raise UserError(f"experiment.output_dir {str(folder)[:60]}... makes paths of more than {PATH_BYTES} bytes; "
                            "choose a shorter one")
