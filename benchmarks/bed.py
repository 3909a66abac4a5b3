"""A small study in which everything is there that can be damaged: data of each kind, labels, weights and results."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK
from PIL import Image

from core.config.load import load_config
from core.data.make_pack import write_pack
from core.errors import Interrupted
from core.formats.label_files import FORMATS, IN_SPACE, Images, read_label_file, resolved, write_label_file
from landmarks_finetuning import predict, train
from study import launch

NAMES = ("a", "b", "c")
STUDY: dict[str, Any] = {
    "experiment": {"name": "study", "output_dir": "runs", "device": "cpu", "precision": "float32"},
    "dataset": {"name": "mine", "layout": "folder", "root": "data", "image_size": [32, 32], "cache_dir": "cache"},
    "unet": {"base_channels": 8, "channel_multipliers": [1, 2], "attention_heads": 1, "attention_head_channels": 8,
             "linear_attention": False},
    "ddpm": {"num_train_timesteps": 20, "iterations": 4, "checkpoint_iterations": [4], "batch_size": 2,
             "sample_every": 4, "sample_count": 1, "sampling_steps": 2, "save_every": 2, "validate_every": 2},
    "finetune": {"backbones": ["ddpm", "scratch"], "shots": [2], "draws": [0], "iterations": 4, "batch_size": 2,
                 "validate_every": 2, "save_every": 2, "log_every": 1,
                 "self_training": {"rounds": 1, "images": 2}},
    "evaluation": {"overlays": 1, "batch_size": 4}}
SUFFIXES = (".png", ".tif", ".jpg", ".bmp", ".dcm", ".webp")  # of the first pictures; the rest are .png
PICTURES, LABELLED = 14, 11
VOLUMES = {**STUDY, "dataset": {**STUDY["dataset"], "root": "volumes", "image_size": [8, 16, 16], "cache_dir": None},
           "finetune": {"backbones": ["scratch"], "shots": [1], "draws": [0], "iterations": 2, "batch_size": 1},
           "is_3d": True}


def make_bed(place: Path) -> None:
    """Write the data and run the study in `place`, which becomes the working folder."""
    place.mkdir(parents=True)
    os.chdir(place)
    write_pictures(Path("data"))
    write_volumes(Path("volumes"))
    for name, values in (("study", STUDY), ("volumes", VOLUMES)):
        Path(f"{name}.json").write_text(json.dumps(values))
    write_pack(load_config("study.json").dataset, Path("pack.npz"))
    write_hand(Path("hand"))
    table, images = Path("data/landmarks.csv"), Images(Path("data/images"))
    labels = resolved(read_label_file(table, images=images), images, table)
    for kind in FORMATS:
        if kind not in IN_SPACE:
            write_label_file(Path("labels") / FORMATS[kind].place, labels, kind, images)
    call(launch, "--config", "study.json")
    run = next(Path("runs/study/landmarks/scratch").glob("*/shots*"))
    shutil.copytree(run, "trained")  # a place that does not change with the settings
    call(predict, "trained", "data/images", "--out", "found")
    half_trained()


def call(module: Any, *arguments: str) -> None:
    """module.main() with a command line."""
    sys.argv = [module.__name__, *arguments]
    module.main()


def half_trained() -> None:
    """Begin a run that is stopped after its first state, in runs/half."""
    def stop(*_: object) -> None:
        if any(Path("runs/half").rglob("last.pt")):
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    try:
        with suppress(Interrupted):
            call(train, *HALF)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


HALF = ("--config", "study.json", "--backbone", "scratch", "--shots", "2", "--set", "experiment.name=half",
        "finetune.iterations=60", "finetune.self_training.rounds=0")


def picture(index: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture (40, 36) of 8 bits with a blob at each of its landmarks, and those (3, 2) as (x, y)."""
    rng = np.random.default_rng(index)
    points = np.array([[9, 10], [25, 12], [18, 30]]) + rng.uniform(-4, 4, (3, 2))
    y, x = np.mgrid[:40, :36]
    blobs = sum(np.exp(-((x - px) ** 2 + (y - py) ** 2) / 8) for px, py in points)
    return (60 * rng.random((40, 36)) + 180 * np.clip(blobs, 0, 1)).astype(np.uint8), points.round(2)


