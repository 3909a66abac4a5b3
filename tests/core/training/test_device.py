"""What a run runs on: the devices and precisions that there are, and one line for those that are not."""

import pytest
import torch

from core.errors import UserError
from core.training.device import resolve_device, resolve_precision

CPU = torch.device("cpu")


def test_resolve_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    for name, message in {"gpu": '"gpu" is not a device; choose auto, cpu, cuda or cuda:N',
                          "meta": '"meta" is not supported; choose auto, cpu, cuda or cuda:N',
                          "cuda": "no CUDA GPU is visible; choose auto or cpu",
                          "cuda:1": "no CUDA GPU is visible"}.items():
        with pytest.raises(UserError, match=f"experiment.device .*{message}"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto").type == "cuda" and resolve_device("cuda:0").index == 0
    with pytest.raises(UserError, match='"cuda:1": 1 CUDA GPU is visible'):
        resolve_device("cuda:1")


def test_resolve_precision(monkeypatch):
    assert (resolve_precision("float32", CPU), resolve_precision("bf16", CPU)) == ("float32", "bf16")
    for native, wanted in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert resolve_precision("auto", CPU) == wanted
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert resolve_precision("auto", torch.device("cuda")) == wanted
