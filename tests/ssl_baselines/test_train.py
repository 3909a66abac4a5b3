"""Self-supervised pre-training of encoders as commands run it, what it leaves, and the studies that start from it."""

import json
import os
import shlex
import shutil
import signal

import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from safetensors.torch import load_file
from torchvision.models.resnet import BasicBlock, conv1x1

import ssl_baselines.train
from core.config.load import parse_config
from core.config.second_stage import second_stage
from core.config.starts import SSL_METHODS
from core.files import write_atomically
from core.formats.pickles import read_pickle
from core.networks.encoders import build_encoder
from core.networks.imagenet import HUB_FILES
from core.networks.weights import read_tensors
from core.runs.cells import encoder_studies, ssl_methods
from core.runs.identity import check_ssl
from core.runs.places import Cell, cell_dir, encoder_path, second_start_path, ssl_dir
from core.training.loop import Training
from core.training.run_log import read_metrics
from landmarks_finetuning.detectors import encoder_unet
from landmarks_finetuning.detectors.encoder_unet import start_encoder_unet
from landmarks_finetuning.starts import imagenet_weights
from landmarks_finetuning.train import finetune_cell
from ssl_baselines.train import pretrain_encoder
from study import runner
from study.prepare import check_start_weights, prepare
from study.run import run_study
from tests.conftest import error_of

SSL, FINETUNING, LAUNCH = "ssl_baselines.train", "landmarks_finetuning.train", "study.launch"
HEAD = {"hidden": 16, "out": 8}
TINY_SSL = {"iterations": 4, "batch_size": 4, "learning_rate": 1e-3, "warmup_iterations": 1, "log_every": 1,
            "validate_every": 2, "save_every": 100, "mocov3": HEAD, "simclrv2": HEAD,
            "dino": {**HEAD, "bottleneck": 6, "local_crops": 2, "freeze_last_layer": 3}}


class Block(BasicBlock):
    """The library's, with convolutions of one pixel."""

    def __init__(self, inplanes, planes, stride=1, *others, **more):
        super().__init__(inplanes, planes, stride, *others, **more)
        self.conv1, self.conv2 = conv1x1(inplanes, planes, stride), conv1x1(planes, planes)


LAYERS = {"block": Block, "layers": [1, 1, 1, 1]}


