"""Encoders in U-Nets: their weights against torchvision's own networks, and the study that trains and scores them."""

import hashlib
import json
import os
import re
import signal
from urllib.error import URLError

import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from torchvision.models.densenet import DenseNet

import core.networks.encoders
import core.networks.imagenet
from core.config.finetune import Finetune, LearningRates
from core.config.load import parse_config
from core.config.starts import BACKBONES
from core.networks.encoders import EncoderUNet, build_encoder_unet
from core.networks.imagenet import HUB, HUB_FILES
from core.networks.weights import load_weights, save_tensors, save_weights
from core.runs.identity import check_cell
from core.runs.places import Cell, cell_dir
from core.training.batches import BatchPlan
from core.training.loop import Training
from landmarks_finetuning.detectors.registry import DETECTORS, build_detector
from landmarks_finetuning.inference import TrainedDetector
from landmarks_finetuning.report.figures import COLOURS
from landmarks_finetuning.report.findings import display_name
from landmarks_finetuning.starts import imagenet_weights
from landmarks_finetuning.train import finetune_cell
from study.prepare import check_start_weights
from study.run import run_study
from tests.conftest import error_of

SMALL = {"num_init_features": 8, "growth_rate": 4, "block_config": (1, 1, 1, 1)}
FINETUNING, LAUNCH = "landmarks_finetuning.train", "study.launch"
SIZE = {"image_size": [64, 64]}
CELL = ("--shots", "2")


@pytest.fixture
def small(monkeypatch):
    """The library's densenet161 with one narrow layer in each block: the same code and names, quick."""
    held = smp.encoders.encoders["densenet161"]
    params = {**SMALL, "out_channels": [3, 8, 12, 10, 9, 8]}
    monkeypatch.setitem(smp.encoders.encoders, "densenet161", {**held, "params": params})


@pytest.fixture
def reference(small):
    """torchvision's network of the same shape, as it evaluates."""
    torch.manual_seed(7)
    network = DenseNet(**SMALL)
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if "var" in name else buffer.normal_()
    return network.eval()


@pytest.fixture
def weights(reference, tmp_path):
    """torchvision's state dict as a file."""
    torch.save(reference.state_dict(), tmp_path / "dense.pth")
    return tmp_path / "dense.pth"


def grey():
    return torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))


def same_features(model, reference):
    """Whether the encoder sees a grey image as torchvision's network sees it in all three colours."""
    model.eval()
    with torch.no_grad():
        first = model.encoder.features.conv0(grey()) - reference.features.conv0(grey().repeat(1, 3, 1, 1))
        last = model.encoder(grey())[-1] - reference.features(grey().repeat(1, 3, 1, 1))
    return bool(first.abs().max() < 1e-5 and last.abs().max() < 1e-4)


# --- the network ---


def test_network_and_names_are_the_librarys(small):
    model = EncoderUNet("densenet161", 1, 5).eval()
    theirs = smp.Unet("densenet161", encoder_weights=None, in_channels=1, classes=5, activation=None).eval()
    theirs.load_state_dict(model.state_dict())
    with torch.no_grad():
        outputs = model(grey())
        assert outputs.shape == (2, 5, 64, 64) and torch.equal(outputs, theirs(grey()))
    assert outputs.min() < 0  # raw: no activation


def test_every_encoder_is_known_to_both_libraries():
    names = {"densenet161": "DenseNet161", "vgg19": "VGG19", "resnext50_32x4d": "ResNeXt50_32X4D",
             "resnet50": "ResNet50"}
    assert names.keys() == HUB_FILES.keys() and HUB_FILES.keys() <= smp.encoders.encoders.keys()
    for name, cased in names.items():
        published = torchvision.models.get_weight(f"{cased}_Weights.IMAGENET1K_V1")
        assert published.url == f"{HUB}/{HUB_FILES[name]}"
        assert Finetune(encoder=name).encoder == name
    assert BACKBONES.keys() == LearningRates.model_fields.keys()
    assert {*BACKBONES.values(), "local_networks"} == DETECTORS.keys()


