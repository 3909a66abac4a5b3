"""Landmark files in millimetres -> network pixels -> landmark files: the same millimetres, however a volume is turned.

The whole path is the program's own; the truth is parsed, written and turned here, with the json module and by hand.
Pixels are checked on their own: what is bright at a place in mm is bright at the network pixel of its landmark.
"""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from core.config.dataset import Dataset as DatasetConfig
from core.config.section import Augmentation
from core.data.augment import augment
from core.data.dataset import load_images
from core.data.layouts import read_layout
from core.formats.geometry import apply_maps, inverse
from core.formats.markups import read_markups
from landmarks_finetuning.predictions import Predictions, write_slicer_files
from tests.conftest import DATA, PROJECT

DATA = DATA / "mouse_ct"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="real data not found; set LANDMARK_DATA")
EXACT_MM = 1e-3
STILL = Augmentation(probability=1, rotation_degrees=0, scale=0, translation=0, intensity=0)
SHAPE, STEPS = (20, 16, 12), (0.6, 0.8, 1.1)  # voxels and mm along the file's first, second and third axis
MIDDLE = np.array([31.5, -12.25, 7.75])  # RAS mm, of every volume
NAMES = ["tip", "b", "c", "d", "e", "unset"]
WORLD = MIDDLE + [[1.5, -1.2, 1.0], [-3, 1, 2], [2.5, 3, -2.25], [-1.125, -3.1, -3], [0.1, 2, 3.3], [0, 0, 0]]  # RAS
BLOB_MM = 1.1


def turn(first, second, degrees):
    """Rotation in the plane of two of the axes 0, 1, 2."""
    matrix = np.eye(3)
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix[[first, second], [first, second]] = cosine
    matrix[first, second], matrix[second, first] = -sine, sine
    return matrix


OBLIQUE = turn(1, 2, 20) @ turn(0, 1, 20)
DIRECTIONS = {  # columns: where the file's axes point to, in RAS
    "RAS": np.diag([1, 1, 1]),
    "LPS": np.diag([-1, -1, 1]),
    "RPI": np.diag([1, -1, -1]),
    "LAS": np.diag([-1, 1, 1]),  # left-handed
    "SPL": np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]]),
    "AIR": np.array([[0, 0, 1], [1, 0, 0], [0, -1, 0]]),
    "oblique": OBLIQUE,
    "oblique SPL": OBLIQUE @ np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]]),
}


def affine_of(directions):
    """From voxels (i, j, k) to RAS mm, MIDDLE being in the middle of the volume."""
    affine = np.eye(4)
    affine[:3, :3] = directions * np.array(STEPS)
    affine[:3, 3] = MIDDLE - affine[:3, :3] @ ((np.array(SHAPE) - 1) / 2)
    return affine


def write_volume(path, directions):
    """A NIfTI whose voxels are a Gaussian of BLOB_MM about the landmark "tip", over a floor."""
    affine = affine_of(directions)
    voxels = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    places = np.einsum("ab,xyzb->xyza", affine[:3, :3], voxels) + affine[:3, 3]
    values = 100 + 900 * np.exp(-((places - WORLD[0]) ** 2).sum(axis=-1) / (2 * BLOB_MM**2))
    nib.save(nib.Nifti1Image(values.astype(np.float32), affine), path)


def write_json(stem, system):
    flip = {"LPS": (-1, -1, 1), "RAS": (1, 1, 1)}[system]
    points = [{"label": name, "position": (place * flip).tolist(), "positionStatus": "defined"}
              for name, place in zip(NAMES[:-1], WORLD, strict=False)]
    points.append({"label": "unset", "position": [0, 0, 0], "positionStatus": "undefined"})
    node = {"type": "Fiducial", "coordinateSystem": system, "controlPoints": points}
    Path(f"{stem}.mrk.json").write_text(json.dumps({"markups": [node]}))


def write_fcsv(stem, system):
    flip = {"LPS": (-1, -1, 1), "1": (-1, -1, 1), "RAS": (1, 1, 1), "0": (1, 1, 1)}[system]
    rows = [f"p{n},{x!r},{y!r},{z!r},0,0,0,1,1,1,0,{name},," for n, (name, (x, y, z)) in
            enumerate(zip(NAMES[:-1], (WORLD[:-1] * flip).tolist(), strict=True))]
    head = ["# Markups fiducial file version = 4.11", f"# CoordinateSystem = {system}",
            "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"]
    Path(f"{stem}.fcsv").write_text("\n".join([*head, *rows]) + "\n")


LABELS = {"json LPS": (write_json, "LPS"), "json RAS": (write_json, "RAS"), "fcsv LPS": (write_fcsv, "LPS"),
          "fcsv RAS": (write_fcsv, "RAS"), "fcsv 0": (write_fcsv, "0"), "fcsv 1": (write_fcsv, "1")}


@pytest.fixture(params=LABELS)
def root(request, tmp_path):
    """A folder data set of one volume for each of DIRECTIONS, all of the same object."""
    write, system = LABELS[request.param]
    for name in ("images", "landmarks"):
        (tmp_path / name).mkdir()
    for name, directions in DIRECTIONS.items():
        write_volume(tmp_path / f"images/{name}.nii.gz", directions)
        write(tmp_path / "landmarks" / name, system)
    description = {"landmarks": NAMES, "splits": {"train": sorted(DIRECTIONS)}}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    return tmp_path


def configure(root, cache, **settings):
    return DatasetConfig(root=str(root), cache_dir=str(cache), **settings)