@pytest.fixture(autouse=True, scope="module")
def shallow():
    """resnet50 with one small block in each layer, for all tests here: the same code and names, quick."""
    params = {**LAYERS, "out_channels": [3, 64, 64, 128, 256, 512]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(smp.encoders.encoders, "resnet50", {**smp.encoders.encoders["resnet50"], "params": params})
        yield


def settings(ssl=None, **finetune):
    """The sections of a tiny study of resnet50."""
    sections = {"ssl": {**TINY_SSL, **(ssl or {})}, "finetune": {"encoder": "resnet50", **finetune}}
    return {"dataset": {"image_size": [32, 32]}, **sections}


@pytest.fixture(scope="module", params=SSL_METHODS)
def trained(request, make_config, tmp_path_factory):
    """(method, config, run folder) of an uninterrupted run of each method in turn."""
    config = make_config(tmp_path_factory.mktemp(request.param), **settings())
    return request.param, config, pretrain_encoder(config, request.param)


def refused(run_main, *arguments):
    status, _, error = run_main(*arguments)
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def same(one, other):
    """Whether two state dicts hold the same tensors, bit for bit."""
    assert one.keys() == other.keys() and len(one) > 30
    return all(torch.equal(one[name], other[name]) for name in one)


def untimed(run_dir):
    """The lines of metrics.jsonl but for times."""
    return [{key: value for key, value in line.items() if key not in ("seconds", "images_per_second")}
            for line in read_metrics(run_dir / "metrics.jsonl")]


# --- a run ---


def test_what_a_run_leaves(trained):
    method, config, run_dir = trained
    assert run_dir == ssl_dir(config, method) == config.experiment_dir / "ssl" / method
    assert encoder_path(config, method) == run_dir / "encoder_iter000004.safetensors"
    _, header = read_tensors(encoder_path(config, method))
    assert (header["kind"], header["encoder"], header["channels"]) == ("encoder", "resnet50", 1)
    assert (header["method"], header["preset"], header["iteration"]) == (method, "tuned", 4)
    assert header["config"] == config.plain()
    kept = json.loads((run_dir / "config.json").read_text())["run"]
    assert (kept["stage"], kept["method"], kept["images"]) == ("ssl", method, 150)
    lines = untimed(run_dir)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    looks = [line for line in lines if "validation_loss" in line]
    own = {"teacher_entropy", "teacher_information"} if method == "dino" else set()
    assert [line["step"] for line in looks] == [2, 4]
    for line in looks:
        assert line.keys() == {"step", "validation_loss", "embedding_spread", "effective_rank"} | own
        assert 0 < line["embedding_spread"] <= 1 and 1 < line["effective_rank"] < 20
        assert all(0 < line[key] < 1 for key in own)


def test_resumed_run_equals_an_uninterrupted_one(trained, config_file, run_main, monkeypatch, tmp_path):
    """Stopped after two of four steps and continued by the command that it printed; DINO's last layer thaws after."""
    method, config, whole = trained
    path, step = config_file(**settings()), Training.optimiser_step

    def struck(self):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "optimiser_step", struck)
        status, _, error = run_main(SSL, "--config", path, "--method", method)
    assert status == 130 and "saved at step 2 of 4" in error
    run_dir = tmp_path / "runs/tiny/ssl" / method
    assert not list(run_dir.glob("*.safetensors"))
    printed = shlex.split(error.strip().splitlines()[-1].partition("continue with: ")[2])
    assert printed[:3] == ["python", "-m", SSL]
    status, out, error = run_main(SSL, *printed[3:])
    assert status == 0 and f"pre-training is done: {run_dir}" in out, error
    assert same(*(load_file(folder / "encoder_iter000004.safetensors") for folder in (run_dir, whole)))
    state, last = read_pickle(run_dir / "last.pt"), read_pickle(whole / "last.pt")
    assert state["step"] == last["step"] == 4 and same(state["model"], last["model"])
    assert state["ema"] is last["ema"] is None if method == "simclrv2" else same(state["ema"], last["ema"])
    assert untimed(run_dir) == untimed(whole)
    before = encoder_path(config, method).stat().st_mtime_ns
    assert pretrain_encoder(config, method) == whole  # finished: left alone
    assert encoder_path(config, method).stat().st_mtime_ns == before


def test_which_encoder_is_kept(trained):
    """DINO's teacher; of the others the network that learns by gradients, not its momentum copy."""
    method, config, run_dir = trained
    held, state = load_file(encoder_path(config, method)), read_pickle(run_dir / "last.pt")
    encoders = {part: {name.removeprefix("backbone.encoder."): tensor for name, tensor in state[part].items()
                       if name.startswith("backbone.encoder.")} for part in ("model", "ema") if state[part]}
    assert ("ema" in encoders) is (method != "simclrv2")
    assert same(held, encoders["ema" if method == "dino" else "model"])
    assert "ema" not in encoders or not same(encoders["ema"], encoders["model"])


def test_detector_starts_from_the_encoder(trained):
    method, config, run_dir = trained
    model = start_encoder_unet(config, method, 1, 5)
    assert same(model.encoder.state_dict(), load_file(run_dir / "encoder_iter000004.safetensors"))
    other = next(name for name in SSL_METHODS if name != method)
    assert f"backbone {other} has no encoder yet" in error_of(start_encoder_unet, config, other, 1, 5)
    assert not same(model.encoder.state_dict(), start_encoder_unet(config, "random", 1, 5).encoder.state_dict())


