"""Pictures of volumes against hand numbers: places in every projection and slice, sides, proportions, order.

The page of VOLUME is 1200 wide: 1200 - 2 * 12 - 6 * 20 = 1056 pixels for 60 + 60 + 56 mm, so 6 pixels to a mm, with a
gap of 24 / 4 = 6. The one card's tiles are (1200 - 2 * 12 - 2 * 4) // 3 = 389 pixels for 2 * 0.15 * 75 = 22.5 mm.
"""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from landmarks_finetuning.pictures.overlays import draw_overlay, font
from landmarks_finetuning.pictures.volume_overlays import draw_case, draw_volume_overlay

SIZE = (30, 56, 60)
SPACING = (2.5, 1.0, 1.0)
# (top, left, height, width)
PANELS = {"axial": (60, 26, 336, 360), "coronal": (60, 432, 450, 360), "sagittal": (60, 838, 450, 336)}
TILE, TILE_TOP = 389, 40 + 490 + 30 + 22
TILES = {name: (TILE_TOP, left, TILE, TILE) for name, left in (("axial", 12), ("coronal", 405), ("sagittal", 798))}
PER_MM = TILE / 22.5
TRUTH = np.array([[14.3, 25.4, 30.2]])
PLANES = ("axial", "coronal", "sagittal")


def pixels(volume: np.ndarray | None = None, predicted=TRUTH, truth=TRUTH, heatmaps=None, spacing=SPACING,
           sides=True, **options) -> np.ndarray:
    """The page as float (h, w, 3); without a volume an empty one."""
    volume = np.zeros((1, *SIZE)) if volume is None else volume
    names = [f"point {n}" for n in range(len(predicted))]
    page = draw_volume_overlay(volume, predicted, truth, names, heatmaps, "t", spacing, sides=sides, **options)
    return np.asarray(page, float)


def region(page: np.ndarray, place: tuple[int, int, int, int]) -> np.ndarray:
    top, left, height, width = place
    return page[top : top + height, left : left + width]


def centre_of(weight: np.ndarray) -> np.ndarray:
    """(y, x) centre of mass of (h, w)."""
    y, x = np.mgrid[: weight.shape[0], : weight.shape[1]]
    return np.array([(weight * y).sum(), (weight * x).sum()]) / weight.sum()


def with_voxel(z: int, y: int, x: int) -> np.ndarray:
    volume = np.zeros((1, *SIZE))
    volume[0, z, y, x] = 9.0
    return volume


def amber(part: np.ndarray) -> np.ndarray:
    return np.clip(part[..., 0] - part[..., 2], 0, None)


@pytest.mark.parametrize("voxel", [(4, 9, 50), (25, 47, 7)])
def test_a_voxel_lies_where_it_should_in_each_projection(voxel):
    z, y, x = voxel
    up = 29 - z  # rows from the top, of 2.5 mm or 15 pixels
    expected = {"axial": ((y + 0.5) * 6 - 0.5, (x + 0.5) * 6 - 0.5),
                "coronal": ((up + 0.5) * 15 - 0.5, (x + 0.5) * 6 - 0.5),
                "sagittal": ((up + 0.5) * 15 - 0.5, (y + 0.5) * 6 - 0.5)}
    seen = np.abs(pixels(with_voxel(*voxel)) - pixels()).sum(axis=2)
    for name, place in PANELS.items():
        assert centre_of(region(seen, place)) == pytest.approx(expected[name], abs=0.05), name


