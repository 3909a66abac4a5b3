"""The second stage on images whose landmarks are bright dots, with a network that sees just brightness."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from core.config.load import parse_config
from core.config.second_stage import second_stage
from core.data.dataset import load_images
from core.data.records import Record
from landmarks_finetuning.calibration import calibrate
from landmarks_finetuning.detectors.registry import DETECTORS
from landmarks_finetuning.predictions import find_landmarks
from landmarks_finetuning.refinement import CropMaps, decode_crops, first_errors, guessed_errors, refine, run_crops
from landmarks_finetuning.running import run_batched
from landmarks_finetuning.uncertainty import Calibration

SHAPE = (200, 160)  # stored pixels
DOTS = np.array([[60.0, 50.0], [121.0, 98.0], [8.0, 150.0]])  # (y, x); the last one near a corner


class Brightness(nn.Module):
    """(B, 1, *size) -> (B, 3, *size): the more the brighter, alike for every landmark."""

    def forward(self, x):
        return 40 * x.expand(-1, 3, *x.shape[2:])


def blurred(dots):
    rows, columns = np.indices(SHAPE)
    picture = sum(np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 8) for y, x in dots)
    return np.rint(255 * picture.clip(0, 1)).astype(np.uint8)


@pytest.fixture
def dotted(tmp_path):
    """(config, records) of two images with the same dots; the second one's are 3 pixels lower."""
    records = []
    for number in range(2):
        points = DOTS + [3.0 * number, 0]
        Image.fromarray(blurred(points)).save(tmp_path / f"{number}.png")
        records.append(Record(str(number), tmp_path / f"{number}.png", points, (0.5, 0.25)))
    config = parse_config({"dataset": {"image_size": [50, 40], "cache_dir": str(tmp_path / "cache")},
                           "unet": {"channel_multipliers": [1, 2]}, "experiment": {"device": "cpu"},
                           "evaluation": {"batch_size": 1},
                           "finetune": {"refine": {"zoom": 4.0, "crop": 32, "prior": None}}}, "c.json")  # fmt: skip
    return config, records


def test_answers_move_to_the_dots(dotted):
    config, records = dotted
    truth = np.stack([record.landmarks for record in records])
    answers = truth + np.array([[5.0, -4.0], [-6.0, 3.0], [4.0, 6.0]])
    answers[1, 0] = np.nan
    points, expected, radii, confidence = refine(Brightness(), records, answers, 1.0, config)
    assert np.isnan(points[1, 0]).all() and all(np.isnan(each[1, 0]) for each in (expected, radii, confidence))
    there = np.isfinite(answers)
    assert np.abs(points - truth)[there].max() < 0.1 < 3 < np.abs(answers - truth)[there].max()


def test_the_first_answer_decides_between_two_dots(dotted):
    """Half way between dots 10 pixels apart the brighter one wins; a narrow prior takes the nearer one."""
    config, records = dotted
    rows = blurred([DOTS[0]]).astype(int) * 0.9 + blurred([DOTS[0] + [0, 14]])
    Image.fromarray(rows.clip(0, 255).astype(np.uint8)).save(records[0].image)
    answer = np.full((1, 3, 2), np.nan)
    answer[0, 0] = DOTS[0] + [0, 3]
    far = refine(Brightness(), records[:1], answer, 2.0, config).points
    assert np.abs(far[0, 0] - DOTS[0] - [0, 14]).max() < 0.5
    weighing = config.finetune.refine.model_copy(update={"prior": 1.5})  # 3 pixels of the crop
    config = config.model_copy(update={"finetune": config.finetune.model_copy(update={"refine": weighing})})
    near = refine(Brightness(), records[:1], answer, 2.0, config).points
    assert np.abs(near[0, 0] - DOTS[0]).max() < 0.5


def test_each_crop_knows_where_it_lies(dotted):
    config, records = dotted
    second = second_stage(config)
    images = load_images(records, second.dataset)
    answers = np.stack([record.landmarks for record in records]) + 1.7
    for crops in run_crops(Brightness(), images, answers, second):
        for output, image, landmark, maps in zip(crops.outputs, crops.image, crops.landmark, crops.maps, strict=True):
            place = maps[:, :2] @ answers[image, landmark] + maps[:, 2]
            assert np.abs(place - 15.5).max() <= 0.5  # the middle of 32 pixels, to the nearest whole one
            dot = maps[:, :2] @ records[image].landmarks[landmark] + maps[:, 2]
            row, column = np.unravel_index(output[0].argmax().item(), output.shape[1:])
            assert np.abs(dot - [row, column]).max() <= 0.5
        points = decode_crops(crops, 1.0, config).points
        assert points.shape == (len(crops.image), 1, 2)