def test_unknown_encoder():
    assert 'encoder "densenet16" is unknown (did you mean "densenet161"?); choose from densenet161, vgg19' in error_of(
        EncoderUNet, "densenet16", 1, 5)


# --- weights from files ---


def test_torchvision_weights(reference, weights):
    assert same_features(build_encoder_unet("densenet161", 1, 3, weights), reference)
    assert not same_features(build_encoder_unet("densenet161", 1, 3), reference)


def test_bare_features_old_names_and_one_channel(reference, weights, tmp_path):
    """Published files: features.* alone; torchvision's of 2017: norm.1 for norm1, and no counters of batches."""
    state = {name: tensor for name, tensor in reference.state_dict().items() if name.startswith("features.")}
    old = {re.sub(r"(norm|conv)([12])\.", r"\1.\2.", name) if "denselayer" in name else name: tensor
           for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    one = {**state, "features.conv0.weight": state["features.conv0.weight"].sum(1, keepdim=True)}
    for content in (state, old, one):
        torch.save(content, tmp_path / "x.pth")
        assert same_features(build_encoder_unet("densenet161", 1, 3, tmp_path / "x.pth"), reference)


def test_resnet_weights(tmp_path, monkeypatch):
    held = smp.encoders.encoders["resnet50"]
    params = {"block": torchvision.models.resnet.BasicBlock, "layers": [1, 1, 1, 1],
              "out_channels": [3, 64, 64, 128, 256, 512]}
    monkeypatch.setitem(smp.encoders.encoders, "resnet50", {**held, "params": params})
    reference = torchvision.models.ResNet(params["block"], params["layers"]).eval()
    torch.save(reference.state_dict(), tmp_path / "x.pth")
    model, seen = build_encoder_unet("resnet50", 1, 3, tmp_path / "x.pth").eval(), []
    reference.layer4.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        reference(grey().repeat(1, 3, 1, 1))
        torch.testing.assert_close(model.encoder(grey())[-1], seen[0], rtol=1e-5, atol=1e-5)


def test_our_own_encoder_file(small, tmp_path):
    trained, path = EncoderUNet("densenet161", 1, 1), tmp_path / "encoder.safetensors"
    header = {"kind": "encoder", "network": "encoder", "encoder": "densenet161", "channels": 1}
    save_tensors(path, trained.encoder.state_dict(), {}, header)
    model = build_encoder_unet("densenet161", 1, 3, path)
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.parameters(), trained.encoder.parameters(), strict=True))
    assert f"{path} holds encoder densenet161, finetune.encoder is vgg19" in error_of(
        core.networks.encoders.read_encoder, path, "vgg19")
    assert f'{path} holds a network of kind "encoder", where unet is needed' in error_of(load_weights, path)


def test_mismatch_lists_names(reference, weights, tmp_path):
    state = reference.state_dict()
    state["features.conv0.weight"] = state["features.conv0.weight"][:, :2]
    state = {name: tensor for name, tensor in state.items() if "denseblock4" not in name} | {"extra": torch.zeros(1)}
    torch.save(state, tmp_path / "x.pth")
    line = error_of(build_encoder_unet, "densenet161", 1, 3, tmp_path / "x.pth")
    assert f"{tmp_path / 'x.pth'} does not fit finetune.encoder densenet161: of 64 tensors 10 missing (features.dense" \
           "block4.denselayer1.norm1.weight, " in line
    assert ", ...); 1 unexpected (extra); 1 of another shape (features.conv0.weight [8, 2, 7, 7] instead of " \
           "[8, 1, 7, 7])" in line
    assert line.count("denseblock4") == 3