def write_pictures(root: Path) -> None:
    """14 pictures of several formats, 11 of them with landmarks."""
    (root / "images").mkdir(parents=True)
    rows = [",".join(["image", *(f"{name}_{axis}" for name in NAMES for axis in "xy")])]
    for index in range(PICTURES):
        pixels, points = picture(index)
        suffix = SUFFIXES[index] if index < len(SUFFIXES) else ".png"
        path = root / "images" / f"p{index:02d}{suffix}"
        if suffix == ".dcm":
            slice_of(pixels.astype(np.uint16), index, None).save_as(path, enforce_file_format=True)
        else:
            Image.fromarray(pixels).save(path)
        if index < LABELLED:
            rows.append(",".join([f"p{index:02d}", *map(str, points.ravel())]))
    (root / "landmarks.csv").write_text("\n".join(rows) + "\n")
    (root / "dataset.json").write_text(json.dumps(
        {"landmarks": NAMES, "spacing_mm": 1.0, "splits": {"train": 0.5, "validation": 0.25, "test": 0.25, "seed": 0},
         "patients": {"p00": "one", "p01": "two"}, "sdr_thresholds": [2, 4]}))


def write_hand(root: Path) -> None:
    """Five pictures in layout hand, whose table is labels/all.csv."""
    (root / "jpg").mkdir(parents=True)
    (root / "labels").mkdir()
    rows = []
    for index in range(5):
        Image.fromarray(picture(index)[0]).save(root / "jpg" / f"{3100 + index}.jpg")
        points = np.random.default_rng(index).uniform(3, 30, 74).round(1)
        rows.append(",".join([str(3100 + index), *map(str, points)]))
    (root / "labels" / "all.csv").write_text("\n".join(rows) + "\n")


def slice_of(pixels: np.ndarray, index: int, series: str | None) -> pydicom.Dataset:
    """A DICOM file: a picture, or slice number `index` of a `series`."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    uid = pydicom.uid.UID(f"1.2.3.{index + 1}.{len(series or '')}")
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = uid
    data.Rows, data.Columns = pixels.shape
    data.PixelSpacing, data.BitsAllocated, data.BitsStored, data.HighBit = [1.0, 1.0], 16, 16, 15
    data.PixelRepresentation, data.SamplesPerPixel, data.PhotometricInterpretation = 0, 1, "MONOCHROME2"
    data.PixelData = pixels.tobytes()
    if series is not None:
        data.SeriesInstanceUID, data.InstanceNumber = series, index + 1
        data.ImagePositionPatient, data.ImageOrientationPatient = [0.0, 0.0, float(index)], [1, 0, 0, 0, 1, 0]
    return data


def write_volumes(root: Path) -> None:
    """Six volumes (8, 16, 16) as NIfTI, NRRD and a DICOM series, with 3D Slicer's markups and one .fcsv."""
    (root / "images").mkdir(parents=True)
    (root / "landmarks").mkdir()
    for index, suffix in enumerate((".nii.gz", ".nii", ".nrrd", "", ".nii.gz", ".nii")):
        rng = np.random.default_rng(index)
        pixels = rng.integers(0, 900, (8, 16, 16)).astype(np.uint16)
        if suffix:
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(pixels), str(root / "images" / f"c{index}{suffix}"))
        else:
            (root / "images" / "c3").mkdir()
            for number in range(8):
                slice_of(pixels[number], number, "1.2.9").save_as(root / f"images/c3/{number}.dcm",
                                                                  enforce_file_format=True)
        points = {name: (np.array(at) + rng.uniform(-1, 1, 3)).round(2).tolist()
                  for name, at in (("a", (4, 5, 3)), ("b", (10, 6, 4)), ("c", (8, 11, 5)))}
        if index == 5:
            lines = [f"{number},{','.join(map(str, at))},0,0,0,1,1,1,0,{name},," for number, (name, at)
                     in enumerate(points.items())]
            header = ("# Markups fiducial file version = 4.11\n# CoordinateSystem = LPS\n"
                      "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n")
            (root / "landmarks" / "c5.fcsv").write_text(header + "\n".join(lines) + "\n")
        else:
            markup = {"type": "Fiducial", "coordinateSystem": "LPS", "controlPoints": [
                {"label": name, "position": at, "positionStatus": "defined"} for name, at in points.items()]}
            (root / "landmarks" / f"c{index}.mrk.json").write_text(json.dumps({"markups": [markup]}))
    (root / "dataset.json").write_text(json.dumps(
        {"landmarks": NAMES, "splits": {"train": 0.5, "validation": 0.25, "test": 0.25, "seed": 0}}))
