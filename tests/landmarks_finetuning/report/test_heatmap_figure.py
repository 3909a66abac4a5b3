"""The heatmaps of two test images: hand-computed places from the network's pixels to the page, and the page's rows."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from landmarks_finetuning.pictures.cases import Case, case_of
from landmarks_finetuning.pictures.heatmap_files import (
    FlatCase,
    example_indices,
    flatten,
    read_heatmaps,
    write_heatmaps,
)
from landmarks_finetuning.pictures.overlays import PREDICTION, TRUTH
from landmarks_finetuning.predictions import Predictions
from landmarks_finetuning.report.build import build_report
from landmarks_finetuning.report.collect import aggregate, read_experiment
from landmarks_finetuning.report.figures import finetuning_curves
from landmarks_finetuning.report.heatmap_figure import ENLARGED, draw_heat, heatmap_rows
from landmarks_finetuning.report.order import best_first
from landmarks_finetuning.report.ssl_figures import read_ssl, ssl_curves
from tests.landmarks_finetuning.report.test_report import write_run
from tests.landmarks_finetuning.test_predictions import loaded, seeing_itself, upright_by_nibabel, write_nifti

NOWHERE = np.full((1, 2), np.nan)
DARK = np.zeros((100, 150), np.uint8)


def centre(weight: np.ndarray) -> np.ndarray:
    """(row, column) of the centre of mass."""
    rows, columns = np.mgrid[: weight.shape[0], : weight.shape[1]]
    return np.array([(weight * rows).sum(), (weight * columns).sum()]) / weight.sum()


def peaked(size: tuple[int, ...], *places: tuple[int, ...]) -> np.ndarray:
    """(N, *size) maps of one pixel each, 0.3 high: a map counts by its shape, not by its height."""
    maps = np.zeros((len(places), *size), np.float32)
    for one, place in zip(maps, places, strict=True):
        one[place] = 0.3
    return maps


def test_a_peak_lands_on_its_pixel():
    """A 10 x 20 grid over a picture of 100 x 150: pixel (2, 16) is centred at row 2.5 * 10 and column 16.5 * 7.5."""
    heat = np.zeros((10, 20), np.uint8)
    heat[2, 16] = 255
    drawn = np.asarray(draw_heat(DARK, heat, None, NOWHERE), dtype=float)
    assert drawn.shape == (100 * ENLARGED, 150 * ENLARGED, 3)
    expected = np.array([25.0, 123.75]) * ENLARGED - 0.5
    assert centre(drawn[..., 0]) == pytest.approx(expected, abs=0.1)
    assert drawn[tuple(np.rint(expected).astype(int))][0] > 150 and drawn[0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("colour", "found"), [(PREDICTION, True), (TRUTH, False)])
def test_a_mark_lands_on_its_pixel(colour, found):
    """Pixel (30, 111) of the picture is centred at (30.5, 111.5) of its edges, ENLARGED times as far in the drawing."""
    point = np.array([[30.0, 111.0]])
    drawn = draw_heat(DARK, np.zeros((10, 20), np.uint8), point if found else None, NOWHERE if found else point)
    pixels = np.asarray(drawn, dtype=float)
    weight = ((pixels[..., 0] - pixels[..., 2]) * (1 if colour[0] > colour[2] else -1)).clip(0)
    assert centre(weight) == pytest.approx([30.5 * ENLARGED - 0.5, 111.5 * ENLARGED - 0.5], abs=0.1)


def test_an_image_keeps_its_places():
    """200 x 100 pixels of 1 x 2 mm are square: 400 x 400 pixels, twice as many rows and four times as many columns."""
    pixels = np.zeros((1, 200, 100), np.float32)
    pixels[0, 20:23, 70:73] = 9.0  # centred at (21, 71)
    maps = peaked((20, 10), (2, 7), (15, 1))
    found, truth = np.array([[21.0, 71], [np.nan] * 2]), np.array([[0.0, 99], [199, 0]])
    flat = flatten(Case(pixels, found, truth, maps, maps[:1], (1.0, 2.0)))
    assert flat.picture.shape == (400, 400) and flat.picture.dtype == np.uint8
    assert centre(flat.picture) == pytest.approx([21.5 * 2 - 0.5, 71.5 * 4 - 0.5], abs=0.05)
    assert flat.found[0] == pytest.approx([21.5 * 2 - 0.5, 71.5 * 4 - 0.5]) and np.isnan(flat.found[1]).all()
    assert flat.truth == pytest.approx(np.array([[0.5, 397.5], [398.5, 1.5]]))
    assert np.argwhere(flat.heat == 255).tolist() == [[2, 7], [15, 1]] and flat.heat.sum() == 2 * 255
    assert np.argwhere(flat.target).tolist() == [[2, 7]]


def test_a_volume_is_seen_from_the_side_with_up_at_the_top():
    """10 x 20 x 6 voxels of 2 x 1 x 3 mm: 400 x 400 pixels; slice 8 of 0..9 is the second row from the top."""
    volume = np.zeros((1, 10, 20, 6), np.float32)
    volume[0, 8, 3, 5] = 7.0
    flat = flatten(Case(volume, np.array([[8.0, 3, 5]]), np.array([[0.0, 0, 0]]), peaked((5, 10, 3), (4, 1, 2)),
                        peaked((5, 10, 3), (0, 9, 0)), (2.0, 1.0, 3.0)))
    assert flat.picture.shape == (400, 400)
    assert flat.found[0] == pytest.approx([1.5 * 40 - 0.5, 3.5 * 20 - 0.5])
    assert centre(flat.picture) == pytest.approx(flat.found[0], abs=0.5)
    assert flat.truth[0] == pytest.approx([9.5 * 40 - 0.5, 0.5 * 20 - 0.5])
    assert np.argwhere(flat.heat).tolist() == [[0, 1]] and np.argwhere(flat.target).tolist() == [[4, 9]]


@pytest.mark.parametrize("dataset", [{"image_size": (6, 12, 24)}, {"image_size": (4, 4, 4), "resample_mm": 1.0}],
                         ids=["resized", "windows"])
def test_file_of_an_oblique_volume(tmp_path, dataset):
    """A network that returns its input: the bright voxel, the annotated one and the heat are at one place."""
    path = write_nifti(tmp_path / "a.nii")
    volume, _ = upright_by_nibabel(path)
    z, y, _ = np.unravel_index(volume.argmax(), volume.shape)
    images = loaded(tmp_path, path, landmarks=np.array([[1.0, 4, 17]]), spacing=(2.0, 1.0, 0.5), **dataset)
    points, doubts = np.array([[[1.0, 4, 17]]]), np.ones((3, 1, 1))
    found = Predictions(images, ["a"], points, *doubts, detector=seeing_itself(**dataset))
    write_heatmaps(tmp_path / "run/heatmaps.npz", found)
    [(name, flat)] = read_heatmaps(tmp_path / "run/heatmaps.npz").items()
    scale = np.array(flat.picture.shape) / volume.shape[:2]
    expected = np.array([volume.shape[0] - 1 - z + 0.5, y + 0.5]) * scale - 0.5
    assert name == "a.nii" and flat.truth[0] == pytest.approx(expected) and flat.found[0] == pytest.approx(expected)
    drawn = [flat.picture, flat.heat, *[flat.target] * images.fits]  # of 4 pixels the targets' sigma is below any pixel
    for values in drawn:
        peak = np.unravel_index(values.argmax(), values.shape)
        step = np.array(flat.picture.shape) / values.shape
        assert np.abs((np.array(peak) + 0.5) * step - 0.5 - expected).max() <= max(step.max(), scale.max()) / 2 + 1


def test_a_cropped_pack_shows_its_own_part(tmp_path):
    """Images of several sizes on one canvas, without the stored files: points are those of the image's own part."""
    paths = []
    for name, size in (("a.png", (8, 8)), ("b.png", (4, 6))):
        Image.new("L", size, 50).save(tmp_path / name)
        paths.append(tmp_path / name)
    images = loaded(tmp_path, *paths, landmarks=np.array([[1.0, 2]]), spacing=(1.0, 1.0), image_size=(4, 4),
                    resample_mm=1.0)
    bare = [record.__class__(record.id, None, record.landmarks, record.spacing) for record in images.records]
    found = Predictions(images.__class__(tuple(bare), images.images, images.points, images.maps, images.firsts,
                                         images.sizes, images.original_sizes, images.network_size),
                        ["a"], np.full((2, 1, 2), 1.0), *np.ones((3, 2, 1)))
    case = case_of(found, 1)
    assert case.pixels.shape == (1, 6, 4) and case.truth.tolist() == [[1, 2]] and case.found.tolist() == [[1, 1]]


