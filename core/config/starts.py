"""What a detector can start from: the backbones, by the network that they fill."""

from __future__ import annotations

SSL_METHODS = ("mocov3", "simclrv2", "dino")
BACKBONES = {"ddpm": "unet", "scratch": "unet", "imagenet": "encoder_unet", "random": "encoder_unet",
             **dict.fromkeys(SSL_METHODS, "encoder_unet")}  # start: network
UNET_STARTS = tuple(name for name, network in BACKBONES.items() if network == "unet")
ENCODER_STARTS = tuple(name for name, network in BACKBONES.items() if network == "encoder_unet")
ENCODER_LEVELS = 6  # sizes of an encoder's feature maps, the image's own included
MEAN_SHAPE = "mean_shape"  # the guess without an image; not a backbone to train
