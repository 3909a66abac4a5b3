"""The authors' files: converted to equal tensors and outputs, listed and fetched from a hub that runs in the test."""

import hashlib
import json
import re
import shutil
import threading
import time
import weakref
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import HTTPError
from safetensors import safe_open
from safetensors.torch import load_file
from segmentation_models_pytorch.encoders import get_encoder
from torchvision.models import get_model

from core.errors import UserError
from core.networks import convert_weights, published_weights
from core.networks.convert_weights import convert, encoder_architecture, write_safetensors
from core.networks.weights import FORMAT, load_weights
from landmarks_finetuning.detectors.registry import build_detector
from tests.conftest import PROJECT

FIXTURE = PROJECT / "tests/fixtures/official_ddpm_base8"
PUBLISHED = FIXTURE / "ema_model_epoch800_step6000.pt"
COMMAND = "core.networks.published_weights"
DDPM, DINO = "DDPM/chest/ema_model_epoch800_step6000.pt", "Dino/hand/model epoch9_iter10000.pth"


@pytest.fixture(scope="module")
def content():
    """The published pickle: epoch, n_iter, model_state_dict. Not to be changed."""
    return torch.load(PUBLISHED, weights_only=True)


@pytest.fixture
def pickled(tmp_path):
    """pickled(content, name, **how) -> path of the file that torch.save writes."""

    def write(content, name="chest/x.pt", **how):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path, **how)
        return path

    return write


def refused(source, out, dtype="float32"):
    """The one line in which `convert` refuses; it leaves nothing behind."""
    with pytest.raises(UserError) as caught:
        convert(source, out, dtype)
    assert "\n" not in str(caught.value)
    assert not out.parent.is_dir() or not [p for p in out.parent.iterdir() if p.suffix in (".tmp", ".safetensors")]
    return str(caught.value)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 5e-3), ("bfloat16", 5e-2)])
def test_convert_keeps_tensors_and_outputs(content, run_main, tmp_path, dtype, tolerance):
    source, out = tmp_path / "DDPM/chest/ema.pt", tmp_path / "out/ema.safetensors"
    source.parent.mkdir(parents=True)
    shutil.copy(PUBLISHED, source)
    status, printed, error = run_main(COMMAND, "convert", source, "--out", out, "--dtype", dtype)
    assert status == 0, error
    assert f"--set finetune.checkpoint={out}" in printed and "unet.base_channels 8" in printed
    original, kind = content["model_state_dict"], getattr(torch, dtype)
    stored, weights = load_file(out), load_weights(out)  # the safetensors library's own reader, and ours
    assert stored.keys() == weights.tensors.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(stored[name], tensor.to(kind)) and stored[name].dtype == kind, name
        assert torch.equal(weights.tensors[name], tensor.to(kind).float()), name
        assert weights.tensors[name].dtype == torch.float32, name
    assert weights.unet == load_weights(PUBLISHED).unet and (weights.channels, weights.out_channels) == (1, 1)
    told = {key: weights.header[key] for key in ("kind", "iteration", "epoch", "dataset", "method", "source")}
    assert told == {"kind": "published", "iteration": 6000, "epoch": 800, "dataset": "chest", "method": "ddpm",
                    "source": "ema.pt"}
    expected = np.load(FIXTURE / "expected.npz")
    model, x = weights.build((64, 64)).eval(), torch.from_numpy(expected["x"])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        for name, t in (("noise_prediction", torch.from_numpy(expected["t"])), ("null_time_output", None)):
            assert np.abs(model(x, t).numpy() - expected[name]).max() <= tolerance * np.abs(expected[name]).max()


