"""Files that survive crashes, weights that say what they are, and the refusal of everything else."""

import json
import os
import pickle
import random
import re
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from core.config.load import parse_config
from core.config.unet import UNet as UNetConfig
from core.errors import UserError
from core.files import atomic_file, write_atomically, write_json
from core.formats.pickles import read_pickle
from core.networks.convert_weights import write_safetensors
from core.networks.encoders import read_encoder
from core.networks.unet import UNet
from core.networks.weights import full_header, load_weights, read_tensors, save_weights
from core.training.state import load_state, save_state
from tests.conftest import error_of, unsealed_header

TINY = UNetConfig(base_channels=4, channel_multipliers=(1, 2), attention_heads=1, attention_head_channels=4)


class Malicious:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_atomic_file_keeps_the_old_file_when_the_block_raises(tmp_path):
    path = tmp_path / "deep/state.bin"
    write_atomically(path, b"old")

    def fail():
        with atomic_file(path) as file:
            file.write(b"half of the ne")
            file.flush()
            assert path.read_bytes() == b"old"  # no reader ever sees a part
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["state.bin"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in path.parent.iterdir()] == ["state.bin"]


def test_atomic_file_reaches_the_disk_before_it_replaces(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append("fsync"))
    monkeypatch.setattr(Path, "replace", lambda self, target: order.append(target.name))
    write_atomically(tmp_path / "a", b"x")
    assert order == ["fsync", "a"]


def test_write_json_refuses_what_is_not_json(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2.5]})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 2.5]}


