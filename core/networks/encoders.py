"""U-Nets around the image encoders of segmentation_models_pytorch, and the weights that the encoders start from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from core.config.starts import ENCODER_LEVELS
from core.errors import UserError, did_you_mean
from core.formats.pickles import check_archive, read_pickle
from core.networks.imagenet import HUB_FILES
from core.networks.weights import read_tensors

CLASSIFIER = ("classifier.", "fc.")  # torchvision's last layers, of no use here
OLD_DENSENET_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
NAMES_SHOWN = 3


class Encoder(nn.Module):
    """What is used of segmentation_models_pytorch's encoders, which ship no types: (B, C, H, W) -> feature maps."""

    out_channels: Sequence[int]  # of the feature maps, from the image's own to the deepest


def check_encoder(name: str) -> None:
    """UserError for an encoder that is not ours."""
    if name not in HUB_FILES:
        raise UserError(f'encoder "{name}" is unknown{did_you_mean(name, list(HUB_FILES))}; choose from '
                        f"{', '.join(HUB_FILES)}")


def build_encoder(name: str, channels: int) -> Encoder:
    """An encoder by itself, random weights: (B, channels, H, W) -> its feature maps, from the finest to the deepest.

    Parameters have torchvision's names, the maps' channels are in `out_channels`.
    """
    check_encoder(name)
    from segmentation_models_pytorch.encoders import get_encoder  # takes seconds, which only encoders should cost

    return get_encoder(name, in_channels=channels, depth=ENCODER_LEVELS - 1, weights=None)


class EncoderUNet(nn.Module):
    """The U-Net of segmentation_models_pytorch: (B, channels, H, W) -> (B, out_channels, H, W), H and W by 32.

    Parameters have that library's names. No activation at the end; the weights are random.
    """

    def __init__(self, name: str, channels: int, out_channels: int) -> None:
        super().__init__()
        check_encoder(name)
        import segmentation_models_pytorch as smp  # takes seconds, which only these networks should cost

        network = smp.Unet(name, encoder_weights=None, in_channels=channels, classes=out_channels, activation=None)
        self.name, self.channels, self.out_channels = name, channels, out_channels
        self.encoder, self.decoder = network.encoder, network.decoder
        self.segmentation_head = network.segmentation_head

    @property
    def identity(self) -> dict[str, str]:
        """What a weights file must say, beside channels, for the network to be rebuilt."""
        return {"network": "encoder_unet", "encoder": self.name}

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, out_channels, H, W) raw outputs."""
        return self.segmentation_head(self.decoder(self.encoder(x)))


def build_encoder_unet(name: str, channels: int, landmarks: int, weights: Path | None = None) -> EncoderUNet:
    """A U-Net of `landmarks` output maps around encoder `name`, which starts from file `weights` or from random values.

    An encoder trained on RGB images takes `channels` 1 by the sum of its first convolution over the three colours:
    it then answers a grey image as it answered that image in all three. Raises UserError for a file that does not fit.
    """
    model = EncoderUNet(name, channels, landmarks)
    if weights is not None:
        load_encoder(model, weights)
    return model


def load_encoder(model: EncoderUNet, path: Path) -> None:
    """Fill the encoder from `path`; UserError in one line that lists missing and unexpected names and other shapes."""
    stored, wanted = read_encoder(path, model.name), model.encoder.state_dict()
    first = next(name for name, tensor in wanted.items() if tensor.ndim == 4)
    if first in stored and stored[first].ndim == 4 and stored[first].shape[1] == 3 and model.channels == 1:
        stored[first] = stored[first].sum(dim=1, keepdim=True)
    counters = {name: tensor for name, tensor in wanted.items() if name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name not in stored and name not in counters]  # older files have no counters
    unexpected = [name for name in stored if name not in wanted]
    shapes = [f"{name} {list(stored[name].shape)} instead of {list(tensor.shape)}" for name, tensor in wanted.items()
              if name in stored and stored[name].shape != tensor.shape]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    wrong = [f"{len(names)} {kind} ({', '.join(names[:NAMES_SHOWN])}{', ...' if len(names) > NAMES_SHOWN else ''})"
             for kind, names in problems.items() if names]
    if wrong:
        raise UserError(f"{path} does not fit finetune.encoder {model.name}: of {len(wanted) - len(counters)} tensors "
                        f"{'; '.join(wrong)}")
    model.encoder.load_state_dict({**counters, **stored})


def read_encoder(path: Path, name: str) -> dict[str, Tensor]:
    """An encoder's tensors by torchvision's names: a pickled state dict, or our .safetensors of encoder `name`."""
    if path.suffix == ".safetensors":
        tensors, header = read_tensors(path)
        description = f"encoder {header['encoder']}" if header["kind"] == "encoder" else f"a {header['kind']}"
        if description != f"encoder {name}":
            raise UserError(f"{path} holds {description}, finetune.encoder is {name}")
        return tensors
    check_archive(path)
    content = read_pickle(path)
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        kind = f"a dict of {sorted(map(str, content))[:6]}" if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} holds {kind}, expected the state dict of a torchvision {name}: names to tensors")
    return {OLD_DENSENET_NAME.sub(r"\1\2", str(key)): tensor for key, tensor in content.items()
            if not str(key).startswith(CLASSIFIER)}










