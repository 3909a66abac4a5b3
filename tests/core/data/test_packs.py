"""Packs: images one at a time, and nothing that is larger than the memory."""

import json
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

import core.bounds
from core.config.dataset import Dataset
from core.data.cache import load_one
from core.data.make_pack import write_pack
from core.data.packs import open_pack
from core.data.source import load_source
from tests.conftest import error_of

COUNT, SIDE = 24, 128


@pytest.fixture
def config(tmp_path):
    """24 pictures of noise, one of them of 16 bits."""
    (tmp_path / "data/images").mkdir(parents=True)
    for index in range(COUNT):
        pixels = np.random.default_rng(index).integers(0, 256, (SIDE, SIDE))
        kind = np.uint8 if index else np.uint16
        Image.fromarray((pixels * (1 if index else 200)).astype(kind)).save(tmp_path / f"data/images/{index:02d}.png")
    (tmp_path / "data/landmarks.csv").write_text("image,tip_x,tip_y\n00,1,2\n01,3,4\n")
    (tmp_path / "data/dataset.json").write_text(json.dumps({"landmarks": ["tip"], "splits": {"train": ["00", "01"]}}))
    return Dataset(root=str(tmp_path / "data"), cache_dir=None, image_size=(SIDE, SIDE))


def test_one_image_is_in_memory_at_a_time(config, tmp_path):
    """16 more of them take less than the pixels (4 bytes each) of two."""
    fewer = config.model_copy(update={"exclude": tuple(f"{index:02d}" for index in range(8, COUNT))})
    write_pack(config, tmp_path / "first.npz")  # what is imported and kept once is not counted
    peaks = []
    for some in (fewer, config):
        tracemalloc.start()
        try:
            write_pack(some, tmp_path / "new/pack.npz")
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < 2 * 4 * SIDE**2
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pack.npz"]


def test_a_pack_is_as_numpy_writes_it(config, tmp_path):
    """Each image's levels by hand; numpy reads all of it without pickles."""
    assert write_pack(config, tmp_path / "pack.npz") == COUNT
    source = load_source(config)
    records = {record.id: record for record in (*source.splits["train"], *source.unlabelled)}
    with np.load(tmp_path / "pack.npz", allow_pickle=False) as file:
        ids, levels, ranges = file["ids"].tolist(), file["pixels"], file["ranges"]
        assert set(ids) == records.keys() and levels.shape == (COUNT, 1, SIDE, SIDE) and levels.dtype == np.uint16
    packed = config.model_copy(update={"root": str(tmp_path / "pack.npz")})
    for row, name in enumerate(ids):
        pixels = load_one(records[name], config).pixels
        low, high = pixels.min(), pixels.max()
        assert ranges[row].tolist() == [low, high]
        expected = np.rint((pixels.astype(np.float64) - low) / (high - low) * 65535)
        assert np.abs(levels[row] - expected).max() <= 1
        again = open_pack(tmp_path / "pack.npz").load(name)
        assert np.abs(again.pixels - pixels).max() <= (high - low) / 65535
    assert load_source(packed).splits["train"][0].landmarks.tolist() == [[2, 1]]


def test_a_pack_beyond_memory_is_refused_before_it_is_read(config, tmp_path, monkeypatch):
    write_pack(config, tmp_path / "pack.npz")
    monkeypatch.setattr(core.bounds, "machine_bytes", lambda: COUNT * SIDE**2 * 2 - 1)
    monkeypatch.setattr(np, "load", None)
    said = error_of(open_pack, tmp_path / "pack.npz")
    assert said.startswith(f"dataset.root {tmp_path}/pack.npz, a pack of {COUNT} images, takes at least")
    assert said.endswith("make dataset.root the folder itself, or a pack of fewer images (dataset.exclude)")


def test_a_header_of_another_version_is_damage(config, tmp_path):
    write_pack(config, tmp_path / "pack.npz")
    with zipfile.ZipFile(tmp_path / "pack.npz") as pack:
        members = {name: pack.read(name) for name in pack.namelist()}
    members["pixels.npy"] = members["pixels.npy"].replace(b"NUMPY\x01", b"NUMPY\x07", 1)
    with zipfile.ZipFile(tmp_path / "wrong.npz", "w") as pack:
        for name, content in members.items():
            pack.writestr(name, content)
    assert "wrong.npz is damaged or not a pack" in error_of(open_pack, tmp_path / "wrong.npz")