def test_save_state_rotates(tmp_path):
    for step in (1, 2, 3):
        save_state(tmp_path, {"step": step, "tensor": torch.full((3,), step)})
        assert load_state(tmp_path, "last", "run")["step"] == step
    assert load_state(tmp_path, "previous", "run")["tensor"].tolist() == [2, 2, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_a_save_after_one_that_was_killed_between_its_renames_leaves_nothing(tmp_path):
    """previous.pt is already what last.pt is."""
    save_state(tmp_path, {"step": 1})
    (tmp_path / "previous.pt").hardlink_to(tmp_path / "last.pt")
    save_state(tmp_path, {"step": 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    assert [load_state(tmp_path, which, "run")["step"] for which in ("last", "previous")] == [2, 1]


def test_failed_save_leaves_both_states(tmp_path, monkeypatch):
    save_state(tmp_path, {"step": 1})
    save_state(tmp_path, {"step": 2})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_state(tmp_path, {"step": lambda: 3})  # cannot be pickled: fails half-way
    assert [load_state(tmp_path, which, "run")["step"] for which in ("last", "previous")] == [2, 1]
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_state(tmp_path, {"step": 3})
    assert load_state(tmp_path, "last", "run")["step"] == 2


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.9, 0.99, 0.999])
def test_truncated_last_offers_previous(tmp_path, keep):
    save_state(tmp_path, {"step": 40, "tensor": torch.zeros(1000)})
    save_state(tmp_path, {"step": 60, "tensor": torch.zeros(1000)})
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    line = error_of(load_state, tmp_path, "last", "python -m ddpm_pretraining.train --config c.json")
    assert f"{tmp_path}/last.pt is " in line and "previous.pt (step 40) is whole" in line
    assert line.endswith("python -m ddpm_pretraining.train --config c.json --resume previous")
    assert load_state(tmp_path, "previous", "run")["step"] == 40


def test_every_flipped_bit_of_a_state_is_noticed(tmp_path):
    """Wherever it is, the state is refused in one line, or reads as it was."""
    save_state(tmp_path, {"step": 40, "tensor": torch.randn(500, generator=torch.Generator().manual_seed(0))})
    whole, saved = (tmp_path / "last.pt").read_bytes(), load_state(tmp_path, "last", "run")
    refused = 0
    for place in random.Random(0).sample(range(8 * len(whole)), 300):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        (tmp_path / "last.pt").write_bytes(flipped)
        try:
            state = load_state(tmp_path, "last", "run")
        except UserError as error:
            assert "\n" not in str(error) and str(tmp_path / "last.pt") in str(error)
            refused += 1
        else:
            assert state["step"] == 40 and torch.equal(state["tensor"], saved["tensor"])
    assert refused > 100


def of_every_kind(folder):
    """A file by each writer of weights: of a U-Net in float32, and of an encoder converted to bfloat16."""
    model = UNet(TINY, 1, 2, (8, 8))
    save_weights(folder / "unet.safetensors", model, {"unet": TINY.model_dump(mode="json")}, {"iteration": 4})
    tensors = {"b.weight": torch.randn(3, 5), "a.counter": torch.tensor(7), "c.bias": torch.randn(0)}
    write_safetensors(folder / "converted.safetensors", tensors, torch.bfloat16, full_header({}, {"source": "x"}),
                      folder / "x.pt")
    return sorted(folder.glob("*.safetensors"))


def test_every_flipped_bit_of_weights_is_noticed(tmp_path):
    """Wherever it is, in the header or in a tensor, the file is refused in one line, or reads as it was."""
    for path in of_every_kind(tmp_path):
        whole, (tensors, header) = path.read_bytes(), read_tensors(path)
        refused, places = 0, random.Random(0).sample(range(8 * len(whole)), 400)
        for place in places:
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            try:
                read, said = read_tensors(path)
            except UserError as error:
                assert "\n" not in str(error) and str(path) in str(error)
                refused += 1
            else:
                assert said == header and read.keys() == tensors.keys()
                assert all(torch.equal(read[name], tensors[name]) for name in tensors)
        assert refused > 0.9 * len(places)
        path.write_bytes(whole)


def test_the_checksum_of_weights_is_that_of_their_bytes(tmp_path):
    """By another way: zlib over the bytes as the file holds them, whatever the order."""
    path = of_every_kind(tmp_path)[0]
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    layout = json.loads(whole[8:8 + length])
    metadata, body = layout.pop("__metadata__"), whole[8 + length:]
    words = {"F32": "torch.float32", "BF16": "torch.bfloat16", "I64": "torch.int64"}
    header = json.loads(metadata["header"])
    checked, checksum = header.pop("checked"), header.pop("checksum")
    text = f",{json.dumps(header)!r},"
    for name, of in sorted(layout.items()):
        start, end = of["data_offsets"]
        said = f"{words[of['dtype']]} {of['shape']}".encode()
        text += f",,{name!r},{zlib.crc32(said + body[start:end])};"
    assert checked and checksum == f"{zlib.crc32((text + ';;').encode()):08x}"


def test_weights_without_a_checksum_are_read(tmp_path):
    """Those that were written before, and those of others."""
    path = of_every_kind(tmp_path)[1]
    with safe_open(path, framework="pt") as file:
        header = unsealed_header(file)
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    path.write_bytes(save(tensors, metadata={"header": json.dumps(header)}))
    assert torch.equal(read_tensors(path)[0]["init_conv.weight"], tensors["init_conv.weight"])


def test_a_flipped_bit_of_a_published_file_is_noticed(tmp_path):
    """torch.load reads over it; zip's own checksums tell."""
    path = tmp_path / "x.pt"
    torch.save({"model_state_dict": {"w": torch.randn(400)}}, path)
    whole = path.read_bytes()
    place = whole.find(b"data/0") + 1000
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
    assert read_pickle(path)["model_state_dict"]["w"].shape == (400,)
    assert re.fullmatch(rf"{path} is damaged \(.+\); fetch it again", error_of(load_weights, path))
    assert re.fullmatch(rf"{path} is damaged \(.+\); fetch it again", error_of(read_encoder, path, "resnet50"))


def test_missing_states(tmp_path):
    assert error_of(load_state, tmp_path, "last", "run") == f"checkpoint {tmp_path}/last.pt does not exist"
    save_state(tmp_path, {"step": 7})
    (tmp_path / "last.pt").rename(tmp_path / "previous.pt")
    assert "last.pt does not exist; previous.pt (step 7) is whole" in error_of(load_state, tmp_path, "last", "run")


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_pickle_that_runs_code_is_refused(tmp_path, write):
    path, trap = tmp_path / "evil.pt", tmp_path / "trap"
    write({"model_state_dict": Malicious(trap), "step": 1}, path)
    for call in (read_pickle, load_weights):
        assert "evil.pt is damaged, or holds more than tensors and plain values" in error_of(call, path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Malicious(trap)))
    assert trap.exists()  # the trap does work


@pytest.fixture
def weights(tmp_path):
    """A file of ours: path, network, header."""
    torch.manual_seed(0)
    model = UNet(TINY, 2, 3, (8, 8))
    config = parse_config({"finetune": {"iterations": 1}, "unet": TINY.model_dump(mode="json"),
                           "dataset": {"image_size": [8, 8]}}, "test").plain()
    path = tmp_path / "deep/ema_iter000010.safetensors"
    save_weights(path, model, config, {"kind": "ddpm", "iteration": 10, "dataset": "mine"})
    return path, model, config


