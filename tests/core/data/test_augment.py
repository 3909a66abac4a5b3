"""Image and landmarks move together, in 2D and in 3D, and as OpenCV would move them."""

import cv2
import numpy as np
import pytest
import torch

from core.config.section import Augmentation
from core.data.augment import Crops, augment, change_intensity, draw_affines, draw_crops, move_points, warp_images

STRONG = Augmentation(probability=1, rotation_degrees=20, scale=0.1, translation=0.05)
SIZES = pytest.mark.parametrize("size", [(48, 64), (28, 36, 32)], ids=["2D", "3D"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(centres, size, sigma=2.0):
    """(B, D) centres -> (B, 1, *size), a Gaussian at each."""
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    grid = torch.stack(axes)[None]
    offsets = grid - centres.view(*centres.shape, *(1,) * len(size))
    return torch.exp(-(offsets**2).sum(1, keepdim=True) / (2 * sigma**2)).float()


def centroids(images):
    """(B, 1, *size) -> (B, D)."""
    size = images.shape[2:]
    mass = images.double().flatten(2)[:, 0]
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    grid = torch.stack(axes).flatten(1)
    return mass @ grid.T / mass.sum(1, keepdim=True)


@SIZES
def test_blob_and_point_move_together(size):
    generator, count = seeded(), 12
    low, high = torch.tensor(size) * 0.36, torch.tensor(size) * 0.64
    centres = low + torch.rand(count, len(size), generator=generator, dtype=torch.float64) * (high - low)
    images, points = augment(blobs(centres, size), centres[:, None], STRONG, generator)
    assert images.shape == (count, 1, *size) and points.dtype == torch.float64
    moved = points[:, 0]
    assert (moved - centres).norm(dim=1).min() > 0.3  # they did move
    assert (centroids(images) - moved).abs().max() < 0.05


@SIZES
def test_identity(size):
    settings = Augmentation(probability=1, rotation_degrees=0, scale=0, translation=0)
    images = torch.rand(2, 3, *size, generator=seeded())
    points = torch.rand(2, 4, len(size), generator=seeded(), dtype=torch.float64) * 20
    for chosen in (settings, STRONG.model_copy(update={"probability": 0})):
        out, moved = augment(images, points, chosen, seeded())
        torch.testing.assert_close(out, images, rtol=0, atol=2e-5)  # float32 sampling positions
        assert torch.equal(moved, points)


@SIZES
def test_whole_pixel_shift_and_replicated_border(size):
    dims = len(size)
    images = torch.rand(1, 1, *size, generator=seeded())
    shift = [3, -2, 1][:dims]
    affine = torch.cat((torch.eye(dims), torch.tensor(shift)[:, None]), dim=1).double()[None]
    out = warp_images(images.double(), affine)
    source = [(np.arange(n) - s).clip(0, n - 1) for n, s in zip(size, shift, strict=True)]
    expected = images.double().numpy()[0, 0][np.ix_(*source)]
    np.testing.assert_allclose(out[0, 0].numpy(), expected, atol=1e-9)
    assert move_points(torch.zeros(1, 1, dims).double(), affine).flatten().tolist() == shift


def test_against_opencv():
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.random((40, 60), dtype=np.float32), (0, 0), 2)
    matrix_xy = cv2.getRotationMatrix2D((31.0, 18.0), angle=17, scale=1.1) + [[0, 0, 2.5], [0, 0, -1.25]]
    expected = cv2.warpAffine(image, matrix_xy, (60, 40), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    linear, offset = matrix_xy[::-1, 1::-1], matrix_xy[::-1, 2:]  # (x, y) -> (y, x)
    affine = torch.tensor(np.hstack([linear, offset]))[None]
    out = warp_images(torch.from_numpy(image)[None, None], affine)[0, 0].numpy()
    assert np.abs(out - expected).max() < 0.01 * np.ptp(image)  # OpenCV rounds positions to 1/32 px
    points = rng.random((5, 2)) * [40, 60]
    truth = cv2.transform(points[None, :, ::-1].copy(), matrix_xy)[0, :, ::-1]
    moved = move_points(torch.from_numpy(points)[None], affine)[0].numpy()
    np.testing.assert_allclose(moved, truth, atol=1e-12)


@SIZES
def test_rotation_and_scale_are_about_the_centre_and_within_range(size):
    dims, count = len(size), 400
    centre = (torch.tensor(size, dtype=torch.float64) - 1) / 2
    fixed = STRONG.model_copy(update={"translation": 0})
    affines = draw_affines(count, size, fixed, seeded())
    torch.testing.assert_close(move_points(centre.expand(count, 1, dims), affines)[:, 0], centre.expand(count, dims))
    linear = affines[:, :, :-1]
    factors = torch.linalg.det(linear) ** (1 / dims)
    assert 0.9 <= factors.min() < 0.905 and 1.095 < factors.max() <= 1.1
    turns = linear / factors[:, None, None]
    torch.testing.assert_close(turns @ turns.transpose(1, 2), torch.eye(dims).double().expand_as(turns))
    if dims == 2:
        degrees = torch.rad2deg(torch.atan2(turns[:, 1, 0], turns[:, 0, 0]))
        assert -20 <= degrees.min() < -19.5 and 19.5 < degrees.max() <= 20

    shifted = STRONG.model_copy(update={"rotation_degrees": 0, "scale": 0})
    affines = draw_affines(count, size, shifted, seeded())
    assert torch.equal(affines[:, :, :-1], torch.eye(dims).double().expand(count, dims, dims))
    shifts = affines[:, :, -1] / torch.tensor(size)
    assert (shifts.abs().amax(0) <= 0.05 + 1e-12).all() and (shifts.amax(0) > 0.048).all()
    assert (shifts.amin(0) < -0.048).all()
    assert torch.corrcoef(shifts.T)[0, 1].abs() < 0.2  # drawn for each axis


def test_every_plane_turns_in_3d():
    only_turns = STRONG.model_copy(update={"scale": 0, "translation": 0})
    linear = draw_affines(50, (8, 8, 8), only_turns, seeded())[:, :, :-1]
    off_diagonal = linear[:, ~torch.eye(3, dtype=torch.bool)]
    assert (off_diagonal.abs().amax(0) > 0.2).all()


def test_probability():
    settings = STRONG.model_copy(update={"probability": 0.3})
    affines = draw_affines(2000, (8, 8), settings, seeded())
    identity = torch.eye(2, 3, dtype=torch.float64)
    unmoved = (affines == identity).all(dim=2).all(dim=1)
    assert unmoved.double().mean().item() == pytest.approx(0.7, abs=0.04)
    assert (affines[~unmoved][:, 0, 1] != 0).all()


def test_same_generator_state_same_result():
    images, points = torch.rand(20, 1, 16, 16, generator=seeded()), torch.rand(20, 2, 2).double() * 16
    settings = STRONG.model_copy(update={"probability": 0.5, "intensity": 0.3})
    first, second, other = (augment(images, points, settings, seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])
    assert not torch.equal(first[0][0], first[0][1])  # one draw for each image


def test_missing_points_stay_missing():
    points = torch.tensor([[[1.0, 2.0], [float("nan")] * 2]], dtype=torch.float64)
    _, moved = augment(torch.rand(1, 1, 16, 16), points, STRONG, seeded())
    assert moved.isnan().tolist() == [[[False, False], [True, True]]]
    assert augment(torch.rand(1, 1, 16, 16), None, STRONG, seeded())[1] is None


def test_intensity():
    images = torch.linspace(0, 1, 50).view(1, 1, 5, 10).repeat(30, 1, 1, 1)
    assert torch.allclose(change_intensity(images, 0.0, seeded()), images)
    changed = change_intensity(images, 0.4, seeded()).flatten(1)
    assert changed.min() >= 0 and changed.max() <= 1
    assert (changed.diff(dim=1) >= -1e-6).all()  # brighter stays brighter
    assert changed[:, 25].std() > 0.05
    inside = ((changed > 0) & (changed < 1)).all(1)
    assert inside.any() and (changed[inside].diff(dim=1).diff(dim=1).abs().amax(1) > 1e-3).any()  # gamma: no line
    points = torch.rand(30, 2, 2).double()
    still = Augmentation(probability=0, intensity=0.4)
    out, moved = augment(images, points, still, seeded())
    assert torch.equal(moved, points) and not torch.allclose(out, images, atol=0.01)


@SIZES
@pytest.mark.parametrize("cropped", [False, True])
def test_without_elastic_and_artefacts_it_is_the_similarity_and_the_intensity_alone(size, cropped):
    """Bit for bit, and no number more is drawn."""
    settings = STRONG.model_copy(update={"probability": 0.7, "intensity": 0.3})
    count, dims, first, second = 6, len(size), seeded(), seeded()
    images = torch.rand(count, 1, *size, generator=seeded(1))
    points = torch.rand(count, 3, dims, generator=seeded(2), dtype=torch.float64) * 20
    crop = tuple(n - 4 for n in size) if cropped else size
    crops = Crops(crop, lambda generator: draw_crops(torch.zeros(count, dims, dtype=torch.float64),
                                                     torch.tensor(size).expand(count, dims), crop, generator))
    out, moved = augment(images, points, settings, first, crops if cropped else None)
    affines = draw_affines(count, crop, settings, second)
    if cropped:
        corners = crops.corners(second)
        affines = torch.cat((affines[:, :, :-1], affines[:, :, -1:] - affines[:, :, :-1] @ corners[..., None]), dim=2)
    assert torch.equal(out, change_intensity(warp_images(images, affines, crop), 0.3, second))
    assert torch.equal(moved, move_points(points, affines))
    assert torch.equal(first.get_state(), second.get_state())


def test_recorded_numbers():
    """What the version before elastic and artefacts gave."""
    generator = seeded(3)
    images = torch.arange(2 * 12 * 10, dtype=torch.float32).view(2, 1, 12, 10) / 240
    points = torch.tensor([[[3.0, 4.0], [6.5, 2.25]]] * 2, dtype=torch.float64)
    settings = Augmentation(probability=0.8, rotation_degrees=20, scale=0.1, translation=0.05, intensity=0.3)
    out, moved = augment(images, points, settings, generator)
    np.testing.assert_allclose(moved.flatten(), [3.1397211384300476, 4.951083419541052, 6.047504287217353,
                                                 2.0228549848335833, 3.0, 4.0, 6.5, 2.25], rtol=1e-12)
    np.testing.assert_allclose(out[:, 0, 3::5, 2::5].flatten(), [
        0.20642568, 0.16866733, 0.39544472, 0.34925839, 0.40702602, 0.42637548, 0.60714567, 0.62791306], rtol=1e-5)
    assert torch.rand(1, generator=generator).item() == pytest.approx(0.1808772087097168)