def positions(path):
    """{label: RAS mm or None} of a .mrk.json, by hand."""
    [node] = json.loads(path.read_text())["markups"]
    flip = {"LPS": (-1, -1, 1), "RAS": (1, 1, 1)}[node["coordinateSystem"]]
    assert node.get("coordinateUnits", "mm") == "mm"
    return {point["label"]: np.multiply(point["position"], flip) if point["positionStatus"] == "defined" else None
            for point in node["controlPoints"]}


def there_and_back(images, names, folder):
    """Network pixels of an ImageSet -> augmentation by nothing -> stored pixels -> landmark files in `folder`."""
    pixels, points = augment(images.images, images.points, STILL, torch.Generator().manual_seed(0))
    torch.testing.assert_close(pixels, images.images, rtol=0, atol=1e-4)
    stored = apply_maps(points.numpy(), inverse(images.maps))
    write_slicer_files(folder, Predictions(images, names, stored, *np.ones((3, *stored.shape[:2]))))


def compare(path, names, truth):
    """The written file against `truth`, {label: RAS mm or None}: as the program reads it, and as it stands there."""
    written, read = positions(path), read_markups(path, names)
    assert set(written) == set(names)
    for name, place in zip(names, read, strict=True):
        if truth[name] is None:
            assert written[name] is None and np.isnan(place).all()
        else:
            assert np.abs(place - truth[name]).max() < EXACT_MM, (path.name, name)
            assert np.abs(written[name] - truth[name]).max() < EXACT_MM, (path.name, name)


GRIDS = pytest.mark.parametrize("grid", [
    {"image_size": (16, 24, 8)},
    {"image_size": (16, 16, 16), "resample_mm": 0.9},  # all images fit
    {"image_size": (8, 8, 16), "resample_mm": 0.7},  # they do not: crops and windows
], ids=["fixed size", "resampled", "resampled, larger than the network"])


@GRIDS
def test_written_landmarks_are_those_read(root, tmp_path, grid):
    config = configure(root, tmp_path / "cache", **grid)
    source = read_layout("folder", root, dims=3)
    images = load_images(source.require("train"), config)
    assert len(images.records) == len(DIRECTIONS) and images.fits == (grid["image_size"] != (8, 8, 16))
    there_and_back(images, source.landmark_names, tmp_path / "out")
    truth = {**dict(zip(NAMES, WORLD, strict=True)), "unset": None}
    for name in DIRECTIONS:
        if (labels := root / f"landmarks/{name}.mrk.json").exists():
            held = positions(labels)
            assert held["unset"] is None and np.allclose([held[n] for n in NAMES[:-1]], WORLD[:-1], atol=1e-9)
            truth = held
        compare(tmp_path / f"out/{name}.mrk.json", NAMES, truth)


@pytest.mark.parametrize("root", ["json LPS"], indirect=True)
@GRIDS
def test_what_is_bright_at_a_place_is_bright_at_its_network_pixel(root, tmp_path, grid):
    images = load_images(read_layout("folder", root, dims=3).require("train"), configure(root, tmp_path / "c", **grid))
    for m, (record, points) in enumerate(zip(images.records, images.points.numpy(), strict=True)):
        canvas, size = images.images[m, 0].double().numpy(), images.sizes[m].tolist()
        first = images.firsts[m].tolist()
        filled = canvas[tuple(slice(start, start + length) for start, length in zip(first, size, strict=True))]
        assert filled.sum() == pytest.approx(canvas.sum(), abs=1e-12)
        mass = np.where(filled > 0.05, filled, 0)  # without the far tail, which the border cuts
        centre = [(mass.sum(axis=tuple({0, 1, 2} - {axis})) * np.arange(length)).sum() / mass.sum()
                  for axis, length in enumerate(size)]
        assert np.abs(np.add(centre, first) - points[0]).max() < 0.06, record.id


@pytest.mark.parametrize("root", ["json LPS"], indirect=True)
def test_upright_volumes_look_alike_however_they_are_stored(root, tmp_path):
    """Of one object, z runs up, y back and x to the left: by hand, in mm about the middle of the volume."""
    config = configure(root, tmp_path / "cache", image_size=(16, 16, 16), resample_mm=0.9)
    images = load_images(read_layout("folder", root, dims=3).require("train"), config)
    middles = (images.firsts + (images.sizes - 1) / 2).numpy()
    for record, points, middle in zip(images.records, images.points.numpy(), middles, strict=True):
        right, front, up = ((OBLIQUE if "oblique" in record.id else np.eye(3)).T @ (WORLD - MIDDLE).T)[:, :-1]
        seen = (points[:-1] - middle) * 0.9
        np.testing.assert_allclose(seen, np.stack([up, -front, -right], axis=1), atol=1e-5)


@real_data
@pytest.mark.parametrize("grid", [{"image_size": (8, 12, 8)}, {"image_size": (8, 8, 8), "resample_mm": 1.5}],
                         ids=["fixed size", "resampled"])
def test_real_landmarks_survive(tmp_path, grid):
    description = PROJECT / "configs/mouse_ct/dataset.json"
    names = json.loads(description.read_text())["landmarks"]
    source = read_layout("folder", DATA, dims=3, description=description)
    assert len(source.labelled) == 24
    config = configure(DATA, tmp_path / "cache", description=str(description), **grid)
    images = load_images(source.labelled, config)
    there_and_back(images, names, tmp_path / "out")
    for record in source.labelled:
        truth = positions(DATA / f"landmarks/{record.id}.mrk.json")
        assert len(truth) == 45
        compare(tmp_path / f"out/{record.id}.mrk.json", names, truth)
