"""Leaks: altered copies against different images, pairs across groups, what is kept, what is scored without them."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter, shift, zoom

import core.data.leaks
import landmarks_finetuning.stages
from core.config.dataset import Dataset
from core.config.load import parse_config
from core.data.dataset import load_images
from core.data.leaks import LARGEST_UNEXPLAINED, MARGIN, Leak, find_leaks, leak_lines, leaked_ids, reduced, unexplained
from core.data.make_pack import write_pack
from core.data.records import SPLITS, DataSource, Record
from core.data.shots import labelled_subset, scored_records
from core.data.source import load_source
from core.errors import UserError
from core.runs.identity import check_cell
from core.runs.places import Cell, cell_dir
from landmarks_finetuning.evaluate import score
from landmarks_finetuning.predictions import Predictions
from landmarks_finetuning.train import finetune_cell
from study.plan import print_plan
from tests.conftest import DATA

real_data = pytest.mark.skipif(not DATA.is_dir(), reason="real data not found; set LANDMARK_DATA")
SIZES = {2: (120, 100), 3: (50, 60, 55)}


def texture(seed, dims=2):
    """A smooth random image or volume, 0 to 255, whose structures measure a tenth of it."""
    size = SIZES[dims]
    pixels = gaussian_filter(np.random.default_rng(seed).normal(size=size), [n / 20 for n in size])
    return (255 * (pixels - pixels.min()) / np.ptp(pixels)).astype(np.float32)


def jpeg(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=40)
    return np.asarray(Image.open(buffer)).astype(np.float32)


def moved(pixels, share):
    return shift(pixels, [share * n * (-1) ** axis for axis, n in enumerate(pixels.shape)], order=1, mode="nearest")


COPIES = {
    "brighter": lambda pixels: 0.7 * pixels + 60,
    "gamma": lambda pixels: 255 * (pixels / 255) ** 0.6,
    "clipped": lambda pixels: (1.15 * pixels - 10).clip(0, 255),
    "resized": lambda pixels: zoom(pixels, [0.9, 1.1, 0.8][: pixels.ndim], order=1),
    "shifted 1 %": lambda pixels: moved(pixels, 0.01),
    "shifted 2 %": lambda pixels: moved(pixels, 0.02),
    "cut off": lambda pixels: pixels[tuple(slice(int(0.02 * n) or 1, -(int(0.02 * n) or 1)) for n in pixels.shape)],
}


def share(first, second):
    return unexplained(reduced(first[None])[None], reduced(second[None])[None])[0, 0]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("change", COPIES)
def test_altered_copies_are_the_same_picture(change, dims):
    for seed in range(3):
        pixels = texture(seed, dims)
        assert share(pixels, COPIES[change](pixels)) < LARGEST_UNEXPLAINED
        assert share(texture(seed + 10, dims), COPIES[change](pixels)) > 10 * LARGEST_UNEXPLAINED


def test_reencoded_copies_and_their_combination():
    pixels = texture(0)
    assert share(pixels, jpeg(pixels)) < 0.001
    assert share(pixels, jpeg(COPIES["resized"](COPIES["gamma"](moved(pixels, 0.015))))) < LARGEST_UNEXPLAINED


@pytest.mark.parametrize("dims", [2, 3])
def test_unexplained_is_the_residual_of_a_least_squares_fit(dims):
    first, second = (np.stack([reduced(texture(seed, dims)[None]) for seed in seeds]) for seeds in ((0, 1, 2), (3, 4)))
    found = unexplained(first, second)
    assert found.shape == (3, 2)
    inner = (slice(MARGIN, -MARGIN),) * dims

    def residual(image, target):
        places = np.indices(image.shape) / (image.shape[0] - 1) * 2 - 1
        slopes = [np.gradient(image, axis=axis) for axis in range(dims)]
        terms = [np.ones_like(image), image, *slopes, *(p * s for p, s in zip(places, slopes, strict=True))]
        matrix, wanted = np.stack([term[inner].ravel() for term in terms], axis=1), target[inner].ravel()
        left = wanted - matrix @ np.linalg.lstsq(matrix, wanted, rcond=None)[0]
        return (left**2).sum() / ((wanted - wanted.mean()) ** 2).sum()

    for m in range(3):
        for n in range(2):
            expected = min(residual(first[m], second[n]), residual(second[n], first[m]))
            assert found[m, n] == pytest.approx(expected, abs=1e-6)


def test_a_flat_image_has_nothing_in_common_with_any():
    flat = np.full((20, 30), 7.0, np.float32)
    assert share(flat, texture(0)) == share(flat, flat) == 1


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels.ndim == 3:
        np.save(path, pixels)
    else:
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def make_source(tmp_path, dims=2, **groups):
    """A data set of {group: {id: pixels or (pixels, patient)}} with one landmark at (10, 20[, 30])."""
    made = {}
    for name, images in groups.items():
        records = []
        for key, given in images.items():
            pixels, patient = given if isinstance(given, tuple) else (given, None)
            path = save(tmp_path / f"{name}/{key}.{'npy' if dims == 3 else 'png'}", pixels)
            records.append(Record(key, path, np.array([[10.0, 20, 30][:dims]]), None, patient))
        made[name] = tuple(records)
    return DataSource("folder", ("tip",), {split: made.get(split, ()) for split in SPLITS},
                      made.get("unlabelled", ()), "px", (3.0,), None, tmp_path)


def configure(tmp_path, dims=2, **changes):
    usual = {"root": str(tmp_path), "cache_dir": str(tmp_path / "cache"), "image_size": (48,) * dims}
    return Dataset(**{**usual, **changes})


@pytest.mark.parametrize("dims", [2, 3])
def test_pairs_across_groups(tmp_path, dims):
    a, b, c, d, e = (texture(seed, dims) for seed in range(5))
    source = make_source(
        tmp_path, dims, train={"t1": a, "t2": b, "t3": (texture(5, dims), "p")},
        validation={"v1": c, "v2": moved(b, 0.02)},
        test={"x1": a, "x2": moved(c, 0.01), "x3": (d, "p"), "x4": e, "x5": e}, unlabelled={"u1": d, "u2": c})
    leaks = find_leaks(source, configure(tmp_path, dims))
    assert set(leaks) == {  # x4 = x5 are on one side, v1 = u2 are both pre-trained on
        Leak("test", "x1", "train", "t1", "identical"), Leak("test", "x2", "validation", "v1", "near"),
        Leak("test", "x3", "train", "t3", "patient"), Leak("test", "x3", "unlabelled", "u1", "identical"),
        Leak("test", "x2", "unlabelled", "u2", "near"), Leak("validation", "v2", "train", "t2", "near")}  # fmt: skip
    assert len(leaks) == 6
    assert leaked_ids(leaks, "test") == ["x1", "x2", "x3"] and leaked_ids(leaks, "validation") == ["v2"]


def test_finding_is_kept_until_something_changes(tmp_path, monkeypatch):
    source = make_source(tmp_path, train={"t1": texture(0)}, test={"x1": texture(0), "x2": texture(1)})
    config, read, load = configure(tmp_path), [], core.data.leaks.load_one
    monkeypatch.setattr(core.data.leaks, "load_one",
                        lambda record, config: read.append(record.id) or load(record, config))
    first = find_leaks(source, config)
    assert read == ["t1", "x1", "x2"]
    assert find_leaks(source, config) == first == (Leak("test", "x1", "train", "t1", "identical"),) and len(read) == 3
    swapped = replace(source, splits={**source.splits, "train": source.splits["test"], "test": source.splits["train"]})
    assert find_leaks(swapped, config)[0].id == "t1"
    together = [replace(record, patient="p") for record in source.labelled]
    known = replace(source, splits={"train": (together[0],), "validation": (), "test": tuple(together[1:])})
    assert [leak.kind for leak in find_leaks(known, config)] == ["identical", "patient"]
    save(source.splits["test"][0].image, texture(2))
    assert find_leaks(source, config) == ()


def folder_of(tmp_path, **pixels):
    """A folder data set of one training, one validation and three test images a ... e."""
    for name, image in pixels.items():
        save(tmp_path / f"data/images/{name}.png", image)
    rows = [f"{name},{10 + place},20" for place, name in enumerate(pixels)]
    (tmp_path / "data/landmarks.csv").write_text("\n".join(["image,tip_x,tip_y", *rows]))
    splits = {"train": ["a"], "validation": ["b"], "test": ["c", "d", "e"]}
    (tmp_path / "data/dataset.json").write_text(json.dumps({"landmarks": ["tip"], "splits": splits, "spacing_mm": 0.5}))
    return configure(tmp_path, root=str(tmp_path / "data"), layout="folder")


@pytest.fixture
def leaky(tmp_path):
    """Config of a folder data set whose test images c and d are its training image (the file, and shifted)."""
    a = texture(0)
    return folder_of(tmp_path, a=a, b=texture(1), c=a, d=moved(a, 0.02), e=texture(2))


def test_packs(leaky, tmp_path):
    before = find_leaks(load_source(leaky), leaky)
    assert [(leak.id, leak.kind) for leak in before] == [("c", "identical"), ("d", "near")]
    write_pack(leaky, tmp_path / "pack.npz")
    packed = leaky.model_copy(update={"root": str(tmp_path / "pack.npz")})
    assert find_leaks(load_source(packed), packed) == before
    with np.load(tmp_path / "pack.npz") as file:  # as packs were before they held digests
        np.savez(tmp_path / "old.npz", **{key: file[key] for key in file.files if key != "digests"})
    old = leaky.model_copy(update={"root": str(tmp_path / "old.npz")})
    assert [(leak.id, leak.kind) for leak in find_leaks(load_source(old), old)] == [("c", "near"), ("d", "near")]


def test_lines_of_the_plan():
    leaks = [Leak("test", f"x{n}", "train", "t", "near") for n in range(7)]
    leaks.append(Leak("validation", "v", "train", "t", "patient"))
    lines = leak_lines(leaks)
    assert lines[0].startswith("leaks  7 test, 1 validation images have a twin on the other side of the split")
    assert lines[1] == "    test x0 = train t (the same picture)" and lines[6:] == ["    and 3 more pairs"]
    assert len(leak_lines(leaks[-1:])) == 2 and leak_lines([]) == []


def study(tmp_path, dataset, leaked="keep", **finetune):
    return parse_config({"experiment": {"name": "s", "output_dir": str(tmp_path / "runs")},
                         "dataset": json.loads(dataset.model_dump_json()), "evaluation": {"leaked": leaked},
                         "unet": {"base_channels": 4, "channel_multipliers": [1]},
                         "finetune": {"shots": [1], "draws": [0], **finetune}}, "study.json")


def test_the_plan_shows_them(leaky, tmp_path, capsys):
    source = load_source(leaky)
    print_plan(study(tmp_path, leaky), ("finetune",), source, [])
    out = capsys.readouterr().out
    assert "leaks  2 test images have" in out and "    test c = train a (identical files)\n" in out
    print_plan(study(tmp_path, leaky), ("pretrain",), source, [])  # nothing is scored
    assert "leaks" not in capsys.readouterr().out


def scored(tmp_path, dataset, leaked, errors):
    """metrics.json of predictions that miss the test images by `errors` {id: pixels of 0.5 mm}."""
    config, source = study(tmp_path, dataset, leaked), load_source(dataset)
    held = load_images(scored_records(source, config.evaluation, config.dataset), dataset)
    points = held.original_points() + np.array([[[errors[record.id], 0]] for record in held.records])
    run_dir = tmp_path / "run"
    score(run_dir, config, source, Predictions(held, source.landmark_names, points, *np.ones((3, len(points), 1))),
          {"backbone": "ddpm", "decoder": None})
    return json.loads((run_dir / "metrics.json").read_text())


def test_figures_without_leaks(leaky, tmp_path):
    errors = {"c": 1, "d": 3, "e": 20}
    kept = scored(tmp_path, leaky, "keep", errors)
    assert (kept["images"], kept["leaked"], kept["physical"]["mre"]) == (3, "keep", pytest.approx(4))
    expected = {"left_out": ["c", "d"], "images": 1, "mre": pytest.approx(10), "median": pytest.approx(10),
                "sdr": {"2": 0, "2.5": 0, "3": 0, "4": 0}}
    assert kept["without_leaks"] == expected and kept["human"] is None
    dropped = scored(tmp_path, leaky, "drop", errors)
    assert (dropped["images"], dropped["leaked"], dropped["physical"]["mre"]) == (1, "drop", pytest.approx(10))
    assert dropped["without_leaks"] == expected
    clean = folder_of(tmp_path / "clean", **{name: texture(seed) for seed, name in enumerate("abcde")})
    assert scored(tmp_path, clean, "drop", errors)["without_leaks"] is None


def test_nothing_left_to_score(tmp_path):
    dataset = folder_of(tmp_path, a=texture(0), b=texture(1), **{name: texture(0) for name in "cde"})
    with pytest.raises(UserError, match='evaluation.leaked "drop" leaves none of the 3 test images of .*data'):
        scored_records(load_source(dataset), study(tmp_path, dataset, "drop").evaluation, dataset)
    nothing = scored(tmp_path, dataset, "keep", dict.fromkeys("cde", 2))["without_leaks"]
    assert (nothing["images"], nothing["mre"]) == (0, None)


def test_cells_scored_the_other_way_are_refused(leaky, tmp_path):
    cell, config = Cell("ddpm", 1, 0, 0), study(tmp_path, leaky)
    folder = cell_dir(config, cell)
    folder.mkdir(parents=True)
    values = config.plain()
    for keep_key in (True, False):  # runs from before the key kept them all
        if not keep_key:
            del values["evaluation"]["leaked"]
        (folder / "config.json").write_text(json.dumps(values))
        check_cell(config, cell)
        with pytest.raises(UserError, match='evaluation.leaked = "keep", now it is "drop"'):
            check_cell(study(tmp_path, leaky, "drop"), cell)


@pytest.mark.parametrize("validation", ["official", "none", 2])
@pytest.mark.parametrize("selection", ["random", "first"])
def test_test_images_choose_neither_labels_nor_checkpoint(phantom, tmp_path, monkeypatch, validation, selection):
    dataset = Dataset(layout="cephalo", root=str(phantom), image_size=(16, 16), cache_dir=str(tmp_path / "cache"))
    config = study(tmp_path, dataset, shots=[5, 130], draws=[0, 1, 2], validation=validation, selection=selection)
    source = load_source(dataset)
    allowed = {split: {record.id for record in source.splits[split]} for split in SPLITS}
    for shots in (5, 130):
        for draw in (0, 1, 2):
            training, held = labelled_subset(source, config.finetune, shots, draw)
            assert {record.id for record in training} <= allowed["train"]
            assert {record.id for record in held} <= allowed["validation" if validation == "official" else "train"]
            assert not {record.id for record in training} & {record.id for record in held}
    seen = []

    def load(records, config):
        seen.extend(record.id for record in records)
        return load_images(records, config)

    monkeypatch.setattr(landmarks_finetuning.stages, "load_images", load)
    monkeypatch.setattr(landmarks_finetuning.stages, "train", lambda *arguments: SimpleNamespace())
    finetune_cell(config, Cell("scratch", 5, 0, 0))  # all that the loop gets
    assert len(seen) == 5 + 20 * (validation == "official") and not set(seen) & allowed["test"]


@real_data
def test_real_cephalograms(tmp_path):
    """Two pairs are one file. The doctors' points, which the search does not see, tell all pairs from all others."""
    config = Dataset(layout="cephalo", root=str(DATA / "cephalo"), image_size=(64, 64), cache_dir=str(tmp_path))
    source = load_source(config)
    leaks = find_leaks(source, config)
    assert {(leak.twin, leak.id) for leak in leaks if leak.kind == "identical"} == {("038", "283"), ("144", "173")}
    points = {split: np.stack([record.landmarks for record in source.splits[split]]) for split in SPLITS}
    expected = set()
    for split, other in (("test", "train"), ("test", "validation"), ("validation", "train")):
        apart_mm = 0.1 * np.linalg.norm(points[split][:, None] - points[other][None], axis=3).mean(axis=2)
        expected |= {(source.splits[split][m].id, source.splits[other][n].id) for m, n in np.argwhere(apart_mm < 2)}
        assert not ((apart_mm > 1.5) & (apart_mm < 2.5)).any()
    assert {(leak.id, leak.twin) for leak in leaks} == expected and len(leaks) == len(leaked_ids(leaks, "test")) == 20


@real_data
def test_real_chest_images_raise_no_alarm(tmp_path):
    config = Dataset(layout="chest", root=str(DATA / "chest"), image_size=(64, 64), cache_dir=str(tmp_path))
    images = np.stack([reduced(image.numpy()) for image in load_images(load_source(config).labelled, config).images])
    shares = unexplained(images, images)[np.triu_indices(len(images), 1)]
    assert shares.min() > 1.5 * LARGEST_UNEXPLAINED
