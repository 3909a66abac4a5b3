"""Pairing of volumes and landmarks: hand-made mistakes, random right shapes, real volumes spoilt one by one."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from core.data.pairing import Case, check_against_others, check_inside
from core.errors import UserError
from core.formats.geometry import Geometry, geometry_of
from tests.conftest import DATA

real_data = pytest.mark.skipif(not (DATA / "mouse_ct").is_dir(), reason="real data not found; set LANDMARK_DATA")
NAMES = [str(number + 1) for number in range(45)]
SWITCH = r"\(set dataset.check_geometry to false if this is right\)$"
MISTAKES = {  # (x, y, z) of the world -> what is said of it
    "-x": (np.diag([-1.0, 1, 1]), "with x negated .*left and right are mirrored"),
    "-y": (np.diag([1.0, -1, 1]), "with y negated .*front and back are mirrored"),
    "-z": (np.diag([1.0, 1, -1]), "with z negated .*top and bottom are mirrored"),
    "lps": (np.diag([-1.0, -1, 1]), "with x and y negated .*LPS and RAS are exchanged: correct its coordinateSystem"),
    "xy": (np.eye(3)[[1, 0, 2]], "axes x and y are swapped"),
    "xz": (np.eye(3)[[2, 1, 0]], "axes x and z are swapped"),
    "yz": (np.eye(3)[[0, 2, 1]], "axes y and z are swapped"),
    "cycle": (np.eye(3)[[1, 2, 0]], r"with \(x, y, z\) read as \(y, z, x\)"),  # the file has (z, x, y)
}
FLIPS = [name for name, (matrix, _) in MISTAKES.items() if np.linalg.det(matrix) < 0]


def case(name, geometry, points):
    return Case(name, Path(f"images/{name}.nii.gz"), Path(f"landmarks/{name}.mrk.json"), geometry, np.asarray(points))


def voxels(world, affine):
    """RAS mm to voxels (z, y, x) by nibabel."""
    return nib.affines.apply_affine(np.linalg.inv(affine), world)[:, ::-1]


def world(spoilt):
    return nib.affines.apply_affine(spoilt.geometry.affine, spoilt.points[:, ::-1])


def about_centre(good, matrix):
    """The case with its world points mapped about the centre of its volume."""
    affine = good.geometry.affine
    centre = nib.affines.apply_affine(affine, (np.array(good.geometry.size[::-1]) - 1) / 2)
    return replace(good, points=voxels((world(good) - centre) @ matrix + centre, affine))


def tilt(rng, degrees):
    axis = rng.normal(size=3)
    return Rotation.from_rotvec(axis / np.linalg.norm(axis) * np.radians(rng.uniform(0, degrees))).as_matrix()


def synthetic(seed, count, points=8, squash=(1, 1, 1), degrees=20):
    """Cases of one random shape, tilted, scaled by 0.7 .. 1.3, with 5 % of noise, in LPS volumes of 1 mm."""
    rng = np.random.default_rng(seed)
    shape = rng.normal(size=(points, 3)) * squash
    shape *= 30 / np.sqrt(shape.var(axis=0).sum())
    affine = np.diag([-1.0, -1, 1, 1])
    affine[:2, 3] = 299
    noise = rng.normal(size=(count, points, 3)) * 1.5 / np.sqrt(3)
    turned = [(shape + noise[i]) @ tilt(rng, degrees) * rng.uniform(0.7, 1.3) + 150 for i in range(count)]
    geometry = geometry_of((300, 300, 300), affine)
    return [case(f"c{i}", geometry, voxels(turned[i], affine)) for i in range(count)]


@cache
def mice():
    found = []
    for path in sorted((DATA / "mouse_ct/images").glob("*.nii.gz")):
        image, name = nib.load(path), path.name.removesuffix(".nii.gz")
        markups = json.loads((DATA / f"mouse_ct/landmarks/{name}.mrk.json").read_text())["markups"][0]
        ras = np.array([point["position"] for point in markups["controlPoints"]]) * (-1, -1, 1)
        found.append(case(name, geometry_of(image.shape[::-1], image.affine), voxels(ras, image.affine)))
    return found


@cache
def mice_alike():
    """Real cases turned to the orientation of one of them, then tilted by up to 15 degrees."""
    rng, found, pose_of = np.random.default_rng(1), [], mice()[2]
    for one in mice()[:10]:
        target = world(pose_of) - world(pose_of).mean(axis=0)
        turn, _ = Rotation.align_vectors(target, world(one) - world(one).mean(axis=0))
        found.append(about_centre(one, turn.as_matrix().T @ tilt(rng, 15)))
    return found


# ---- inside


LPS = geometry_of((146, 138, 138), np.array([[-0.5, 0, 0, 10], [0, -0.5, 0, 10], [0, 0, 0.5, 5], [0, 0, 0, 1.0]]))
INSIDE = np.array([[100, 20, 30], [140, 100, 60.2], [3, 70, 90.0]])  # z, y, x


def test_the_border_is_half_a_voxel():
    names, size = ["a", "b"], np.array(LPS.size)
    check_inside(case("a", LPS, [[-0.5, -0.5, -0.5], size - 0.5]), names)
    check_inside(case("a", LPS, [[np.nan] * 3, size - 0.5]), names)
    with pytest.raises(UserError, match='^landmarks/a.mrk.json: landmark "b" lies outside images/a.nii.gz: '):
        check_inside(case("a", LPS, [[0, 0, 0], size - [0.5, 0.5, 0.4]]), names)


def test_the_line_says_which_where_and_in_what():
    points = np.array([[np.nan] * 3, [100, 20, 30], [135.2, 60.2, -43.1], [200, 1, 1], [201, 1, 1]])
    said = r'"3" lies outside .*: \(x, y, z\) = \(-43.1, 60.2, 135.2\) in 138 x 138 x 146 voxels, as do 3 of 4;'
    with pytest.raises(UserError, match=said):
        check_inside(case("a", LPS, points), NAMES)
    with pytest.raises(UserError, match="the only one of 3; check that the two files belong together"):
        check_inside(case("a", LPS, [[1, 2, 3], [4, 5, 6], [999, 1, 1]]), NAMES)


LOW = geometry_of((146, 138, 138), np.array([[-0.5, 0, 0, 0], [0, -0.5, 0, 0], [0, 0, 0.5, -40], [0, 0, 0, 1.0]]))
BARE = Geometry((40, 50, 60), (0.5, 0.5, 0.5), None)


@pytest.mark.parametrize(
    "geometry, points, mend",
    [
        (LPS, voxels(nib.affines.apply_affine(LPS.affine, INSIDE[:, ::-1]) * (-1, -1, 1), LPS.affine), "LPS and RAS"),
        (LPS, INSIDE[:, ::-1] * [1, 1, 0] + [0, 0, 142], r"\(x, y, z\) are read as \(z, y, x\)"),
        (LPS, voxels(INSIDE[:, ::-1], LPS.affine), "numbers are voxels, not mm"),
        (LPS, voxels(INSIDE[:, ::-1] * (-1, -1, 1), LPS.affine), "numbers are voxels, not mm"),
        (LOW, (INSIDE[:, ::-1] * 0.5 - (0, 0, 40))[:, ::-1], "inside when the file's numbers are mm, not voxels"),
        (replace(BARE, spacing_mm=(0.01,) * 3), [[99, 1, 1], [1, 99, 1], [1, 1, 99]], "; check that the two"),
        (BARE, np.array([[38, 40, 59], [2, 4, 6.0]]) / 0.5, "numbers are voxels, not mm"),
        (replace(BARE, spacing_mm=(2.0, 2.0, 2.0)), np.array([[38, 40, 59], [2, 4, 6.0]]) * 2, "mm, not voxels"),
        (BARE, [[40, 59, 39], [3, 4, 2], [30, 40, 20.0]], r"are read as \(z, x, y\)"),  # the file has (z, x, y)
    ],
)
def test_what_mends_points_outside(geometry, points, mend):
    with pytest.raises(UserError, match=mend):
        check_inside(case("a", geometry, points), NAMES)


# ---- spacing


def spacing_one(good, keep_world):
    affine = good.geometry.affine.copy()
    affine[:3, :3] /= good.geometry.spacing_mm[::-1]
    points = voxels(world(good), affine) if keep_world else good.points
    return replace(good, geometry=geometry_of(good.geometry.size, affine), points=points)


def test_the_spacing_of_an_unlabelled_volume():
    right = [(Path(f"u{i}"), Geometry((100, 90, 80 + i), (0.3, 0.2, 0.1))) for i in range(4)]
    check_against_others([], right, NAMES)
    wrong = (Path("u9"), Geometry((100, 90, 80), (1.0, 1.0, 1.0)))
    said = r"^image u9: its spacing is 1 x 1 x 1 mm, that of the other 4 volumes 0.1 x 0.2 x 0.3 mm .* 5.5 times larger"
    with pytest.raises(UserError, match=said + ".*" + SWITCH):
        check_against_others([], [*right, wrong], NAMES)
    check_against_others([], [*right, (Path("u9"), Geometry((18, 17, 15), (1.0, 1.0, 1.0)))], NAMES)  # resampled
    check_against_others([], [*right, (Path("u9"), Geometry((30, 25, 25), (0.3, 0.2, 0.1)))], NAMES)  # a crop
    check_against_others([], [right[0], wrong], NAMES)  # which of the two?
    unlike = [(Path(f"v{i}"), Geometry((90, 90, 90), (0.01 * 10**i,) * 3)) for i in range(4)]
    check_against_others([], unlike, NAMES)


def test_the_size_of_the_landmarks():
    cases = synthetic(0, 5)
    cases[3] = about_centre(cases[3], np.eye(3) / 6)
    with pytest.raises(UserError, match=r"^landmarks/c3.mrk.json: its landmarks are \d\.\d times smaller.*" + SWITCH):
        check_against_others(cases, [], NAMES)


# ---- direction


@pytest.mark.parametrize("squash", [(1, 1, 1), (1, 1, 0), (1, 1, 0.1), (3, 1, 1), (5, 1, 0.3), (1, 0.02, 0.02)])
def test_no_false_alarm_on_right_shapes(squash):
    for seed in range(16):
        count, points = (3, 4, 6, 8)[seed % 4], (4, 5, 8, 20)[seed // 4 % 4]
        check_against_others(synthetic(seed, count, points, squash), [], NAMES)


def test_a_mirror_symmetric_shape_is_not_mirrored():
    """Points in the plane x = 0 and in pairs whose labels name no side: a flip of x leaves it as it is."""
    cases = synthetic(0, 6, 8, (0, 1, 1))
    check_against_others([about_centre(cases[0], MISTAKES["-x"][0]), *cases[1:]], [], NAMES)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_of_direction_is_caught_and_named(mistake):
    matrix, said = MISTAKES[mistake]
    for seed in range(3):
        cases = synthetic(seed, 7)
        cases[seed] = about_centre(cases[seed], matrix)
        with pytest.raises(UserError, match=rf"^landmarks/c{seed}\..*fit the other 6 cases .* times better .*{said}"):
            check_against_others(cases, [], NAMES)


def test_two_wrong_cases_of_seven_and_points_left_out():
    cases = synthetic(0, 7, 12)
    for number in (2, 5):
        cases[number] = about_centre(cases[number], MISTAKES["-x"][0])
    for number in range(7):
        cases[number].points[[number, number + 1]] = np.nan
    with pytest.raises(UserError, match=r"^landmarks/c[25]\..*left and right are mirrored .*" + SWITCH):
        check_against_others(cases, [], NAMES)


def test_too_few_cases_or_points_say_nothing():
    cases = synthetic(0, 4)
    wrong = about_centre(cases[0], MISTAKES["-x"][0])
    check_against_others([wrong, cases[1]], [], NAMES)
    check_against_others([replace(c, points=c.points[:3]) for c in (wrong, *cases[1:])], [], NAMES)
    with pytest.raises(UserError, match="landmarks/c0.*mirrored.*one axis is flipped or two are swapped"):
        check_against_others([wrong, *cases[1:3]], [], NAMES)


def test_bare_arrays_keep_their_axes():
    cases = [replace(c, geometry=Geometry(c.geometry.size, None, None)) for c in synthetic(0, 7)]
    check_against_others(cases, [], NAMES)
    cases[1] = replace(cases[1], points=cases[1].points * (1, 1, -1) + (0, 0, 299))
    with pytest.raises(UserError, match=r"landmarks/c1\..*with x negated .*voxels off\): left and right"):
        check_against_others(cases, [], NAMES)


# ---- real volumes


@real_data
def test_no_false_alarm_on_real_volumes():
    for one in mice():
        check_inside(one, NAMES)
    check_against_others(mice(), [], NAMES)
    rng = np.random.default_rng(0)
    for count, points in [(24, 8), *[(3, 8), (4, 8), (3, 45), (4, 45), (6, 4)] * 5]:
        chosen, kept = rng.choice(24, count, replace=False), np.sort(rng.choice(45, points, replace=False))
        check_against_others([replace(mice()[i], points=mice()[i].points[kept]) for i in chosen], [], NAMES)


@real_data
@pytest.mark.parametrize("mistake", FLIPS)
def test_real_volumes_at_any_roll_show_a_mirror(mistake):
    number = 3 * FLIPS.index(mistake)
    cases = list(mice()[:16])
    cases[number] = about_centre(cases[number], MISTAKES[mistake][0])
    said = rf"^landmarks/{cases[number].name}\..*mirrored .*one axis is flipped or two are swapped .*{SWITCH}"
    with pytest.raises(UserError, match=said):
        check_against_others(cases, [], NAMES)


@real_data
@pytest.mark.parametrize("mistake", ["-x", "-y", "-z", "lps", "xy", "xz", "yz"])
def test_real_volumes_that_lie_alike_show_which(mistake):
    cases = list(mice_alike())
    if mistake == "lps":
        check_against_others(cases, [], NAMES)
    cases[5] = about_centre(cases[5], MISTAKES[mistake][0])
    with pytest.raises(UserError, match=rf"^landmarks/{cases[5].name}\..*{MISTAKES[mistake][1]}"):
        check_against_others(cases, [], NAMES)


@real_data
def test_real_volumes_with_lps_and_ras_exchanged_fall_outside():
    for one in mice():
        spoilt = replace(one, points=voxels(world(one) * (-1, -1, 1), one.geometry.affine))
        with pytest.raises(UserError, match="as do all 45; they lie inside when LPS and RAS are exchanged"):
            check_inside(spoilt, NAMES)


@real_data
@pytest.mark.parametrize("keep_world", [False, True])
@pytest.mark.parametrize("number", [0, 12, 23])
def test_a_real_volume_with_a_spacing_of_1(number, keep_world):
    cases = list(mice())
    cases[number] = spacing_one(cases[number], keep_world)
    said = rf"^image images/{cases[number].name}.nii.gz: its spacing is 1 x 1 x 1 mm, .* 0.141 x 0.141 x 0.141 mm"
    with pytest.raises(UserError, match=said):
        check_against_others(cases, [], NAMES)
    spoilt = cases[number]
    unlabelled = [(spoilt.image, spoilt.geometry)]
    with pytest.raises(UserError, match=said):
        check_against_others(cases[:number] + cases[number + 1 :], unlabelled, NAMES)
