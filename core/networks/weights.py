"""Weights as safetensors, of which one changed bit is noticed, and the published checkpoint format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from core.background import snapshot, written
from core.config.unet import UNet as UNetConfig
from core.errors import UserError
from core.files import code_version, parse_json, write_atomically
from core.formats.pickles import check_archive, read_pickle
from core.networks.checksums import CHECKED, CHECKSUM, checksum_of, is_sealed, sealed
from core.networks.unet import UNet

FORMAT = "landmark-unet-1"
MAX_CHANNELS = 10_000
PUBLISHED_HEADS, PUBLISHED_HEAD_CHANNELS, PUBLISHED_GROUPS = 4, 32, 4  # not recoverable from tensor shapes
PUBLISHED_NAMES = {"init_conv.weight", "final_conv.weight", "ups.0.0.block1.proj.weight"}


@dataclass(frozen=True)
class Weights:
    """A network read from a file: its tensors and what is needed to rebuild it."""

    tensors: dict[str, Tensor]
    unet: UNetConfig
    channels: int
    out_channels: int
    header: dict[str, Any]  # kind, iteration, config and so on; for published files what their pickle says

    def build(self, size: tuple[int, ...]) -> UNet:
        """The network with these weights, for inputs of `size`."""
        model = UNet(self.unet, self.channels, self.out_channels, size)
        model.load_state_dict(self.tensors)
        return model


def save_weights(path: Path, model: nn.Module, config: dict[str, Any], header: dict[str, Any]) -> None:
    """Write `model`, which knows its channels and out_channels, with `header` (kind, network, iteration ...)."""
    sizes = {"channels": model.channels, "out_channels": model.out_channels}
    save_tensors(path, model.state_dict(), config, {**sizes, **header})


def save_tensors(path: Path, tensors: dict[str, Tensor], config: dict[str, Any], header: dict[str, Any]) -> None:
    """Write a safetensors file whose header holds the full config, what `header` says and the code version."""
    written(_write_tensors, path, snapshot(dict(tensors)), full_header(config, header))


def _write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(header)
    checksums = {name: checksum_of(tensor) for name, tensor in stored.items()}
    write_atomically(path, safetensors_bytes(stored, metadata={"header": sealed(text, checksums)}))


def full_header(config: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    """The header of a weights file: format and code version, the config, and what `header` says of the tensors."""
    return {"format": FORMAT, "code_version": code_version(), "config": config, **header}


def load_weights(path: Path, networks: Sequence[str] = ("unet",)) -> Weights:
    """Read our .safetensors of one of `networks`, or a published .pt, as float32; UserError for anything else."""
    if path.suffix == ".pt" and path.is_file():
        check_archive(path)
        return published_network(path, read_pickle(path))
    tensors, header = read_tensors(path)
    network = header.get("network", "unet")
    if network not in networks:
        raise UserError(f'{path} holds a network of kind "{network}", where {" or ".join(networks)} is needed')
    config = header.get("config")
    sizes: list[Any] = [header.get("channels"), header.get("out_channels")]
    if not isinstance(config, dict) or not isinstance(config.get("unet"), dict):
        raise UserError(f"{path} is damaged: its header has no config of a network (config.unet)")
    unknown = sorted(config["unet"].keys() - UNetConfig.model_fields.keys())
    if unknown:
        raise UserError(f"{path} holds a network of a later version: it has unet.{unknown[0]}, which this one does not "
                        "know; update the project")
    if not all(type(size) is int and 0 < size <= MAX_CHANNELS for size in sizes):
        raise UserError(f"{path} is damaged: channels and out_channels of its header must be numbers from 1 to "
                        f"{MAX_CHANNELS}, not {sizes[0]!r:.40} and {sizes[1]!r:.40}")
    try:
        unet = UNetConfig.model_validate_json(json.dumps(config["unet"]))
    except ValueError as error:
        raise UserError(f"{path} is damaged: its header's config.unet is none ({' '.join(str(error).split())[:200]})"
                        ) from None
    if network == "unet":
        _check_sizes(path, tensors, unet, sizes[1])
    return Weights(tensors, unet, sizes[0], sizes[1], header)


def _check_sizes(path: Path, tensors: dict[str, Tensor], unet: UNetConfig, outputs: int) -> None:
    """UserError where the header describes a larger or another network, before that takes its memory."""
    widest = unet.base_channels * max(unet.channel_multipliers)
    largest = max((length for tensor in tensors.values() for length in tensor.shape), default=0)
    last = tensors.get("final_conv.weight")
    if widest > largest or last is None or last.shape[0] != outputs:
        raise UserError(f"{path} is damaged: its header describes a network of up to {widest} channels with {outputs} "
                        f"outputs, its tensors are of up to {largest} and {'no' if last is None else last.shape[0]}")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (float32) and header of our .safetensors, whatever its network; UserError for anything else.

    A file that does not have the checksum it was saved with is refused; without one it is read as it is.
    """
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        header = parse_json(metadata.get("header", "null"))
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is truncated or not a weights file of this project ({error})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(f"{path} is not a weights file of this project: its header does not say {FORMAT}")
    if [entry for entry in (CHECKED, CHECKSUM) if header.pop(entry, None) is not None]:
        checksums = {name: checksum_of(tensor) for name, tensor in stored.items()}
        if not is_sealed(metadata["header"], checksums):
            raise UserError(f"{path} is damaged: what it holds does not have the checksum that was saved with it; copy "
                            "it again, or make it anew")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}, header


def published_network(path: Path, content: Any) -> Weights:
    """The network in `content`, a published pickle read from `path`; UserError when it is another one."""
    tensors = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not tensors.keys() >= PUBLISHED_NAMES:
        description = sorted(map(str, content))[:6] if isinstance(content, dict) else f"a {type(content).__name__}"
        raise UserError(f"{path} is not a published DDPM checkpoint: it holds {description}, "
                        f'expected "model_state_dict" with {", ".join(sorted(PUBLISHED_NAMES))}')
    try:
        base, inputs = tensors["init_conv.weight"].shape[:2]
        levels = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("ups."))
        widths = [tensors[f"ups.{level}.0.block1.proj.weight"].shape[0] for level in reversed(range(levels))]
        unet = UNetConfig(base_channels=base, channel_multipliers=tuple(width // base for width in widths),
                          norm_groups=PUBLISHED_GROUPS, attention_heads=PUBLISHED_HEADS,
                          attention_head_channels=PUBLISHED_HEAD_CHANNELS)
        out_channels = tensors["final_conv.weight"].shape[0]
    except (LookupError, ValueError, ArithmeticError, AttributeError):
        raise UserError(f"{path} holds another network than the published DDPM: its shapes do not fit") from None
    header = {"kind": "published", "iteration": content.get("n_iter"), "epoch": content.get("epoch")}
    return Weights(tensors, unet, inputs // 2, out_channels, header)