def test_changed_settings_are_refused(trained, make_values, run_main, tmp_path):
    method, config, run_dir = trained
    path = tmp_path / "same.json"
    values = make_values(run_dir.parents[2], **settings())
    path.write_text(json.dumps(values))
    other = next(name for name in SSL_METHODS if name != method)
    for key, old, new in (("ssl.learning_rate", "0.001", "0.5"), (f"ssl.{method}.out", "8", "9"),
                          ("finetune.encoder", '"resnet50"', '"vgg19"'), ("ssl.iterations", "4", "5")):
        line = refused(run_main, SSL, "--config", path, "--method", method, "--set", f"{key}={new}")
        assert f"{run_dir} was made with {key} = {old}, now it is {new}" in line
    for command in ((LAUNCH, "--stages", "finetune"), (FINETUNING, "--backbone", method, "--shots", "2")):
        line = refused(run_main, *command, "--config", path, "--set", "ssl.batch_size=8",
                       f'finetune.backbones=["{method}"]')
        assert "was made with ssl.batch_size = 4, now it is 8" in line
    ssl = {**TINY_SSL, "workers": 2, "save_every": 7, other: {"out": 9}}
    check_ssl(parse_config({**values, "ssl": ssl, "ddpm": {**values["ddpm"], "learning_rate": 0.5}}, "x"), method)


def test_resume_with_accumulation(make_config, tmp_path):
    """The second step's micro-batches are the same ones; a process of its own, which made them at first, or none."""
    ssl = {"iterations": 2, "accumulation": 2, "save_every": 1, "scheduler": "constant"}
    config, alone = (make_config(tmp_path, **settings({**ssl, "workers": workers})) for workers in (1, 0))
    path = pretrain_encoder(config, "simclrv2") / "encoder_iter000002.safetensors"
    whole = load_file(path)
    path.unlink()
    pretrain_encoder(alone, "simclrv2", "previous")  # of step 1
    assert same(load_file(path), whole)


# --- what is refused ---


@pytest.mark.parametrize("method", SSL_METHODS)
def test_volumes_are_refused(config_file, run_main, method, tmp_path):
    line = refused(run_main, SSL, "--config", config_file(**settings()), "--method", method, "--set", "is_3d=true",
                   "dataset.layout=folder", "dataset.image_size=[32,32,32]")
    assert f'backbone "{method}" is a 2D baseline; with is_3d choose from ddpm, scratch' in line
    assert not (tmp_path / "runs").exists()


def test_missing_encoder(config_file, run_main, tmp_path):
    path = config_file(**settings(backbones=["mocov3"]))
    for arguments in ((FINETUNING, "--backbone", "mocov3", "--shots", 2), (LAUNCH, "--stages", "finetune")):
        line = refused(run_main, arguments[0], "--config", path, *arguments[1:])
        assert f"no encoder yet, {tmp_path}/runs/tiny/ssl/mocov3/encoder_iter000004.safetensors: pre-train it" in line
        assert "stage ssl or python -m ssl_baselines.train --method mocov3, or set finetune.encoder_weights.mo" in line
    line = refused(run_main, FINETUNING, "--config", path, "--backbone", "mocov3", "--shots", 2, "--set",
                   "finetune.encoder_weights.mocov3=gone.pth")
    assert "finetune.encoder_weights.mocov3 gone.pth does not exist; null takes this study's own" in line
    assert not list((tmp_path / "runs").rglob("last.pt"))


# --- weights from files ---