def test_half_size_file_is_a_finetuning_checkpoint(content, make_config, tmp_path):
    out = tmp_path / "half.safetensors"
    convert(PUBLISHED, out, "float16")
    assert out.stat().st_size < 0.52 * PUBLISHED.stat().st_size
    unet = {"channel_multipliers": [1, 2, 4, 8], "attention_heads": 4, "attention_head_channels": 32,
            "linear_attention": True}
    config = make_config(tmp_path, unet=unet, finetune={"checkpoint": str(out)})
    detector = build_detector(config, "ddpm", 1, 19).state_dict()
    for name, tensor in content["model_state_dict"].items():
        assert name.startswith("final_conv.") or torch.equal(detector[name], tensor.half().float()), name


def test_optimiser_is_dropped_and_old_formats_give_the_same_file(content, pickled, tmp_path):
    moments = {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(300_000)}}, "param_groups": [{"lr": 1}]}
    loss = torch.tensor(2.0, requires_grad=True) * 3
    variants = {"bare": ({**content}, {}), "whole": ({**content, "optimizer_state_dict": moments, "loss": loss}, {}),
                "old": ({**content}, {"_use_new_zipfile_serialization": False})}
    files = []
    for name, (values, how) in variants.items():
        source = pickled(values, f"{name}/x.pt", **how)
        convert(source, tmp_path / f"{name}.safetensors", "float32")
        files.append((tmp_path / f"{name}.safetensors").read_bytes())
    assert zipfile.is_zipfile(tmp_path / "whole/x.pt") and not zipfile.is_zipfile(tmp_path / "old/x.pt")
    assert files[0] == files[1] == files[2]


def test_one_tensor_at_a_time_is_in_memory(tmp_path, monkeypatch):
    made, loads = [], []
    original, load = convert_weights._as_stored, torch.load

    def watched(*arguments):
        assert all(earlier() is None for earlier in made)
        view = original(*arguments)
        made.append(weakref.ref(view))
        return view

    monkeypatch.setattr(convert_weights, "_as_stored", watched)
    monkeypatch.setattr(torch, "load", lambda *a, **k: loads.append(k) or load(*a, **k))
    convert(PUBLISHED, tmp_path / "x.safetensors", "float16")
    assert len(made) == 293 and [k["mmap"] for k in loads] == [True]  # tensors are left in the file until written


@pytest.fixture(scope="module")
def densenet():
    """State of a torchvision DenseNet-121 for grey images, as the authors save their encoders: without a classifier."""
    torch.manual_seed(0)
    model = get_model("densenet121", weights=None)
    model.features.conv0 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    model.classifier = torch.nn.Identity()
    model.features.norm0.num_batches_tracked += 2**40 + 1
    return model.eval()


def test_encoder(densenet, pickled, run_main):
    state = densenet.state_dict()
    source = pickled(state, "MocoV3/hand/model_epoch131_iter10000.pth")
    status, printed, error = run_main(COMMAND, "convert", source)
    out = source.with_suffix(".safetensors")
    assert status == 0, error
    assert "iteration 10000: encoder densenet121 for 1 channels" in printed
    stored = load_file(out)
    assert stored.keys() == state.keys() and all(torch.equal(stored[name], state[name]) for name in state)
    with safe_open(out, framework="pt") as file:
        header = json.loads(file.metadata()["header"])
    assert header.pop("code_version") and header.pop("checked") and header.pop("checksum") and header == {
        "format": FORMAT, "config": {}, "kind": "encoder", "network": "encoder", "encoder": "densenet121",
        "channels": 1,
        "iteration": 10000, "source": source.name, "dataset": "hand", "method": "mocov3"}
    encoder = get_encoder("densenet121", in_channels=1, weights=None)
    encoder.load_state_dict(stored)
    x = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, ours = densenet.features(x).relu(), encoder.eval()(x)[-1]
    assert ours.abs().max() > 0.01 and torch.allclose(ours.relu(), theirs, atol=1e-5)
    with pytest.raises(UserError, match='holds a network of kind "encoder", where unet is needed'):
        load_weights(out)


