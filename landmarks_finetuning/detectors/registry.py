"""Every kind of detector, by the network that it is: what docs/design.md calls adding one ends here."""

from __future__ import annotations

from core.config.config import Config
from core.config.starts import BACKBONES
from landmarks_finetuning.detectors import global_to_local as patches
from landmarks_finetuning.detectors import gu2net
from landmarks_finetuning.detectors.encoder_unet import deepest, rebuild_encoder_unet, start_encoder_unet
from landmarks_finetuning.detectors.gu2net_scorer import release_score
from landmarks_finetuning.detectors.heatmap_unet import rebuild_unet, start_unet
from landmarks_finetuning.detectors.heatmaps import CROPS, as_they_are, heatmap_loss, heatmap_terms, locate_heatmaps
from landmarks_finetuning.detectors.interface import Kind, Network, SecondStage
from landmarks_finetuning.joint_training import JointRegression
from landmarks_finetuning.local_step import LocalRegression, refine_locally
from landmarks_finetuning.regression import LandmarkRegression

DETECTORS = {
    "unet": Kind(start_unet, rebuild_unet, heatmap_loss, heatmap_terms, locate_heatmaps, as_they_are, None,
                 LandmarkRegression, CROPS),
    "encoder_unet": Kind(start_encoder_unet, rebuild_encoder_unet, heatmap_loss, heatmap_terms, locate_heatmaps,
                         as_they_are, deepest, LandmarkRegression, CROPS),
    "gu2net": Kind(gu2net.start_gu2net, gu2net.rebuild_gu2net, gu2net.gu2net_loss, None, locate_heatmaps,
                   gu2net.probabilities, gu2net.deepest, JointRegression, CROPS, release_score),
    "global_to_local": Kind(patches.start_global, patches.rebuild_global, patches.global_loss, None,
                            patches.locate_global, None, patches.deepest_global, LandmarkRegression,
                            SecondStage("local_networks", LocalRegression, refine_locally)),
    "local_networks": Kind(patches.start_local, patches.rebuild_local, patches.local_loss, None,
                           patches.locate_local, None, patches.deepest_local, LocalRegression, None),
}


def kind_of(backbone: str) -> Kind:
    """The kind of detector that starts from `backbone`."""
    return DETECTORS[BACKBONES[backbone]]


def build_detector(config: Config, backbone: str, channels: int, landmarks: int) -> Network:
    """A fresh detector (B, channels, *size) -> its outputs for so many landmarks that starts from `backbone`."""
    return kind_of(backbone).start(config, backbone, channels, landmarks)
