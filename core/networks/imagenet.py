"""torchvision's ImageNet weights of the encoders, downloaded once into torch.hub's folder."""

from __future__ import annotations

from http.client import HTTPException
from pathlib import Path

import torch

from core.errors import UserError

HUB = "https://download.pytorch.org/models"
HUB_FILES = {  # encoder -> torchvision's ImageNet-1K weights (the first edition), with the start of their SHA-256
    "densenet161": "densenet161-8d451a50.pth",
    "vgg19": "vgg19-dcbb9e9d.pth",
    "resnext50_32x4d": "resnext50_32x4d-7cdf4587.pth",
    "resnet50": "resnet50-0676ba61.pth",
}


def download_weights(encoder: str) -> Path:
    """The file of `encoder`, downloaded where it is not there yet, its SHA-256 checked against its name.

    UserError in one line without a network, or for a damaged download.
    """
    name = HUB_FILES[encoder]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"{HUB}/{name}"
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rpartition("-")[2])
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the hash differs
            reason = " ".join(str(error).split())
            raise UserError(f"ImageNet weights cannot be downloaded ({reason}); fetch {url} where there is a network "
                            "and set finetune.encoder_weights.imagenet to that file or its folder") from None
    return path
