"""Averages over views and networks against detectors whose answer is known in closed form."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from core.config.section import Augmentation
from core.data.augment import move_points
from core.formats.images import IMAGE_SUFFIXES
from core.networks.weights import load_weights, save_tensors
from core.runs.places import Cell
from landmarks_finetuning import ensemble
from landmarks_finetuning.ensemble import MeanOutputs, over_views
from landmarks_finetuning.heatmaps import decode
from landmarks_finetuning.inference import TrainedDetector, trained_detector
from landmarks_finetuning.train import finetune_cell
from tests.conftest import error_of
from tests.core.data.test_augment import blobs, centroids

SIZES = pytest.mark.parametrize("size", [(48, 56), (28, 32, 24)], ids=["2d", "3d"])


def parabola(points, size):
    """(B, D) -> (B, 1, *size) log of a Gaussian of 2 pixels there."""
    pixels = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"), dim=-1)
    return (-((pixels - points[(slice(None), *(None,) * len(size))]) ** 2).sum(dim=-1) / 8)[:, None].float()


def places(count, size):
    fraction = torch.rand(count, len(size), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (0.35 + 0.3 * fraction) * torch.tensor(size)


@SIZES
def test_one_view_is_the_image_itself(size):
    inputs, outputs = torch.rand(2, 1, *size), torch.rand(2, 3, *size)
    assert over_views(lambda x: outputs if x is inputs else None, inputs, 1) is outputs


@SIZES
def test_views_of_a_detector_that_moves_with_the_image_agree(size):
    """It sees the blob's centre of mass in every view; back in the image's frame all say the same."""
    centres, seen = places(4, size), []

    def outputs_of(inputs):
        seen.append(inputs)
        return parabola(centroids(inputs), size)

    outputs = over_views(outputs_of, blobs(centres, size), 6)
    assert len(seen) == 6 and outputs.shape == (4, 1, *size)
    moves = torch.stack([(centroids(view) - centres).norm(dim=1) for view in seen])
    assert (moves[0] < 1e-3).all() and (moves[1:] > 0.1).any(dim=0).all()
    points, _ = decode(outputs, "quadratic", "cross_entropy_pixels", 2.0)
    assert (points[:, 0] - centres).abs().max() < 0.03
    assert seen[1].sum() != seen[2].sum() and seen[1].max() <= 1  # and their intensities differ


@SIZES
def test_the_maps_are_averaged(size, monkeypatch):
    """With views that are only shifted by whole pixels: the mean of a map that is known pixel by pixel."""
    shifts = [(2, -1, 1)[: len(size)], (-1, 0, 2)[: len(size)]]
    affines = torch.stack([torch.cat((torch.eye(len(size)), torch.tensor(shift)[:, None]), dim=1).double()
                           for shift in shifts])
    monkeypatch.setattr(ensemble, "draw_affines", lambda *_: affines)
    monkeypatch.setattr(ensemble, "GAMMA", 0.0)
    inputs = torch.rand(2, 1, *size)
    fixed = torch.rand(1, 1, *size)  # what the detector says whatever it sees, beside the image
    outputs = over_views(lambda x: 3 * x + fixed, inputs, 3)
    inner = (slice(None), slice(None), *(slice(3, n - 3) for n in size))
    moved = [fixed.roll([-step for step in shift], dims=tuple(range(2, len(size) + 2))) for shift in shifts]
    expected = 3 * inputs + (fixed + moved[0] + moved[1]) / 3
    torch.testing.assert_close(outputs[inner], expected[inner], rtol=0, atol=2e-4)


def test_errors_that_views_do_not_share_are_averaged_out():
    """A detector that answers in whole pixels of what it sees."""
    size = (64, 64)
    centres = places(60, size)
    pictures = blobs(centres, size)

    def errors(count):
        outputs = over_views(lambda x: parabola(centroids(x).round(), size), pictures, count)
        return (decode(outputs, "quadratic", "cross_entropy_pixels", 2.0)[0][:, 0] - centres).norm(dim=1).mean()

    assert errors(12) < 0.55 * errors(1)


@SIZES
def test_an_image_is_seen_alike_in_any_batch(size):
    inputs = torch.rand(3, 1, *size)
    together = over_views(lambda x: x * 2, inputs, 4)
    torch.testing.assert_close(over_views(lambda x: x * 2, inputs[1:2], 4)[0], together[1], rtol=0, atol=1e-6)


def test_views_have_other_intensities():
    """0.5 to the power e^g with |g| up to 0.1, another for each view; the image itself as it is."""
    seen = []
    over_views(lambda x: seen.append(x) or x, torch.full((1, 1, 16, 16), 0.5), 8)
    assert max(view.std() for view in seen) < 1e-6
    greys = [view[0, 0, 0, 0].item() for view in seen]
    assert greys[0] == 0.5 and len(set(greys)) == 8
    assert all(0.5 ** np.exp(0.1) <= grey <= 0.5 ** np.exp(-0.1) for grey in greys) and np.ptp(greys) > 0.03


def test_views_are_small_moves():
    corners = torch.tensor([[[0.0, 0], [0, 255], [255, 0], [255, 255]]]).double()
    assert isinstance(ensemble.VIEWS, Augmentation)
    affines = ensemble.draw_affines(50, (256, 256), ensemble.VIEWS, torch.Generator().manual_seed(0))
    moves = (move_points(corners.expand(50, -1, -1), affines) - corners).norm(dim=2)
    assert 1 < moves.mean() < 8 and moves.max() < 20


def test_the_mean_of_networks():
    first, second = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1)
    x = torch.rand(2, 1, 5, 5)
    torch.testing.assert_close(MeanOutputs([first, second])(x), (first(x) + second(x)) / 2)


@pytest.fixture(scope="module")
def seeds(make_config, tmp_path_factory):
    """Two runs that differ in their seed, and one with another sigma."""
    folder = tmp_path_factory.mktemp("seeds")

    def run(seed, **finetune):
        config = make_config(folder, finetune={"backbones": ["scratch"], **finetune})
        return finetune_cell(config, Cell("scratch", 2, 0, seed))

    return [run(0), run(1), run(0, sigma=4.0)]


def test_prediction_with_views_and_other_seeds(seeds, run_main, tmp_path, phantom):
    """The command's points are those of the mean of the outputs, computed here; the order does not matter."""
    image = next(path for path in sorted(phantom.rglob("*")) if path.suffix in IMAGE_SUFFIXES)

    def command(*arguments):
        status, _, said = run_main("landmarks_finetuning.predict", *arguments, "--no-overlays")
        assert status == 0, said
        return pd.read_csv(tmp_path / "out" / "predictions.csv")[["x", "y"]].to_numpy()

    out = ("--out", tmp_path / "out")
    alone, other = (command(run_dir, image, *out) for run_dir in seeds[:2])
    both = command(seeds[0], image, *out, "--with", seeds[1])
    assert np.abs(both - alone).max() > 0.01 and np.abs(both - other).max() > 0.01
    np.testing.assert_allclose(command(seeds[1], image, *out, "--with", seeds[0]), both, atol=0.02)
    np.testing.assert_array_equal(command(seeds[0], image, *out, "--set", "evaluation.views=1"), alone)
    assert np.abs(command(seeds[0], image, *out, "--set", "evaluation.views=3") - alone).max() > 0.001
    np.testing.assert_allclose(command(seeds[0], image, *out, "--with", seeds[0]), alone, atol=0.001)
    status, _, said = run_main("landmarks_finetuning.predict", seeds[0], image, *out, "--with", seeds[2])
    assert status == 2 and "cannot be averaged with" in said and "finetune.sigma is 4.0 there and 20.0 here" in said