@pytest.mark.parametrize("name, row, column", [("axial", 1, 2), ("coronal", 0, 2), ("sagittal", 0, 1)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_voxel_lies_where_it_should_in_each_slice(name, row, column, sign):
    """The middle of a tile, between its pixels, is the truth; the slice is the truth's nearest voxel."""
    voxel = np.array([14, 25, 30])
    voxel[row] += sign * (3 if row == 0 else 6)
    voxel[column] += 5
    from_truth = (voxel - TRUTH[0]) * SPACING * (-1, 1, 1)  # down the page, in mm
    expected = TILE / 2 - 0.5 + from_truth[[row, column]] * PER_MM
    seen = np.abs(pixels(with_voxel(*voxel)) - pixels()).sum(axis=2)
    peak = np.clip(region(seen, TILES[name]) - 6, 0, None)  # without the interpolation's faint lobes, cut at the rim
    assert centre_of(peak) == pytest.approx(expected, abs=0.05)
    for other in set(TILES) - {name}:
        assert region(seen, TILES[other]).sum() == 0  # the voxel is in one of the three slices


def test_marks_lie_where_they_should():
    predicted = np.array([[16.9, 21.1, 33.7]])
    page, plain = pixels(predicted=predicted, truth=None), pixels(predicted=predicted)
    z, y, x = predicted[0]
    places = {"axial": (y, x, 6, 6), "coronal": (29 - z, x, 15, 6), "sagittal": (29 - z, y, 15, 6)}
    for name, (row, column, down, along) in places.items():
        expected = ((row + 0.5) * down - 0.5, (column + 0.5) * along - 0.5)
        assert centre_of(amber(region(page, PANELS[name]))) == pytest.approx(expected, abs=0.12), name
        assert centre_of(amber(region(page, TILES[name]))) == pytest.approx((194, 194), abs=0.05), name
    off = (predicted - TRUTH)[0] * SPACING * (-1, 1, 1)
    for name, axes in zip(PLANES, ([1, 2], [0, 2], [0, 1]), strict=True):
        part = region(plain, TILES[name])
        y, x = np.rint(194 + off[axes] * PER_MM).astype(int)
        cross = amber(part)[y - 7 : y + 8, x - 7 : x + 8]
        assert centre_of(cross) + (y - 7, x - 7) == pytest.approx(194 + off[axes] * PER_MM, abs=0.5), name
        ring = np.clip(part[..., 2] - part[..., 0], 0, None)
        assert centre_of(ring) == pytest.approx((194, 194), abs=0.2), name  # the error line covers a little of it


def letter_at(page: np.ndarray, y: float, x: float) -> str:
    """The letter whose drawing is most like the page around (y, x)."""
    seen = region(page, (round(y) - 9, round(x) - 9, 18, 18))[..., 0]
    found = {}
    for letter in "ASPIRL":
        image = Image.new("L", (18, 18), 20)
        ImageDraw.Draw(image).text((9, 9), letter, fill=240, font=font(14), anchor="mm")
        found[letter] = np.abs(np.asarray(image, float) - seen).sum()
    return min(found, key=found.get)


@pytest.mark.parametrize("name, top, bottom, left, right", [
    ("axial", "A", "P", "R", "L"), ("coronal", "S", "I", "R", "L"), ("sagittal", "S", "I", "A", "P")])
def test_letters_name_the_sides(name, top, bottom, left, right):
    """A voxel far to a side of the patient, (z, y, x) run up, back and to the left, is at the side of its letter."""
    page = pixels()
    y0, x0, height, width = PANELS[name]
    sides = {top: (y0 - 10, x0 + width / 2), bottom: (y0 + height + 10, x0 + width / 2),
             left: (y0 + height / 2, x0 - 10), right: (y0 + height / 2, x0 + width + 10)}
    voxels = {"S": (28, 28, 30), "I": (1, 28, 30), "A": (15, 1, 30), "P": (15, 54, 30), "R": (15, 28, 1),
              "L": (15, 28, 58)}
    for letter, (y, x) in sides.items():
        assert letter_at(page, y, x) == letter
        seen = np.abs(pixels(with_voxel(*voxels[letter])) - page).sum(axis=2)
        towards = np.array([y, x]) - (y0 + height / 2, x0 + width / 2)
        assert (centre_of(region(seen, PANELS[name])) - (height / 2, width / 2)) @ np.sign(towards) > 100


def test_no_side_is_named_where_none_is_known():
    page = pixels(np.zeros((1, 60, 60, 60)), spacing=(1, 1, 1), sides=False)
    known = pixels(np.zeros((1, 60, 60, 60)), spacing=(1, 1, 1))
    size = (1200 - 24 - 120) // 3
    middle = 6 + 20 + size / 2
    assert letter_at(known, 50, middle) == "A"
    assert np.abs(region(page, (41, int(middle) - 9, 18, 18)) - region(known, (41, int(middle) - 9, 18, 18))).max() > 99


@pytest.mark.parametrize("spacing, counts", [
    ((2.5, 1.0, 1.0), (4, 10, 10)), ((1.25, 0.5, 0.5), (8, 20, 20)), ((2.0, 1.0, 0.5), (5, 10, 20))])
def test_a_cube_in_mm_is_a_square(spacing, counts):
    """A cube of 10 mm has the same height and width in every projection and slice: 10 mm of what is shown."""
    start = np.array([13, 24, 28])
    volume = np.zeros((1, *SIZE))
    volume[(0, *(slice(a, a + n) for a, n in zip(start, counts, strict=True)))] = 1
    truth = start[None] + (np.array(counts)[None] - 1) / 2
    page = np.abs(pixels(volume, truth, truth, spacing=spacing) - pixels(None, truth, truth, spacing=spacing))
    largest, across = (np.array(SIZE) * spacing).max(), 2 * 60 * spacing[2] + 56 * spacing[1]
    bottom = len(page) - 44 - 4  # of the tiles, above the legend
    pictures = [(page[bottom - TILE : bottom, left : left + TILE], 0.3 * largest / TILE) for left in (12, 405, 798)]
    pictures += [(part, across / 1056) for part in np.split(page[60 : bottom - TILE - 60], [408, 812], axis=1)]
    for picture, mm in pictures:
        bright = picture.mean(axis=2) > 127
        assert [bright.any(axis=1).sum(), bright.any(axis=0).sum()] == pytest.approx([10 / mm] * 2, abs=4)


def slabs() -> tuple[np.ndarray, np.ndarray]:
    """Five slabs of different grey along x and the points in their middles."""
    volume = np.zeros((1, 20, 20, 100))
    for n in range(5):
        volume[..., 20 * n : 20 * n + 20] = n
    return volume, np.array([[10.0, 10.0, 20 * n + 9.5] for n in range(5)])


def order_of(page: np.ndarray, projections: int) -> list[int]:
    """Which slab each card shows: the grey beside the middle of its first tile, 125 pixels for 30 voxels."""
    found = []
    for place in range(5):
        y = 40 + projections + 30 + place // 3 * 151 + 22 + 62 - 16
        x = 12 + place % 3 * (383 + 12) + 62 + 16
        found.append(round(page[y, x, 0] / 255 * 4))
    return found


@pytest.mark.parametrize("errors, expected", [
    (None, [4, 2, 0, 1, 3]), (np.array([1, 9, 3, 8, 2.0]), [1, 2, 4, 0, 3])])
def test_close_ups_are_in_order_of_the_error(errors, expected):
    """Distances 2, 1, 1.5 * 2, - and 4 mm: a z step is 2 mm. The third has no truth, and is last whatever is given."""
    volume, points = slabs()
    truth = points.copy()
    truth[3] = np.nan
    predicted = points + np.array([[0, 2, 0], [0, 1, 0], [1.5, 0, 0], [0, 0, 0], [0, 4, 0.0]])
    page = pixels(volume, predicted, truth, spacing=(2, 1, 1), errors=errors)
    scale = 1056 / 220
    assert order_of(page, int(40 * scale) + 40) == expected


def test_without_truth_close_ups_are_in_order_of_the_names_and_through_the_prediction():
    volume, points = slabs()
    page = pixels(volume, points, None, spacing=(1, 1, 1))
    assert order_of(page, int(20 * 1056 / 220) + 40) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(15, 28, 30), (60, 56, 120)])
