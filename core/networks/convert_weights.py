"""The authors' pickles to safetensors: checked, recognised, and written tensor by tensor."""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from core.errors import UserError
from core.files import atomic_file
from core.formats.pickles import check_archive, read_pickle
from core.networks.checksums import checksum_of, sealed
from core.networks.convolutions import CONV
from core.networks.unet import UNet
from core.networks.weights import PUBLISHED_NAMES, Weights, full_header, published_network

ENCODERS = {  # by the name of their first convolution: the authors' choices, as torchvision calls them
    "features.conv0.weight": ("densenet161", "densenet121", "densenet169", "densenet201"),
    "conv1.weight": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
                     "resnext101_32x8d"),
    "features.0.weight": ("vgg11", "vgg13", "vgg16", "vgg19"),
}
HEADS = ("classifier.", "fc.")  # what torchvision puts behind an encoder
DATASETS, METHODS = ("cephalo", "chest", "hand"), ("ddpm", "dino", "mocov3", "simclrv2")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


def convert(source: Path, out: Path, dtype: str) -> dict[str, Any]:
    """Write the weights in `source`, a published pickle, to the safetensors file `out`; returns its header.

    Only one tensor at a time is in memory, unless `source` is of the format before torch 1.6, which is read whole.
    Optimiser states are dropped. `dtype`: float32, float16 or bfloat16. UserError names the file in one line.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: must end in .safetensors")
    if source.suffix == ".safetensors":
        raise UserError(f"{source} is a safetensors file already; convert takes a published .pt or .pth")
    archive = source.is_file() and zipfile.is_zipfile(source)
    if archive:
        with _byte_bar("checking", source.stat().st_size) as bar:
            check_archive(source, bar.update)
    tensors, header = recognise(source, read_pickle(source, mmap=archive))
    try:
        write_safetensors(out, tensors, DTYPES[dtype], header, source)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    return header


def recognise(path: Path, content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors to keep and the header of their file, for a U-Net or an encoder; UserError for any other content."""
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        names = sorted(map(str, content))[:6] if isinstance(content, dict) else f"a {type(content).__name__}"
        raise UserError(f'{path} is no published file: it holds {names}, expected "model_state_dict" or an encoder\'s '
                        "tensors")
    origin = {"source": path.name, "dataset": _folder_among(path, DATASETS), "method": _folder_among(path, METHODS)}
    if state.keys() >= PUBLISHED_NAMES:
        network = published_network(path, {**content, "model_state_dict": state})
        _check_complete(path, network)
        config = {"unet": network.unet.model_dump(mode="json")}
        header = full_header(config, {"channels": network.channels, "out_channels": network.out_channels,
                                      **network.header, **origin})
        return network.tensors, header
    return _recognise_encoder(path, content, state, origin)


def _check_complete(path: Path, network: Weights) -> None:
    dims = network.tensors["init_conv.weight"].ndim - 2
    if dims not in CONV:
        raise UserError(f"{path}: init_conv.weight has {dims + 2} axes, expected 3, 4 or 5")
    with torch.device("meta"):  # shapes without memory
        expected = UNet(network.unet, network.channels, network.out_channels, (1,) * dims).state_dict()
    difference = first_difference(network.tensors, expected)
    if difference is not None:
        raise UserError(f"{path} holds another network than the published DDPM: {difference}")


