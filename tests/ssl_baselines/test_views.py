"""Random views: reproducible, drawn for each image by itself, as the settings and presets say."""

import numpy as np
import pytest
import torch

from core.config.load import load_config, parse_config
from core.config.ssl import DINO, Views
from core.config.starts import SSL_METHODS
from core.runs.places import Cell, cell_dir, ssl_dir
from core.training.batches import BatchPlan
from ssl_baselines.dino import DINO as Distillation
from ssl_baselines.mocov3 import MoCoV3
from ssl_baselines.simclrv2 import SimCLRv2
from ssl_baselines.views import ViewBatches, global_views, local_views, make_views, view_stream

SIDE = 120  # pixels of the images that tell positions; twice the position fits uint8
PLAIN = {"rotation_degrees": 0.0, "jitter": 0.0, "blur": (0.0, 0.0), "solarise": (0.0, 0.0)}
RAMP = np.broadcast_to(2 * np.arange(SIDE, dtype=np.uint8), (SIDE, SIDE))
COLUMNS, ROWS = np.ascontiguousarray(RAMP), np.ascontiguousarray(RAMP.T)


def plain(**changes):
    """Views that are nothing but crops, with `changes`."""
    return Views(**PLAIN | changes)


def made(views, image, count=1):
    """The first and the second views of `count` times the same image, (count, H, W) as float."""
    batches = make_views([image], [0] * count, global_views(views, image.shape), [0])
    return [batch[:, 0].double().numpy() for batch in batches]


