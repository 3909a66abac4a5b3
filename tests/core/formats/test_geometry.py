"""Maps between pixels, voxels and millimetres against closed forms, nibabel's reorientation and loops over points."""

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from core.formats.geometry import (
    Geometry,
    apply_maps,
    compose,
    geometry_of,
    index_to_world,
    inverse,
    resampling_map,
    upright,
    upright_axes,
    upright_map,
    world_to_index,
)

AFFINE = np.array([[0.0, -0.5, 0.0, 10.0], [2.0, 0.0, 0.0, -20.0], [0.0, 0.0, 1.5, 30.0], [0.0, 0.0, 0.0, 1.0]])
CODES = ["LPS", "RAS", "SPL", "AIR", "PSR", "ILP"]


def affine_of(codes, steps=(2.0, 0.5, 1.5)):
    """Axes (i, j, k) that point along the letters of `codes`, in RAS mm."""
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[:3, :3] = 0
    for column, letter in enumerate(codes):
        affine["RASLPI".index(letter) % 3, column] = steps[column] * (1 if letter in "RAS" else -1)
    affine[:3, 3] = (5.0, -7.0, 11.0)
    return affine


def test_voxels_to_world_by_hand():
    """(z, y, x) = (1, 2, 3): i = 3, j = 2, k = 1, so x = 10 - 0.5 * 2, y = -20 + 2 * 3, z = 30 + 1.5."""
    assert index_to_world([[1, 2, 3]], AFFINE).tolist() == [[9.0, -14.0, 31.5]]
    np.testing.assert_allclose(world_to_index([[9.0, -14.0, 31.5]], AFFINE), [[1, 2, 3]], atol=1e-12)
    geometry = geometry_of((7, 6, 5), AFFINE)
    assert geometry.size == (7, 6, 5) and geometry.spacing_mm == (1.5, 0.5, 2.0) and geometry.axes == "ALS"
    assert Geometry((4, 4)).axes == "unknown"


def test_an_oblique_affine_is_nibabel_s():
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * (0.5, 1.0, 2.0), (3, 4, 5)
    points = rng.normal(size=(5, 3)) * 10
    world = index_to_world(points, affine)
    np.testing.assert_allclose(world, nib.affines.apply_affine(affine, points[:, ::-1]), atol=1e-12)
    np.testing.assert_allclose(world_to_index(world, affine), points, atol=1e-12)
    assert geometry_of((3, 3, 3), affine).spacing_mm == pytest.approx((2.0, 1.0, 0.5))


def spoiled(row, column, value):
    affine = np.eye(4)
    affine[row, column] = value
    return affine


@pytest.mark.parametrize(("affine", "message"), [
    (spoiled(0, 0, np.nan), "not finite"), (spoiled(0, 3, np.inf), "not finite"), (spoiled(1, 1, 0), "length 0"),
    (spoiled(0, 1, 0.002), "right angles"), (spoiled(2, 1, -0.5), "right angles"), (np.eye(4)[:3], "not finite")])
def test_affines_that_are_no_grid_s(affine, message):
    with pytest.raises(ValueError, match=message):
        geometry_of((3, 3, 3), affine)


def test_a_shear_below_the_rounding_of_files_is_a_grid():
    assert geometry_of((3, 3, 3), spoiled(0, 1, 0.0009)).spacing_mm == pytest.approx((1, 1, 1), abs=1e-6)


@pytest.mark.parametrize("codes", CODES)
def test_upright_is_nibabel_s_reorientation_to_lps(codes):
    size = (4, 3, 2)  # z, y, x of the file
    geometry = geometry_of(size, affine_of(codes))
    assert geometry.axes == codes
    pixels = np.arange(24.0).reshape(1, *size)
    image = nib.Nifti1Image(pixels[0].transpose(2, 1, 0), geometry.affine)
    change = ornt_transform(io_orientation(geometry.affine), axcodes2ornt("LPS"))
    expected = np.asarray(image.as_reoriented(change).dataobj).transpose(2, 1, 0)
    turned = upright(pixels, geometry)
    np.testing.assert_array_equal(turned[0], expected)
    points = np.array(list(np.ndindex(size)), dtype=float)
    moved = apply_maps(points[None], upright_map(geometry)[None])[0]
    for point, place in zip(points.astype(int), moved, strict=True):
        assert turned[(0, *place.astype(int))] == pixels[(0, *point)] and (place == place.astype(int)).all()


def test_without_an_affine_the_axes_stay():
    assert upright_axes(Geometry((4, 5))) == ((0, 1), (1, 1))
    assert upright_map(Geometry((4, 5, 6))).tolist() == np.eye(3, 4).tolist()


def test_resampling_keeps_centres_and_edges():
    """10 pixels to 5 of twice the size: the edges -0.5 and 9.5 become -0.5 and 4.5; 7 of them leave one at each end."""
    halved = resampling_map((10, 8), (5, 4), (2.0, 2.0))
    points = np.array([[[-0.5, -0.5], [9.5, 7.5], [4.5, 3.5], [0.0, 1.0]]])
    np.testing.assert_allclose(apply_maps(points, halved[None])[0], [[-0.5, -0.5], [4.5, 3.5], [2, 1.5], [-0.25, 0.25]])
    wider = resampling_map((10, 8), (7, 4), (2.0, 4.0))
    np.testing.assert_allclose(apply_maps(points[:, :2], wider[None])[0], [[0.5, 0.5], [5.5, 2.5]])


@pytest.mark.parametrize("dims", [2, 3])
def test_maps_are_composed_and_inverted_as_functions(dims):
    rng = np.random.default_rng(dims)
    first, second = rng.normal(size=(2, 3, dims, dims + 1))
    points = rng.normal(size=(3, 4, dims))
    points[1, 2] = np.nan
    by_hand = np.array([[m[:, :-1] @ p + m[:, -1] for p in ps] for ps, m in zip(points, first, strict=True)])
    np.testing.assert_allclose(apply_maps(points, first), by_hand)
    both = np.stack([compose(after, before) for after, before in zip(second, first, strict=True)])
    np.testing.assert_allclose(apply_maps(points, both), apply_maps(by_hand, second))
    np.testing.assert_allclose(apply_maps(by_hand, inverse(first)), points, atol=1e-9)