def test_the_examples_are_the_first_and_the_middle():
    assert [example_indices(count) for count in (1, 2, 3, 250)] == [[0], [0, 1], [0, 1], [0, 125]]


def put_heatmaps(folder, *images):
    """A run's file about `images`."""
    arrays = {"images": np.array(images)}
    for k in range(len(images)):
        flat = FlatCase(np.full((30, 20), 80, np.uint8), *np.full((2, 6, 4), 9, np.uint8), *np.full((2, 2, 2), 5.0))
        arrays |= {f"{name}_{k}": value for name, value in flat._asdict().items()}
    np.savez_compressed(folder / "heatmaps.npz", **arrays)


@pytest.fixture
def study(tmp_path):
    """scratch is best at 25 labels and worst at 10; files at 1, 10 and 25 labels, at 25 of scratch alone."""
    root = tmp_path / "study"
    for shots, errors in ((1, (4, 8)), (10, (2, 3)), (25, (2, 1))):
        for backbone, error in zip(("ddpm", "scratch"), errors, strict=True):
            folder = write_run(root, backbone, shots, 0, [[error, error], [error, error + 2]])
            if shots < 25 or backbone == "scratch":
                put_heatmaps(folder, "000", "001")
    write_run(root, "mean_shape", 10, 0, [[20, 20], [20, 20]])
    return root


