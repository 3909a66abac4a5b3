"""ONNX files against torch, and the script beside them, without torch and this project, against `predict`."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from PIL import Image

from core.config.section import Augmentation
from landmarks_finetuning import Detector, run_onnx
from landmarks_finetuning.detectors.heatmap_unet import HeatmapUNet
from landmarks_finetuning.export import export, write_onnx
from landmarks_finetuning.heatmaps import decode
from landmarks_finetuning.inference import trained_detector
from landmarks_finetuning.predict import predict
from landmarks_finetuning.shape import SCALES, SCATTER, Shape
from landmarks_finetuning.uncertainty import Calibration, measure_spread
from tests.conftest import error_of

ALONE = "import sys; sys.modules.update(torch=None, core=None, landmarks_finetuning=None, scipy=None, cv2=None); " \
        "import runpy; script = sys.argv.pop(1); sys.argv[0] = script; runpy.run_path(script, run_name='__main__')"
CASES = {"two stages": ((), ()),  # name of a run: (settings, names of those averaged with it)
         "one stage": (("finetune.decoder=window_mass", "finetune.shape_prior=null"), ("one stage, another seed",))}


@pytest.fixture(scope="module")
def runs(one_and_two_stages):
    """Run folders by what they are. Not to be changed."""
    return one_and_two_stages


@pytest.fixture(scope="module")
def pictures(phantom, tmp_path_factory):
    """A grey, a cropped 16-bit and a coloured picture that lies on its side, as its EXIF tag says."""
    folder = tmp_path_factory.mktemp("pictures")
    with Image.open(sorted(phantom.rglob("*.jpg"))[0]) as image:
        grey = image.convert("L")
    grey.save(folder / "a.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16)[5:80, 3:70] * 200).save(folder / "b.png")
    coloured = np.stack([np.asarray(grey.rotate(90, expand=True)), np.zeros(grey.size, np.uint8),
                         np.full(grey.size, 90, np.uint8)], axis=2)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(coloured).save(folder / "c.jpg", exif=exif, quality=95)
    return folder


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """exported(name) -> the .onnx file of a run of CASES, made once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("exported") / "model.onnx"
            settings, others = CASES[name]
            export(runs[name], made[name], settings, [runs[other] for other in others])
        return made[name]

    return make


@pytest.mark.parametrize("name", CASES)
def test_the_script_alone_gives_the_points_of_predict(runs, exported, pictures, tmp_path, name):
    model, (settings, others) = exported(name), CASES[name]
    assert {path.name for path in model.parent.iterdir()} == {
        "model.onnx", "run_onnx.py", *(["model.fine.onnx"] if name == "two stages" else [])}
    images = sorted(pictures.iterdir())
    subprocess.run([sys.executable, "-c", ALONE, str(model.parent / "run_onnx.py"), str(model), *map(str, images),
                    "--out", str(tmp_path / "alone.csv")], cwd=tmp_path, check=True)
    alone = pd.read_csv(tmp_path / "alone.csv")
    table = pd.read_csv(predict(runs[name], [pictures], tmp_path / "out", False, settings,
                                [runs[other] for other in others]))
    assert list(alone.image) == list(table.image) and list(alone.landmark) == list(table.landmark)
    apart = np.abs(alone[["x", "y"]].to_numpy() - table[["x", "y"]].to_numpy()).max(axis=1)
    same = apart < 0.02
    assert same.mean() > 0.97 and apart.max() < 1.5  # of hardly trained networks: two pixels of a flat map may be level
    np.testing.assert_allclose(alone.expected_error[same], table.expected_error[same], rtol=2e-3)
    np.testing.assert_allclose(alone.radius90[same], table.radius90[same], rtol=5e-3, atol=0.1)
    found = run_onnx.Model(model)(run_onnx.read_picture(images[0]))
    wanted = Detector.load(runs[name], *[runs[other] for other in others], settings=settings)(images[0])
    np.testing.assert_allclose(found.confidence, wanted.confidence, atol=2e-3)
    assert (model.parent / "run_onnx.py").read_text() == Path(run_onnx.__file__).read_text()


