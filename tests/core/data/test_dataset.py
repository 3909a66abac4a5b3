"""From files to tensors: resizing against PyTorch, the half-pixel rule, cache, few-shot subsets and packs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import core.data.cache
import core.data.dataset
from core.config.dataset import Dataset as DatasetConfig
from core.data.dataset import load_images
from core.data.make_pack import write_pack
from core.data.records import SPLITS, Record
from core.data.resize import normalise, resize
from core.data.shots import select_shots
from core.data.source import load_source
from core.errors import UserError
from core.formats.geometry import apply_maps, inverse, resampling_map

RNG_SEED = 0


def configure(tmp_path, **settings):
    return DatasetConfig(**{"root": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache"),
                            "image_size": (16, 16), **settings})


def record_of(path, points=None, spacing=None):
    landmarks = None if points is None else np.array(points, dtype=np.float64)
    return Record(path.stem, path, landmarks, spacing)


def picture(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("old, new", [((90, 71), (16, 16)), ((40, 24), (20, 16)), ((33, 64), (32, 64))])
def test_shrinking_is_that_of_pytorch(old, new):
    pixels = np.random.default_rng(RNG_SEED).random((2, *old), dtype=np.float32) * 255
    expected = F.interpolate(torch.from_numpy(pixels)[None], new, mode="bilinear", antialias=True, align_corners=False)
    np.testing.assert_allclose(resize(pixels, new), expected[0].numpy(), atol=1e-3)


def test_resize_by_hand():
    row = np.array([[[0.0, 4.0]]], dtype=np.float32)
    assert resize(row, (1, 4)).tolist() == [[[0, 1, 3, 4]]]  # centres at -0.25, 0.25, 0.75, 1.25
    assert resize(row, (2, 2)).tolist() == [[[0, 4], [0, 4]]]
    halved = resize(np.array([[[0.0, 8.0, 16.0, 24.0]]], dtype=np.float32), (1, 2))
    # the triangle of half-width 2 about 0.5 weighs pixels 0, 1, 2 by 3/4, 3/4, 1/4 (about 2.5: mirrored)
    np.testing.assert_allclose(halved, [[[(8 * 3 + 16) / 7, (8 + 16 * 3 + 24 * 3) / 7]]], rtol=1e-6)


def test_resize_of_a_volume_treats_every_axis_alike():
    volume = np.random.default_rng(RNG_SEED).random((1, 12, 9, 10), dtype=np.float32)
    out = resize(volume, (6, 9, 5))
    assert out.shape == (1, 6, 9, 5) and out.flags.c_contiguous and out.dtype == np.float32
    turned = resize(np.ascontiguousarray(volume.transpose(0, 3, 1, 2)), (5, 6, 9))
    np.testing.assert_allclose(out, turned.transpose(0, 2, 3, 1), atol=1e-6)
    np.testing.assert_allclose(resize(volume.mean(axis=2), (6, 5)), out.mean(axis=2), atol=1e-6)


def resized(old, new):
    return resampling_map(old, new, tuple(a / b for a, b in zip(old, new, strict=True)))[None]


def test_resampling_map_by_hand():
    maps = resized((200, 100), (50, 200))
    moved = apply_maps(np.array([[[-0.5, 99.5], [0.0, 0.0], [49.5, 9.5], [np.nan, np.nan]]]), maps)
    np.testing.assert_allclose(moved, [[[-0.5, 199.5], [-0.375, 0.5], [12.0, 19.5], [np.nan, np.nan]]])
    back = apply_maps(moved, inverse(maps))
    np.testing.assert_allclose(back, [[[-0.5, 99.5], [0, 0], [49.5, 9.5], [np.nan, np.nan]]], atol=1e-12)


@pytest.mark.parametrize("old, new", [((120, 90), (32, 48)), ((50, 90), (64, 48)), ((40, 60, 30), (20, 16, 24))])
def test_blob_lies_where_its_point_is_mapped(old, new):
    for share in (0.4, 0.55):
        point = np.array(old) * share + 0.3
        axes = [np.exp(-((np.arange(n) - p) ** 2) / (2 * (n / 14) ** 2)) for n, p in zip(old, point, strict=True)]
        blob = axes[0]
        for axis in axes[1:]:
            blob = blob[..., None] * axis
        small = resize(blob[None].astype(np.float32), new)[0].astype(np.float64)
        centroid = [(small.sum(tuple(set(range(len(new))) - {a})) * np.arange(n)).sum() / small.sum()
                    for a, n in enumerate(new)]
        np.testing.assert_allclose(centroid, apply_maps(point[None], resized(old, new))[0, 0], atol=0.02)


def test_load_images(tmp_path):
    rng = np.random.default_rng(RNG_SEED)
    wide = rng.integers(0, 200, (20, 40), dtype=np.uint8)
    tall = rng.integers(0, 200, (48, 32), dtype=np.uint8)
    records = [record_of(picture(tmp_path / "wide.png", wide), [[9.5, 19.5], [np.nan] * 2]),
               record_of(picture(tmp_path / "tall.png", tall), [[0, 0], [47, 31]])]
    loaded = load_images(records, configure(tmp_path, image_size=(16, 24)))
    assert loaded.images.shape == (2, 1, 16, 24) and loaded.images.dtype == torch.float32 and loaded.fits
    assert loaded.original_sizes.tolist() == [[20, 40], [48, 32]]
    assert loaded.images.amin(dim=(1, 2, 3)).tolist() == [0, 0] and loaded.images.amax(dim=(1, 2, 3)).tolist() == [1, 1]
    expected = resize(wide[None].astype(np.float32), (16, 24))
    expected = (expected - expected.min()) / np.ptp(expected)
    np.testing.assert_allclose(loaded.images[0].numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(loaded.points[0].numpy(), [[7.5, 11.5], [np.nan] * 2])
    np.testing.assert_allclose(loaded.points[1, 0].numpy(), [0.5 / 3 - 0.5, 0.5 * 0.75 - 0.5])
    np.testing.assert_array_equal(loaded.original_points()[1], [[0, 0], [47, 31]])
    assert loaded.points.dtype == torch.float64 and loaded.spacings() is None
    unlabelled = [records[0], record_of(records[1].image)]
    assert load_images(unlabelled, configure(tmp_path)).points is None
    measured = [record_of(r.image, r.landmarks, (0.1, 0.2)) for r in records]
    assert load_images(measured, configure(tmp_path)).spacings().tolist() == [[0.1, 0.2]] * 2


def test_missing_image_is_named(tmp_path):
    with pytest.raises(UserError, match="image .*gone.png does not exist"):
        load_images([record_of(tmp_path / "gone.png")], configure(tmp_path))


def test_cache_is_keyed_by_content(tmp_path, monkeypatch):
    rng, config = np.random.default_rng(RNG_SEED), configure(tmp_path)
    path = picture(tmp_path / "a.png", rng.integers(0, 255, (30, 20), dtype=np.uint8))
    first = load_images([record_of(path, [[3, 4]])], config)
    decoded = []
    monkeypatch.setattr(core.data.cache, "read_image",
                        lambda path: decoded.append(path) or np.zeros((1, 30, 20), "f4"))
    renamed = path.rename(tmp_path / "b.png")
    again = load_images([record_of(renamed, [[3, 4]])], config)
    assert not decoded and torch.equal(again.images, first.images) and torch.equal(again.points, first.points)
    assert again.original_sizes.tolist() == [[30, 20]]
    clipped = load_images([record_of(renamed)], configure(tmp_path, intensity="percentile", percentiles=(20, 80)))
    assert not decoded and not torch.equal(clipped.images, first.images)  # raw intensities are what is kept
    load_images([record_of(renamed)], configure(tmp_path, image_size=(8, 16)))
    assert decoded == [renamed]  # another size is another entry
    monkeypatch.undo()
    picture(renamed, rng.integers(0, 255, (30, 20), dtype=np.uint8))
    changed = load_images([record_of(renamed)], config)
    assert not torch.equal(changed.images, first.images)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_the_runs_of_a_process_share_images_until_a_file_changes(tmp_path, monkeypatch):
    path, config = picture(tmp_path / "a.png", np.eye(30, dtype=np.uint8) * 200), configure(tmp_path)
    record = record_of(path, [[3, 4]])
    first = load_images([record], config)
    assert load_images((record,), config, "images") is first
    assert load_images([record], configure(tmp_path, intensity="percentile")) is not first
    picture(path, np.eye(30, dtype=np.uint8) * 100 + 50)
    changed = load_images([record], config)
    assert changed is not first and load_images([record], config) is changed
    others = [record_of(picture(tmp_path / f"{n}.png", np.eye(20, dtype=np.uint8) * n)) for n in range(1, 4)]
    for other in others:
        load_images([other], config)
    assert load_images([record], config) is not changed  # three sets are kept
    monkeypatch.setattr(core.data.dataset, "KEPT_BYTES", 100)
    assert load_images(others, config) is not load_images(others, config)  # large ones are not


def test_normalise(tmp_path):
    pixels = np.arange(101, dtype=np.float32)[None, None] - 20
    minmax = normalise(pixels, configure(tmp_path))
    np.testing.assert_allclose(minmax, (pixels + 20) / 100, atol=1e-6)
    percentile = normalise(pixels, configure(tmp_path, intensity="percentile", percentiles=(10, 60)))
    np.testing.assert_allclose(percentile, ((pixels + 10) / 50).clip(0, 1), atol=1e-6)
    window = normalise(pixels, configure(tmp_path, intensity="window", window=(0, 40)))
    np.testing.assert_allclose(window, (pixels / 40).clip(0, 1), atol=1e-6)
    assert window.dtype == percentile.dtype == minmax.dtype == np.float32
    for mode in ({}, {"intensity": "percentile"}):
        assert not normalise(np.full((1, 2, 2), 7.0, dtype=np.float32), configure(tmp_path, **mode)).any()


def test_select_shots():
    records = [record_of(Path(f"{index}.png"), [[0, 0]]) for index in range(20)]
    names = {record.id for record in records}

    def pick(shots, draw=0, selection="random"):
        return [record.id for record in select_shots(records, shots, draw, selection)]

    assert pick(3, selection="first") == pick(3, draw=9, selection="first") == ["0", "1", "2"]
    assert pick(5) == pick(5) and len(set(pick(5)) & names) == 5
    assert pick(5, draw=0) != pick(5, draw=1) and pick(5) != ["0", "1", "2", "3", "4"]
    assert set(pick(1)) < set(pick(5)) < set(pick(10)) < set(pick(20)) == names
    assert pick(10) == sorted(pick(10), key=int)
    drawn = {name for draw in range(60) for name in pick(1, draw)}
    assert len(drawn) > 12  # every image can be the one
    for selection in ("first", "random"):
        with pytest.raises(UserError, match="finetune.shots 21 is above the training split's 20 labelled images"):
            pick(21, selection=selection)


@pytest.fixture
def folder(tmp_path):
    """A folder data set: a, b, c labelled (b partly), d not; config and the pixels written."""
    rng = np.random.default_rng(RNG_SEED)
    for name in "abcd":
        picture(tmp_path / f"data/images/{name}.png", rng.integers(0, 255, (30, 24), dtype=np.uint8))
    (tmp_path / "data/landmarks.csv").write_text(
        "image,patient,tip_x,tip_y,base_x,base_y\na,p1,1,2,3.25,4\nb,p2,5,6,,\nc,p3,0,0,19.5,9.5\n")
    (tmp_path / "data/dataset.json").write_text(json.dumps({
        "landmarks": ["tip", "base"], "spacing_mm": [0.5, 0.25],
        "splits": {"train": ["a"], "validation": ["b"], "test": ["c"]}}))
    return configure(tmp_path)


def test_a_data_set_is_read_once_until_a_file_changes(folder):
    first = load_source(folder)
    assert load_source(folder.model_copy()) is first
    assert load_source(folder.model_copy(update={"spacing_mm": 0.5})) is not first
    labels = Path(folder.root) / "landmarks.csv"
    labels.write_text(labels.read_text().replace("a,p1,1,2", "a,p1,7,2"))
    again = load_source(folder)
    assert first.splits["train"][0].landmarks[0].tolist() == [2, 1]
    assert again.splits["train"][0].landmarks[0].tolist() == [2, 7]


def test_pack_round_trip(folder, tmp_path):
    before = load_source(folder)
    assert write_pack(folder, tmp_path / "pack.npz") == 4
    packed = folder.model_copy(update={"root": str(tmp_path / "pack.npz"), "cache_dir": str(tmp_path / "unused")})
    after = load_source(packed)
    for name in ("layout", "landmark_names", "unit", "sdr_thresholds", "paper_rule"):
        assert getattr(after, name) == getattr(before, name)
    for split in SPLITS:
        old, new = load_images(before.require(split), folder), load_images(after.require(split), packed)
        assert [r.id for r in new.records] == [r.id for r in old.records]
        assert [(r.patient, r.spacing) for r in new.records] == [(r.patient, r.spacing) for r in old.records]
        np.testing.assert_array_equal(new.original_points(), old.original_points())
        assert torch.equal(new.points.nan_to_num(-9), old.points.nan_to_num(-9))
        np.testing.assert_array_equal(new.original_sizes, old.original_sizes)
        assert 0 < (new.images - old.images).abs().max() < 1 / 150  # a level of 256, after stretching to 0..1
    assert np.isnan(after.splits["validation"][0].landmarks).tolist() == [[False, False], [True, True]]
    assert [r.id for r in after.pretraining_records()] == ["a", "b", "d"]
    assert not (tmp_path / "unused").exists()
    fewer = load_source(packed.model_copy(update={"exclude": ("d", "c")}))
    assert [r.id for r in fewer.pretraining_records()] == ["a", "b"] and fewer.splits["test"] == ()
    with pytest.raises(UserError, match='exclude: "e" is no image of folder at .*pack.npz'):
        load_source(packed.model_copy(update={"exclude": ("e",)}))
    without = folder.model_copy(update={"exclude": ("d",)})
    assert write_pack(without, tmp_path / "less.npz") == 3
    assert len(load_source(without.model_copy(update={"root": str(tmp_path / "less.npz")})).records) == 3


@pytest.mark.parametrize("mode, dtype, values", [
    ("deep", np.uint16, (0, 40000)), ("negative", np.float32, (-1000, 3000)), ("shallow", np.uint8, (0, 255)),
])
def test_pack_keeps_the_range_of_intensities(tmp_path, mode, dtype, values):
    low, high = values
    pixels = (low + (high - low) * np.linspace(0, 1, 16 * 16).reshape(16, 16) ** 2).astype(dtype)
    picture(tmp_path / "data/images/a.tif", pixels)
    (tmp_path / "data/landmarks.csv").write_text("image,tip_x,tip_y\na,1,2\n")
    (tmp_path / "data/dataset.json").write_text(json.dumps({"landmarks": ["tip"], "splits": {"train": ["a"]}}))
    config = configure(tmp_path, intensity="window", window=values)
    write_pack(config, tmp_path / f"{mode}.npz")
    packed = config.model_copy(update={"root": str(tmp_path / f"{mode}.npz")})
    old, new = (load_images(load_source(c).require("train"), c).images for c in (config, packed))
    assert (old - new).abs().max() < (1 / 500 if mode == "shallow" else 1e-4)
    assert old.min() == 0 and old.max() == 1


def test_wrong_pack(folder, tmp_path):
    path = tmp_path / "pack.npz"
    write_pack(folder, path)
    packed = folder.model_copy(update={"root": str(path)})
    larger = packed.model_copy(update={"image_size": (32, 16)})
    with pytest.raises(UserError, match=r"pack.npz holds images of \[16, 16\], and \[32, 16\] are asked for"):
        load_images(load_source(larger).require("train"), larger)
    with pytest.raises(UserError, match='was packed from layout "folder", dataset.layout is "chest"'):
        load_source(packed.model_copy(update={"layout": "chest"}))
    with pytest.raises(UserError, match="dataset.root .*none.npz does not exist"):
        load_source(packed.model_copy(update={"root": str(tmp_path / "none.npz")}))
    np.savez(tmp_path / "foreign.npz", images=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:500])
    (tmp_path / "text.npz").write_text("no pack")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("foreign", "cut", "text", "empty"):
        with pytest.raises(UserError, match=f"dataset.root .*{name}.npz is damaged or not a pack") as caught:
            load_source(packed.model_copy(update={"root": str(tmp_path / f"{name}.npz")}))
        assert "\n" not in str(caught.value)


def test_set_moves_to_a_device_unless_too_large(tmp_path, monkeypatch):
    path = picture(tmp_path / "a.png", np.arange(256, dtype=np.uint8).reshape(16, 16))
    loaded = load_images([record_of(path, [[1, 2]])], configure(tmp_path))
    moved = loaded.to(torch.device("meta"))
    assert moved.images.is_meta and moved.points.is_meta and moved.records == loaded.records
    monkeypatch.setattr(core.data.dataset, "ON_DEVICE_BYTES", 16 * 16 * 4 - 1)
    kept = loaded.to(torch.device("meta"))
    assert kept.points.is_meta and not kept.images.is_meta


def test_phantom_is_made_on_first_use(tmp_path):
    config = configure(tmp_path, layout="cephalo", spacing_mm=0.8, phantom={"count": 152, "size": (48, 48)})
    source = load_source(config)
    assert [len(source.splits[split]) for split in SPLITS] == [130, 20, 2]
    made = (tmp_path / "data/phantom.json").stat().st_mtime_ns
    assert load_source(config).splits["test"][0].spacing == (0.8, 0.8)
    assert (tmp_path / "data/phantom.json").stat().st_mtime_ns == made
