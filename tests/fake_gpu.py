"""A GPU that is not there: tensors without numbers, which know that they lie on one, as the CUDA code path meets them.

What mixes devices, or asks a GPU's tensor for a numpy array, fails as it would there. Numbers are made up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from core.config.unet import UNet as UNetConfig
from core.networks.unet import UNet


def as_numpy(tensor: Tensor, **_: object) -> np.ndarray:
    """`made_up` numbers; TypeError on a GPU, in torch's words."""
    if tensor.device.type != "cpu":
        raise TypeError(f"can't convert {tensor.device} device type tensor to numpy")
    return made_up(tensor)


def made_up(tensor: Tensor) -> np.ndarray:
    """Numbers from 0 to 10 in the tensor's shape."""
    numbers = 10 * np.random.default_rng(0).random(tuple(tensor.shape))
    return numbers.astype(str(tensor.dtype).removeprefix("torch."))


@contextmanager
def fake_gpu(patch: pytest.MonkeyPatch, *modules: str) -> Iterator[None]:
    """Inside, the `modules`, by name, find a GPU when they ask `resolve_device`, and compute in float32."""
    with patch.context() as inside:
        for module in modules:
            inside.setattr(f"{module}.resolve_device", lambda _: torch.device("cuda"), raising=False)
            inside.setattr(f"{module}.resolve_precision", lambda *_: "float32", raising=False)
        inside.setattr(nn.Module, "to", lambda self, *_, **__: self)  # networks are made there: see `on_gpu`
        inside.setattr(Tensor, "numpy", as_numpy)
        inside.setattr(Tensor, "pin_memory", lambda self: self)
        inside.setattr(FakeTensor, "tolist", lambda self: made_up(self).tolist())
        inside.setattr(Tensor, "__bool__", lambda self: True)  # of whether all is finite
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield


def features_on_gpu(patch: pytest.MonkeyPatch, settings: UNetConfig) -> None:
    """Features are those of a fresh network with these settings, on the GPU that is not there."""
    weights = SimpleNamespace(build=lambda size: on_gpu(lambda: UNet(settings, 1, 1, size)))
    patch.setattr("landmarks_finetuning.features.load_weights", lambda _: weights)
    patch.setattr("landmarks_finetuning.features.check_same_network", lambda *_: None)


def on_gpu(make: Callable[[], nn.Module]) -> nn.Module:
    """The network that `make` makes, on the GPU that is not there."""
    with torch.device("cuda"):
        return make().eval()
