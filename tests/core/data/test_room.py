"""How much memory images take: what is too much is refused by its header, and a set takes that of its tensor."""

import weakref

import numpy as np
import pytest
from PIL import Image

import core.data.cache
import core.data.dataset
from core import bounds
from core.config.dataset import Dataset
from core.data.dataset import load_images
from core.data.leaks import find_leaks
from core.data.records import Record
from core.data.source import load_source
from core.data.store import DECODERS
from tests.conftest import error_of


def records(tmp_path, count, size=(40, 30)):
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, size, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return [Record(str(number), tmp_path / f"{number}.png", None, (0.5, 0.5)) for number in range(count)]


def test_a_resampling_beyond_memory_is_refused_before_a_pixel_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(core.data.cache, "read_image", lambda path: pytest.fail("read"))
    config = Dataset(resample_mm=1e-4, cache_dir=str(tmp_path / "cache"))  # 200000 x 150000 pixels
    line = error_of(load_images, records(tmp_path, 1), config)
    assert "0.png at dataset.resample_mm 0.0001, 200000 x 150000 pixels, takes at least 111.8 GiB of memory" in line


def test_a_set_beyond_memory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nSwapTotal: 0 kB\n")
    monkeypatch.setattr(bounds, "MEMINFO", tmp_path / "meminfo")
    config = Dataset(image_size=(64, 64), cache_dir=None)
    load_images(records(tmp_path, 6), config)  # 96 KiB
    assert "7 images of 64 x 64 pixels takes at least" in error_of(load_images, records(tmp_path, 7), config)


def test_decoded_images_are_let_go_one_by_one(tmp_path, monkeypatch):
    """Not more than are being decoded are there beside the tensor."""
    alive, most, load = weakref.WeakSet(), [], core.data.dataset.load_one

    class Pixels(np.ndarray):
        pass

    def counted(record, config):
        loaded = load(record, config)
        pixels = loaded.pixels.view(Pixels)
        alive.add(pixels)
        most.append(len(alive))
        return loaded._replace(pixels=pixels)

    monkeypatch.setattr(core.data.dataset, "load_one", counted)
    monkeypatch.setattr(Pixels, "__hash__", object.__hash__, raising=False)
    images = load_images(records(tmp_path, 60), Dataset(image_size=(8, 8), cache_dir=None))
    assert len(images.images) == 60 and max(most) <= DECODERS + 1


def test_without_a_cache_nothing_is_written(phantom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = Dataset(layout="cephalo", root=str(phantom), image_size=(24, 24), cache_dir=str(tmp_path / "cache"))
    bare = kept.model_copy(update={"cache_dir": None})
    source = load_source(bare)
    some = source.splits["test"]
    assert (load_images(some, bare).images == load_images(some, kept).images).all()
    assert find_leaks(source, bare) == find_leaks(source, kept)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
