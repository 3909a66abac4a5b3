"""Sets that outgrow memory: what is read from the packed files against what fits into memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import core.data.leaks
import core.data.store
from core.config.dataset import Dataset
from core.data.dataset import PackedSet, load_images, load_unlabelled
from core.data.leaks import find_leaks
from core.data.records import DataSource, Record
from core.errors import UserError
from core.formats.pickles import read_pickle
from core.training.batches import STEPS_AHEAD, BatchPlan, ReadAhead, step_generator
from ddpm_pretraining.train import Denoising, pretrain


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(core.data.store, "LARGE_BYTES", 0)


def configure(tmp_path, **settings):
    return Dataset(**{"cache_dir": str(tmp_path / "cache"), "image_size": (16, 24), **settings})


def save(path: Path, pixels: np.ndarray) -> Record:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, pixels) if path.suffix == ".npy" else Image.fromarray(pixels).save(path)
    return Record(path.stem, path, None, None)


def noise(seed, size=(40, 50), peak=256, kind=np.uint8):
    return np.random.default_rng(seed).integers(0, peak, size).astype(kind)


def grey_images(tmp_path, count=5):
    return [save(tmp_path / f"{seed}.png", noise(seed)) for seed in range(count)]


def whole(images: PackedSet) -> torch.Tensor:
    indices = np.arange(len(images.records))
    return images.normalised(images.read(indices), torch.from_numpy(indices))


def files_of(config, suffix="pixels"):
    return sorted(Path(config.cache_dir).glob(f"packed_*/*.{suffix}"))


@pytest.mark.parametrize("intensity", [{}, {"intensity": "percentile", "percentiles": (5, 90)},
                                       {"intensity": "window", "window": (20, 150)}])
def test_images_are_those_in_memory_to_half_a_level_of_their_own_depth(tmp_path, intensity):
    colour = np.stack([noise(seed, (40, 50)) for seed in (5, 6, 7)], axis=-1)
    records = [save(tmp_path / "grey.png", noise(0)), save(tmp_path / "colour.png", colour),
               save(tmp_path / "deep.png", noise(1, peak=60000, kind=np.uint16)),
               save(tmp_path / "float.npy", np.random.default_rng(2).random((40, 50), dtype=np.float32) * 200)]
    config = configure(tmp_path, **intensity)
    wanted, packed = load_images(records, config).images, load_unlabelled(records, config)
    assert isinstance(packed, PackedSet) and packed.fits and packed.shape == tuple(wanted.shape)
    assert [packed.store.depths[which].name for which in packed.store.which] == ["uint8", "uint8", "uint16", "float32"]
    low, high = packed.ranges.T
    allowed = [0.5 / (high[0] - low[0]), 0.5 / (high[1] - low[1]), 0.5 / (high[2] - low[2]), 0]
    differences = (whole(packed) - wanted).abs().amax(dim=(1, 2, 3))
    assert all(difference <= limit + 1e-6 for difference, limit in zip(differences, allowed, strict=True))
    assert differences[0] > 0 and packed.store.read(0).dtype == np.uint8
    torch.testing.assert_close(packed.beginning(2).images, whole(packed)[:2], rtol=0, atol=0)


def test_negative_whole_numbers_take_16_bits_and_images_of_the_networks_size_lose_nothing(tmp_path):
    records = [save(tmp_path / "ct.npy", noise(3, (16, 24), 3000, np.int16) - 1024),
               save(tmp_path / "grey.png", noise(4, (16, 24)))]
    config = configure(tmp_path)
    packed = load_unlabelled(records, config)
    assert sorted(depth.name for depth in packed.store.depths) == ["int16", "uint8"]
    assert torch.equal(whole(packed), load_images(records, config).images)


def test_images_of_several_sizes_lie_on_the_canvas_as_in_memory(tmp_path):
    records = [Record(str(seed), save(tmp_path / f"{seed}.png", noise(seed, size)).image, None, (1.0, 1.0))
               for seed, size in enumerate([(40, 52), (21, 70), (10, 12)])]
    config = configure(tmp_path, resample_mm=2.0, intensity="window", window=(-50, 200))
    wanted, packed = load_images(records, config), load_unlabelled(records, config)
    assert not packed.fits and packed.shape == tuple(wanted.images.shape)
    torch.testing.assert_close(whole(packed), wanted.images, rtol=0, atol=0.5 / 250 + 1e-6)
    assert torch.equal(packed.firsts, wanted.firsts) and torch.equal(packed.sizes, wanted.sizes)
    np.testing.assert_allclose(packed.beginning(3).maps, wanted.maps)


def test_a_few_files_hold_all_and_nothing_is_decoded_twice(tmp_path, monkeypatch):
    config, read = configure(tmp_path), []
    decode = core.data.store.decode
    monkeypatch.setattr(core.data.store, "decode",
                        lambda record, config: read.append(record.id) or decode(record, config))
    first = whole(load_unlabelled(grey_images(tmp_path), config))
    assert len(read) == 5 and len(files_of(config)) == 1 and not list(Path(config.cache_dir).glob("*.npy"))
    again = load_unlabelled(grey_images(tmp_path, 8)[::-1], config)
    assert read[5:] == ["7", "6", "5"] and len(files_of(config)) == 2
    assert torch.equal(whole(again).flip(0)[:5], first)
    shard = files_of(config)[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert torch.equal(whole(load_unlabelled(grey_images(tmp_path, 8), config))[:5], first) and len(read) > 8


def test_an_interrupted_filling_keeps_the_shards_that_were_full(tmp_path, monkeypatch):
    monkeypatch.setattr(core.data.store, "SHARD_BYTES", 2 * 16 * 24)
    config, records = configure(tmp_path), grey_images(tmp_path)
    records.append(Record("bad", tmp_path / "bad.png", None, None))
    records[-1].image.write_bytes(b"no image")
    with pytest.raises(UserError, match="bad.png"):
        load_unlabelled(records, config)
    assert len(files_of(config, "npz")) == len(files_of(config)) == 2
    assert not [path for path in files_of(config)[0].parent.iterdir() if path.suffix == ".tmp"]
    assert len(whole(load_unlabelled(records[:-1], config))) == 5 and len(files_of(config)) == 3


def test_leaks_are_the_same_by_parts_from_the_packed_files(tmp_path, monkeypatch):
    test = [save(tmp_path / f"t{seed}.png", noise(seed)) for seed in range(3)]
    more = [save(tmp_path / f"u{place}.png", noise(seed)) for place, seed in enumerate([9, 2, 8, 0, 0])]
    near = np.clip(noise(1).astype(float) * 0.8 + 10, 0, 255).astype(np.uint8)
    more.append(save(tmp_path / "u5.png", near))
    source = DataSource("folder", (), {"train": (), "validation": (), "test": tuple(test)}, tuple(more), "px", (), None)
    monkeypatch.setattr(core.data.leaks, "PART", 2)
    leaks = find_leaks(source, configure(tmp_path))
    assert [(leak.id, leak.twin, leak.kind) for leak in leaks] == [
        ("t0", "u3", "identical"), ("t0", "u4", "identical"), ("t1", "u5", "near"), ("t2", "u1", "identical")]


def test_what_is_read_ahead_never_decides_what_is_given():
    plan, read = BatchPlan(10, 3, 2, "epoch", False, 7), []

    def numbers(indices):
        read.append(indices.tolist())
        return torch.from_numpy(indices * 10)

    ahead = ReadAhead(numbers, plan.groups, threads=1)
    for step in (0, 1, 2, 9, 10, 3, 4):  # on, then elsewhere, then back
        for indices in plan.groups(step):
            assert ahead.take(step, indices).tolist() == (indices * 10).tolist()
    assert ahead.take(4, np.array([1, 2])).tolist() == [10, 20]  # nobody said it would be asked for
    for indices in reversed(plan.groups(5)):  # in another order
        assert ahead.take(5, indices).tolist() == (indices * 10).tolist()
    assert ahead.take(6, np.array([1, 2])).tolist() == [10, 20]  # while that step's own are there
    for step in (20, 40, 60, 80):  # nothing is kept of places that were left
        ahead.take(step, plan.groups(step)[0])
    assert len(ahead.pending) < 2 * (STEPS_AHEAD + 1)
    ahead.pool.shutdown()
    assert read[:4] == [batch.tolist() for step in (0, 1) for batch in plan.groups(step)]


def test_a_pretraining_that_reads_from_disk_resumes_exactly(tmp_path, make_config):
    def until(step, name):
        ddpm = {"iterations": step, "checkpoint_iterations": [step], "sample_every": 100, "accumulation": 2}
        return make_config(tmp_path / name, dataset={"cache_dir": str(tmp_path / "cache")}, ddpm=ddpm)

    for step, name in ((2, "stopped"), (5, "stopped"), (5, "straight")):
        folder = pretrain(until(step, name))
    stopped = read_pickle(until(5, "stopped").experiment_dir / "ddpm/last.pt")
    straight = read_pickle(folder / "last.pt")
    assert stopped["step"] == straight["step"] == 5
    for key in ("model", "ema"):
        assert all(torch.equal(stopped[key][name], tensor) for name, tensor in straight[key].items())


def test_a_process_reads_its_own_part_and_gets_the_same(tmp_path, make_config):
    config = make_config(tmp_path)
    images = load_unlabelled(grey_images(tmp_path), configure(tmp_path, image_size=(48, 48)))
    task, indices = Denoising(config, tmp_path, images, None), np.array([4, 0, 3])
    wanted = task.draw(indices, step_generator(0, 0, 0, task.device))
    part = slice(1, 3)
    drawn = task.draw(indices, step_generator(0, 0, 0, task.device), part)
    assert all(torch.equal(one[part], all_[part]) for one, all_ in zip(drawn, wanted, strict=True))
    assert not torch.equal(drawn[0][0], wanted[0][0])
