"""Synthetic volumes: the landmarks of the files lie on the drawn anatomy, found through nibabel's affine alone."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from core.errors import UserError
from core.phantoms import volumes as phantom_volume
from core.phantoms.volumes import LANDMARKS, render_volume, write_phantom_volumes

NAMES = list(LANDMARKS)
COUNT, SIZE = 6, (64, 64, 64)
TINY = (16, 18, 20)


class Case:
    """One written case, read without the project: `at` gives Hounsfield units at RAS mm."""

    def __init__(self, root: Path, index: int) -> None:
        self.image = nib.load(root / "images" / f"case_{index:03d}.nii.gz")
        self.voxels = np.asarray(self.image.dataobj).astype(float)
        markup = json.loads((root / "landmarks" / f"case_{index:03d}.mrk.json").read_text())["markups"][0]
        self.system = markup["coordinateSystem"]
        self.names = [point["label"] for point in markup["controlPoints"]]
        points = np.array([point["position"] for point in markup["controlPoints"]])
        self.marks = points * {"RAS": (1, 1, 1), "LPS": (-1, -1, 1)}[self.system]
        up, right = self["vertex"] - self["menton"], self["right condyle"] - self["left condyle"]
        right = right / np.linalg.norm(right)
        front = np.cross(up / np.linalg.norm(up), right)  # of the head, in RAS
        self.front = front / np.linalg.norm(front)
        self.right, self.up = right, np.cross(right, self.front)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.marks[self.names.index(name)]

    def at(self, places: np.ndarray) -> np.ndarray:
        inverse = np.linalg.inv(self.image.affine)
        return map_coordinates(self.voxels, apply_affine(inverse, np.atleast_2d(places)).T, order=1, cval=-1000)

    def within(self, centre: np.ndarray, radius: float) -> np.ndarray:
        """Hounsfield units in a ball of `radius` mm, sampled every 2 mm or so."""
        grid = np.stack(np.meshgrid(*[np.linspace(-radius, radius, 7)] * 3), axis=-1).reshape(-1, 3)
        return self.at(centre + grid[np.linalg.norm(grid, axis=1) <= radius])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "new" / "heads"
    write_phantom_volumes(folder, COUNT, SIZE, seed=0)
    return folder


@pytest.fixture(scope="module")
def cases(root: Path) -> list[Case]:
    return [Case(root, index) for index in range(1, COUNT + 1)]


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_files_are_in_the_folder_layout(root: Path, cases: list[Case]) -> None:
    ids = [f"case_{index:03d}" for index in range(1, COUNT + 1)]
    assert sorted(contents(root)) == sorted(
        ["dataset.json", "phantom.json", *(f"images/{name}.nii.gz" for name in ids),
         *(f"landmarks/{name}.mrk.json" for name in ids)]
    )  # fmt: skip
    assert [path.name for path in root.parent.iterdir()] == ["heads"]
    description = json.loads((root / "dataset.json").read_text())
    assert description["landmarks"] == NAMES and len(NAMES) == 12 and all(case.names == NAMES for case in cases)
    assert description["splits"] == {"train": ids[:3], "validation": ids[3:4], "test": ids[4:]}
    assert [case.system for case in cases] == ["LPS", "RAS"] * 3


@pytest.mark.parametrize("count, shares", [(3, (1, 1, 1)), (10, (6, 1, 3)), (40, (24, 4, 12))])
def test_splits_go_by_position(count: int, shares: tuple[int, ...]) -> None:
    splits = phantom_volume._splits(count)
    assert tuple(len(splits[name]) for name in ("train", "validation", "test")) == shares
    assert sum(splits.values(), []) == [f"case_{index:03d}" for index in range(1, count + 1)]


def test_grids_vary_about_the_nominal_one(cases: list[Case]) -> None:
    seen = []
    for case in cases:
        assert case.image.get_data_dtype() == np.int16 and case.image.header.get_xyzt_units()[0] == "mm"
        spacing, shape = np.array(case.image.header.get_zooms()), np.array(case.image.shape)
        assert (np.abs(shape[:2] / 64 - 1) <= 0.15).all() and 64 * 0.85 / 1.8 <= shape[2] <= 64 * 1.15
        np.testing.assert_array_less(199, spacing * shape)  # the field of view
        np.testing.assert_array_less(spacing * shape, 221)
        columns = case.image.affine[:3, :3] / spacing
        seen.append((spacing[2] / spacing[:2].mean(), columns))
    assert any(ratio > 1.3 for ratio, _ in seen) and any(ratio < 1.25 for ratio, _ in seen)
    for index in (0, 3):
        np.testing.assert_allclose(seen[index][1], np.diag([-1, -1, 1]), atol=1e-6)
        np.testing.assert_allclose(seen[index + 1][1], np.eye(3), atol=1e-6)
        oblique = seen[index + 2][1]
        turn = oblique * np.sign(np.diag(oblique))
        assert 4.9 < np.rad2deg(np.arccos((np.trace(turn) - 1) / 2)) < 15.1


@pytest.mark.parametrize("index", range(COUNT))
def test_landmarks_lie_on_their_structures(cases: list[Case], index: int) -> None:
    case = cases[index]
    for side in ("left", "right"):
        orbit = case.within(case[f"{side} orbit"], 4)
        assert -20 < orbit.mean() < 60 and orbit.max() < 150  # eyeball; fat and a wall of bone about it
        assert np.percentile(case.within(case[f"{side} orbit"], 24), 95) > 350
        assert case.within(case[f"{side} condyle"], 3).mean() > 500
        assert case.within(case[f"{side} zygion"], 2).mean() > 350
        away = case.right if side == "right" else -case.right
        assert case.at(case[f"{side} zygion"] + 14 * away) < -300  # bone is there, the cheek ends outside
    assert case.within(case["nasion"], 2).mean() > 500
    assert case.within(case["upper incisors"], 2).mean() > 500
    assert case.within(case["left parietal boss"], 4).mean() > 850
    foramen = case.within(case["foramen magnum"], 3)
    ring = [case.at(case["foramen magnum"] + step * case.right + tilt * case.up)
            for step in (-14, -12, 12, 14) for tilt in (-6, -3, 0, 3, 6)]  # fmt: skip
    assert abs(foramen.mean() - 35) < 40 and np.max(ring) > 300


@pytest.mark.parametrize("index", range(COUNT))
@pytest.mark.parametrize("name, outwards", [("menton", -1), ("vertex", 1)])
def test_tips_are_the_border_of_bone(cases: list[Case], index: int, name: str, outwards: int) -> None:
    case = cases[index]
    steps = np.arange(-5, 10, 0.25)
    profile = case.at(case[name] + outwards * steps[:, None] * case.up)
    assert profile[:6].mean() > 400 and profile[-8:].mean() < 0
    edge = steps[np.flatnonzero(profile > 0.5 * profile[:6].mean())[-1]]
    assert abs(edge) < 2.0  # mm, of voxels of 3 to 5


@pytest.mark.parametrize("index", range(COUNT))
def test_left_and_right_differ(cases: list[Case], index: int) -> None:
    """Only the left side has the boss, and a mirrored file turns the head inside out."""
    case = cases[index]
    middle = np.mean([case["vertex"], case["menton"], case["foramen magnum"], case["nasion"]], axis=0)
    boss = case["left parietal boss"]
    mirrored = boss - 2 * ((boss - middle) @ case.right) * case.right
    assert case.within(boss, 4).mean() > 700
    assert case.within(mirrored, 4).mean() < case.within(boss, 4).mean() - 250
    forward = case["nasion"] - case["foramen magnum"]
    assert np.cross(case["vertex"] - case["menton"], case.right) @ forward > 0  # up x right = front in RAS
    assert case.right[0] > 0.85 and case.up[2] > 0.75 and forward[1] > 0  # a tilt, not another orientation
    assert (boss - middle) @ case.right < -30


def test_intensities_are_those_of_a_ct(cases: list[Case]) -> None:
    for case in cases:
        air, soft, bone = ((case.voxels > low) & (case.voxels < high)
                           for low, high in ((-1024, -850), (-60, 130), (300, 1500)))  # fmt: skip
        assert air.mean() > 0.4 and soft.mean() > 0.1 and 0.015 < bone.mean() < 0.12
        assert case.voxels.min() >= -1024 and 900 < case.voxels.max() < 1600
        assert 3 < case.voxels[:, :, -2:][case.voxels[:, :, -2:] < -850].std() < 40  # noise


def test_mean_shape_is_a_poor_guess() -> None:
    """In voxels of a 32^3 resampling, upright: what a detector that ignores the image would score."""
    relative, tilts = [], []
    for index in range(1, 61):
        rng = np.random.default_rng([7, index])
        head = phantom_volume._sample_head(rng)
        marks = head.to_world(np.array(list(LANDMARKS.values())))
        tilts.append(Rotation.from_matrix(head.tilt).as_euler("xyz", degrees=True))
        orientation = phantom_volume._ORIENTATIONS[index % 3]
        grid = phantom_volume._sample_grid(SIZE, orientation, head.position, marks, rng)
        part = (apply_affine(np.linalg.inv(grid.affine), marks) + 0.5) / grid.size[::-1]
        assert part.min() > 0.0399 and part.max() < 0.9601
        relative.append(np.where(np.diag(grid.affine)[:3] > 0, part, 1 - part))
    error = np.linalg.norm(relative - np.mean(relative, axis=0), axis=-1)
    assert 2.2 < 32 * error.mean() < 2.9
    assert (32 * error.mean(axis=0)).min() > 1.5  # no landmark is easy
    assert 9 < np.abs(tilts).max() < 12.01 and np.std(tilts, axis=0).min() > 4


def test_shape_inverts_and_world_does_not_depend_on_the_grid() -> None:
    head = phantom_volume._sample_head(np.random.default_rng(5))
    points = np.random.default_rng(6).uniform(-85, 85, (500, 3))
    upright = (head.to_world(points) - head.position) @ head.tilt
    np.testing.assert_allclose(head.from_patient(upright.T).T, points, atol=1e-9)
    first = render_volume((20, 20, 20), "RAS", np.random.default_rng(8))
    other = render_volume((16, 24, 18), "oblique", np.random.default_rng(8))
    assert first[0].shape != other[0].shape and first[0].dtype == np.int16 and first[2].dtype == np.float64
    np.testing.assert_array_equal(first[2], other[2])


def test_cropped_drawing_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part is drawn in a window of its own; windows as large as the volume give the same volume."""
    cropped = render_volume((40, 40, 40), "RAS", np.random.default_rng(3))[0]
    real = phantom_volume.world_to_index
    rng = np.random.default_rng(3)
    monkeypatch.setattr(phantom_volume, "world_to_index", lambda points, affine: (
        np.array([[-1e3] * 3, [1e3] * 3]) if len(points) == 8 else real(points, affine)))  # fmt: skip
    whole = render_volume((40, 40, 40), "RAS", rng)[0]
    assert np.abs(whole.astype(int) - cropped).max() <= 1