def test_encoder_of_a_training_state(densenet, pickled, tmp_path):
    state = {f"backbone.{name}": tensor for name, tensor in densenet.state_dict().items()}
    state |= {"momentum_backbone.x": torch.zeros(3), "projector.weight": torch.zeros(3)}
    source = pickled({"model_state_dict": state, "optimizer_state_dict": {}, "epoch": 3, "iteration": 77}, "last.pth")
    header = convert(source, tmp_path / "e.safetensors", "float16")
    stored = load_file(tmp_path / "e.safetensors")
    assert (header["encoder"], header["iteration"], header["dataset"]) == ("densenet121", 77, None)
    assert stored.keys() == densenet.state_dict().keys()
    assert stored["features.norm0.num_batches_tracked"] == 2**40 + 1  # counters keep their type


@pytest.mark.parametrize("kind", ["a", "ab"])  # of two lengths: one of the headers needs padding
def test_tensors_are_aligned_in_the_file(tmp_path, kind):
    tensors = {"a": torch.arange(3.0), "b": torch.tensor(7), "c": torch.arange(6.0).view(2, 3).T}
    write_safetensors(tmp_path / "x.safetensors", tensors, torch.float16, {"kind": kind}, Path("x.pt"))
    raw = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0 and json.loads(raw[8 : 8 + length])["b"]["data_offsets"] == [0, 8]  # the widest type first
    stored = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(stored[name].float(), tensor.float()) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["densenet161", "resnet18", "resnext50_32x4d", "vgg11"])
def test_architecture_from_shapes(name):
    with torch.device("meta"):
        state = get_model(name, weights=None).state_dict()
        assert encoder_architecture(state) == name
        stem = next(iter(state))
        grey = {**state, stem: torch.empty(state[stem].shape[0], 1, *state[stem].shape[2:])}
    assert encoder_architecture(grey) == name
    last = [key for key in state if not key.startswith(("fc.", "classifier."))][-2]
    assert encoder_architecture({key: value for key, value in state.items() if key != last}) is None


def change(content, **tensors):
    """The published content with other or (None) without some tensors."""
    state = {**content["model_state_dict"], **{name.replace("__", "."): t for name, t in tensors.items()}}
    return {**content, "model_state_dict": {name: t for name, t in state.items() if t is not None}}


@pytest.mark.parametrize("values, message", [
    (lambda c: change(c, mid_attn__fn__norm__bias=None), "another network than .*mid_attn.fn.norm.bias is missing"),
    (lambda c: change(c, extra__weight=torch.zeros(2)), "another network than .*extra.weight is not part of it"),
    (lambda c: change(c, time_mlp__1__bias=torch.zeros(5)), r"time_mlp.1.bias has shape \(5,\), expected \(32,\)"),
    (lambda c: change(c, init_conv__weight=torch.zeros(6, 2, 1, 1)), "another network than the published DDPM"),
    (lambda c: change(c, init_conv__weight=torch.zeros(8, 2)), "init_conv.weight has 2 axes"),
    (lambda c: change(c, init_conv__weight=torch.zeros(8)), "another network than the published DDPM"),
    (lambda c: change(c, ups__x__0=torch.zeros(8)), "another network than the published DDPM"),
    (lambda c: change(c, final_conv__weight=torch.zeros(())), "another network than the published DDPM"),
    (lambda c: change(c, final_conv__bias=torch.tensor([np.nan])), "final_conv.bias holds values that are not finite"),
    (lambda c: change(c, final_conv__bias=torch.tensor([1j])), "final_conv.bias is of type torch.complex64"),
    (lambda c: {"conv.weight": torch.zeros(2, 2, 3, 3)}, "neither the published DDPM nor an encoder .*densenet161.*"
                                                         "1 tensors, the first conv.weight"),
    (lambda c: {"features.0.weight": torch.zeros(2, 2, 3, 3)}, "neither the published DDPM nor an encoder known"),
    (lambda c: {"step": 3, "model": {}}, r"no published file: it holds \['model', 'step'\]"),
    (lambda c: {"model_state_dict": {"a": 5}}, "no published file"), (lambda c: {}, "no published file"),
    (lambda c: [1, 2], "it holds a list"), (lambda c: {"x": Path("a")}, "more than tensors and plain values"),
], ids=range(17))  # fmt: skip
def test_other_content_is_refused(content, pickled, tmp_path, values, message):
    source = pickled(values(content))
    line = refused(source, tmp_path / "out/x.safetensors")
    assert line.startswith(str(source))
    assert re.search(message, line), line


