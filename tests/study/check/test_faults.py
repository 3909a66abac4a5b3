"""Twenty faults, each planted alone into 60 sound radiographs: each is named, and nothing else is."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from core.config.load import parse_config
from core.data.layouts import CEPHALO_NAMES
from core.data.source import load_source
from core.formats.points import FolderRow, write_folder_csv
from core.phantoms.radiographs import write_phantom_radiographs
from study.check.overview import overview

COUNT, SIZE, VICTIM, OTHER = 60, (192, 155), 17, 31
KEPT = 16  # landmarks


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """(pictures, landmarks (60, 19, 2)) of phantom radiographs."""
    root = tmp_path_factory.mktemp("sound")
    write_phantom_radiographs(root / "phantom", 152, SIZE, 3)
    dataset = {"layout": "cephalo", "root": str(root / "phantom"), "image_size": [96, 96], "spacing_mm": 1.25}
    records = load_source(parse_config({"dataset": dataset}, "test").dataset).labelled[:COUNT]
    return [Image.open(record.image).convert("L") for record in records], np.stack([r.truth for r in records])


class Planted:
    """A data set that a fault may change before it is written: pictures, points (K, N, 2) y, x, spacings, splits."""

    def __init__(self, sound):
        self.pictures, self.points = [picture.copy() for picture in sound[0]], sound[1].copy()
        self.spacing = np.full(COUNT, 1.25)
        self.names = [f"p{n:02d}" for n in range(COUNT)]
        self.splits = {"train": self.names[:40], "validation": self.names[40:50], "test": self.names[50:]}

    def write(self, root: Path) -> Path:
        (root / "images").mkdir(parents=True)
        for name, picture in zip(self.names, self.pictures, strict=True):
            picture.save(root / "images" / f"{name}.png")
        rows = [FolderRow(name, points, (spacing, spacing))
                for name, points, spacing in zip(self.names, self.points, self.spacing, strict=True)]
        write_folder_csv(root / "landmarks.csv", CEPHALO_NAMES, rows)
        (root / "dataset.json").write_text(json.dumps({"landmarks": list(CEPHALO_NAMES), "splits": self.splits}))
        return root


def swapped(data):
    data.points[VICTIM] = data.points[VICTIM, :, ::-1] * 0.8  # so that they lie inside


def zero(data):
    data.points[VICTIM, 5] = 0


def fractions(data):
    data.points[VICTIM] /= SIZE


def far(data):
    data.points[VICTIM, 4] += (-55, -40)


def exchanged_images(data):
    data.points[[VICTIM, OTHER]] = data.points[[OTHER, VICTIM]]


def mirrored(data):
    data.points[VICTIM, :, 1] = SIZE[1] - 1 - data.points[VICTIM, :, 1]


def from_the_bottom(data):
    data.points[VICTIM, :, 0] = SIZE[0] - 1 - data.points[VICTIM, :, 0]


def half_size(data):
    data.points[VICTIM] /= 2


def exchanged_landmarks(data):
    data.points[VICTIM, [0, 9]] = data.points[VICTIM, [9, 0]]


def seldom(data):
    data.points[6:, 3] = np.nan


def one_place(data):
    data.points[VICTIM, 8] = data.points[VICTIM, 6]


def same_file(data):
    data.pictures[55], data.points[55] = data.pictures[2], data.points[2]


def same_picture(data):
    data.pictures[55] = data.pictures[2].resize((145, 180)).resize(SIZE[::-1]).point(lambda v: 0.8 * v + 20)
    data.points[55] = data.points[2] + 0.5


def copied_row(data):
    data.points[OTHER] = data.points[VICTIM]


def blank(data):
    data.pictures[VICTIM] = Image.new("L", SIZE[::-1], 77)


def negative(data):
    data.pictures[VICTIM] = ImageOps.invert(data.pictures[VICTIM])


def clipped(data):
    data.pictures[VICTIM] = data.pictures[VICTIM].point(lambda v: 255 if v > 8 else v)


def wrong_spacing(data):
    data.spacing[VICTIM] = 12.5


def scanner(data):
    for n in range(50, COUNT):
        data.pictures[n] = data.pictures[n].point(lambda v: 0.3 * v)


def turned_picture(data):
    """The picture turned by 90 degrees, its labels with it."""
    data.pictures[VICTIM] = data.pictures[VICTIM].transpose(Image.Transpose.ROTATE_90)
    data.points[VICTIM] = np.stack([SIZE[1] - 1 - data.points[VICTIM, :, 1], data.points[VICTIM, :, 0]], axis=1)


FAULTS = {  # what is planted: the kind of the alarm, the images it names
    swapped: ("x and y are swapped", "p17"), zero: (r'\(0, 0\) as "missing"', "p17"),
    fractions: ("fractions of the size", "p17"), far: ("landmark far from the common shape", "p17"),
    exchanged_images: ("labels of another image", "p17"), mirrored: ("left and right are mirrored", "p17"),
    from_the_bottom: ("top and bottom are mirrored", "p17"), half_size: ("another size", "p17"),
    exchanged_landmarks: ("two landmarks exchanged", "p17"), seldom: ("landmark seldom annotated", None),
    one_place: ("two landmarks at one place", "p17"), same_file: ("twin images", "p55"),
    same_picture: ("twin images", "p55"), copied_row: ("labels copied", "p17"), blank: ("blank image", "p17"),
    negative: ("negative image", "p17"), clipped: ("clipped image", "p17"), wrong_spacing: ("another spacing", "p17"),
    scanner: ("drift between groups", None), turned_picture: ("another aspect", "p17")}


def alarms_of(root, cache):
    dataset = {"layout": "folder", "root": str(root), "image_size": [96, 96], "cache_dir": str(cache)}
    config = parse_config({"dataset": dataset}, "test")
    return overview(config, load_source(config.dataset)).alarms


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_a_sound_data_set_raises_no_alarm(sound, tmp_path, cache):
    assert alarms_of(Planted(sound).write(tmp_path / "data"), cache) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_named(fault, sound, tmp_path, cache):
    data = Planted(sound)
    fault(data)
    kind, image = FAULTS[fault]
    alarms = alarms_of(data.write(tmp_path / "data"), cache)
    found = [alarm for alarm in alarms if re.search(kind, alarm.kind)]
    assert found and (image is None or any(image in alarm.images for alarm in found)), [str(alarm) for alarm in alarms]
    touched = {"p17", "p31", "p55", "p02"}
    assert all(touched.intersection(alarm.images) or not alarm.images for alarm in alarms), list(map(str, alarms))


def test_there_are_twenty():
    assert len(FAULTS) == 20