def test_contours_lie_where_they_should(shape):
    """A Gaussian of sigma 4 mm: a circle of sigma sqrt(2 ln 2) in its middle slice, a smaller one beside."""
    step = np.array(SIZE) * SPACING / shape  # mm
    corner_to_truth = (TRUTH[0] + 0.5) * SPACING
    centre = (np.floor((corner_to_truth + (0, 3.0, -2.0)) / step) + 0.5) * step  # on a voxel of the map
    grids = [(np.arange(n) + 0.5) * s for n, s in zip(shape, step, strict=True)]
    along = [np.exp(-((grid - c) ** 2) / (2 * 4.0**2)) for grid, c in zip(grids, centre, strict=True)]
    heatmap = np.einsum("i,j,k->ijk", *along)
    drawn = np.abs(pixels(heatmaps=heatmap[None]) - pixels()).sum(axis=2)
    for through, (name, axes) in enumerate(zip(PLANES, ([1, 2], [0, 2], [0, 1]), strict=True)):
        y, x = np.nonzero(region(drawn, TILES[name]))
        middle = np.array([y.min() + y.max(), x.min() + x.max()]) / 2
        from_truth = (centre - corner_to_truth) * (-1, 1, 1)
        assert middle == pytest.approx(194 + from_truth[axes] * PER_MM, abs=3), name
        slice_mm = ((14, 25, 30)[through] + 0.5) * SPACING[through]
        peak = np.interp(slice_mm, grids[through], along[through])
        radius = 4.0 * np.sqrt(2 * np.log(2 * peak)) * PER_MM
        assert (x.max() - x.min()) / 2 == pytest.approx(radius, abs=5), name


