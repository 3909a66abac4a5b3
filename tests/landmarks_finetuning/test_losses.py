"""Losses against torch's cross-entropy on label maps and against naive loops, in 2D and 3D."""

import math

import pytest
import torch
import torch.nn.functional as F

from landmarks_finetuning.heatmaps import probability_maps
from landmarks_finetuning.losses import LOSSES, cross_entropy_channels, cross_entropy_pixels

SIZES = [(6, 5), (4, 3, 5)]
sizes = pytest.mark.parametrize("size", SIZES, ids=["2d", "3d"])


def random_outputs(size, seed=0, batch=2, landmarks=3):
    return torch.randn(batch, landmarks, *size, generator=torch.Generator().manual_seed(seed)) * 3


@sizes
def test_pixels_equals_torch_cross_entropy_when_the_target_is_one_pixel(size):
    outputs = random_outputs(size)
    labels = torch.randint(math.prod(size), (6,), generator=torch.Generator().manual_seed(1))
    target = F.one_hot(labels, math.prod(size)).view(outputs.shape)
    expected = F.cross_entropy(outputs.reshape(6, -1), labels)
    torch.testing.assert_close(cross_entropy_pixels(outputs, target), expected)


@sizes
def test_pixels_normalises_the_target_and_averages_over_present_landmarks(size):
    outputs, target = random_outputs(size), random_outputs(size, seed=2).abs()
    target[0, 1] = 0
    costs = []
    for image, landmark in [(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)]:
        probability = target[image, landmark].flatten() / target[image, landmark].sum()
        costs.append(F.cross_entropy(outputs[image, landmark].flatten()[None], probability[None]))
    torch.testing.assert_close(cross_entropy_pixels(outputs, target), torch.stack(costs).mean())
    torch.testing.assert_close(cross_entropy_pixels(outputs, target * 7), torch.stack(costs).mean())


@sizes
def test_channels_equals_torch_cross_entropy_on_a_label_map_divided_by_all_pixels(size):
    outputs = random_outputs(size)
    labels = torch.randint(-1, 3, (2, *size), generator=torch.Generator().manual_seed(3))  # -1 is background
    target = torch.stack([(labels == landmark).float() for landmark in range(3)], dim=1)
    summed = F.cross_entropy(outputs, labels, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(cross_entropy_channels(outputs, target), summed / (2 * math.prod(size)))


@sizes
def test_channels_counts_overlapping_targets_for_both_landmarks(size):
    outputs = random_outputs(size, batch=1)
    target = torch.zeros_like(outputs)
    pixel = (1,) * len(size)
    target[(0, 0, *pixel)] = target[(0, 2, *pixel)] = 1
    scores = outputs[(0, slice(None), *pixel)].double().tolist()
    log_sum = math.log(sum(math.exp(score) for score in scores))
    expected = ((log_sum - scores[0]) + (log_sum - scores[2])) / math.prod(size)
    assert cross_entropy_channels(outputs, target).item() == pytest.approx(expected, rel=1e-5)


@sizes
@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_annotated_costs_nothing_and_moves_nothing(loss, size):
    outputs = random_outputs(size).requires_grad_()
    value = LOSSES[loss](outputs, torch.zeros(outputs.shape))
    value.backward()
    assert value.item() == 0
    assert outputs.grad.abs().max() == 0


@sizes
def test_a_missing_landmark_gets_no_gradient_from_the_pixel_softmax(size):
    outputs = random_outputs(size).requires_grad_()
    target = torch.ones(outputs.shape)
    target[1, 2] = 0
    cross_entropy_pixels(outputs, target).backward()
    assert outputs.grad[1, 2].abs().max() == 0
    assert outputs.grad[1, 1].abs().max() > 0


@sizes
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_outputs_are_computed_in_float32(loss, size):
    outputs, target = random_outputs(size).bfloat16(), random_outputs(size, seed=4).gt(0)
    value = LOSSES[loss](outputs, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, LOSSES[loss](outputs.float(), target.float()), rtol=0, atol=0)


@sizes
def test_probabilities_sum_to_one_over_what_the_loss_says(size):
    outputs = random_outputs(size)
    over_pixels = probability_maps(outputs, "cross_entropy_pixels").flatten(2).sum(dim=2)
    over_landmarks = probability_maps(outputs, "cross_entropy_channels").sum(dim=1)
    torch.testing.assert_close(over_pixels, torch.ones(2, 3))
    torch.testing.assert_close(over_landmarks, torch.ones(2, *size))