def test_rows_are_the_truth_and_the_methods_best_first(study):
    rows = heatmap_rows(read_experiment(study).runs)
    assert [(row["name"], row["shots"]) for row in rows] == [
        ("Truth", 10), ("From scratch", 10), ("Diffusion pre-training", 10)]  # most files at 1 and 10; as in the paper
    assert rows[2]["errors"] == [("000", 2.0), ("001", 3.0)] and rows[0]["picture"].size == (2 * 20 * ENLARGED + 8, 60)


def test_the_page_has_the_rows_and_a_figure(study):
    page = build_report([study])
    text = page.read_text(encoding="utf8")
    part = text[text.index('study_cephalo_test-heatmaps">'):]
    assert re.findall(r'alt="Heatmaps: ([^"]*)"', part) == ["Truth", "From scratch", "Diffusion pre-training"]
    assert "000 2.00 mm, 001 3.00 mm" in part
    with Image.open(page.parent / "figures/study_cephalo_test_heatmaps.png") as picture:
        assert picture.size == (2 * 20 * ENLARGED + 8, 3 * (60 + 40))


def test_runs_without_the_file_have_no_figure(tmp_path):
    page = build_report([write_run(tmp_path / "study", "ddpm", 10, 0, [[1, 1]]).parents[3]])
    assert "What each method sees" not in page.read_text(encoding="utf8")
    assert not list(page.parent.glob("figures/*heatmaps*"))


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "heatmaps.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"heatmaps\.npz is damaged"):
        read_heatmaps(tmp_path / "heatmaps.npz")


def test_methods_that_saw_other_images_are_shown_on_the_shared_ones(study):
    put_heatmaps(study / "landmarks/scratch/default/shots010_draw0_seed0", "001", "007")
    rows = heatmap_rows(read_experiment(study).runs)
    assert [image for row in rows for image, _ in row["errors"]] == ["001"] * 3


def test_legends_follow_the_table(study):
    """By the error at the most labels, 25: scratch, ddpm; the mean shape, with 10 labels at the most, comes last."""
    runs = read_experiment(study).runs
    assert list(best_first(runs)) == list(best_first(aggregate(runs))) == ["scratch", "ddpm", "mean_shape"]
    text = build_report([study]).read_text(encoding="utf8")
    legends = re.findall(r"(?:Diffusion pre-training|From scratch|Mean shape)</text>", text)
    found = [entry.partition("<")[0] for entry in legends]
    for first, second in (("From scratch", "Diffusion pre-training"), ("Diffusion pre-training", "Mean shape")):
        assert found.index(first) < found.index(second)
    curves = json.loads(re.search(r'<script type="application/json">(.*?)</script>', text, re.S).group(1))
    names = [curve["name"] for curve in curves["panels"][1]["curves"]]
    assert names == ["From scratch", "Diffusion pre-training", "Mean shape"]


def test_curves_of_the_encoders(tmp_path):
    """The entropy has a panel where DINO's is logged; a line cut off is left out, and a folder without lines."""
    lines = ['{"step": 5, "loss": 9.0}',
             '{"step": 10, "validation_loss": 8.0, "embedding_spread": 0.9, "effective_rank": 7}']
    teacher = '{"step": 10, "teacher_entropy": 0.9, "teacher_information": 0.1}'
    for name, text in (("mocov3", lines), ("dino_paper", [*lines, teacher]), ("simclrv2", [])):
        (tmp_path / "ssl" / name).mkdir(parents=True)
        (tmp_path / "ssl" / name / "metrics.jsonl").write_text("\n".join([*text, '{"st']))
    methods = read_ssl(tmp_path)
    assert list(methods) == ["dino_paper", "mocov3"]
    figure = ssl_curves(methods)
    titles = [axis.get_title(loc="left") for axis in figure.axes if axis.get_visible()]
    assert len(titles) == 4 and "entropy" in titles[3]
    drawn = {tuple(line.get_ydata()) for line in figure.axes[3].lines}
    assert drawn == {(0.9,), (0.1,)} and all(line.get_marker() == "o" for line in figure.axes[3].lines)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["DINO (paper)", "MoCoV3"]
    assert len([axis for axis in ssl_curves({"mocov3": methods["mocov3"]}).axes if axis.get_visible()]) == 3
    assert ssl_curves({}) is None


def test_one_validation_point_is_a_mark(study):
    figure = finetuning_curves(read_experiment(study).runs, "mm")
    lines = {(line.get_marker(), len(line.get_xdata())) for axis in figure.axes for line in axis.lines}
    assert lines == {("None", 2), ("o", 1)}
