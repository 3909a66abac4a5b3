"""Layouts: small data sets made on the spot, every inconsistency, and the counts of the real data."""

import json

import numpy as np
import pytest
from PIL import Image

from core.config.dataset import Dataset
from core.data.layouts import LAYOUTS, read_layout
from core.data.make_pack import write_pack
from core.data.source import load_source
from core.errors import UserError
from tests.conftest import DATA, error_of

real_data = pytest.mark.skipif(not DATA.is_dir(), reason="real data not found; set LANDMARK_DATA")
SPLITS = {"train": ["s/a"], "validation": ["b"], "test": ["c.png"]}
ROWS = {"s/a": "p1,1,2,3,4", "b.png": "p2,5,6,,", "c": "p3,0,0,19.5,9.5"}


def picture(path, width=20, height=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (width, height)).save(path)


def make_folder(root, rows=ROWS, header="image,patient,tip_x,tip_y,base_x,base_y", **settings):
    """A folder data set of images s/a, b, c (labelled by default) and d (not)."""
    for name in ("s/a", "b", "c", "d"):
        picture(root / "images" / f"{name}.png")
    (root / "landmarks.csv").write_text("\n".join([header, *(f"{name},{row}" for name, row in rows.items())]))
    description = {"landmarks": ["tip", "base"], "spacing_mm": 0.5, "splits": SPLITS} | settings
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def ids(records):
    return [record.id for record in records]


def test_folder(tmp_path):
    source = read_layout("folder", make_folder(tmp_path))
    assert {split: ids(records) for split, records in source.splits.items()} == {
        "train": ["s/a"], "validation": ["b"], "test": ["c"],
    }  # fmt: skip
    record = source.require("train")[0]
    assert record.landmarks.tolist() == [[2, 1], [4, 3]] and record.landmarks.dtype == np.float64
    assert (record.spacing, record.patient, record.image) == ((0.5, 0.5), "p1", tmp_path / "images/s/a.png")
    assert np.isnan(source.splits["validation"][0].landmarks[1]).all()
    assert ids(source.unlabelled) == ["d"]
    assert (source.unit, source.sdr_thresholds, source.paper_rule) == ("mm", (2.0, 2.5, 3.0, 4.0), None)
    assert source.landmark_names == ("tip", "base")


def test_pretraining_never_sees_test_images_or_labels(tmp_path):
    records = read_layout("folder", make_folder(tmp_path)).pretraining_records()
    assert ids(records) == ["s/a", "b", "d"] and all(record.landmarks is None for record in records)


def test_folder_spacing(tmp_path):
    root = make_folder(tmp_path, spacing_mm=[0.2, 0.3])
    assert read_layout("folder", root).splits["test"][0].spacing == (0.3, 0.2)
    assert read_layout("folder", root, spacing_mm=0.7).splits["test"][0].spacing == (0.7, 0.7)
    source = read_layout("folder", make_folder(tmp_path, spacing_mm=None))
    assert (source.unit, source.splits["test"][0].spacing, source.sdr_thresholds) == ("px", None, (3.0, 6.0, 9.0))
    rows = {"s/a": "1,2,3,4,0.1,0.4", "b": "1,2,3,4,0.1,0.4", "c": "1,2,3,4,,"}
    header = "image,tip_x,tip_y,base_x,base_y,spacing_x,spacing_y"
    source = read_layout("folder", make_folder(tmp_path, rows, header))
    assert [source.splits[s][0].spacing for s in SPLITS] == [(0.4, 0.1), (0.4, 0.1), (0.5, 0.5)]
    with pytest.raises(UserError, match="c.png has no spacing, but others have"):
        read_layout("folder", make_folder(tmp_path, rows, header, spacing_mm=None))


def test_row_without_landmarks_is_unlabelled_unless_its_patient_is_tested(tmp_path):
    source = read_layout("folder", make_folder(tmp_path, ROWS | {"d": "p1,,,,"}))
    assert ids(source.unlabelled) == ["d"] and source.unlabelled[0].landmarks is None
    assert read_layout("folder", make_folder(tmp_path, ROWS | {"d": "p3,,,,"})).unlabelled == ()


