"""The folder layout with volumes: every format against nibabel's mathematics, every contradiction, wrong pairings."""

import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from core.data.layouts import read_layout
from core.errors import UserError
from tests.core.formats.test_dicom import picture, write

NAMES = ("tip", "base", "left, lower", "right", "top", "far")
SHAPE = np.array([(2, 3, 4), (15, 4, 5), (3, 14, 6), (9, 8, 17), (4, 5, 12), (13, 15, 9)], dtype=float)  # x, y, z
SIZE = (19, 18, 20)  # x, y, z
STEP = 0.14
IDS = tuple(f"c{number}" for number in range(6))
SPLITS = {"train": ["c0", "c1", "c2"], "validation": ["c3"], "test": ["c4", "c5"]}
LPS = np.array([-1.0, -1, 1])
OBLIQUE = np.array([[0.3, -0.8, 0, 5], [0.4, 0.6, 0, -7], [0, 0, -2, 90], [0, 0, 0, 1]])  # 0.5 x 1 x 2 mm, z down


def centred(step=STEP, signs=(1, 1, 1)):
    """A RAS affine whose origin is the middle of the volume."""
    affine = np.diag([*np.multiply(step, signs), 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(SIZE) - 1) / 2)
    return affine


def voxels_of(number):
    """The landmarks (x, y, z) of case `number`: the shape and half a voxel of variation."""
    return SHAPE + np.random.default_rng(number).uniform(-0.5, 0.5, SHAPE.shape)


def nifti(path, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.zeros(SIZE, np.uint8), affine), path)


