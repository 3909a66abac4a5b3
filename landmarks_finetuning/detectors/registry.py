"""Every kind of detector: how a fresh one starts, and how one is rebuilt from a weights file."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from core.config.config import Config
from core.config.starts import BACKBONES
from core.networks.encoders import EncoderUNet
from core.networks.weights import Weights
from landmarks_finetuning.detectors.encoder_unet import rebuild_encoder_unet, start_encoder_unet
from landmarks_finetuning.detectors.heatmap_unet import HeatmapUNet, rebuild_unet, start_unet

Detector = HeatmapUNet | EncoderUNet


class Network(NamedTuple):
    """A kind of network: how to make a fresh one, and how to rebuild one from a weights file's header."""

    start: Callable[[Config, str, int, int], Detector]
    rebuild: Callable[[Weights, tuple[int, ...]], Detector]


DETECTORS = {"unet": Network(start_unet, rebuild_unet),
             "encoder_unet": Network(start_encoder_unet, rebuild_encoder_unet)}


def build_detector(config: Config, backbone: str, channels: int, landmarks: int) -> Detector:
    """A fresh detector (B, channels, *size) -> (B, landmarks, *size) that starts from `backbone`."""
    return DETECTORS[BACKBONES[backbone]].start(config, backbone, channels, landmarks)