def test_without_splits_every_label_trains(tmp_path):
    """Listed or not: what is held back by nothing says so, also in a pack and less single images."""
    source = read_layout("folder", make_folder(tmp_path, splits=None))
    assert ids(source.splits["train"]) == ["b", "c", "s/a"] and source.nothing_held_back
    assert ids(source.pretraining_records()) == ["b", "c", "s/a", "d"]
    described = json.loads((tmp_path / "dataset.json").read_text())
    for splits, kept in (({"train": ["b"]}, True), ({"train": 1.0}, True), ({"train": ["b"], "test": ["c"]}, False),
                         ({"test": ["b", "c"]}, False)):
        (tmp_path / "dataset.json").write_text(json.dumps(described | {"splits": splits}))
        assert read_layout("folder", tmp_path).nothing_held_back is kept
    assert ids(read_layout("folder", tmp_path).splits["test"]) == ["b", "c"]  # another hospital's
    del described["splits"]
    (tmp_path / "dataset.json").write_text(json.dumps(described))
    config = Dataset(root=str(tmp_path), image_size=(8, 8), cache_dir=str(tmp_path / "cache"))
    write_pack(config, tmp_path / "pack.npz")
    packed = load_source(config.model_copy(update={"root": str(tmp_path / "pack.npz")}))
    assert packed.nothing_held_back and len(packed.splits["train"]) == 3


def test_images_alone_are_a_data_set(tmp_path):
    """No label, no description: all images are for pre-training; what needs labels says that there are none."""
    for name in ("a", "x/b"):
        picture(tmp_path / "images" / f"{name}.png")
    source = read_layout("folder", tmp_path)
    assert ids(source.pretraining_records()) == ["a", "x/b"] and source.landmark_names == ()
    with pytest.raises(UserError, match="has no labelled image: add labels, .*, or pre-train alone: --stages pretrain"):
        source.require("train")
    with pytest.raises(UserError, match="dataset.json is missing"):
        read_layout("folder", tmp_path, description=tmp_path / "nowhere.json")
    (tmp_path / "dataset.json").write_text(json.dumps({"landmarks": ["tip"], "splits": {"train": 0.5, "test": 0.5}}))
    assert ids(read_layout("folder", tmp_path).unlabelled) == ["a", "x/b"]
    assert not (tmp_path / "dataset.splits.json").exists()  # labels that come later are still to be drawn
    (tmp_path / "landmarks.csv").write_text("image,tip_x,tip_y\na,1,2\nx/b,3,4\n")
    assert {split: len(some) for split, some in read_layout("folder", tmp_path).splits.items()} == {
        "train": 1, "validation": 0, "test": 1}


@pytest.mark.parametrize("name", ["landmarks.csv", "landmarks", "landmarks.json", "dataset.json"])
def test_a_link_to_nowhere_is_named(tmp_path, name):
    """Labels on a disk that is not mounted are no data set without labels."""
    picture(tmp_path / "images/a.png")
    for target in ("nowhere/x", name):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(target)
        with pytest.raises(UserError, match=name):
            read_layout("folder", tmp_path)


def test_labelled_image_in_no_split_is_not_used(tmp_path):
    source = read_layout("folder", make_folder(tmp_path, splits={"train": ["s/a"], "test": ["c"]}))
    assert ids(source.pretraining_records()) == ["s/a", "d"]


