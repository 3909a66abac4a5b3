"""Every kind of detector, by the network that it is: what docs/design.md calls adding one ends here."""

from __future__ import annotations

from core.config.config import Config
from core.config.starts import BACKBONES, ENCODER_LEVELS
from landmarks_finetuning.detectors.encoder_unet import rebuild_encoder_unet, start_encoder_unet
from landmarks_finetuning.detectors.heatmap_unet import rebuild_unet, start_unet
from landmarks_finetuning.detectors.heatmaps import CROPS, as_they_are, heatmap_loss, locate_heatmaps
from landmarks_finetuning.detectors.interface import Detector, Kind

DETECTORS = {
    "unet": Kind(start_unet, rebuild_unet, heatmap_loss, locate_heatmaps, as_they_are, None, CROPS),
    "encoder_unet": Kind(start_encoder_unet, rebuild_encoder_unet, heatmap_loss, locate_heatmaps, as_they_are,
                         ENCODER_LEVELS - 1, CROPS),
}


def kind_of(backbone: str) -> Kind:
    """The kind of detector that starts from `backbone`."""
    return DETECTORS[BACKBONES[backbone]]


def build_detector(config: Config, backbone: str, channels: int, landmarks: int) -> Detector:
    """A fresh detector (B, channels, *size) -> its outputs for so many landmarks that starts from `backbone`."""
    return kind_of(backbone).start(config, backbone, channels, landmarks)
