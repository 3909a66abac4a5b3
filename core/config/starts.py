"""What a detector can start from: the backbones, by the network that they fill."""

from __future__ import annotations

SSL_METHODS = ("mocov3", "simclrv2", "dino")
BACKBONES = {"ddpm": "unet", "scratch": "unet", "imagenet": "encoder_unet", "random": "encoder_unet",
             **dict.fromkeys(SSL_METHODS, "encoder_unet"),
             "gu2net": "gu2net", "global_to_local": "global_to_local"}  # start: network


def _starts(*networks: str) -> tuple[str, ...]:
    return tuple(name for name, network in BACKBONES.items() if network in networks)


UNET_STARTS = _starts("unet")
ENCODER_STARTS = _starts("encoder_unet")
SOFTMAX_STARTS = _starts("unet", "encoder_unet")  # those that finetune.loss trains
HEATMAP_STARTS = _starts("unet", "encoder_unet", "gu2net")
ENCODER_LEVELS = 6  # sizes of an encoder's feature maps, the image's own included
MEAN_SHAPE = "mean_shape"  # the guess without an image; not a backbone to train