def test_same_seed_same_files_and_cases_do_not_depend_on_the_count(tmp_path: Path) -> None:
    for name, count, seed in (("a", 3, 1), ("b", 3, 1), ("more", 4, 1), ("other", 3, 2)):
        write_phantom_volumes(tmp_path / name, count, TINY, seed)
    first, more, other = (contents(tmp_path / name) for name in ("a", "more", "other"))
    assert first == contents(tmp_path / "b")
    cases = [name for name in first if "/" in name]
    assert len(cases) == 6 and all(first[name] == more[name] and first[name] != other[name] for name in cases)
    assert len({first[name] for name in cases}) == 6


def test_interrupted_root_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write_phantom_volumes(whole, 3, TINY, 1)
    calls = []

    def stop_at_the_second(*arguments: object) -> tuple:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return render_volume(*arguments)

    monkeypatch.setattr(phantom_volume, "render_volume", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        write_phantom_volumes(cut, 3, TINY, 1)
    assert sorted(contents(cut)) == ["images/case_001.nii.gz", "landmarks/case_001.mrk.json", "phantom.json"]
    (cut / "landmarks" / "case_001.mrk.json").unlink()  # as if it had stopped between the two files
    write_phantom_volumes(cut, 3, TINY, 1)
    assert contents(cut) == contents(whole) and len(calls) == 5


def test_complete_root_is_left_alone(root: Path) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    write_phantom_volumes(root, COUNT, SIZE, seed=0)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == stamps


def test_other_content_and_impossible_requests_are_refused(root: Path, tmp_path: Path) -> None:
    for count, size, seed in ((COUNT + 1, SIZE, 0), (COUNT, (64, 64, 60), 0), (COUNT, SIZE, 1)):
        with pytest.raises(UserError, match="holds phantom") as error:
            write_phantom_volumes(root, count, size, seed)
        assert "\n" not in str(error.value)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="not a phantom data set"):
        write_phantom_volumes(tmp_path / "mine", 3, TINY, 0)
    for count, size, seed in ((2, TINY, 0), (3, (15, 20, 20), 0), (3, TINY, -1), (3, (20, 20), 0)):
        with pytest.raises(UserError, match="needed, got"):
            write_phantom_volumes(tmp_path / "none", count, size, seed)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