def test_drawn_splits_keep_patients_together(tmp_path):
    for index in range(40):
        picture(tmp_path / "images" / f"{index:02d}.png")
    lines = [f"{index:02d},p{index // 4},1,1" for index in range(36)] + [f"{index},,1,1" for index in range(36, 40)]
    (tmp_path / "landmarks.csv").write_text("\n".join(["image,patient,tip_x,tip_y", *lines]))

    def draw(seed, **shares):
        splits = {"train": 0.6, "validation": 0.1, "test": 0.3} | shares | {"seed": seed}
        (tmp_path / "dataset.json").write_text(json.dumps({"landmarks": ["tip"], "splits": splits}))
        return {split: ids(records) for split, records in read_layout("folder", tmp_path).splits.items()}

    drawn = draw(0)
    assert drawn == draw(0) and drawn != draw(1)
    assert sorted(sum(drawn.values(), [])) == [f"{index:02d}" for index in range(40)]
    group = {f"{i:02d}": i // 4 if i < 36 else i for i in range(40)}  # 9 patients and 4 single images: 13 groups
    groups = {split: {group[name] for name in names} for split, names in drawn.items()}
    assert {split: len(members) for split, members in groups.items()} == {"train": 8, "validation": 1, "test": 4}
    assert len(draw(0, train=0.69, validation=0.01)["validation"]) >= 1
    with pytest.raises(UserError, match="fractions must lie between 0 and 1 and sum to 1"):
        draw(0, test=0.5)
    with pytest.raises(UserError, match="seed must be a whole number"):
        draw("x")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"splits": SPLITS | {"test": ["d"]}}, 'test: image "d" has no landmarks in .*landmarks.csv'),
        ({"splits": SPLITS | {"test": ["cc"]}}, r'test: image "cc" is not in images/ \(did you mean "c"\?\)'),
        ({"splits": SPLITS | {"test": ["b"]}}, 'image "b" is listed twice, in validation and in test'),
        ({"splits": SPLITS | {"test": 0.5}}, "give either a list .* or a fraction"),
        ({"splits": SPLITS | {"seed": 1}}, "give either a list .* or a fraction"),
        ({"splits": SPLITS | {"tset": []}}, r'splits: unknown key "tset" \(did you mean "test"\?\)'),
        ({"landmark": []}, r'dataset.json: unknown key "landmark" \(did you mean "landmarks"\?\); keys are landmarks,'),
        ({"landmarks": []}, "landmarks must be a list of one or more names"),
        ({"landmarks": ["tip", "tip"]}, "landmarks must be different names"),
        ({"landmarks": ["tip", "bass"]}, r'unknown column "base_x" \(did you mean "bass_x"\?\)'),
        ({"spacing_mm": -1}, "spacing_mm must be a number above 0"),
        ({"sdr_thresholds": ["2"]}, "sdr_thresholds must be a list of numbers"),
        ({"rows": ROWS | {"b": "p2,5,6,,"}}, 'image "b" has two rows'),
        ({"rows": ROWS | {"e": "p2,5,6,,"}}, 'landmarks.csv: image "e" is not in images/'),
        ({"rows": ROWS | {"c": "p1,0,0,1,1"}}, 'patient "p1" is in both train and test'),
        ({"rows": ROWS | {"c": "p3,0,0,19.6,9.5"}}, r'landmark "base" of image .*c.png lies outside: \(19.6, 9.5\)'),
        ({"rows": ROWS | {"c": "p3,0,-0.6,1,1"}}, 'landmark "tip" of image .*c.png lies outside'),
        ({"rows": ROWS | {"c": "p3,inf,0,1,1"}}, 'landmarks.csv, row 4, column tip_x: "inf" is not a finite number'),
        ({"rows": ROWS | {"c": "p3,1e400,0,1,1"}}, 'csv, row 4, column tip_x: "1e400" is not a finite number'),
    ],
)
def test_inconsistent_folder(tmp_path, settings, message):
    make_folder(tmp_path, **settings)
    with pytest.raises(UserError, match=message) as caught:
        read_layout("folder", tmp_path)
    assert "\n" not in str(caught.value)


def test_broken_json_and_two_images_of_one_stem(tmp_path):
    picture(make_folder(tmp_path) / "images/b.bmp")
    with pytest.raises(UserError, match='two images have the id "b": .*b.bmp and .*b.png'):
        read_layout("folder", tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="dataset.json is not a readable JSON file"):
        read_layout("folder", tmp_path)


def test_wrong_layout_and_wrong_root(tmp_path):
    with pytest.raises(UserError, match=r'layout "cefalo" .*did you mean "cephalo".*choose from cephalo, chest, hand'):
        read_layout("cefalo", tmp_path)
    for layout in LAYOUTS:
        with pytest.raises(UserError, match=f"no {layout} data set at .*none: .* is missing; .*datasets/README.md"):
            read_layout(layout, tmp_path / "none")


def test_unlabelled_folders(tmp_path):
    root = make_folder(tmp_path / "set")
    picture(tmp_path / "more/x/a.png")
    source = read_layout("folder", root, unlabelled_dirs=[tmp_path / "more", root / "images"])
    assert [record.image.name for record in source.unlabelled] == ["d.png", "a.png"]  # nothing of the set twice
    with pytest.raises(UserError, match="folder .*nowhere of unlabelled images does not exist"):
        read_layout("folder", root, unlabelled_dirs=[tmp_path / "nowhere"])
    with pytest.raises(UserError, match="two images have the id"):
        read_layout("folder", root, unlabelled_dirs=[tmp_path / "more", tmp_path / "more/x"])


def test_exclude(tmp_path):
    root = make_folder(tmp_path, ROWS | {"c": "p3,0,0,99,99"})
    source = read_layout("folder", root, exclude=["c.png", "d"], unlabelled_dirs=[root / "images"])
    assert ids(source.pretraining_records()) == ["s/a", "b"] and source.splits["test"] == ()
    with pytest.raises(UserError, match="test split of folder at .* is empty: .* 1 train, 1 validation, 0 test"):
        source.require("test")
    with pytest.raises(UserError, match="choose from train, validation, test"):
        source.require("val")
    with pytest.raises(UserError, match=r'exclude: "s/b" is no image of folder .*did you mean "s/a"'):
        read_layout("folder", root, exclude=["s/b"])


def make_cephalo(root, count):
    for index in range(1, count + 1):
        picture(root / f"jpg/{index:03d}.jpg", 40, 50)
        for folder, x in (("400_junior", 10), ("400_senior", 13)):
            (root / folder).mkdir(exist_ok=True)
            (root / folder / f"{index:03d}.txt").write_text(f"{x},20\n" * 19 + "1\n2\n")
    return root