@pytest.mark.parametrize("content, message", [
    ({"state_dict": {}, "epoch": 3}, "holds a dict of ['epoch', 'state_dict'], expected the state dict of a"),
    ([1], "holds list, expected the state dict of a torchvision densenet161"), ({}, "holds a dict of [], expected"),
])  # fmt: skip
def test_file_that_is_no_state_dict(small, tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    assert f"{tmp_path / 'x.pth'} {message}" in error_of(build_encoder_unet, "densenet161", 1, 3, tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(b"cut")
    assert "x.pth is " in error_of(build_encoder_unet, "densenet161", 1, 3, tmp_path / "x.pth")


# --- weights from the network ---


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache and a folder in place of the server; hub(content) puts densenet161's file there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "server").mkdir()
    monkeypatch.setattr(core.networks.imagenet, "HUB", (tmp_path / "server").as_uri())

    def publish(content, name="dense-{}.pth"):
        file = name.format(hashlib.sha256(content).hexdigest()[:8])
        (tmp_path / "server" / file).write_bytes(content)
        monkeypatch.setitem(core.networks.imagenet.HUB_FILES, "densenet161", file)
        return tmp_path / "cache/hub/checkpoints" / file

    return publish


def test_weights_are_fetched_once(hub, reference, weights, make_config, tmp_path, monkeypatch):
    kept = hub(weights.read_bytes())
    config = make_config(tmp_path, dataset=SIZE)
    assert imagenet_weights(config) == kept and kept.read_bytes() == weights.read_bytes()
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    assert same_features(build_detector(config, "imagenet", 1, 3), reference)


def test_no_network_is_one_line_at_once(hub, make_config, tmp_path, monkeypatch):
    config = make_config(tmp_path, dataset=SIZE)
    line = error_of(imagenet_weights, config)  # no such file on the server
    assert "ImageNet weights cannot be downloaded" in line
    assert f"fetch {core.networks.imagenet.HUB}/densenet161-8d451a50.pth where there is a network and set " \
           "finetune.encoder_weights.imagenet to that file" in line

    def unreachable(*_, **__):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    assert "(<urlopen error no route>)" in error_of(imagenet_weights, config)


def test_damaged_download_is_not_kept(hub, make_config, tmp_path):
    config = make_config(tmp_path, dataset=SIZE)
    kept = hub(b"half a file", "dense-0123abcd.pth")
    assert 'invalid hash value (expected "0123abcd"' in error_of(imagenet_weights, config)
    assert list(kept.parent.iterdir()) == []


# --- detectors ---


@pytest.mark.parametrize("backbone", ["random", "scratch"])
def test_detector_is_rebuilt_from_its_header(small, make_config, tmp_path, backbone):
    config = make_config(tmp_path, dataset=SIZE)
    torch.manual_seed(3)
    model, path = build_detector(config, backbone, 1, 4), tmp_path / "best.safetensors"
    model(grey())  # moves the statistics of batch normalisation
    header = {"kind": "detector", **model.identity, "landmark_names": ["a", "b", "c", "d"]}
    save_weights(path, model, config.plain(), header)
    rebuilt = TrainedDetector(path)
    with torch.no_grad():
        assert torch.equal(rebuilt.model(grey()), model.eval()(grey()))
    if backbone == "random":
        assert 'of kind "encoder_unet", where unet is needed' in error_of(load_weights, path)
    save_weights(path, model, config.plain(), {**header, "network": "transformer"})
    assert 'of kind "transformer", where unet or encoder_unet or ' in error_of(TrainedDetector, path)
    if backbone == "scratch":  # files of before there was a choice
        save_weights(path, model, config.plain(), {k: v for k, v in header.items() if k != "network"})
        assert torch.equal(TrainedDetector(path).model(grey()), rebuilt.model(grey()))


def test_average_holds_the_statistics_of_batch_normalisation(small, make_config, tmp_path):
    """After one step at decay 0.5 each averaged tensor is the middle between what it was and what it is."""
    config = make_config(tmp_path, dataset=SIZE, finetune={"backbones": ["random"], "iterations": 1,
                                                           "save_every": 1, "validate_every": 1})
    finetune_cell(config, Cell("random", 2, 0, 0))
    run_dir = cell_dir(config, Cell("random", 2, 0, 0))
    torch.manual_seed(0)
    before = build_detector(config, "random", 1, 19).state_dict()
    after = torch.load(run_dir / "last.pt", weights_only=True)
    moved = [name for name, tensor in before.items() if tensor.is_floating_point()
             and not torch.equal(tensor, after["model"][name])]
    assert any("running_mean" in name for name in moved) and any("conv0" in name for name in moved)
    for name in moved:
        torch.testing.assert_close(after["ema"][name], (before[name] + after["model"][name]) / 2)


def test_smallest_batch():
    for sampling, drop_last, count, size in (("stream", False, 1, 4), ("epoch", False, 9, 1), ("epoch", True, 9, 4),
                                             ("epoch", False, 8, 4), ("epoch", False, 3, 3), ("epoch", True, 3, 3)):
        plan = BatchPlan(count, 4, 2, sampling, drop_last, 0)
        batches = [len(batch) for step in range(2 * plan.steps_per_epoch) for batch in plan.groups(step)]
        assert plan.smallest_batch == min(batches) == size


# --- the study ---


def test_study_of_encoders(small, weights, make_config, tmp_path):
    """No pre-training; both cells are trained and scored; imagenet starts from the file, random does not."""
    config = make_config(tmp_path, dataset=SIZE, finetune={
        "backbones": ["imagenet", "random"], "encoder_weights": {"imagenet": str(weights)}, "iterations": 1,
        "validate_every": 1, "ema_decay": None, "learning_rate": {"imagenet": 1e-7, "random": 1e-7}})
    run_study(config, ("pretrain", "finetune"))
    assert not (tmp_path / "tiny/ddpm").exists()
    kept = torch.load(weights, weights_only=True)["features.denseblock2.denselayer1.conv2.weight"]
    for backbone, near in (("imagenet", True), ("random", False)):
        run_dir = cell_dir(config, Cell(backbone, 2, 0, 0))
        assert ("weights-dense" in run_dir.parent.name) is near
        metrics = json.loads((run_dir / "metrics.json").read_text())
        assert (metrics["backbone"], metrics["encoder"], metrics["images"]) == (backbone, "densenet161", 4)
        held = load_weights(run_dir / "best.safetensors", ("encoder_unet",))
        assert held.header["network"] == "encoder_unet" and held.out_channels == 19
        found = held.tensors["encoder.features.denseblock2.denselayer1.conv2.weight"]
        assert bool((found - kept).abs().max() < 1e-5) is near
    weights.unlink()
    check_start_weights(config, ())  # nothing is left to train


def test_every_backbone_has_a_name_and_a_colour():
    assert {display_name(backbone) for backbone in BACKBONES} == {"Diffusion pre-training", "From scratch", "ImageNet",
                                                                  "Untrained encoder", "MoCoV3", "SimCLRv2", "DINO",
                                                                  "GU2Net", "Global-to-local"}
    assert BACKBONES.keys() <= COLOURS.keys() and len(set(COLOURS.values())) == len(COLOURS)


def test_learning_rate_of_one_backbone(small, make_values, tmp_path):
    values = make_values(tmp_path, dataset=SIZE, finetune={"learning_rate": {"imagenet": 3e-4}})
    rates = parse_config(values, "x").finetune.learning_rate
    assert (rates.ddpm, rates.scratch, rates.imagenet, rates.random) == (1e-4, 1e-4, 3e-4, 1e-3)


def test_resumed_run_equals_an_uninterrupted_one(small, config_file, run_main, tmp_path, monkeypatch):
    settings = {"dataset": SIZE, "finetune": {"iterations": 4, "validate_every": 1}}
    whole = config_file("whole.json", **settings, experiment={"name": "whole"})
    broken = config_file("broken.json", **settings, experiment={"name": "broken"})
    assert run_main(FINETUNING, "--config", whole, "--backbone", "random", *CELL)[0] == 0
    step = Training.optimiser_step

    def struck(self):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "optimiser_step", struck)
        status, _, error = run_main(FINETUNING, "--config", broken, "--backbone", "random", *CELL)
    assert status == 130 and "saved at step 2 of 4" in error
    assert run_main(FINETUNING, "--config", broken, "--backbone", "random", *CELL)[0] == 0
    folders = [next((tmp_path / "runs").glob(f"{run}/landmarks/random/*/*")) for run in ("whole", "broken")]
    one, other = (torch.load(folder / "last.pt", weights_only=True) for folder in folders)
    pairs = [(one[part][name], other[part][name]) for part in ("model", "ema") for name in one[part]]
    one, other = (load_weights(folder / "best.safetensors", ("encoder_unet",)).tensors for folder in folders)
    pairs += [(one[name], other[name]) for name in one]
    assert len(pairs) > 150 and all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("arguments, message", [
    (("--backbone", "random"), "dataset.image_size [48, 48]: random's encoder's 6 levels need multiples of 32; nearest "
                               "to 48: 32 or 64"),
    (("--backbone", "random", "--encoder", "vgg"), "finetune.encoder: input should be 'densenet161', 'vgg19', "),
    (("--backbone", "scratch", "--encoder", "vgg19"), '--encoder is for backbones with an encoder; "scratch" is the'),
    (("--backbone", "random", "--set", "is_3d=true", "dataset.layout=folder", "dataset.image_size=[32,32,32]"),
     'backbone "random" is a 2D baseline; with is_3d choose from ddpm, scratch'),
    (("--backbone", "random", "--set", "dataset.image_size=[32,32]", "finetune.sampling=epoch",
      "finetune.batch_size=1"),
     'backbone "random" cannot be trained on one image of [32, 32] pixels at a time'),
    (("--backbone", "imagenet", "--set", "dataset.image_size=[64,64]", "finetune.encoder_weights.imagenet=gone.pth"),
     "finetune.encoder_weights.imagenet gone.pth does not exist"),
])  # fmt: skip
def test_refused_in_one_line(small, config_file, run_main, arguments, message):
    status, _, error = run_main(FINETUNING, "--config", config_file(), *CELL, *arguments)
    assert status == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


def test_missing_weights_are_told_before_images_are_read(make_config, tmp_path, monkeypatch):
    config = make_config(tmp_path, dataset=SIZE, finetune={"encoder_weights": {"imagenet": "gone.pth"}})
    monkeypatch.setattr("landmarks_finetuning.stages.load_images", None)
    assert "gone.pth does not exist" in error_of(finetune_cell, config, Cell("imagenet", 2, 0, 0))


def test_launcher_refuses_before_any_training(small, config_file, run_main, tmp_path):
    path = config_file(dataset=SIZE, finetune={"backbones": ["ddpm", "imagenet"]})
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "x.pth")
    for name, message in (("gone.pth", "gone.pth does not exist"), ("x.pth", "1 unexpected (conv.weight)")):
        for more in ((), ("--dry-run",)):
            status, _, error = run_main(LAUNCH, "--config", path, "--set",
                                        f"finetune.encoder_weights.imagenet={tmp_path / name}", *more)
            assert status == 2 and message in error and not (tmp_path / "runs/tiny").exists()


def test_settings_that_count_for_a_cell(small, make_config, tmp_path):
    """The diffusion U-Net's shape is nothing to an encoder; its file is, to imagenet alone."""
    first = make_config(tmp_path, dataset=SIZE)
    for backbone in ("imagenet", "random"):
        folder = cell_dir(first, Cell(backbone, 2, 0, 0))
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({**first.plain(), "finetune": {
            **first.plain()["finetune"], "encoder_weights": {"imagenet": "other/x.pth"}}}))
        check = make_config(tmp_path, dataset=SIZE, unet={"norm_groups": 2}, finetune={"learning_rate": {"ddpm": 0.5}})
        if backbone == "random":
            check_cell(check, Cell(backbone, 2, 0, 0))
        else:
            assert 'finetune.encoder_weights.imagenet = "other/x.pth", now it is null;' in error_of(
                check_cell, check, Cell(backbone, 2, 0, 0))