def markup(path, ras, system="LPS", names=NAMES):
    """A 3D Slicer file of world points (N, 3), RAS mm, that counts in `system`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    points = [{"label": name, "position": position, "positionStatus": "defined"}
              for name, position in zip(names, (ras * (LPS if system == "LPS" else 1)).tolist(), strict=True)]
    node = {"type": "Fiducial", "coordinateSystem": system, "controlPoints": points}
    path.write_text(json.dumps({"markups": [node]}))


def fcsv(path, ras, system="RAS"):
    rows = [f'vtk,{x!r},{y!r},{z!r},0,0,0,1,1,1,0,"{name}",,'
            for name, (x, y, z) in zip(NAMES, (ras * (LPS if system == "LPS" else 1)).tolist(), strict=True)]
    head = ("# Markups fiducial file version = 4.11", f"# CoordinateSystem = {system}",
            "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*head, *rows]))


def table(root, points, extra="", cells=None):
    """landmarks.csv of (x, y, z) points by image; `extra` columns hold `cells` by image."""
    header = "image," + ",".join(f'"{name}_{axis}"' for name in NAMES for axis in "xyz") + extra
    rows = [",".join([name, *(repr(v) for v in values.ravel().tolist())]) + (cells[name] if extra else "")
            for name, values in points.items()]
    (root / "landmarks.csv").write_text("\n".join([header, *rows]))


def describe(root, **settings):
    values = {"landmarks": list(NAMES), "splits": SPLITS} | settings
    (root / "dataset.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return root


def make(root, affine=None, system="LPS", **settings):
    """Six NIfTI volumes in one orientation with markups: a data set with nothing wrong."""
    affine = centred() if affine is None else affine
    for number, name in enumerate(IDS):
        nifti(root / "images" / f"{name}.nii", affine)
        markup(root / "landmarks" / f"{name}.mrk.json", nib.affines.apply_affine(affine, voxels_of(number)), system)
    return describe(root, **settings)


def arrays(root, suffix=".npy", spacing=None, **settings):
    """Six bare arrays with landmarks.csv in pixels."""
    (root / "images").mkdir(parents=True)
    for name in IDS:
        volume = np.zeros(SIZE[::-1], np.uint8)
        if suffix == ".npy":
            np.save(root / "images" / name, volume)
        else:
            np.savez(root / "images" / name, image=volume, **({} if spacing is None else {"spacing": spacing}))
    table(root, {name: voxels_of(number) for number, name in enumerate(IDS)})
    return describe(root, **settings)


def read(root, **options):
    return read_layout("folder", root, **{"dims": 3, **options})


def ids(records):
    return [record.id for record in records]


def refuses(root, message, **options):
    with pytest.raises(UserError, match=message) as caught:
        read(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_points(source):
    for number, record in enumerate(sorted(source.labelled, key=lambda record: record.id)):
        assert record.landmarks.dtype == np.float64
        np.testing.assert_allclose(record.landmarks[:, ::-1], voxels_of(number), atol=1e-5)


# --- what is read ---


@pytest.mark.parametrize("system", ["LPS", "RAS"])
@pytest.mark.parametrize("affine", [centred(), centred(signs=(-1, -1, 1)), OBLIQUE], ids=["RAS", "LPS", "oblique"])
def test_markups_of_volumes(tmp_path, affine, system):
    source = read(make(tmp_path, affine, system))
    check_points(source)
    assert {split: ids(records) for split, records in source.splits.items()} == SPLITS
    record = source.splits["train"][0]
    steps = np.linalg.norm(affine[:3, :3], axis=0)[::-1]
    assert record.spacing == pytest.approx(steps) and record.geometry.size == SIZE[::-1]
    assert record.labels == tmp_path / "landmarks/c0.mrk.json" and record.image == tmp_path / "images/c0.nii"
    assert (source.unit, source.sdr_thresholds, source.landmark_names) == ("mm", (2, 2.5, 3, 4), NAMES)


@pytest.mark.parametrize("system", ["LPS", "RAS", "0", "1"])
def test_legacy_point_lists(tmp_path, system):
    make(tmp_path, OBLIQUE)
    for number, name in enumerate(IDS[:3]):
        (tmp_path / f"landmarks/{name}.mrk.json").unlink()
        ras = nib.affines.apply_affine(OBLIQUE, voxels_of(number))
        fcsv(tmp_path / f"landmarks/{name}.fcsv", ras * LPS if system == "1" else ras, system)
    check_points(read(tmp_path))


@pytest.mark.parametrize("coordinates", ["pixel", None, "LPS", "RAS"])
def test_table_of_volumes(tmp_path, coordinates):
    shutil.rmtree(make(tmp_path, OBLIQUE, coordinates=coordinates) / "landmarks")
    signs = {"LPS": LPS, "RAS": 1}.get(coordinates)
    points = {name: voxels_of(number) for number, name in enumerate(IDS)}
    if signs is not None:
        points = {name: nib.affines.apply_affine(OBLIQUE, values) * signs for name, values in points.items()}
    table(tmp_path, points)
    source = read(tmp_path)
    check_points(source)
    assert source.splits["test"][0].labels == tmp_path / "landmarks.csv"
    refuses(describe(tmp_path, coordinates="lps"), 'dataset.json: coordinates must be one of pixel, RAS, LPS, not "l')
    refuses(describe(tmp_path, coordinates=["LPS"]), "dataset.json: coordinates must be one of pixel, RAS, LPS")


def test_unannotated_points_and_cases_stay_so(tmp_path):
    make(tmp_path, splits={"train": 0.5, "test": 0.5})
    (tmp_path / "landmarks/c1.mrk.json").unlink()
    ras = nib.affines.apply_affine(centred(), voxels_of(2))
    markup(tmp_path / "landmarks/c2.mrk.json", ras[:2], names=NAMES[:2])
    content = json.loads((tmp_path / "landmarks/c3.mrk.json").read_text())
    for point in content["markups"][0]["controlPoints"]:
        point["positionStatus"] = "undefined"
    (tmp_path / "landmarks/c3.mrk.json").write_text(json.dumps(content))
    source = read(tmp_path)
    assert sorted(ids(source.labelled)) == ["c0", "c2", "c4", "c5"] and len(source.splits["test"]) == 2
    assert ids(source.unlabelled) == ["c1", "c3"] and all(r.landmarks is None for r in source.unlabelled)
    landmarks = next(record.landmarks for record in source.labelled if record.id == "c2")
    assert np.isnan(landmarks).all(axis=1).tolist() == [False, False, True, True, True, True]
    refuses(describe(tmp_path), r'dataset.json, splits.train: image "c1" has no landmarks in .*landmarks$')


def test_drawn_splits_keep_the_patients_of_the_description_together(tmp_path):
    pairs = {"c0": "p", "c1.nii": "p", "c2": "q", "c3": "q", "c4": "r", "c5": "r"}
    make(tmp_path)
    for seed in range(4):
        splits = {"train": 0.34, "validation": 0.33, "test": 0.33, "seed": seed}
        source = read(describe(tmp_path, splits=splits, patients=pairs))
        assert all(len({r.patient for r in source.splits[s]}) == 1 == len(source.splits[s]) / 2 for s in SPLITS)
    refuses(describe(tmp_path, patients={"c2": "p", "c3": "p"}), 'patient "p" is in both train and validation')
    refuses(describe(tmp_path, patients={"c44": "p"}),
            r'dataset.json, patients: image "c44" is not in images/ \(did you mean "c4"\?\)')
    refuses(describe(tmp_path, patients={"c0": 1}), "patients must be an object of image id and patient id")
    (tmp_path / "landmarks/c3.mrk.json").unlink()  # of a tested patient: not for pre-training either
    splits = {"train": ["c0", "c1"], "test": ["c2"]}
    assert read(describe(tmp_path, splits=splits, patients={"c2": "q", "c3": "q"})).unlabelled == ()


def test_description_elsewhere(tmp_path):
    make(tmp_path / "data", sdr_thresholds=[1, 2])
    (tmp_path / "data/dataset.json").rename(tmp_path / "other.json")
    assert read(tmp_path / "data", description=tmp_path / "other.json").sdr_thresholds == (1, 2)
    refuses(tmp_path / "data", "dataset.json is missing")
    refuses(tmp_path / "data", "dataset.json is missing", description=tmp_path / "none.json")
    describe(tmp_path / "data", splits={"train": ["c0"], "test": ["c9"]}).joinpath("dataset.json").rename(
        tmp_path / "other.json")
    refuses(tmp_path / "data", "other.json, splits.test", description=tmp_path / "other.json")


def test_dicom_series_is_one_volume(tmp_path):
    """Axial slices at LPS (-10, 20, 5 + 3 z) with pixels of 2 (down) x 0.5 (across) mm, as the standard counts."""
    for z in range(4):
        write_to = tmp_path / "images/a/head"
        write_to.mkdir(parents=True, exist_ok=True)
        write(write_to / f"{9 - z}.dcm", picture(
            np.zeros((6, 8), np.uint16), ImagePositionPatient=[-10, 20, 5 + 3 * z], PixelSpacing=[2, 0.5],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0]))
    lps = np.array([(-10 + 0.5 * 7, 20 + 2 * 4, 5 + 3 * 1.5), (-10, 20, 5)])
    markup(tmp_path / "landmarks/a/head.mrk.json", lps * LPS, names=NAMES[:2])
    source = read(describe(tmp_path, landmarks=NAMES[:2], splits={"train": ["a/head"]}))
    [record] = source.labelled
    assert record.landmarks == pytest.approx(np.array([(1.5, 4, 7), (0, 0, 0)]))
    assert record.spacing == (3, 2, 0.5) and record.geometry.size == (4, 6, 8)


# --- spacing ---


def test_spacing_of_arrays(tmp_path):
    source = read(arrays(tmp_path / "npy", spacing_mm=[0.5, 1, 2]))
    check_points(source)
    assert {record.spacing for record in source.records} == {(2, 1, 0.5)} and source.unit == "mm"
    assert {r.spacing for r in read(tmp_path / "npy", spacing_mm=3).records} == {(3, 3, 3)}
    source = read(describe(tmp_path / "npy"))
    assert (source.unit, source.sdr_thresholds, source.splits["test"][0].spacing) == ("px", (3, 6, 9), None)
    refuses(describe(tmp_path / "npy", spacing_mm=[1, 2]), r"dataset.json: spacing_mm must be .* \[x, y, z\] of such")
    source = read(arrays(tmp_path / "npz", ".npz", spacing=(0.5, 1, 2)))
    assert {record.spacing for record in source.records} == {(2, 1, 0.5)}
    source = read(describe(tmp_path / "npz", spacing_mm=[0.5, 1, 3]))
    assert {record.spacing for record in source.records} == {(3, 1, 0.5)}  # of labelled volumes too


def test_spacing_columns(tmp_path):
    arrays(tmp_path, spacing_mm=4)
    points = {name: voxels_of(number) for number, name in enumerate(IDS)}
    cells = dict.fromkeys(IDS, ",0.5,1,2") | {"c4": ",,,"}
    table(tmp_path, points, ",spacing_x,spacing_y,spacing_z", cells)
    refuses(tmp_path, r"c4.npy: its spacing is 4 x 4 x 4 mm, that of the other 5 volumes 0.5 x 1 x 2 mm")
    source = read(tmp_path, check_geometry=False)
    assert [record.spacing for record in source.labelled] == [(2, 1, 0.5)] * 4 + [(4, 4, 4)] + [(2, 1, 0.5)]
    refuses(describe(tmp_path), "c4.npy has no spacing, but others have; give it for all images or for none")


def test_a_volume_with_an_affine_takes_no_other_spacing(tmp_path):
    told = r"c0.nii has a spacing of its own \(0.5 x 1 x 2 mm\): remove spacing_mm from config, dataset.json and"
    make(tmp_path, OBLIQUE, spacing_mm=[0.5, 1, 2])
    refuses(tmp_path, told)
    refuses(describe(tmp_path), told, spacing_mm=1.0)
    shutil.rmtree(tmp_path / "landmarks")
    points = {name: voxels_of(number) for number, name in enumerate(IDS)}
    table(tmp_path, points, ",spacing_x,spacing_y,spacing_z", dict.fromkeys(IDS, ",,,") | {"c0": ",1,1,1"})
    refuses(tmp_path, told)


# --- contradictions ---


def test_table_and_folder(tmp_path):
    make(tmp_path)
    (tmp_path / "landmarks.csv").touch()
    refuses(tmp_path, f"data set at {tmp_path} has both landmarks.csv and landmarks/; give one of them, see data")
    shutil.rmtree(tmp_path / "landmarks")
    (tmp_path / "landmarks.csv").unlink()
    refuses(tmp_path, f'image "c0" has no landmarks in {tmp_path}/landmarks.csv or landmarks')


def test_landmark_files_that_do_not_fit(tmp_path):
    make(tmp_path)
    refuses(describe(tmp_path, coordinates="RAS"),
            'dataset.json: coordinates "RAS" is for a landmarks.csv .* files in landmarks/ name .*; remove this key')
    describe(tmp_path)
    (tmp_path / "landmarks/._c0.mrk.json").touch()  # of a macOS archive
    (tmp_path / "landmarks/notes.txt").touch()
    check_points(read(tmp_path))
    (tmp_path / "landmarks/c1.mrk.json").rename(tmp_path / "landmarks/c11.mrk.json")
    refuses(tmp_path, r'landmarks/c11.mrk.json belongs to no image: "c11" is not in images/ \(did you mean "c1"\?\)')
    fcsv(tmp_path / "landmarks/c2.fcsv", SHAPE)
    (tmp_path / "landmarks/c11.mrk.json").unlink()
    refuses(tmp_path, "c2.fcsv and c2.mrk.json are landmarks of the same image; remove one of them")


def test_flat_images(tmp_path):
    (tmp_path / "images").mkdir()
    for name in IDS:
        Image.new("L", (30, 30)).save(tmp_path / f"images/{name}.png")
    markup(tmp_path / "landmarks/c0.mrk.json", SHAPE)
    for dims in (2, 3):
        refuses(describe(tmp_path), "landmarks holds landmarks of volumes, but the images are flat; give landmarks.csv",
                dims=dims)
    shutil.rmtree(tmp_path / "landmarks")
    (tmp_path / "landmarks.csv").write_text("image,tip_x,tip_y\nc0,1,2\n")
    describe(tmp_path, landmarks=["tip"], splits={"train": ["c0"]})
    assert read(tmp_path, dims=2).splits["train"][0].landmarks.tolist() == [[2, 1]]
    refuses(tmp_path, "c0.png has 2 axes, dataset.image_size has 3 numbers; set is_3d to false and dataset.image_size")
    refuses(describe(tmp_path, landmarks=["tip"], splits={"train": ["c0"]}, coordinates="LPS"),
            'dataset.json: coordinates "LPS" is for a landmarks.csv of volumes, but the images are flat; rem', dims=2)


def test_volumes_where_images_are_expected(tmp_path):
    message = "c0.nii has 3 axes, dataset.image_size has 2 numbers; set is_3d to true and dataset.image_size to match"
    refuses(make(tmp_path), message, dims=2)


def test_mixed_dimensions(tmp_path):
    make(tmp_path)
    Image.new("L", (30, 30)).save(tmp_path / "images/c9.png")
    refuses(tmp_path, "c9.png has 2 axes, but .*c0.nii has 3; keep images and volumes in data sets of their own")
    (tmp_path / "images/c9.png").unlink()
    (tmp_path / "more").mkdir()
    Image.new("L", (30, 30)).save(tmp_path / "more/c9.png")
    refuses(tmp_path, "c9.png has 2 axes, dataset.image_size has 3 numbers", unlabelled_dirs=[tmp_path / "more"])


def test_no_image(tmp_path):
    shutil.rmtree(make(tmp_path) / "images")
    (tmp_path / "images").mkdir()
    refuses(tmp_path, "images holds no image or volume; supported: .*.nii.gz, .*DICOM series")


def test_world_landmarks_need_an_affine(tmp_path):
    told = r"counts in mm of the patient, but .*c0.npy does not say where its voxels lie; give landmarks.csv in pixels"
    arrays(tmp_path, spacing_mm=1, coordinates="LPS")
    refuses(tmp_path, f"landmarks.csv {told}")
    (tmp_path / "landmarks.csv").unlink()
    markup(tmp_path / "landmarks/c0.mrk.json", SHAPE)
    refuses(describe(tmp_path), f"landmarks/c0.mrk.json {told}")


def test_unlabelled_folders_of_volumes(tmp_path):
    make(tmp_path / "data")
    nifti(tmp_path / "more/x/c0.nii", centred(0.2))
    np.save(tmp_path / "more/bare.npy", np.zeros((5, 5, 5)))
    folders = [tmp_path / "more", tmp_path / "data/images"]
    source = read(tmp_path / "data", unlabelled_dirs=folders)
    assert [record.image.name for record in source.unlabelled] == ["bare.npy", "c0.nii"]  # nothing of the set twice
    assert source.unlabelled[1].geometry.spacing_mm == pytest.approx([0.2] * 3)
    assert len(source.pretraining_records()) == 6  # never the two tested ones
    nifti(tmp_path / "more/x/c0.nii", centred(5.0))  # the checks look at volumes without landmarks too
    refuses(tmp_path / "data", "more/x/c0.nii: its spacing is 5 x 5 x 5 mm", unlabelled_dirs=folders)
    read(tmp_path / "data", unlabelled_dirs=folders, check_geometry=False)


# --- wrong pairings ---


def spoil(root, change, system="LPS", name="c4"):
    """Rewrite one case's landmarks, RAS mm (N, 3), as `change` turns them."""
    ras = nib.affines.apply_affine(centred(), voxels_of(int(name[1:])))
    markup(root / f"landmarks/{name}.mrk.json", change(ras), system)