def test_given_files(trained, make_config, tmp_path):
    """Our .safetensors and a bare torchvision state dict (RGB, with a classifier) in place of a pre-training."""
    method, config, _ = trained
    reference = torchvision.models.ResNet(*LAYERS.values())
    torch.save(reference.state_dict(), tmp_path / "theirs.pth")
    shutil.copy(encoder_path(config, method), tmp_path / "ours.safetensors")
    for given in ("ours.safetensors", "theirs.pth"):
        config = make_config(tmp_path, **settings(backbones=["dino"], encoder_weights={"dino": str(tmp_path / given)}))
        found = start_encoder_unet(config, "dino", 1, 3).encoder.state_dict()
        wanted = load_file(tmp_path / given) if given == "ours.safetensors" else reference.state_dict()
        wanted = {name: tensor for name, tensor in wanted.items() if not name.startswith("fc.")}
        wanted["conv1.weight"] = wanted["conv1.weight"].sum(dim=1, keepdim=True)
        assert same(found, wanted)
        assert ssl_methods(config.finetune) == []  # nothing to pre-train
        assert cell_dir(config, Cell("dino", 2, 0, 0)).parent.name.count(f"_weights-{given.partition('.')[0]}-")
        check_start_weights(config, ())


def test_a_second_stage_starts_from_the_encoder_of_whole_images(trained, make_config, tmp_path):
    """The study has one pre-training of encoders, and none of crops."""
    method, own, _ = trained
    refine = {"zoom": 2, "crop": 64, "iterations": 2}
    config = make_config(own.experiment.output_dir, **settings(backbones=[method], refine=refine))
    start = second_start_path(config, method)
    found = start_encoder_unet(second_stage(config), method, 1, 3, start).encoder.state_dict()
    wanted = load_file(encoder_path(own, method))
    wanted["conv1.weight"] = wanted["conv1.weight"].sum(dim=1, keepdim=True)
    assert same(found, wanted)


def test_folder_of_imagenet_weights(make_config, tmp_path):
    """Each encoder takes torchvision's file from it; where it is missing, one line names it."""
    torch.manual_seed(5)
    reference = torchvision.models.ResNet(*LAYERS.values())
    torch.save(reference.state_dict(), tmp_path / HUB_FILES["resnet50"])
    config = make_config(tmp_path, **settings(encoder_weights={"imagenet": str(tmp_path)}))
    assert imagenet_weights(config) == tmp_path / "resnet50-0676ba61.pth"
    found = start_encoder_unet(config, "imagenet", 1, 3).encoder.state_dict()
    assert torch.equal(found["layer3.0.conv2.weight"], reference.layer3[0].conv2.weight)
    config = make_config(tmp_path, **settings(encoder_weights={"imagenet": str(tmp_path)}, encoder="vgg19"))
    assert f"finetune.encoder_weights.imagenet {tmp_path / HUB_FILES['vgg19']} does not exist" in error_of(
        imagenet_weights, config)


# --- the launcher ---


def test_study_from_images_to_scores(make_config, tmp_path, monkeypatch, capsys):
    """Pre-trains, fine-tunes from that encoder and scores; the second time nothing is done."""
    config = make_config(tmp_path, **settings(
        {"iterations": 2}, backbones=["mocov3"], iterations=1, validate_every=1, ema_decay=None,
        learning_rate={"mocov3": 1e-7}))
    prepare(config, ("ssl", "finetune"))
    assert "ssl  mocov3: 2 steps" in (plan := capsys.readouterr().out) and "optimiser steps to come: 3" in plan
    run_study(config, ("ssl", "finetune"))
    run_dir = cell_dir(config, Cell("mocov3", 2, 0, 0))
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert (metrics["backbone"], metrics["encoder"], metrics["images"]) == ("mocov3", "resnet50", 4)
    before, after = load_file(encoder_path(config, "mocov3")), load_file(run_dir / "best.safetensors")
    name = "layer2.0.conv2.weight"
    assert (before[name] - after[f"encoder.{name}"]).abs().max() < 1e-6
    assert not [*run_dir.glob("*.pt")] and (ssl_dir(config, "mocov3") / "last.pt").is_file()  # what is scored is done
    assert finetune_cell(config, Cell("mocov3", 2, 0, 0)) == run_dir and not [*run_dir.glob("*.pt")]
    monkeypatch.setattr(runner, "perform", None)
    capsys.readouterr()
    run_study(config, ("ssl", "finetune"))
    plan = capsys.readouterr().out
    assert "ssl  mocov3: done" in plan and "2 runs, 2 done" in plan and "optimiser steps to come: 0" in plan


