"""Pre-trainings that are not finished, by their samples and their loss."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from landmarks_finetuning.report.build import build_report
from landmarks_finetuning.report.pretraining import (
    loss_fall,
    neighbour_correlation,
    noisy_samples,
    pretraining_sentence,
)
from tests.landmarks_finetuning.report.test_report import write_run

CONFIG = {"dataset": {"image_size": [32, 48]}, "ddpm": {"sample_count": 6}}
FLAT_LOG = [{"step": step, "loss": 1.0, "validation_loss": 0.5} for step in range(100, 1100, 100)]


def sheet(folder, smooth, iteration=800):
    """Six tiles of 32 x 48 in two rows of four; of the first `smooth` ones neighbours are alike."""
    rng, picture = np.random.default_rng(0), np.zeros((64, 192), dtype=np.uint8)
    for index in range(6):
        tile = rng.normal(size=(32, 48))
        tile = gaussian_filter(tile, 2) if index < smooth else tile
        row, column = divmod(index, 4)
        picture[row * 32 : row * 32 + 32, column * 48 : column * 48 + 48] = np.clip(
            128 + 50 * tile / tile.std(), 0, 255)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(folder / "samples" / f"samples_iter{iteration:06d}.png")


def test_correlation_of_neighbours_is_numpys():
    tile = gaussian_filter(np.random.default_rng(1).normal(size=(200, 200)), 1) * 100
    along = [np.corrcoef(tile[1:].ravel(), tile[:-1].ravel())[0, 1], np.corrcoef(tile[:, 1:].ravel(),
                                                                                 tile[:, :-1].ravel())[0, 1]]
    assert neighbour_correlation(tile) == pytest.approx(np.mean(along), abs=2e-3)
    assert np.isnan(neighbour_correlation(np.full((8, 8), 7)))


@pytest.mark.parametrize("smooth, found", [(6, None), (3, None), (2, (4, 6, 800)), (0, (6, 6, 800))])
def test_samples_that_are_noise(tmp_path, smooth, found):
    sheet(tmp_path, 0, iteration=400)  # the newest counts
    sheet(tmp_path, smooth)
    assert noisy_samples(tmp_path / "samples", CONFIG) == found
    assert noisy_samples(tmp_path / "samples", CONFIG | {"ddpm": {"sample_count": 12}}) is None  # not this picture


def test_loss_that_still_falls():
    assert loss_fall(FLAT_LOG) is None and loss_fall([]) is None
    falling = [line | {"validation_loss": 1 - line["step"] / 2000} for line in FLAT_LOG]
    kind, fall, steps = loss_fall(falling)  # 0.65 at 700, 0.5 at 1000
    assert (kind, steps) == ("validation", 1000) and fall == pytest.approx(1 - 0.5 / 0.65)


def test_a_noisy_training_loss_must_have_fallen_for_sure():
    rng = np.random.default_rng(0)
    spread = rng.normal(size=100)
    for slope, found in ((0.0, False), (0.5, True)):
        lines = [{"step": step + 1, "loss": 1 - slope * step / 100 + 0.1 * spread[step]} for step in range(100)]
        assert (loss_fall(lines) is not None) == found
    wild = [{"step": step + 1, "loss": 1 - 0.3 * step / 100 + 3 * spread[step]} for step in range(100)]
    assert loss_fall(wild) is None


def test_the_page_says_it_in_one_sentence(tmp_path):
    root = tmp_path / "study"
    write_run(root, "ddpm", 1, 0, [[1, 1]])
    config = root / "landmarks/ddpm/default/shots001_draw0_seed0/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | CONFIG))
    sheet(root / "ddpm", 0)
    falling = [line | {"validation_loss": 1 - line["step"] / 2000} for line in FLAT_LOG]
    (root / "ddpm" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in falling))
    sentence = ("The diffusion pre-training is bad: 6 of 6 images sampled at iteration 800 are noise (neighbouring "
                "pixels correlate by less than 0.5; in radiographs by about 0.9 or more), and its validation loss "
                "still fell by 23% over the last quarter of its 1000 steps; raise ddpm.iterations before you judge it.")
    assert pretraining_sentence(root / "ddpm", falling, CONFIG) == sentence
    assert build_report([root]).read_text(encoding="utf8").count(sentence) == 2  # by the verdict and by the samples
    sheet(root / "ddpm", 6)
    assert pretraining_sentence(root / "ddpm", falling, CONFIG).startswith("The diffusion pre-training was cut short: ")
    assert pretraining_sentence(root / "ddpm", FLAT_LOG, CONFIG) == ""