def wrong_spacing(root):
    affine = centred(1.0)
    affine[:3, 3] = centred()[:3, 3]
    nifti(root / "images/c4.nii", affine)


PAIRINGS = {
    "one outside": (lambda root: spoil(root, lambda p: np.where(np.arange(6)[:, None] == 3, 9.0, p)), False,
                    r'c4.mrk.json: landmark "right" lies outside .*c4.nii: .* the only one of 6; check that the two'),
    "voxels": (lambda root: spoil(root, lambda p: voxels_of(4) * LPS), False,
               r'c4.mrk.json: landmark "tip" .*; they lie inside when the file\'s numbers are voxels, not mm'),
    "swapped": (lambda root: spoil(root, lambda p: p[:, [1, 0, 2]]), True, "c4.mrk.json: .* axes x and y are swapped"),
    "flipped": (lambda root: spoil(root, lambda p: p * (-1, 1, 1)), True, "c4.mrk.json: .* left and right are mirr"),
    "LPS as RAS": (lambda root: spoil(root, lambda p: p * LPS, "RAS"), True,
                   "c4.mrk.json: .* LPS and RAS are exchanged: correct its coordinateSystem"),
    "spacing": (wrong_spacing, True, r"c4.nii: its spacing is 1 x 1 x 1 mm, that of the other 5 volumes 0.14 x 0.14"),
}