def test_the_file_says_what_it_is(runs, exported):
    model = exported("two stages")
    onnx.checker.check_model(str(model), full_check=True)
    settings = {path.name: json.loads(onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map[
        "landmarks"]) for path in model.parent.glob("*.onnx")}
    first, fine = settings["model.onnx"], settings["model.fine.onnx"]
    assert (first["size"], first["second_stage"], first["spacing_mm"]) == ([48, 48], "model.fine.onnx", 2.5)
    assert first["shape_prior"]["width"] == 0.3 and first["names"] == list(Detector.load(runs["two stages"]).names)
    assert (fine["size"], fine["crop"], fine["sigma"]) == ([96, 96], [32, 32], 4) and fine["prior_px"] > 0
    assert "triangle filter" in fine["preprocessing"] and "softmax" in fine["postprocessing"]


def test_a_changed_bit_is_refused(exported, tmp_path):
    """Wherever it is, and in one line."""
    content = exported("one stage").read_bytes()
    model, rng = tmp_path / "model.onnx", np.random.default_rng(0)
    model.write_bytes(content)
    assert run_onnx.Model(model).names
    mark, last = content.index(run_onnx.CHECKSUM), len(content) - 1
    for place in (0, mark, mark + 3, mark + len(run_onnx.CHECKSUM), last, *rng.integers(0, last, 40)):
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        model.write_bytes(changed)
        with pytest.raises(ValueError, match="damaged"):
            run_onnx.Model(model)
    done = subprocess.run([sys.executable, run_onnx.__file__, str(model), "a.png"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1, f"error: {model}: damaged: its checksum is that of another content; export it again\n")


def test_a_network_with_attention_and_a_timestep(make_config, tmp_path):
    unet = make_config(tmp_path, dataset={"image_size": [16, 16]},
                       unet={"linear_attention": True, "full_attention_sizes": [8], "blocks_per_level": 1}).unet
    model = HeatmapUNet(unet, 1, 3, (16, 16))
    model.timestep = 3
    assert write_onnx(model, (16, 16), {}, tmp_path / "m.onnx") < 1e-4


def test_what_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("landmarks_finetuning.export.TOLERANCE", -1.0)
    assert "was not written: onnxruntime's outputs are up to" in error_of(
        write_onnx, torch.nn.Conv2d(1, 2, 3, padding=1), (8, 8), {}, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("said", "changes"), [
    ("is not in the script", {"finetune": {"decoder": "quadratic"}}),
    ("evaluation.views 3 would need", {"evaluation": {"views": 3}}),
    ("dataset.canvas_size an image is seen in overlapping windows",
     {"dataset": {"canvas_size": [64, 64]}, "finetune": {"sigma": 3.0}}),
])
def test_what_cannot_be_exported_is_one_line(finished_runs, tmp_path, said, changes):
    run = finished_runs(said.split()[0], **changes)
    assert said in error_of(export, run, tmp_path / "model.onnx") and not list(tmp_path.iterdir())


def test_other_kinds_and_volumes_are_refused(runs, tmp_path, run_main, monkeypatch):
    detector = trained_detector(runs["one stage"])
    monkeypatch.setattr("landmarks_finetuning.export.trained_detector", lambda *_: detector)
    detector.kind = detector.kind._replace(heatmaps=None)
    assert "no heatmaps but votes" in error_of(export, runs["one stage"], tmp_path / "m.onnx")
    detector.kind = trained_detector(runs["one stage"]).kind
    dataset = detector.config.dataset.model_copy(update={"image_size": (8, 8, 8)})
    detector.config = detector.config.model_copy(update={"dataset": dataset})
    assert "it is for volumes" in error_of(export, runs["one stage"], tmp_path / "m.onnx")
    assert "must end in .onnx" in error_of(export, runs["one stage"], tmp_path / "m.pt")
    monkeypatch.undo()
    status, _, said = run_main("landmarks_finetuning.export", tmp_path / "nothing", "--out", tmp_path / "m.onnx")
    assert status == 2 and "best.safetensors" in said
    monkeypatch.setattr("landmarks_finetuning.export.find_spec", lambda name: None)
    assert "pip install -r requirements-export.txt" in error_of(export, runs["one stage"], tmp_path / "m.onnx")


# --- the script's parts against the project's ---


@pytest.mark.parametrize("decoder", ["argmax", "local_expectation", "window_mass", "component_centroid"])
@pytest.mark.parametrize("loss", ["cross_entropy_pixels", "cross_entropy_channels"])
def test_decoders(decoder, loss):
    if (decoder, loss) == ("window_mass", "cross_entropy_channels"):
        pytest.skip("the softmax over landmarks says nothing of a window's mass: the config refuses the pair")
    outputs = 3 * torch.nn.functional.avg_pool2d(
        torch.randn((1, 6, 40, 33), generator=torch.Generator().manual_seed(1)), 3, 1, 1)
    points, sure = decode(outputs, decoder, loss, 2.3)
    read = run_onnx.read_maps(outputs[0].numpy(), {"loss": loss, "decoder": decoder, "sigma": 2.3})
    np.testing.assert_allclose(read.points, points[0], atol=1e-4)
    np.testing.assert_allclose(read.confidence, sure[0], atol=1e-5)


@pytest.mark.parametrize("modes", [0, 3])
def test_shapes(modes):
    """Fitted to points of which one is far off, turned further than the poses allow, and with a landmark unknown."""
    random = np.random.default_rng(0)
    base = random.normal(size=(9, 2)) * 20
    shapes = base + random.normal(size=(12, 9, 2)) * 2
    shapes[:, 4] = np.nan
    plain = Augmentation(probability=1.0, rotation_degrees=2.0, scale=0.02, translation=0.0)
    shape = Shape.of(shapes, plain, modes)
    stored = json.loads(json.dumps(shape.header()))
    prior = {"size": shape.size, "mean": stored["shape"], "modes": stored.get("shape_modes"),
             "poses": stored.get("shape_poses"), "scales": SCALES, "scatter": SCATTER}
    for degrees in (3.0, 60.0, -170.0):
        turn = np.deg2rad(degrees)
        points = 1.1 * base @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]] + random.normal(size=(9, 2))
        points[2] += 45
        sure = random.uniform(0.2, 1, 9)
        np.testing.assert_allclose(run_onnx.fit_shape(prior, points, sure), shape.fit(points, sure), atol=1e-6)
    assert (shape.modes is not None) == bool(modes)


def test_spreads_under_a_calibration():
    scores = torch.nn.functional.avg_pool2d(
        5 * torch.randn((1, 3, 30, 20), generator=torch.Generator().manual_seed(2)), 5, 1, 2)
    points = torch.tensor([[[4.2, 5.5], [20.0, 1.0], [15.0, 12.3]]], dtype=torch.float64)
    calibration = Calibration(np.array([0.5, 1.0, 3.0]), 1.2, 0.8, 4, 12)
    maps = np.array([[[2.0, 0, 0], [0, 3.0, 0]]])  # to stored pixels
    wanted = measure_spread(scores, points, maps, np.array([[0.5, 0.25]]), calibration)
    settings = {"loss": "cross_entropy_pixels", "names": "abc",
                "calibration": {"temperatures": [0.5, 1.0, 3.0], "error_scale": 1.2, "radius_scale": 0.8}}
    read = run_onnx.Read(points[0].numpy(), scores[0].double().numpy(), np.ones(3))
    found = run_onnx.measured(read, np.array([1.0, 0.75]), settings, slice(None))
    np.testing.assert_allclose(found.expected_error, wanted.expected_error[0], rtol=1e-5)
    np.testing.assert_allclose(found.radius90, wanted.radius90[0], rtol=0.02)