def test_values_that_half_precision_cannot_hold(content, pickled, tmp_path):
    source = pickled(change(content, final_conv__bias=torch.tensor([-1e5])))
    line = refused(source, tmp_path / "x.safetensors", "float16")
    assert "final_conv.bias reaches 1e+05, too large for float16; choose --dtype bfloat16 or float32" in line
    convert(source, tmp_path / "x.safetensors", "bfloat16")


@pytest.mark.parametrize("damage, message", [
    (lambda raw: raw[:-1000], "is truncated or not a checkpoint"), (lambda raw: raw[:100_000], "is truncated or not"),
    (lambda raw: raw[: 2**20] + bytes(2**16) + raw[2**20 + 2**16 :], r"is damaged \(Bad CRC-32 .*fetch it again"),
    (lambda raw: b"<html>404</html>", "x.pt is"), (lambda raw: b"", "is truncated or not"),
])
def test_damaged_file(tmp_path, damage, message):
    (tmp_path / "x.pt").write_bytes(damage(PUBLISHED.read_bytes()))
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "x.pt", tmp_path / "x.safetensors", "float32")
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_paths_that_cannot_be(tmp_path):
    out = tmp_path / "x.safetensors"
    assert refused(tmp_path / "none.pt", out) == f"checkpoint {tmp_path}/none.pt does not exist"
    assert "must end in .safetensors" in refused(PUBLISHED, tmp_path / "x.pt")
    assert "is a safetensors file already" in refused(tmp_path / "y.safetensors", out)
    (tmp_path / "file").write_text("")
    assert "file/x.safetensors cannot be written" in refused(PUBLISHED, tmp_path / "file/x.safetensors")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as is asked for: the repository's description, and files by whole or from a byte on."""

    def do_GET(self):
        files, path = self.server.files, self.path.split("?")[0]
        self.server.asked.append((path, self.headers.get("Range")))
        status, body = 404, b"{}"
        if path.startswith("/api/models/"):
            status, body = 200, json.dumps({"id": "x", "siblings": [{"rfilename": "README.md", "size": 9}, *(
                {"rfilename": name, "size": len(data), "lfs": {"size": len(data), "pointerSize": 1,
                 "sha256": hashlib.sha256(data).hexdigest()}} for name, data in files.items())]}).encode()
        for name, data in files.items():
            if path.endswith("/resolve/main/" + name.replace(" ", "%20")):
                start = int((self.headers.get("Range") or "bytes=0-")[6:].rstrip("-"))
                status, body = 206 if start else 200, data[start:]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Silent."""


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine with two files, which the command takes for the real one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {DINO: bytes(range(256)) * 500, DDPM: PUBLISHED.read_bytes()}
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(published_weights, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_list(hub, run_main):
    status, out, _ = run_main(COMMAND, "list")
    assert status == 0 and [line.split(maxsplit=4) for line in out.splitlines()[1:3]] == [
        ["DDPM", "chest", "2.8", "MB", DDPM], ["Dino", "hand", "128", "kB", DINO]]
    assert out.splitlines()[3:] == ["2 files, 2.9 MB; get one: python -m core.networks.published_weights fetch PATH"]


def test_fetch_then_convert(hub, run_main, tmp_path):
    status, out, error = run_main(COMMAND, "fetch", DDPM, "--out", tmp_path)
    assert status == 0, error
    target = tmp_path / DDPM
    assert out == f"{target} (2.8 MB); convert it: python -m core.networks.published_weights convert {target}\n"
    assert (tmp_path / DDPM).read_bytes() == PUBLISHED.read_bytes()
    assert convert(tmp_path / DDPM, tmp_path / "x.safetensors", "float32")["dataset"] == "chest"
    asked = len(hub.asked)
    assert run_main(COMMAND, "fetch", DDPM, "--out", tmp_path)[0] == 0  # it is here: only looked up
    assert [path for path, _ in hub.asked[asked:]] == [f"/api/models/{published_weights.REPOSITORY}"]


def test_fetch_goes_on_where_it_stopped(hub, run_main, tmp_path, monkeypatch):
    def cut(url, file, **_):
        file.write(hub.files[DINO][:70_000])
        raise HTTPError("[Errno 104] Connection reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(published_weights, "http_get", cut)
        status, _, error = run_main(COMMAND, "fetch", DINO, "--out", tmp_path)
    part, = (tmp_path / DINO).parent.iterdir()
    assert status == 2 and error.count("\n") == 1 and part.stat().st_size == 70_000
    assert f"(Connection reset by peer); what came is kept in {part}".replace("(", "([Errno 104] ") in error
    assert run_main(COMMAND, "fetch", DINO, "--out", tmp_path)[0] == 0
    assert hub.asked[-1][1] == "bytes=70000-" and (tmp_path / DINO).read_bytes() == hub.files[DINO]
    assert [p.name for p in (tmp_path / DINO).parent.iterdir()] == [Path(DINO).name]


def test_fetch_finds_damage(hub, run_main, tmp_path, monkeypatch):
    monkeypatch.setattr(published_weights, "http_get", lambda url, file, **_: file.write(b"x" * len(hub.files[DINO])))
    status, _, error = run_main(COMMAND, "fetch", DINO, "--out", tmp_path)
    assert status == 2 and f"error: {DINO} was damaged on the way" in error and error.count("\n") == 1
    assert not list((tmp_path / DINO).parent.iterdir())


def test_fetch_of_what_is_not_there(hub, run_main, tmp_path):
    status, _, error = run_main(COMMAND, "fetch", DDPM.replace("6000", "600"), "--out", tmp_path / "w")
    assert status == 2 and f'(did you mean "{DDPM}"?)' in error and not (tmp_path / "w").exists()
    (tmp_path / "w").write_text("")
    status, _, error = run_main(COMMAND, "fetch", DDPM, "--out", tmp_path / "w")
    assert status == 2 and error.count("\n") == 1 and "w/DDPM" in error


def test_refusing_hub(hub, run_main, monkeypatch):
    monkeypatch.setattr(published_weights, "REPOSITORY", "somebody/else")
    monkeypatch.setattr(Hub, "do_GET", lambda self: self.send_error(403))
    status, _, error = run_main(COMMAND, "list")
    assert status == 2 and error.count("\n") == 1 and "answers 403 to" in error


@pytest.mark.parametrize("arguments, place", [
    (["list"], "tree/main"), (["fetch", "DDPM/a b.pt"], "resolve/main/DDPM/a%20b.pt")])
@pytest.mark.parametrize("offline", [False, True])
def test_no_network_is_said_at_once_in_one_line(run_main, monkeypatch, tmp_path, arguments, place, offline):
    def no_waiting(seconds):
        raise AssertionError(f"waits {seconds} s to try again")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", no_waiting)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(published_weights, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens: the client's own error
    status, out, error = run_main(COMMAND, *arguments)
    assert status == 2 and out == "" and error.count("\n") == 1
    assert error.startswith("error: http://127.0.0.1:9 cannot be reached (")
    assert f"by hand: download http://127.0.0.1:9/{published_weights.REPOSITORY}/{place} with a browser, then " in error
    assert not list(tmp_path.iterdir())