@pytest.mark.parametrize(("away", "expected"), [(4, 12.0), (5, 10.0)])
def test_an_answer_is_the_mean_about_its_peak(dotted, away, expected):
    """Mass of 0.5 + and of 0.5 - four pixels further: half way between, 12; five further does not count."""
    config, _ = dotted
    outputs = torch.full((1, 1, 32, 32), -100.0)
    outputs[0, 0, 10, 20], outputs[0, 0, 10 + away, 20] = 1e-4, 0.0
    crops = CropMaps(np.zeros(1, int), np.zeros(1, int), outputs, np.eye(2, 3)[None], np.zeros((1, 1, 2)))
    assert decode_crops(crops, 1.0, config).points[0, 0] == pytest.approx([expected, 20], abs=1e-3)


def test_crops_measure_in_mm_at_their_landmarks_temperature(dotted):
    config, records = dotted
    answers = np.stack([record.landmarks for record in records])

    def expected(temperatures, scale=1.0, given=records):
        calibration = Calibration(np.array(temperatures, dtype=float), scale, 1.0, 1, 1)
        return refine(Brightness(), given, answers, 1.0, config, calibration).expected_error

    each = expected([2, 4, 8])
    for n, heat in enumerate((2, 4, 8)):
        np.testing.assert_allclose(each[:, n], expected([heat] * 3)[:, n], rtol=1e-6)
    np.testing.assert_allclose(refine(Brightness(), records, answers, 1.0, config)[1], expected([1] * 3))
    larger = [replace(record, spacing=(1.0, 0.5)) for record in records]
    np.testing.assert_allclose(expected([2, 4, 8], given=larger), 2 * each, rtol=1e-5)
    np.testing.assert_allclose(expected([2, 4, 8], scale=3.0), 3 * each, rtol=1e-6)


def test_two_stages_are_calibrated_on_the_maps_of_the_second(dotted):
    """On their own validation images the mean expected error is the mean error; a truth outside a crop counts as one.

    Its map does not know of it, so that temperatures are those of the other landmarks.
    """
    config, records = dotted
    wrong = [replace(record, landmarks=record.landmarks + [[0.5, 1], [1, -0.5], [0, 40]]) for record in records]
    images = load_images(wrong, config.dataset)

    def outputs(images, chosen=None):
        return run_batched(lambda inputs: 40 * inputs.expand(-1, 3, -1, -1), images, config.evaluation,
                           torch.device("cpu"), "auto", chosen)

    second = SimpleNamespace(model=Brightness(), header={"spread_pixels": 1.0})
    detector = SimpleNamespace(config=config, recipe=config, kind=DETECTORS["unet"], outputs=outputs,
                               landmark_names=["a", "b", "c"], shape=None, sigma=0.5,
                               second=second)
    errors, calibration = calibrate(detector, images, "argmax")
    again = find_landmarks(detector, images, "argmax", calibration=calibration)
    assert calibration.landmarks == 6 and again.expected_error.mean() == pytest.approx(errors.mean())
    assert (errors <= again.radius90 + 1e-9).all()  # of fewer than nine labels the largest ratio


def test_errors_of_the_first_stage_in_pixels_of_the_second(dotted):
    config, records = dotted
    images = load_images(records, second_stage(config).dataset)  # 200 x 160: stored pixels as they are
    answers = np.stack([record.landmarks for record in records])
    answers[0, 0] += [2.0, -3.0]
    answers[0, 1] += [0.0, 70.0]  # cut off at 0.4 of 32
    answers[1, 2] = np.nan
    expected = np.zeros((5, 2))
    expected[0], expected[1] = (2.0, -3.0), (0.0, 12.8)
    np.testing.assert_allclose(first_errors(answers, images), expected, atol=1e-9)


def test_guessed_errors_are_an_eighth_of_a_crop():
    errors = guessed_errors((32, 64))
    assert np.abs(errors.std(axis=0) / [4, 8] - 1).max() < 0.1 and np.abs(errors).max() <= 0.4 * 64


def test_the_same_in_volumes(tmp_path):
    shape, dot = (40, 36, 32), np.array([[[14.0, 20.0, 11.0]]])
    grid = np.stack(np.indices(shape), axis=-1)
    np.save(tmp_path / "v.npy", np.exp(-((grid - dot[0, 0]) ** 2).sum(axis=-1) / 6).astype(np.float32))
    record = Record("v", tmp_path / "v.npy", dot[0], (1.0, 1.0, 1.0))
    config = parse_config({"is_3d": True, "dataset": {"layout": "folder", "image_size": [20, 18, 16],
                                                      "cache_dir": str(tmp_path / "cache")},
                           "unet": {"channel_multipliers": [1, 2]}, "experiment": {"device": "cpu"},
                           "finetune": {"refine": {"zoom": 2.0, "crop": 16, "prior": None}}}, "c.json")  # fmt: skip
    points = refine(Brightness(), [record], dot + [3.0, -2.0, 2.5], 1.0, config).points
    assert np.abs(points - dot).max() < 0.1