def test_the_model_is_the_mean(seeds):
    paths = [run_dir / "best.safetensors" for run_dir in seeds[:2]]
    first, second = map(TrainedDetector, paths)
    x = torch.rand(1, 1, *first.config.dataset.image_size)
    with torch.no_grad():
        expected = (first.model(x) + second.model(x)) / 2
        torch.testing.assert_close(trained_detector(seeds[0], (), [seeds[1]]).model(x), expected)
    assert "does not exist" in error_of(trained_detector, seeds[0], (), [seeds[1] / "none"])


def test_a_crop_that_nothing_is_cut_to_does_not_matter(seeds, tmp_path):
    """As of runs with one stage that were trained when finetune.refine.crop had another default."""
    weights = load_weights(seeds[1] / "best.safetensors")
    config = json.loads(json.dumps(weights.header["config"]))
    assert config["finetune"]["refine"]["zoom"] is None
    config["finetune"]["refine"]["crop"] = 64
    save_tensors(tmp_path / "best.safetensors", weights.tensors, config, weights.header | {"config": config})
    TrainedDetector(seeds[0] / "best.safetensors", others=[TrainedDetector(tmp_path / "best.safetensors")])


def test_a_score_of_several_runs_has_a_folder_of_its_own(seeds, run_main):
    status, out, said = run_main("landmarks_finetuning.evaluate", seeds[0], "--with", seeds[1])
    assert status == 0, said
    folder = seeds[0] / "evaluations" / f"with-{seeds[1].parent.name}-{seeds[1].name}"
    assert str(folder) in out and not (seeds[0] / "metrics.json").exists()
    assert json.loads((folder / "metrics.json").read_text())["averaged_with"] == [str(seeds[1])]