def test_a_heatmap_elsewhere_has_no_contour_in_the_slice():
    heatmap = np.zeros((30, 56, 60))
    heatmap[16:18, 24:28, 28:32] = 1  # above the axial slice, within the two others
    drawn = np.abs(pixels(heatmaps=heatmap[None]) - pixels()).sum(axis=2)
    assert region(drawn, TILES["axial"]).sum() == 0
    assert region(drawn, TILES["coronal"]).sum() > 0 and region(drawn, TILES["sagittal"]).sum() > 0


@pytest.mark.parametrize("off, hollow", [(3.0, True), (0.4, False)])
def test_a_prediction_off_the_slice_is_hollow_and_has_its_distance(off, hollow):
    page = pixels(predicted=TRUTH + (off, 0, 0))
    axial, coronal = region(page, TILES["axial"]), region(page, TILES["coronal"])
    row = round(194 - off * 2.5 * PER_MM)
    assert (amber(axial[193:196, 193:196]).max() < 100) == hollow
    assert amber(coronal[row - 1 : row + 2, 193:196]).max() > 200
    assert (axial[370:, :70].max() > 200) == hollow  # the distance, at the lower left
    assert coronal[370:, :70].max() == 0


def test_a_few_extreme_voxels_do_not_darken_the_close_ups():
    volume = np.zeros((1, *SIZE))
    volume[:, :, 20:40] = 1000
    clean = region(pixels(volume), TILES["axial"]).mean()
    volume[0, 0, :2, :2] = 1e6
    volume[0, 0, 2:4, :2] = -1e6
    assert region(pixels(volume), TILES["axial"]).mean() == pytest.approx(clean, rel=0.05)


def test_beyond_the_volume_there_is_no_image():
    corner = np.array([[29.0, 0.0, 0.0]])
    part = region(pixels(np.full((1, *SIZE), 7.0), corner, corner), TILES["coronal"])
    assert (part[:100, 250:] == part[0, 0]).all() and part[0, 0, 2] > part[0, 0, 0] > 0
    edge = 194.5 - 0.5 * 2.5 * PER_MM  # half a voxel above the topmost centre
    column = part[:, 300, 2]
    assert np.flatnonzero(np.diff(column))[0] == pytest.approx(edge, abs=1)


@pytest.mark.parametrize("count, width", [(1, 300), (45, 1200), (4, 700)])
def test_pages_of_any_size(count, width):
    points = np.linspace(0, 18, 3 * count).reshape(count, 3)
    names = ["a long name " * 5] * count
    volume = np.linspace(-3000, 1000, 3 * 20**3).reshape(3, 20, 20, 20)
    page = draw_volume_overlay(volume, points, np.full_like(points, np.nan), names, np.zeros((count, 4, 4, 4)),
                               "t " * 500, (1, 1, 1), width=width)
    assert page.width == width and page.mode == "RGB"


def test_a_slice_thick_volume():
    points = np.array([[0.0, 5, 6]])
    assert draw_volume_overlay(np.zeros((1, 1, 20, 30)), points, points, ["A"], None, "t", (3, 1, 1)).width == 1200


def test_one_call_for_images_and_volumes():
    rng = np.random.default_rng(0)
    image, flat, maps = rng.random((1, 40, 30)), rng.random((2, 2)) * 20, rng.random((2, 10, 10))
    assert draw_case(image, flat, flat + 2, "AB", maps, "t", (1, 1), np.ones(2)) \
        == draw_overlay(image, flat, flat + 2, "AB", maps, "t")
    volume, points = rng.random((1, 20, 20, 20)), rng.random((2, 3)) * 15
    arguments = (volume, points, points + 2, "AB", rng.random((2, 10, 10, 10)), "t", (1, 2, 1), np.ones(2))
    assert draw_case(*arguments) == draw_volume_overlay(*arguments)