@pytest.mark.parametrize("case", PAIRINGS)
def test_wrong_pairing(tmp_path, case):
    damage, across, message = PAIRINGS[case]
    read(make(tmp_path))
    damage(tmp_path)
    assert ("set dataset.check_geometry to false if this is right" in refuses(tmp_path, message)) == across
    read(tmp_path, exclude=["c4"])
    if across:
        assert len(read(tmp_path, check_geometry=False).labelled) == 6
    else:
        refuses(tmp_path, message, check_geometry=False)


def test_exchanged_systems_far_from_the_origin(tmp_path):
    affine = centred()
    affine[:3, 3] += 40
    make(tmp_path, affine)
    markup(tmp_path / "landmarks/c2.mrk.json", nib.affines.apply_affine(affine, voxels_of(2)) * LPS, "LPS")
    refuses(tmp_path, "c2.mrk.json: .* as do all 6; .* LPS and RAS are exchanged: correct the file's coordinateSystem")


def test_wrong_pairing_in_a_table(tmp_path):
    arrays(tmp_path)
    points = {name: voxels_of(number) for number, name in enumerate(IDS)}
    table(tmp_path, points | {"c3": points["c3"][:, ::-1]})
    refuses(tmp_path, "landmarks.csv: .* axes x and z are swapped .*check_geometry")
    table(tmp_path, points | {"c3": points["c3"] + (0, 9, 0)})
    refuses(tmp_path, r'landmarks.csv: landmark "left, lower" lies outside .*c3.npy')


def test_command_ends_in_one_line(tmp_path, config_file, run_main):
    make(tmp_path / "data")
    path = config_file(is_3d=True, dataset={"name": "volumes", "layout": "folder", "root": str(tmp_path / "data"),
                                            "image_size": [16, 16, 16], "spacing_mm": None})
    assert run_main("study.launch", "--config", path, "--dry-run")[0] == 0
    spoil(tmp_path / "data", lambda p: p * (-1, 1, 1))
    status, out, error = run_main("study.launch", "--config", path, "--dry-run")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"error: \S*c4.mrk.json: [^\r\n]*left and right are mirrored[^\r\n]*\n", error), error
    assert run_main("study.launch", "--config", path, "--dry-run", "--set", "dataset.check_geometry=false")[0] == 0
    assert run_main("study.launch", "--config", path, "--dry-run", "--set", "dataset.spacing_mm=1")[0] == 2
