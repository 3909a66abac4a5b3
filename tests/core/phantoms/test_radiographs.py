"""Synthetic radiographs: the files are in the published layout and the labels are where the drawn anatomy is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from core.phantoms import radiographs as phantom
from core.phantoms.radiographs import LANDMARK_NAMES, render_radiograph, write_phantom_radiographs

SIZE = (300, 242)


def generator(index: int, seed: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, index])


def drawn(index: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, list[phantom.Shape], phantom.Pose]:
    """Landmarks (19, 2) in pixels as y, x, the shapes and the pose of image `index`."""
    rng = generator(index)
    marks, shapes = phantom._build_head(rng)
    pose = phantom._sample_pose(marks, size, rng)
    return pose.to_pixels(marks)[:, ::-1], shapes, pose


def alone(name: str, shapes: list[phantom.Shape], pose: phantom.Pose, size: tuple[int, int] = SIZE) -> np.ndarray:
    """What one named shape adds to the attenuation map, as the difference of two renders, normalised to 0..1."""
    without = phantom._attenuation([shape for shape in shapes if shape.name != name], pose, size)
    change = np.abs(phantom._attenuation(shapes, pose, size) - without)
    return change / change.max()


def of(points: np.ndarray, name: str) -> np.ndarray:
    return points[LANDMARK_NAMES.index(name)]


def extreme(mask: np.ndarray, direction: np.ndarray) -> float:
    """Farthest place of a rendered shape along a unit (y, x) direction, in pixels."""
    return float((np.argwhere(mask > 0.5) @ direction).max())


@pytest.fixture(scope="module")
def many() -> np.ndarray:
    """Landmarks (100, 19, 2) of 100 heads."""
    return np.stack([drawn(i)[0] for i in range(1, 101)])


def test_names_are_unique_and_complete() -> None:
    assert len(set(LANDMARK_NAMES)) == len(LANDMARK_NAMES) == len(phantom._KEYS) == 19


def test_same_generator_same_image_other_index_other_image() -> None:
    first, truth = render_radiograph(SIZE, generator(3))
    again, truth_again = render_radiograph(SIZE, generator(3))
    other, _ = render_radiograph(SIZE, generator(4))
    assert first.dtype == np.uint8 and first.shape == SIZE
    assert truth.dtype == np.float64 and truth.shape == (19, 2)
    assert np.array_equal(first, again) and np.array_equal(truth, truth_again)
    assert np.abs(first.astype(int) - other).mean() > 5
    np.testing.assert_array_equal(truth, drawn(3)[0])


def test_files_are_in_the_published_layout(tmp_path: Path) -> None:
    root = tmp_path / "new" / "ceph"
    write_phantom_radiographs(root, 3, (150, 121), seed=5)
    assert sorted(p.name for p in root.iterdir()) == ["400_junior", "400_senior", "jpg", "phantom.json"]
    assert [p.name for p in root.parent.iterdir()] == ["ceph"]
    for i in range(1, 4):
        picture, truth = render_radiograph((150, 121), generator(i, seed=5))
        with Image.open(root / "jpg" / f"{i:03d}.jpg") as image:
            assert image.mode == "L" and image.size == (121, 150)
            assert np.abs(np.asarray(image, dtype=float) - picture).mean() < 6
        text = (root / "400_junior" / f"{i:03d}.txt").read_text()
        assert text == (root / "400_senior" / f"{i:03d}.txt").read_text()
        lines = text.splitlines()
        assert len(lines) == 19 and all(len(part.split(".")[1]) == 2 for line in lines for part in line.split(","))
        labels = np.array([[float(part) for part in line.split(",")] for line in lines])
        np.testing.assert_allclose(labels[:, ::-1], truth, atol=0.0051)


def test_image_does_not_depend_on_the_count(tmp_path: Path) -> None:
    write_phantom_radiographs(tmp_path / "one", 1, (60, 48))
    write_phantom_radiographs(tmp_path / "two", 2, (60, 48))
    for name in ("jpg/001.jpg", "400_senior/001.txt"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_existing_folder_is_reused_or_refused(tmp_path: Path) -> None:
    root = tmp_path / "ceph"
    root.mkdir()
    write_phantom_radiographs(root, 1, (60, 48))
    stamp = (root / "jpg" / "001.jpg").stat().st_mtime_ns
    write_phantom_radiographs(root, 1, (60, 48))
    assert (root / "jpg" / "001.jpg").stat().st_mtime_ns == stamp
    for count, size, seed in ((2, (60, 48), 0), (1, (60, 50), 0), (1, (60, 48), 1)):
        with pytest.raises(UserError, match="holds phantom") as error:
            write_phantom_radiographs(root, count, size, seed)
        assert "\n" not in str(error.value)
    recipe = json.loads((root / "phantom.json").read_text())
    assert {key: recipe[key] for key in ("count", "size", "seed")} == {"count": 1, "size": [60, 48], "seed": 0}


def test_foreign_folder_and_impossible_requests_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="not a phantom data set"):
        write_phantom_radiographs(tmp_path / "mine", 1, (60, 48))
    for count, size, seed in ((0, (60, 48), 0), (1, (8, 8), 0), (1, (60, 48), -1)):
        with pytest.raises(UserError, match="needed, got"):
            write_phantom_radiographs(tmp_path / "none", count, size, seed)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(size: tuple[int, int], rng: np.random.Generator) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(phantom, "render_radiograph", fail)
    with pytest.raises(KeyboardInterrupt):
        write_phantom_radiographs(tmp_path / "ceph", 1, (60, 48))
    assert list(tmp_path.iterdir()) == []


def test_landmarks_stay_inside(many: np.ndarray) -> None:
    assert many.min() >= 0.04 * min(SIZE)
    assert np.all(many <= 0.96 * np.array(SIZE))


def test_mean_shape_is_a_bad_guess(many: np.ndarray) -> None:
    spread = np.linalg.norm(many - many.mean(axis=0), axis=2) * 240 / SIZE[0]
    assert 10 < spread.mean() < 14
    assert spread.mean(axis=0).min() > 8


def test_shape_varies_beyond_similarity(many: np.ndarray) -> None:
    shapes = (many - many.mean(axis=1, keepdims=True)) @ np.array([1j, 1])
    model = shapes.mean(axis=0)
    fit = shapes @ model.conj() / np.vdot(model, model)
    assert np.abs(shapes - fit[:, None] * model).mean() * 240 / SIZE[0] > 2.5


@pytest.mark.parametrize("index", [1, 2, 3])
@pytest.mark.parametrize("shape, landmark", [("sella pit", "sella"), ("ear rod", "porion"), ("ear rod hole", "porion")])
def test_centres_are_the_centre_of_mass(index: int, shape: str, landmark: str) -> None:
    truth, shapes, pose = drawn(index)
    weight = alone(shape, shapes, pose)
    centre = np.array([(weight.sum(axis=1) @ np.arange(SIZE[0])), (weight.sum(axis=0) @ np.arange(SIZE[1]))])
    np.testing.assert_allclose(centre / weight.sum(), of(truth, landmark), atol=0.1)


@pytest.mark.parametrize("index", [1, 2, 3])
@pytest.mark.parametrize(
    "shape, landmark, direction",  # (y, x) in the head's own axes
    [
        ("orbit", "orbitale", (1, 0)),
        ("mandible", "menton", (1, 0)),
        ("mandible", "gnathion", (1, 6.5 / 7.5)),
        ("palate", "anterior nasal spine", (0, 1)),
        ("palate", "posterior nasal spine", (0, -1)),
        ("upper incisor", "upper incisor", (1, 0.35)),
        ("lower incisor", "lower incisor", (-1, 0.4)),
    ],
)
def test_tips_are_the_extreme_of_their_shape(index: int, shape: str, landmark: str, direction: tuple) -> None:
    size = (600, 484)
    truth, shapes, pose = drawn(index, size)
    along = pose.matrix[::-1, ::-1] @ np.array(direction) / np.hypot(*(pose.matrix[::-1, ::-1] @ np.array(direction)))
    millimetres = (extreme(alone(shape, shapes, pose, size), along) - of(truth, landmark) @ along) * 240 / size[0]
    assert abs(millimetres) < 0.8


@pytest.mark.parametrize(
    "landmark, down", [("upper lip", 0), ("lower lip", 0), ("soft-tissue pogonion", 0), ("subnasale", 1)]
)
def test_profile_landmarks_lie_on_the_skin(landmark: str, down: float) -> None:
    for index in range(1, 6):
        truth, shapes, pose = drawn(index)
        mask = alone("soft tissue", shapes, pose)
        outward = pose.matrix[::-1] @ (1, down)
        outward /= np.hypot(*outward)
        steps = np.arange(-4, 4.01, 0.25)
        y, x = np.rint(of(truth, landmark)[:, None] + outward[:, None] * steps).astype(int)
        edge = steps[np.argmin(np.abs(mask[y, x] - 0.5))]
        assert abs(edge) <= 1.25


def test_every_landmark_is_seen_on_the_film() -> None:
    contrast = []
    for index in range(1, 13):
        image, truth = render_radiograph(SIZE, generator(index))
        for y, x in np.rint(truth).astype(int):
            patch = image[y - 5 : y + 6, x - 5 : x + 6].astype(float)
            contrast.append(np.quantile(patch, 0.95) - np.quantile(patch, 0.05))
    assert np.reshape(contrast, (-1, 19)).mean(axis=0).min() > 20
