"""What detectors start from: pre-trained weights found, checked and taken over."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from core.config.config import Config
from core.config.starts import SSL_METHODS
from core.config.unet import UNet
from core.errors import UserError
from core.networks.imagenet import HUB_FILES, download_weights
from core.networks.weights import Weights
from core.runs.identity import check_ssl
from core.runs.places import encoder_path


def imagenet_weights(config: Config) -> Path:
    """The file of backbone "imagenet": the config's, one of the config's folder, or torchvision's, fetched once."""
    given = config.finetune.encoder_weights.imagenet
    if given is not None:
        path = Path(given) / HUB_FILES[config.finetune.encoder] if Path(given).is_dir() else Path(given)
        if not path.is_file():
            raise UserError(f"finetune.encoder_weights.imagenet {path} does not exist; null fetches torchvision's")
        return path
    return download_weights(config.finetune.encoder)


def ssl_weights(config: Config, method: str) -> Path:
    """The file of a self-supervised backbone: the config's, or what this study's stage `ssl` left.

    Raises UserError when there is none, or it was pre-trained with other settings than the config's.
    """
    given = getattr(config.finetune.encoder_weights, method)
    path = Path(given) if given is not None else encoder_path(config, method)
    if given is None:
        check_ssl(config, method)
    if path.is_file():
        return path
    if given is not None:
        raise UserError(f"finetune.encoder_weights.{method} {path} does not exist; null takes this study's own")
    raise UserError(f"backbone {method} has no encoder yet, {path}: pre-train it with the launcher's stage ssl or "
                    f"python -m ssl_baselines.train --method {method}, or set finetune.encoder_weights.{method}")


START_WEIGHTS: dict[str, Callable[[Config], Path]] = {  # other starts are random
    "imagenet": imagenet_weights, **{method: partial(ssl_weights, method=method) for method in SSL_METHODS}}


def check_same_network(path: Path, weights: Weights, unet: UNet, channels: int) -> None:
    """UserError naming the key in which the checkpoint's network differs from the config's."""
    stored, wanted = weights.unet.model_dump(), unet.model_dump()
    for key in wanted:
        if stored[key] != wanted[key]:
            raise UserError(f"{path} holds a network with {key} {stored[key]}, the config asks unet.{key} {wanted[key]}"
                            f"; set unet.{key} to {stored[key]}, or choose another checkpoint")
    if weights.channels != channels:
        raise UserError(f"{path} was trained on {weights.channels} channels, the images have {channels}")