def test_cephalo(tmp_path):
    root = make_cephalo(tmp_path, 152)
    source = read_layout("cephalo", root, exclude=["038"])
    assert [len(source.splits[split]) for split in SPLITS] == [129, 20, 2]
    assert source.splits["validation"][0].id == "131" and ids(source.splits["test"]) == ["151", "152"]
    assert source.splits["train"][0].landmarks[18].tolist() == [20, 11.5]
    assert source.splits["train"][0].spacing == (0.1, 0.1) and source.paper_rule == "cephalo"
    assert read_layout("cephalo", root, spacing_mm=0.2).splits["test"][0].spacing == (0.2, 0.2)
    (root / "400_senior/007.txt").unlink()
    with pytest.raises(UserError, match="image .*007.jpg has no label file .*400_senior/007.txt"):
        read_layout("cephalo", root)


def test_chest(tmp_path):
    (tmp_path / "labels").mkdir()
    for name in ("0001_0", "0002_0", "0059_0", "0003_1"):
        picture(tmp_path / f"pngs/CHNCXR_{name}.png", 512, 128)
    for name in ("0001_0", "0059_0", "0003_1", "0004_1"):
        (tmp_path / f"labels/CHNCXR_{name}.txt").write_text("6\n" + "0.5 0.25\n" * 6)
    source = read_layout("chest", tmp_path)
    assert ids(source.splits["train"]) == ["CHNCXR_0001_0", "CHNCXR_0003_1"]
    record = source.splits["train"][0]
    assert record.spacing == (2, 0.5) and record.landmarks[0].tolist() == [31.5, 255.5]
    assert (source.unit, source.sdr_thresholds, source.paper_rule) == ("px", (3, 6, 9), "chest")
    with pytest.raises(UserError, match="spacing_mm cannot be set for layout chest"):
        read_layout("chest", tmp_path, spacing_mm=0.1)


def make_hand(root, **first_points):
    (root / "labels").mkdir(exist_ok=True)
    rows = []
    for name, (x, y) in first_points.items():
        picture(root / f"jpg/{name}.jpg", 60, 60)
        rows.append(",".join([name, f"{x},{y}", *["10,20"] * 36]))
    (root / "labels/all.csv").write_text("\n".join([*rows, ",".join(["elsewhere", *["1"] * 74])]))
    return root


def test_hand(tmp_path):
    root = make_hand(tmp_path, a=(40, 60 - 0.5), b=(50, 50))
    picture(root / "jpg/no_row.jpg")
    source = read_layout("hand", root)
    assert ids(source.splits["train"]) == ["a", "b"] and source.unlabelled == ()
    assert source.splits["train"][1].spacing == (1.0, 1.0)  # (50, 50) to (10, 20): 50 px = 50 mm
    assert (source.unit, source.sdr_thresholds, len(source.landmark_names)) == ("mm", (2, 4, 10), 37)
    with pytest.raises(UserError, match="test split of hand at .* is empty: .* 2 train, 0 validation, 0 test"):
        source.require("test")
    with pytest.raises(UserError, match='points 1 and 5 of image "a" give no scale'):
        read_layout("hand", make_hand(root, a=(10, 20)))
    (root / "labels/all.csv").write_text("")
    with pytest.raises(UserError, match="labels/all.csv has no row"):
        read_layout("hand", root)


@real_data
def test_real_data():
    cephalo, chest, hand = (read_layout(name, DATA / name) for name in ("cephalo", "chest", "hand"))
    assert [len(cephalo.splits[split]) for split in SPLITS] == [130, 20, 150]
    assert [len(chest.splits[split]) for split in SPLITS] == [195, 34, 41]
    assert [len(hand.splits[split]) for split in SPLITS] == [10, 0, 0]
    assert cephalo.splits["train"][0].landmarks[0].tolist() == [993.5, 832]  # junior (829, 991), senior (835, 996)
    assert len(cephalo.landmark_names) == 19 and len(chest.landmark_names) == 6
    assert len(cephalo.pretraining_records()) == 150 and len(chest.pretraining_records()) == 229
    assert chest.splits["train"][0].spacing == (0.5, 0.5)
    assert all(0.05 < record.spacing[0] < 0.25 for record in hand.splits["train"])


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\x00", "\u2028"])
def test_landmarks_that_cannot_be_shown_are_refused(tmp_path, name):
    from core.data.folder_layout import read_description

    (tmp_path / "dataset.json").write_text(json.dumps({"landmarks": ["$x^{$", name + "!"], "splits": {}}))
    assert "holds a line break or another character that cannot be shown" in error_of(
        read_description, tmp_path / "dataset.json")
