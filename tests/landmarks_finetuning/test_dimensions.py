"""What works in any number of dimensions works in 2D and in 3D: the same assertions on both.

Covered in both elsewhere: targets by the closed form and decoders by hand (test_heatmaps), augmentation of whole images
(test_augment), both losses without `absent` (test_losses), errors in mm and the mean shape (test_metrics), attention,
shapes and the missing timestep of the network (test_unet), noising and its inverse (test_diffusion), blobs through a
resize (test_dataset).
"""

import copy
import itertools
import math
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from core.config.dataset import Dataset as DatasetConfig
from core.config.load import parse_config
from core.config.section import Augmentation
from core.config.unet import UNet as UNetConfig
from core.data.augment import augment, draw_crops
from core.data.dataset import ImageSet, load_images, random_crops
from core.data.records import Record
from core.data.resize import resize
from core.errors import UserError
from core.formats.geometry import apply_maps, compose, inverse, resampling_map, upright, upright_map
from core.formats.images import read_geometry, read_image
from core.networks.convolutions import Downsample
from core.networks.unet import UNet
from landmarks_finetuning.heatmaps import decode, draw_target
from landmarks_finetuning.losses import LOSSES, cross_entropy_pixels
from landmarks_finetuning.running import _over_windows, run_batched, window_starts, window_weight

RNG_SEED = 0
PIXELS, CHANNELS = "cross_entropy_pixels", "cross_entropy_channels"
sizes = pytest.mark.parametrize("size", [(16, 24), (16, 24, 8)], ids=["2D", "3D"])
STILL = Augmentation(probability=1, rotation_degrees=0, scale=0, translation=0)
STRONG = Augmentation(probability=1, rotation_degrees=20, scale=0.1, translation=0.05)
SPACING = (0.5, 2.0, 1.25)  # mm along the tensor's axes
TINY = UNetConfig(base_channels=8, channel_multipliers=(1, 2), attention_heads=2, attention_head_channels=4)


def seeded(seed=RNG_SEED):
    return torch.Generator().manual_seed(seed)


def blob(point, size, widths):
    """(*size) Gaussian at `point`, of `widths` along the axes."""
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1)
    return np.exp(-(((grid - point) / widths) ** 2).sum(axis=-1) / 2)


def centroid(image):
    """(*size) -> (D,)."""
    image = np.asarray(image, dtype=np.float64)
    return np.array([np.average(index, weights=image) for index in np.indices(image.shape)])


# ---- reading and resampling


def write(folder, kind, values, spacing):
    """An image file of `kind`; its path and the spacing it can tell."""
    path = folder / {"npy": "a.npy", "npz": "a.npz", "picture": "a.png" if values.ndim == 2 else "a.nii.gz"}[kind]
    if kind == "npy":
        np.save(path, values)
    elif kind == "npz":
        np.savez(path, image=values, spacing=spacing[::-1])  # (x, y[, z])
    elif values.ndim == 2:
        Image.fromarray(values).save(path)
    else:
        nib.save(nib.Nifti1Image(values.T, np.diag([*spacing[::-1], 1]) * [-1, -1, 1, 1]), path)
    return path, None if kind == "npy" or path.suffix == ".png" else tuple(spacing)