def test_launcher_pretrains_what_is_needed(make_config, tmp_path, monkeypatch):
    """Only the backbones without a file of their own; the diffusion model only for ddpm."""
    asked = []

    def perform(run):
        asked.extend(run.arguments)
        write_atomically(encoder_path(run.config, *run.arguments), b"")

    monkeypatch.setattr(runner, "perform", perform)
    (tmp_path / "x.pth").touch()
    run_study(make_config(tmp_path, **settings(backbones=["scratch", "simclrv2", "dino", "mocov3"], encoder_weights={
        "dino": str(tmp_path / "x.pth")})), ("pretrain", "ssl"))
    assert asked == ["mocov3", "simclrv2"]


def test_stage_encoders(make_config, tmp_path, monkeypatch, capsys):
    """The paper's three encoders on ImageNet weights, whatever the study's own backbones are."""
    started = []
    monkeypatch.setattr(encoder_unet, "start_encoder_unet", lambda config, backbone, channels, landmarks: (
        started.append((config.finetune.encoder, backbone, imagenet_weights(config).name))))
    names = ("vgg19", "densenet161", "resnext50_32x4d")
    for name in names:
        (tmp_path / HUB_FILES[name]).touch()
    config = make_config(tmp_path, **settings(backbones=["ddpm"], encoder_weights={"imagenet": str(tmp_path)}))
    prepare(config, ("encoders",))
    assert started == [(name, "imagenet", HUB_FILES[name]) for name in names]
    studies = encoder_studies(config)
    assert [(study.finetune.encoder, study.finetune.backbones) for study in studies] == [
        (name, ("imagenet",)) for name in names]
    assert config.finetune.backbones == ("ddpm",) and config.finetune.encoder == "resnet50"
    plan, folders = capsys.readouterr().out, {cell_dir(study, Cell("imagenet", 2, 0, 0)) for study in studies}
    assert len(folders) == 3 and all(str(folder) in plan for folder in folders)
    assert "stages encoders" in plan and "optimiser steps to come: 12" in plan and "pretrain  " not in plan
    (tmp_path / HUB_FILES["densenet161"]).unlink()
    assert f"{HUB_FILES['densenet161']} does not exist" in error_of(prepare, config, ("encoders",))


def test_stage_encoders_is_refused(config_file, run_main):
    """In one line where the study's own backbones would do."""
    for change, message in ((("is_3d=true", "dataset.layout=folder", "dataset.image_size=[32,32,32]"), "2D baseline"),
                            (("dataset.image_size=[48,48]",), "levels need multiples of 32")):
        line = refused(run_main, LAUNCH, "--config", config_file(), "--stages", "encoders", "--set", *change)
        assert message in line


# --- collapse ---


def test_collapse_is_told(make_config, tmp_path, monkeypatch, capsys):
    """An encoder that answers alike to everything warns, an untrained one does not."""
    def dead(name, channels):
        encoder = build_encoder(name, channels)
        for parameter in encoder.parameters():
            parameter.data.zero_()
        return encoder

    for method, build in (("simclrv2", dead), ("dino", dead), ("simclrv2", build_encoder)):
        monkeypatch.setattr(ssl_baselines.train, "build_encoder", build)
        output = tmp_path / f"{method}_{build.__name__}"
        pretrain_encoder(make_config(output, **settings({"iterations": 1})), method)
        error = capsys.readouterr().err
        warnings = [line for line in error.splitlines() if line.startswith("warning: ")]
        if build is not dead:
            assert warnings == []
            continue
        assert len(warnings) == 1 and f"warning: {method} step 1: the encoder is collapsing" in warnings[0]
        assert "embedding_spread 0: all images get nearly one embedding" in warnings[0]
        assert ("teacher_information" in warnings[0]) is (method == "dino")
