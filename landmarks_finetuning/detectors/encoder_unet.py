"""A heatmap detector around an image encoder of segmentation_models_pytorch."""

from __future__ import annotations

from pathlib import Path

from core.config.config import Config
from core.config.starts import ENCODER_LEVELS
from core.networks.encoders import EncoderUNet, build_encoder_unet
from core.networks.weights import Weights
from landmarks_finetuning.starts import START_WEIGHTS


def start_encoder_unet(config: Config, backbone: str, channels: int, landmarks: int, start: Path | None = None
                       ) -> EncoderUNet:
    """A fresh U-Net of `landmarks` maps around finetune.encoder, with the weights that `backbone` starts from."""
    weights = START_WEIGHTS[backbone](config) if start is None and backbone in START_WEIGHTS else start
    return build_encoder_unet(config.finetune.encoder, channels, landmarks, weights)


def rebuild_encoder_unet(weights: Weights, _size: tuple[int, ...]) -> EncoderUNet:
    """The U-Net around an encoder that `weights` came from."""
    return EncoderUNet(weights.header["encoder"], weights.channels, weights.out_channels)


def deepest(config: Config) -> tuple[int, ...]:
    """The size of the encoder's last map."""
    return tuple(length >> (ENCODER_LEVELS - 1) for length in config.dataset.image_size)