def test_header_round_trip(weights):
    path, model, config = weights
    loaded = load_weights(path)
    assert (loaded.unet, loaded.channels, loaded.out_channels) == (TINY, 2, 3)
    assert {key: loaded.header[key] for key in ("kind", "iteration", "dataset")} == {
        "kind": "ddpm", "iteration": 10, "dataset": "mine"}
    assert loaded.header["config"] == config and loaded.header["code_version"]
    x, t = torch.randn(1, 2, 8, 8), torch.tensor([5])
    assert torch.equal(loaded.build((8, 8))(x, t), model(x, t))


def test_weights_hold_parameters_only_and_channels_last_is_saved_plainly(weights, tmp_path):
    path, model, config = weights
    save_weights(tmp_path / "last.safetensors", model.to(memory_format=torch.channels_last), config, {})
    with safe_open(tmp_path / "last.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == {name for name, _ in model.named_parameters()}
    again, first = load_weights(tmp_path / "last.safetensors").tensors, load_weights(path).tensors
    assert all(torch.equal(again[name], first[name]) for name in names)


@pytest.mark.parametrize("content, message", [
    (None, "does not exist"),
    (b"", "truncated or not a weights file of this project"),
    (b"PNG picture, not weights", "truncated or not a weights file of this project"),
    (save({"a": torch.zeros(2)}), "is not a weights file of this project: its header does not say landmark-unet-1"),
    (save({"a": torch.zeros(2)}, {"format": "pt"}), "is not a weights file of this project"),
    (save({"a": torch.zeros(2)}, {"header": "{}"}), "is not a weights file of this project"),
    (save({"a": torch.zeros(2)}, {"header": "[1]"}), "is not a weights file of this project"),
    (save({"a": torch.zeros(2)}, {"header": "no JSON"}), "truncated or not a weights file of this project"),
], ids=range(8))  # fmt: skip
def test_foreign_safetensors(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    line = error_of(load_weights, path)
    assert str(path) in line and message in line


@pytest.mark.parametrize("change, message", [
    ({"config": None}, "has no config of a network"), ({"config": {"unet": 3}}, "has no config of a network"),
    ({"channels": None}, "channels and out_channels"), ({"out_channels": 10**9}, "channels and out_channels"),
    ({"out_channels": True}, "channels and out_channels"), ({"out_channels": 4}, "with 4 outputs"),
    ({"config": {"unet": {**TINY.model_dump(mode="json"), "base_channels": 10**6}}}, "up to .* channels"),
    ({"config": {"unet": {**TINY.model_dump(mode="json"), "base_channels": "many"}}}, "config.unet is none"),
], ids=range(8))  # fmt: skip
def test_headers_with_missing_wrong_or_huge_entries(weights, tmp_path, change, message):
    """One line with the file's name, before a network of that size is made."""
    path, model, config = weights
    header = {**load_weights(path).header, **change}
    (tmp_path / "x.safetensors").write_bytes(save(dict(model.state_dict()), {"header": json.dumps(header)}))
    line = error_of(load_weights, tmp_path / "x.safetensors")
    assert "x.safetensors is damaged" in line and re.search(message, line) and "\n" not in line


@pytest.mark.parametrize("share", [0.001, 0.1, 0.6, 0.999])
def test_truncated_safetensors(weights, share):
    whole = weights[0].read_bytes()
    weights[0].write_bytes(whole[: int(share * len(whole))])
    assert "is truncated or not a weights file of this project" in error_of(load_weights, weights[0])


@pytest.mark.parametrize("content, message", [
    ({"step": 3, "model": {}}, "is not a published DDPM checkpoint: it holds ['model', 'step'], expected"),
    ({"model_state_dict": {"conv.weight": torch.zeros(1)}}, "is not a published DDPM checkpoint"),
    ({"model_state_dict": {"init_conv.weight": torch.zeros(8, 2, 1, 1)}}, "is not a published DDPM checkpoint"),
    ({"model_state_dict": 5}, "is not a published DDPM checkpoint"),
    ([1, 2], "it holds a list"), (torch.zeros(2), "it holds a Tensor"), ({1: 2, "a": 3}, "it holds ['1', 'a']"),
])
def test_pt_that_is_not_of_the_published_format(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    line = error_of(load_weights, tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in line and message in line


@pytest.mark.parametrize("content", [b"", b"hello world", b"\x80\x02.", b"PK\x03\x04 and no more", bytes(range(256))])
def test_pt_that_is_no_pickle(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    assert str(tmp_path / "x.pt") in error_of(load_weights, tmp_path / "x.pt")