@sizes
@pytest.mark.parametrize("kind", ["npy", "npz", "picture"])
def test_reading(tmp_path, kind, size):
    values = np.random.default_rng(RNG_SEED).integers(0, 255, size, dtype=np.uint8)
    path, spacing = write(tmp_path, kind, values, SPACING[: len(size)])
    pixels, geometry = read_image(path), read_geometry(path)
    assert pixels.dtype == np.float32 and np.array_equal(pixels, values[None])
    assert geometry.size == size and geometry.spacing_mm == (spacing and pytest.approx(spacing))
    config = DatasetConfig(image_size=tuple(n // 2 for n in size), cache_dir=str(tmp_path / "cache"))
    points = np.stack([np.arange(len(size)) + 1.5, np.array(size) - 0.5])
    loaded = load_images([Record("a", path, points, None)], config)
    assert loaded.fits and loaded.images.shape == (1, 1, *config.image_size)
    np.testing.assert_allclose(loaded.points[0].numpy(), (points + 0.5) / 2 - 0.5, atol=1e-12)
    assert loaded.original_sizes.tolist() == [list(size)]


@sizes
def test_resize_equals_a_loop_over_all_pairs_of_pixels(size):
    old = tuple(n // 2 for n in size)
    pixels = np.random.default_rng(RNG_SEED).random((2, *old), dtype=np.float32)
    for new, ratio in (((5, 13, 3), [a / b for a, b in zip(old, (5, 13, 3), strict=False)]),
                       ((6, 18, 3), (1.5, 0.7, 1.3))):  # all of the image; a little more than the image
        new, ratio = new[: len(size)], tuple(ratio[: len(size)])
        expected = pixels.astype(np.float64)
        for axis, (before, after, step) in enumerate(zip(old, new, ratio, strict=True), start=1):
            rows = []
            for i in range(after):
                place = (i + 0.5 - after / 2) * step + before / 2 - 0.5  # about the middle of the image
                weights = [max(0.0, 1 - abs(j - place) / max(step, 1)) for j in range(before)]
                rows.append(np.average(expected, axis=axis, weights=weights))
            expected = np.stack(rows, axis=axis)
        np.testing.assert_allclose(resize(pixels, new, ratio), expected, atol=1e-5)
    assert np.array_equal(resize(pixels, old), pixels)


@sizes
def test_resampling_to_a_common_spacing(tmp_path, size):
    dims, mm = len(size), 0.75
    records, places = [], []
    for m, factor in enumerate((1.0, 0.8)):  # the same voxels, of other sizes in mm
        point = (np.array(size) - 1) / 2 + [0.7, -1.3, 0.4][:dims]
        spacing = tuple(factor * step for step in SPACING[:dims])
        np.save(tmp_path / f"{m}.npy", blob(point, size, 2 / np.array(SPACING[:dims])).astype(np.float32))
        records.append(Record(str(m), tmp_path / f"{m}.npy", np.stack([point, point + 2]), spacing))
        places.append((np.array(size) * spacing, point, np.array(spacing)))
    small = tuple(4 for _ in size)
    config = DatasetConfig(image_size=small, resample_mm=mm, cache_dir=str(tmp_path / "cache"))
    images = load_images(records, config)
    assert not images.fits and images.network_size == small
    expected = [[math.ceil(length / mm) for length in extent] for extent, _, _ in places]
    assert images.sizes.tolist() == expected and images.images.shape[2:] == tuple(np.max(expected, axis=0))
    assert images.original_sizes.tolist() == [list(size)] * 2 and images.maps.shape == (2, dims, dims + 1)
    for m, (_, point, spacing) in enumerate(places):
        in_mm = images.centred_points()[m] * mm
        np.testing.assert_allclose(in_mm[0], (point - (np.array(size) - 1) / 2) * spacing, atol=1e-9)
        np.testing.assert_allclose(in_mm[1] - in_mm[0], 2 * spacing, atol=1e-9)
        canvas = images.images[m, 0].numpy()
        filled = tuple(slice(a, a + n) for a, n in zip(images.firsts[m].tolist(), expected[m], strict=True))
        assert canvas.sum() == pytest.approx(canvas[filled].sum())
        bright = np.where(canvas > 0.2, canvas, 0)
        assert np.abs(centroid(bright) - images.points[m, 0].numpy()).max() < 0.1
        back = apply_maps(images.points[[m]].numpy(), inverse(images.maps[[m]]))
        np.testing.assert_allclose(back[0], records[m].landmarks, atol=1e-9)
    np.testing.assert_allclose(images.from_centred(images.centred_points()), images.original_points(), atol=1e-9)
    large = config.model_copy(update={"image_size": tuple(n + 3 for n in images.images.shape[2:])})
    padded = load_images(records, large)
    assert padded.fits and padded.images.shape[2:] == large.image_size
    torch.testing.assert_close(padded.points - padded.firsts[:, None], images.points - images.firsts[:, None])


# ---- maps


@sizes
def test_maps_compose_and_invert_as_homogeneous_matrices(size):
    rng, dims = np.random.default_rng(RNG_SEED), len(size)
    first, second = (rng.normal(size=(4, dims, dims + 1)) + 2 * np.eye(dims, dims + 1) for _ in range(2))
    points = rng.normal(size=(4, 5, dims)) * size
    points[1, 2] = np.nan
    last = np.broadcast_to(np.eye(dims + 1)[-1:], (4, 1, dims + 1))
    square = [np.concatenate((maps, last), axis=1) for maps in (first, second)]
    moved = np.einsum("mij,mnj->mni", square[0], np.concatenate((points, np.ones((4, 5, 1))), axis=2))[..., :-1]
    np.testing.assert_allclose(apply_maps(points, first), moved, atol=1e-9)
    assert np.isnan(moved).any(axis=2).sum() == 1
    both = np.stack([compose(b, a) for a, b in zip(first, second, strict=True)])
    np.testing.assert_allclose(both, (square[1] @ square[0])[:, :-1], atol=1e-9)
    np.testing.assert_allclose(apply_maps(points, both), apply_maps(moved, second), atol=1e-9)
    np.testing.assert_allclose(inverse(first), np.linalg.inv(square[0])[:, :-1], atol=1e-9)
    np.testing.assert_allclose(apply_maps(moved, inverse(first)), points, atol=1e-9)


@sizes
def test_resampling_map_sends_borders_to_borders_and_upright_leaves_bare_arrays_alone(tmp_path, size):
    old, new = np.array(size), np.array(size)[::-1] + 3
    corners = np.array(list(itertools.product(*((-0.5, n - 0.5) for n in old))))
    expected = np.array(list(itertools.product(*((-0.5, n - 0.5) for n in new))))
    np.testing.assert_allclose(apply_maps(corners[None], resampling_map(old, new, old / new)[None])[0], expected)
    pixels = np.arange(old.prod(), dtype=np.float32).reshape(1, *size)
    np.save(tmp_path / "a.npy", pixels[0])
    geometry = read_geometry(tmp_path / "a.npy")
    assert np.array_equal(upright(pixels, geometry), pixels)
    np.testing.assert_array_equal(upright_map(geometry), np.eye(len(size), len(size) + 1))


# ---- augmentation with crops


@sizes
def test_crops_lie_anywhere_inside_and_small_images_in_the_middle(size):
    dims, count = len(size), 3000
    crop = tuple(n - 2 for n in size)
    firsts, filled = torch.full((count, dims), 5), torch.tensor(size).expand(count, dims)
    corners = draw_crops(firsts, filled, crop, seeded())
    assert corners.dtype == torch.float64 and corners.shape == (count, dims)
    for axis in range(dims):
        values, counts = corners[:, axis].unique(return_counts=True)
        assert values.tolist() == [5, 6, 7] and counts.min() > 0.28 * count
    assert torch.corrcoef(corners.T)[0, 1].abs() < 0.1  # drawn for each axis
    assert (draw_crops(firsts, filled, size, seeded()) == 5).all()
    wide = tuple(n + 4 for n in size)
    assert (draw_crops(firsts, filled, wide, seeded()) == 3).all()


@sizes
def test_training_crops_show_a_small_image_where_prediction_shows_it(size):
    for missing in range(5):
        network = tuple(n + missing for n in size)
        canvas = [network[0] + 6, *network[1:]]
        images = image_set(torch.zeros(1, 1, *canvas), [size], network)
        corner = draw_crops(images.firsts, images.sizes, network, seeded())[0]
        assert corner.tolist() == [part.start for part in images.seen(0)], f"{missing} pixels missing"


@sizes
def test_a_still_crop_is_a_slice(size):
    count, dims = 6, len(size)
    crop = tuple(n // 2 for n in size)
    images = torch.rand(count, 2, *size, generator=seeded(), dtype=torch.float64)
    points = torch.rand(count, 3, dims, generator=seeded(), dtype=torch.float64) * 8
    firsts, filled = torch.ones(count, dims, dtype=torch.long), torch.tensor(size).expand(count, dims) - 2
    out, moved = augment(images, points, STILL, seeded(), random_crops(crop, firsts, filled))
    assert out.shape == (count, 2, *crop)
    corners = points - moved
    assert torch.equal(corners, corners[:, :1].expand_as(corners).round())  # the same whole number for all points
    assert corners.min() >= 1 and (corners.amax(dim=(0, 1)) <= torch.tensor(size) - 1 - torch.tensor(crop)).all()
    assert len(corners[:, 0].unique(dim=0)) > 1
    for image, corner, seen in zip(images, corners[:, 0].long().tolist(), out, strict=True):
        part = tuple(slice(start, start + length) for start, length in zip(corner, crop, strict=True))
        torch.testing.assert_close(seen, image[(slice(None), *part)], rtol=0, atol=1e-10)
    whole, unmoved = augment(images, points, STILL, seeded())
    torch.testing.assert_close(whole, images, rtol=0, atol=1e-10)
    assert torch.equal(unmoved, points)


@sizes
def test_blob_and_point_move_together_into_a_crop(size):
    count, canvas, crop = 6, tuple(n + 16 for n in size), tuple(n + 10 for n in size)
    point = (np.array(canvas) - 1) / 2 + [0.3, -0.4, 0.2][: len(size)]
    images = torch.from_numpy(blob(point, canvas, 1.5))[None, None].expand(count, 1, *canvas)
    points = torch.from_numpy(point).expand(count, 1, -1)
    filled = torch.tensor(canvas).expand(count, -1)
    out, moved = augment(images, points, STRONG, seeded(), random_crops(crop, torch.zeros_like(filled), filled))
    assert out.shape == (count, 1, *crop) and (moved[:, 0].std(dim=0) > 0.5).all()
    for image, seen in zip(out[:, 0].numpy(), moved[:, 0].numpy(), strict=True):
        assert np.abs(centroid(image) - seen).max() < 0.05
    fixed, firsts = STRONG.model_copy(update={"translation": 0}), torch.arange(len(size)).expand(count, -1) + 2
    middle = firsts + (torch.tensor(crop) - 1) / 2
    only = random_crops(crop, firsts, torch.tensor(crop).expand(count, -1))
    _, moved = augment(images, middle[:, None].double(), fixed, seeded(), only)
    assert (moved[:, 0] - (torch.tensor(crop) - 1) / 2).abs().max() < 1e-9  # turned about the middle of the crop


# ---- targets and losses

DISK_RADIUS = 1.5 * math.sqrt(2 * math.log(2))
BOUNDS = {  # pixels along each axis, of what a perfect network says about a landmark of sigma 1.5
    ("pixel", "argmax"): 0.5, ("pixel", "component_centroid"): 0.5, ("pixel", "local_expectation"): 0.5,
    ("disk", "argmax"): DISK_RADIUS, ("disk", "component_centroid"): 0.5, ("disk", "local_expectation"): DISK_RADIUS,
    ("gaussian", "argmax"): 0.5, ("gaussian", "component_centroid"): 0.5, ("gaussian", "local_expectation"): 0.25,
}  # fmt: skip
CHANNEL_BOUNDS = {**BOUNDS, ("gaussian", "local_expectation"): 0.5}  # saturated at the peak: no more than the argmax
del CHANNEL_BOUNDS["gaussian", "component_centroid"]  # where a landmark leads the others is no disk


@sizes
@pytest.mark.parametrize("loss, kind, decoder, bound", [
    *((PIXELS, *names, bound) for names, bound in BOUNDS.items()),
    *((CHANNELS, *names, bound) for names, bound in CHANNEL_BOUNDS.items())])
def test_a_drawn_landmark_is_decoded(loss, kind, decoder, bound, size):
    rng, dims = np.random.default_rng(RNG_SEED), len(size)
    points = rng.uniform(3, 4, (8, 3, dims))
    points[..., 1] += np.array([0, 7, 14])  # apart along one axis
    points = torch.from_numpy(points)
    target = draw_target(points, size, kind, 1.5)
    outputs = target.clamp(min=1e-9).log() if loss == PIXELS else 20 * target
    decoded, _ = decode(outputs, decoder, loss, 1.5)
    assert decoded.shape == points.shape and decoded.dtype == torch.float64
    assert (decoded - points).abs().max() <= bound + 1e-6


@sizes
@pytest.mark.parametrize("mode", ["not cropped", "cropped"])
def test_pixel_loss_equals_a_loop_and_has_one_more_outcome_in_crops(mode, size):
    rng = np.random.default_rng(RNG_SEED)
    outputs = rng.normal(size=(2, 4, *size)) * 3
    points = torch.from_numpy(rng.uniform(2, 6, (2, 4, len(size))))
    points[0, 1] = math.nan  # nobody knows where
    points[0, 2] = points[1, 0] = -40.0  # known to lie outside of the crop
    target = draw_target(points, size, "gaussian", 1.2)
    absent = torch.tensor([[False, False, True, False], [True, False, False, False]]) if mode == "cropped" else None
    costs = []
    for image, landmark in itertools.product(range(2), range(4)):
        scores, wanted = outputs[image, landmark].ravel(), target[image, landmark].double().numpy().ravel()
        if absent is not None:
            scores = np.append(scores, 0.0)
            wanted = np.append(wanted, float(absent[image, landmark]))
        if wanted.sum() > 0:
            probability = np.exp(scores) / np.exp(scores).sum()
            costs.append(-(wanted / wanted.sum() * np.log(probability)).sum())
    assert len(costs) == (7 if mode == "cropped" else 5)
    raw = torch.tensor(outputs, dtype=torch.float32, requires_grad=True)
    value = cross_entropy_pixels(raw, target, absent)
    assert value.item() == pytest.approx(np.mean(costs), rel=1e-5)
    value.backward()
    moved = raw.grad.flatten(2).abs().amax(dim=2) > 0
    assert moved.tolist() == [[True, False, mode == "cropped", True], [mode == "cropped", True, True, True]]


@sizes
@pytest.mark.parametrize("absent", [None, torch.tensor([[False, False, True]])], ids=["not cropped", "cropped"])
def test_channel_loss_equals_a_loop_and_heeds_no_absence(size, absent):
    rng = np.random.default_rng(RNG_SEED)
    outputs = rng.normal(size=(1, 3, *size))
    points = torch.from_numpy(rng.uniform(2, 5, (1, 3, len(size))))
    points[0, 1], points[0, 2] = math.nan, -40.0
    target = draw_target(points, size, "disk", 1.2)
    raw = torch.tensor(outputs, dtype=torch.float32, requires_grad=True)
    value = LOSSES[CHANNELS](raw, target, absent)
    cost = 0.0
    for pixel in np.ndindex(size):
        scores = outputs[(0, slice(None), *pixel)]
        for landmark in range(3):
            chance = math.exp(scores[landmark]) / sum(map(math.exp, scores))
            cost -= target[(0, landmark, *pixel)].item() * math.log(chance)
    assert cost > 0 and value.item() == pytest.approx(cost / math.prod(size), rel=1e-5)
    value.backward()
    drawn = (target > 0).any(dim=1, keepdim=True).expand_as(target)
    assert (raw.grad[drawn] != 0).all() and (raw.grad[~drawn] == 0).all()  # background costs nothing


# ---- the network


@sizes
@pytest.mark.parametrize("attention", [{}, {"full_attention_sizes": (8,)}, {"linear_attention": False}], ids=str)
def test_activation_checkpointing_changes_no_bit(size, attention):
    torch.manual_seed(RNG_SEED)
    model = UNet(TINY.model_copy(update=attention), 1, 3, size)
    x, times = torch.randn(2, 1, *size, generator=seeded()), torch.tensor([3, 400])
    results = []
    for recompute in (False, True):
        model.activation_checkpointing = recompute
        for timesteps in (None, times):
            model.zero_grad(set_to_none=True)
            out = model(x, timesteps)
            assert out.shape == (2, 3, *size)
            out.square().mean().backward()
            results.append({"": out.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    for plain, recomputed in zip(results[:2], results[2:], strict=True):
        for name, expected in plain.items():
            found = recomputed[name]
            assert (found is None and expected is None) or torch.equal(found, expected), name


@sizes
def test_the_network_treats_every_axis_alike(size):
    """With kernels whose axes are permuted, the permuted image gives the permuted output."""
    torch.manual_seed(RNG_SEED)
    dims = len(size)
    order = (0, 1, *range(3, dims + 2), 2)
    back = tuple(np.argsort(order))
    model = UNet(TINY, 1, 2, size).double()
    turned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in turned.parameters():
            if parameter.ndim == dims + 2:
                parameter.copy_(parameter.permute(order).clone())
        for module in turned.modules():
            if isinstance(module, Downsample):
                weight = module[1].weight  # its input channels count the offsets along the axes
                offsets = weight.view(weight.shape[0], -1, *(2,) * dims)
                weight.copy_(offsets.permute(order).reshape(weight.shape).clone())
    x, times = torch.randn(2, 1, *size, generator=seeded(), dtype=torch.float64), torch.tensor([3, 400])
    expected = model(x, times)
    torch.testing.assert_close(turned(x.permute(order), times).permute(back), expected, rtol=0, atol=1e-10)
    assert (model(x.flip(2), times).flip(2) - expected).abs().max() > 1e-3  # places do matter to it
    torch.testing.assert_close(model(x[1:], times[1:]), expected[1:])  # and every image stands alone


@pytest.mark.parametrize("size, said", [
    ((64, 60), "[64, 60]: 4 levels need multiples of 8; nearest to 60: 56 or 64"),
    ((64, 64, 60), "[64, 64, 60]: 4 levels need multiples of 8; nearest to 60: 56 or 64"),
    ((12, 64), "[12, 64]: 4 levels need multiples of 8; nearest to 12: 8 or 16"),
    ((12, 64, 64), "[12, 64, 64]: 4 levels need multiples of 8; nearest to 12: 8 or 16"),
    ((64, 5), "[64, 5]: 4 levels need multiples of 8; nearest to 5: 8"),
    ((64, 5, 64), "[64, 5, 64]: 4 levels need multiples of 8; nearest to 5: 8"),
])  # fmt: skip
def test_a_size_that_the_levels_do_not_divide_ends_in_one_line(size, said):
    values = {"is_3d": len(size) == 3, "dataset": {"image_size": list(size)}}
    with pytest.raises(UserError, match=re.escape(said) + "$") as caught:
        parse_config(values, "study.json")
    assert str(caught.value).startswith("study.json: dataset.image_size ") and "\n" not in str(caught.value)
    mended = [64 if length % 8 else length for length in size]
    assert parse_config({**values, "dataset": {"image_size": mended}}, "study.json").dataset.image_size == (*mended,)


# ---- windows


def image_set(images, filled, network_size):
    """An ImageSet of `images` (M, C, *canvas) that fill `filled` (M, D) in the middle of the canvas."""
    filled = torch.tensor(filled)
    firsts = (torch.tensor(images.shape[2:]) - filled) // 2
    dims = len(network_size)
    maps = np.concatenate((np.tile(np.eye(dims), (len(images), 1, 1)), firsts.numpy()[..., None]), axis=2)
    records = tuple(Record(str(m), None, None, None) for m in range(len(images)))
    return ImageSet(records, images, None, maps, firsts, filled, filled.numpy(), network_size)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("window", [8, 10, 16])
def test_windows_cover_every_pixel_and_overlap_as_asked(window, overlap):
    for length in range(window, 70):
        starts = window_starts(length, window, overlap)
        assert starts[0] == 0 and starts[-1] + window == length
        assert len(set(starts)) == len(starts) and starts == sorted(starts)
        shared = [window - (b - a) for a, b in itertools.pairwise(starts)]
        assert min(shared, default=window) >= window * overlap, f"{length} pixels: {starts}"
        fewest = 1 + math.ceil((length - window) / math.floor(window * (1 - overlap)))
        assert len(starts) <= fewest


@sizes
def test_windows_average_what_the_network_says_by_weight(size):
    window = tuple(n // 2 for n in size)
    weight = window_weight(window).numpy()
    for pixel in np.ndindex(window):  # by hand: products of 1, 2, .., 2, 1 over half of the length
        rises = [min(i + 1, n - i) / (n / 2) for i, n in zip(pixel, window, strict=True)]
        assert weight[pixel] == pytest.approx(math.prod(rises)) and weight[pixel] > 0
    rng, said = np.random.default_rng(RNG_SEED), []

    def network(inputs):
        assert inputs.shape[2:] == window and len(inputs) <= 3
        said.extend(rng.normal(size=(len(inputs), 2, *window)).astype(np.float32))
        return torch.from_numpy(np.stack(said[-len(inputs):]))

    image = torch.rand(1, 1, *size, generator=seeded())
    found = _over_windows(network, image, window, 0.5, batch=3)
    corners = itertools.product(*(window_starts(n, w, 0.5) for n, w in zip(size, window, strict=True)))
    total, weights = np.zeros((2, *size)), np.zeros(size)
    for corner, output in zip(corners, said, strict=True):
        for pixel in np.ndindex(window):
            place = tuple(np.add(corner, pixel))
            total[(slice(None), *place)] += output[(slice(None), *pixel)] * weight[pixel]
            weights[place] += weight[pixel]
    assert weights.min() > 0
    np.testing.assert_allclose(found[0].numpy(), total / weights, atol=1e-5)
    assert torch.allclose(_over_windows(lambda inputs: inputs, image, window, 0.5, 4), image, atol=1e-6)


@sizes
def test_windows_of_larger_images_give_what_one_window_would(size):
    """A network that looks at one pixel at a time, on images larger, smaller and of the size of its windows."""
    values = {"is_3d": len(size) == 3, "experiment": {"precision": "float32", "device": "cpu"},
              "dataset": {"image_size": [16] * len(size)}, "evaluation": {"batch_size": 2}}
    config, cpu = parse_config(values, "study.json"), torch.device("cpu")
    torch.manual_seed(RNG_SEED)
    one = nn.Sequential((nn.Conv2d if len(size) == 2 else nn.Conv3d)(1, 3, 1), nn.Tanh())
    canvas, network = size, tuple(n // 2 for n in size)
    filled = [size, network, tuple(n // 2 - 3 for n in size)]
    images = image_set(torch.rand(3, 1, *canvas, generator=seeded()), filled, network)
    with torch.no_grad():
        expected = one(images.images)
    seen = list(run_batched(one, images, config.evaluation, cpu, "float32"))
    assert [chosen for chosen, _, _ in seen] == [[0], [1], [2]]
    for index, (_, outputs, maps) in enumerate(seen):
        shape = np.maximum(filled[index], network)
        assert outputs.shape == (1, 3, *shape)
        starts = (images.maps[index] - maps[0])[:, -1].astype(int)  # the outputs begin there
        part = tuple(slice(start, start + length) for start, length in zip(starts, shape, strict=True))
        torch.testing.assert_close(outputs[0], expected[(index, slice(None), *part)], rtol=0, atol=1e-6)
        first = images.firsts[index].numpy()
        assert (starts <= first).all() and (starts + shape >= first + images.sizes[index].numpy()).all()
    [(chosen, outputs, _)] = run_batched(one, images, config.evaluation, cpu, "float32", [2])
    assert chosen == [2] and torch.equal(outputs, seen[2][1])
    fitting = image_set(images.images, [size] * 3, canvas)
    seen = list(run_batched(one, fitting, config.evaluation, cpu, "float32", [2, 0, 1]))
    assert fitting.fits and [chosen for chosen, _, _ in seen] == [[2, 0], [1]]
    joined = torch.cat([outputs for _, outputs, _ in seen])
    torch.testing.assert_close(joined, expected[[2, 0, 1]])