def first_difference(stored: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """In words, the first name or shape in which `stored` is not as `expected`; None when all agree."""
    for name, tensor in expected.items():
        if name not in stored:
            return f"{name} is missing"
        if stored[name].shape != tensor.shape:
            return f"{name} has shape {tuple(stored[name].shape)}, expected {tuple(tensor.shape)}"
    return next((f"{name} is not part of it" for name in stored if name not in expected), None)


def _recognise_encoder(path: Path, content: dict[str, Any], state: dict[str, Tensor],
                       origin: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    prefix = "backbone." if any(name.startswith("backbone.") for name in state) else ""  # a whole training state
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state.items()
               if name.startswith(prefix) and not name.removeprefix(prefix).startswith(HEADS)}
    architecture = encoder_architecture(tensors)
    if architecture is None:
        known = ", ".join(name for names in ENCODERS.values() for name in names)
        raise UserError(f"{path} holds neither the published DDPM nor an encoder known here ({known}): "
                        f"{len(state)} tensors, the first {next(iter(state))}")
    numbered = re.search(r"(?:iter|step)(\d+)", path.stem)
    iteration = content.get("iteration") if prefix else int(numbered[1]) if numbered else None
    return tensors, full_header({}, {"kind": "encoder", "network": "encoder", "encoder": architecture,
                                     "channels": next(tensors[name].shape[1] for name in ENCODERS if name in tensors),
                                     "iteration": iteration, **origin})


def encoder_architecture(tensors: dict[str, Tensor]) -> str | None:
    """The torchvision network, one of ENCODERS, whose names and shapes these are, for any input channels; or None."""
    from torchvision.models import get_model  # imports for a second: only where an encoder is read

    stem = next((name for name in ENCODERS if name in tensors), "")
    for architecture in ENCODERS.get(stem, ()):
        with torch.device("meta"):
            if _shapes(get_model(architecture, weights=None).state_dict(), stem) == _shapes(tensors, stem):
                return architecture
    return None


def _shapes(tensors: dict[str, Tensor], stem: str) -> dict[str, tuple[int, ...]]:
    """Of what makes an architecture: not the head, not the counters, not the first convolution's input channels."""
    return {name: tuple(tensor.shape[:1] + tensor.shape[2:] if name == stem else tensor.shape)
            for name, tensor in tensors.items()
            if not name.startswith(HEADS) and not name.endswith("num_batches_tracked")}


def write_safetensors(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype, header: dict[str, Any],
                      source: Path) -> None:
    """Write `tensors`, floating ones as `dtype`, one after the other; `source` is named where one does not fit."""
    stored = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
    foreign = next((name for name in stored if stored[name] not in SAFETENSORS_NAMES), None)
    if foreign is not None:
        raise UserError(f"{source}: {foreign} is of type {stored[foreign]}, which no published file has")
    text = json.dumps(header)
    layout: dict[str, Any] = {"__metadata__": {"header": sealed(text, {})}}
    order = sorted(tensors, key=lambda name: (-stored[name].itemsize, name))  # wide types first keep all aligned
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * stored[name].itemsize
        layout[name] = {"dtype": SAFETENSORS_NAMES[stored[name]], "shape": list(tensors[name].shape),
                        "data_offsets": [start, end]}
    checksums = dict[str, int]()
    with atomic_file(path) as file, _byte_bar("writing", end) as bar:
        file.write(_head(layout))
        for name in order:
            values = _as_stored(name, tensors[name], stored[name], source)
            checksums[name] = checksum_of(values)
            bar.update(file.write(values.reshape(-1).view(torch.uint8).numpy().data))
            del values  # before the next one is made
        layout["__metadata__"]["header"] = sealed(text, checksums)  # as long as the one in its place
        file.seek(0)
        file.write(_head(layout))


def _head(layout: dict[str, Any]) -> bytes:
    """What a safetensors file begins with: its length in 8 bytes, and the JSON, padded to a multiple of 8 bytes."""
    head = json.dumps(layout).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def _as_stored(name: str, tensor: Tensor, dtype: torch.dtype, source: Path) -> Tensor:
    values = tensor.detach().to(dtype).contiguous()
    if not values.isfinite().all():
        if tensor.isfinite().all():
            raise UserError(f"{source}: {name} reaches {tensor.abs().max():.3g}, too large for "
                            f"{str(dtype).removeprefix('torch.')}; choose --dtype bfloat16 or float32")
        raise UserError(f"{source}: {name} holds values that are not finite: damaged, or its training failed")
    return values


def _folder_among(path: Path, names: tuple[str, ...]) -> str | None:
    return next((part.lower() for part in reversed(path.resolve().parts[:-1]) if part.lower() in names), None)


def _byte_bar(title: str, total: int) -> tqdm:
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, dynamic_ncols=True,
                mininterval=0.1 if sys.stderr.isatty() else 30)