def slopes(maker, count, image):
    """Of `count` views of `image`: the value's change per pixel down and across, (count, 2), and its mean, (count,)."""
    views = make_views([image], [0] * count, [maker], [5])[0][:, 0].double().numpy()
    height, width = views.shape[1:]
    middle = views[:, height // 4 : height - height // 4, width // 4 : width - width // 4]
    down, across = (np.gradient(middle, axis=axis).mean(axis=(1, 2)) for axis in (1, 2))
    return np.stack((down, across), axis=1), middle.mean(axis=(1, 2))


def crops(maker, count):
    """Height and width of `count` crops in the image's pixels, below 0 where flipped, and centres, (count, 2) each.

    The draws do not depend on the pixels: the same ones are made of an image of rows and one of columns.
    """
    (down, row), (across, column) = slopes(maker, count, ROWS), slopes(maker, count, COLUMNS)
    return np.stack((down[:, 0], across[:, 1]), axis=1) / 2 * maker.size, np.stack((row, column), axis=1) / 2


def run(seed=3, accumulation=2):
    """Micro-batches of 3 of 7 noise images, two global and two local views with everything that is random."""
    noise = np.random.default_rng(0).integers(0, 256, (7, 40, 48), dtype=np.uint8)
    views = Views(flip=0.5, blur=(1.0, 0.5), solarise=(0.0, 0.5))
    dino = DINO(local_crops=2, views=views)
    makers = [*global_views(views, (40, 48)), *local_views(dino, (40, 48))]
    return ViewBatches(list(noise), makers, BatchPlan(7, 3, accumulation, "stream", True, seed), seed)


def same(one, other):
    """Whether two lists of micro-batches hold the same bytes."""
    assert len(one) == len(other) > 0
    return all(torch.equal(a, b) for first, second in zip(one, other, strict=True)
               for a, b in zip(first, second, strict=True))


# --- a pure function of seed, step and micro-batch ---


def test_shapes():
    views = run()[0]
    assert [tuple(view.shape) for view in views] == [(3, 1, 40, 48)] * 2 + [(3, 1, 32, 32)] * 2
    assert all(view.dtype == torch.uint8 for view in views)


def test_views_depend_on_nothing_else():
    batches = run()
    straight = [batches[k] for k in range(4)]
    again = [batches[k] for k in (3, 1, 0, 2)]
    assert same(straight, [again[2], again[1], again[3], again[0]]) and same(straight, [run()[k] for k in range(4)])


def test_every_draw_is_another():
    """Of seeds, steps, micro-batches, views and images, with the same image everywhere."""
    image, makers = run().images[0], run().makers
    keys = [[3, 0, 0], [3, 0, 1], [3, 1, 0], [4, 0, 0]]
    views = [view.numpy() for key in keys for view in make_views([image], [0] * 3, makers, key)]
    assert len({one.tobytes() for view in views for one in view}) == 4 * 4 * 3


def test_micro_batches_are_the_plans():
    """Views of constant images say which images they are of."""
    images = [np.full((32, 32), 10 * k, np.uint8) for k in range(9)]
    plan = BatchPlan(9, 4, 3, "stream", True, 1)
    batches = ViewBatches(images, global_views(plain(), (32, 32)), plan, seed=1)
    for position, views in enumerate(view_stream(batches, 0, 9, 0, pin=False)):
        wanted = 10 * plan.groups(position // 3)[position % 3]
        assert all(view[:, 0, 0, 0].tolist() == wanted.tolist() for view in views)


def test_streams():
    """With and without worker processes, from the start and from where a run is taken up again."""
    straight = list(view_stream(run(), 0, 8, 0, pin=False))
    assert len(straight) == 8 and same(straight, [run()[k] for k in range(8)])
    assert same(straight, list(view_stream(run(), 0, 8, 2, pin=False)))
    assert same(straight[5:], list(view_stream(run(), 5, 8, 0, pin=False)))
    assert same(straight[3:], list(view_stream(run(), 3, 8, 2, pin=False)))


# --- crops ---


@pytest.mark.parametrize("low, high", [(0.3, 0.5), (0.2, 1.0), (0.05, 0.3)])
def test_crop_area(low, high):
    """Areas in the range and over all of it, sides of 3:4 to 4:3, never beyond the image, in different places."""
    makers = [*global_views(plain(crop_area=(low, high)), (96, 80)),
              *local_views(DINO(local_area=(low, high), local_crops=1, local_size=0.5, views=plain()), (96, 80))]
    assert [maker.size for maker in makers] == [(96, 80), (96, 80), (48, 40)]
    for maker in makers:
        sides, centres = crops(maker, 60)
        areas, one_pixel = sides.prod(axis=1) / SIDE**2, 2.5 / SIDE
        assert low - one_pixel < areas.min() < low + 0.15 * (high - low)
        assert high - 0.25 * (high - low) < areas.max() < high + one_pixel
        ratios = sides[:, 1] / sides[:, 0]
        assert 0.7 < ratios.min() < 0.9 and 1.1 < ratios.max() < 1.43
        assert (centres - sides / 2 > -2).all() and (centres + sides / 2 < SIDE + 2).all()
        assert (centres.std(axis=0) > 0.2 * (SIDE - sides.mean(axis=0)) / 2).all()


def test_every_image_has_its_own_crop():
    """Not one crop for the whole batch."""
    sides, centres = crops(global_views(plain(), (64, 64))[0], 12)
    assert len(np.unique(centres.round(1), axis=0)) == 12 and len(np.unique(sides.round(1), axis=0)) == 12


def test_size_of_local_views():
    for size, small in (((224, 224), (96, 96)), ((256, 192), (110, 82)), ((64, 32), (32, 32))):
        makers = local_views(DINO(), size)
        assert len(makers) == 6 and {maker.size for maker in makers} == {small}
    assert local_views(DINO(local_crops=0), (64, 64)) == []
    assert {maker.size for maker in local_views(DINO(local_size=0.75), (128, 256))} == {(96, 192)}


# --- flips, turns, colours ---


@pytest.mark.parametrize("flip, flipped", [(0.0, {False}), (1.0, {True}), (0.5, {False, True})])
def test_flip(flip, flipped):
    for maker in global_views(plain(flip=flip), (64, 64)):
        sides, _ = crops(maker, 30)
        assert set((sides[:, 1] < 0).tolist()) == flipped and (sides[:, 0] > 0).all()


def test_rotation():
    """Up to 10 degrees either way, for each image its own, and the border's values repeat: no black corners."""
    maker = global_views(plain(crop_area=(1.0, 1.0), rotation_degrees=10.0), (SIDE, SIDE))[0]
    gradient, _ = slopes(maker, 40, COLUMNS)
    angles = np.degrees(np.arctan2(gradient[:, 0], gradient[:, 1]))
    assert angles.min() < -6 and angles.max() > 6 and np.abs(angles).max() < 10.5
    grey = make_views([np.full((SIDE, SIDE), 90, np.uint8)], [0] * 5, [maker], [0])[0]
    assert (grey == 90).all()


@pytest.mark.parametrize("strength", [0.2, 0.4])
def test_jitter(strength):
    """Brightness by a factor of 1 - strength to 1 + strength; contrast about the mean leaves a constant image alone."""
    for views in made(plain(jitter=1.0, jitter_strength=strength), np.full((32, 32), 100, np.uint8), count=40):
        assert (views.std(axis=(1, 2)) == 0).all()
        values = views.mean(axis=(1, 2)) / 100
        assert 1 - strength - 0.011 <= values.min() < 1 - 0.7 * strength
        assert 1 + 0.7 * strength < values.max() <= 1 + strength + 0.011
    halves = np.concatenate([np.full((32, 16), 80, np.uint8), np.full((32, 16), 120, np.uint8)], axis=1)
    views = np.concatenate(made(plain(jitter=1.0, jitter_strength=strength, crop_area=(1.0, 1.0)), halves, count=20))
    contrasts = (views[:, :, -1] - views[:, :, 0]).mean(axis=1) / views.mean(axis=(1, 2)) / 0.4
    assert contrasts.min() < 1 - 0.4 * strength and contrasts.max() > 1 + 0.4 * strength


def test_jitter_off():
    image = np.full((32, 32), 100, np.uint8)
    for views in (plain(), plain(jitter=1.0, jitter_strength=0.0)):
        assert all((view == 100).all() for view in made(views, image, count=20))


def test_constant_image_stays_constant():
    image = np.full((64, 48), 77, np.uint8)
    assert all((view == 77).all() for view in made(plain(blur=(1.0, 1.0), flip=0.5), image, count=20))


@pytest.mark.parametrize("blur, blurred", [((1.0, 0.0), [True, False]), ((0.0, 1.0), [False, True])])
def test_blur_is_of_the_asked_view(blur, blurred):
    line = np.zeros((224, 224), np.uint8)
    line[:, 112] = 255
    for views, changed in zip(made(plain(blur=blur, crop_area=(1.0, 1.0)), line, count=12), blurred, strict=True):
        assert bool(np.abs(views - line).max() > 20) is changed


@pytest.mark.parametrize("size", [224, 448])
def test_blur_width(size):
    """The standard deviation of a blurred line, which is the blur's: 0.1 to 2 pixels of an image of 224."""
    line = np.zeros((size, size), np.uint8)
    line[:, size // 2] = 255
    profiles = made(plain(blur=(1.0, 0.0), crop_area=(1.0, 1.0)), line, count=24)[0].mean(axis=1)
    sigmas = np.sqrt((profiles * (np.arange(size) - size // 2) ** 2).sum(axis=1) / profiles.sum(axis=1))
    assert sigmas.max() < 2.1 * size / 224 and sigmas.max() > 1.5 * size / 224 and sigmas.min() < 0.7 * size / 224


def bright(makers):
    """The values in 60 views of an image of 200s, by maker; 55 is 200 solarised."""
    views = make_views([np.full((32, 32), 200, np.uint8)], [0] * 60, makers, [1])
    assert all((view == view[:, :, :1, :1]).all() for view in views)
    return [set(view[:, 0, 0, 0].tolist()) for view in views]


def test_solarise():
    assert bright(global_views(plain(solarise=(0.0, 0.2)), (32, 32))) == [{200}, {55, 200}]
    assert bright(global_views(plain(solarise=(1.0, 0.0)), (32, 32))) == [{55}, {200}]
    dark = made(plain(solarise=(1.0, 1.0)), np.full((32, 32), 100, np.uint8))
    assert all((view == 100).all() for view in dark)


@pytest.mark.parametrize("preset, second", [("tuned", {200}), ("paper", {55, 200})])
def test_solarised_views_of_the_presets(preset, second):
    """None by default; the second of MoCo v3 and DINO for the paper, never a local one."""
    still = {"views": {"jitter": 0.0, "rotation_degrees": 0.0}}
    ssl = {"preset": preset, "mocov3": still, "simclrv2": still, "dino": {**still, "local_crops": 2}}
    config = parse_config({"dataset": {"image_size": [32, 32]}, "ssl": ssl}, "x")
    assert bright(MoCoV3(config).views) == [{200}, second]
    assert bright(SimCLRv2(config).views) == [{200}, {200}]
    assert bright(Distillation(config).views) == [{200}, second, {200}, {200}]


# --- presets ---


def test_paper_preset(make_config, tmp_path):
    config = make_config(tmp_path, ssl={"preset": "paper"}, dataset={"image_size": [32, 32]})
    ssl = config.ssl
    assert (ssl.batch_size, ssl.accumulation, ssl.learning_rate, ssl.scheduler) == (4, 8, 1e-4, "constant")
    assert (ssl.dino.teacher_temperature, ssl.dino.out, ssl.dino.views.crop_area) == (0.5, 256, (0.04, 1.0))
    assert (ssl.mocov3.temperature, ssl.mocov3.momentum, ssl.mocov3.scaled_loss) == (0.5, 0.999, False)
    assert ssl.mocov3.views.flip == ssl.simclrv2.views.flip == ssl.dino.views.flip == 0.5
    tuned = make_config(tmp_path).ssl
    assert (tuned.preset, tuned.batch_size, tuned.dino.teacher_temperature) == ("tuned", 64, 0.07)
    for method in SSL_METHODS:
        assert ssl_dir(config, method) == tmp_path / "tiny/ssl" / f"{method}_paper"
        assert cell_dir(config, Cell(method, 2, 0, 0)).parent.name.split("_")[0] == "ssl-paper"
        assert "ssl-" not in cell_dir(make_config(tmp_path), Cell(method, 2, 0, 0)).parent.name
    assert "ssl-" not in cell_dir(config, Cell("imagenet", 2, 0, 0)).parent.name
    given = make_config(tmp_path, ssl={"preset": "paper"}, finetune={"encoder_weights": {"dino": "x.pth"}})
    assert "ssl-" not in cell_dir(given, Cell("dino", 2, 0, 0)).parent.name


def test_values_given_win_over_the_presets(config_file, make_config, tmp_path):
    ssl = {"preset": "paper", "batch_size": 6, "dino": {"teacher_temperature": 0.06, "views": {"flip": 0.1}}}
    path = config_file(ssl=ssl)
    for config, rate in ((make_config(tmp_path, ssl=ssl), 1e-4),
                         (load_config(path, ["ssl.learning_rate=0.25"]), 0.25)):
        dino = config.ssl.dino
        assert (config.ssl.batch_size, config.ssl.accumulation, config.ssl.learning_rate) == (6, 8, rate)
        assert (dino.teacher_temperature, dino.teacher_warmup_temperature, dino.views.flip) == (0.06, 0.5, 0.1)
        assert (dino.views.crop_area, dino.views.rotation_degrees) == ((0.04, 1.0), 0.0)
        assert parse_config(config.plain(), "x") == config  # what is written into a run's folder says the same
    assert load_config(config_file(), ["ssl.preset=paper"]).ssl.accumulation == 8
