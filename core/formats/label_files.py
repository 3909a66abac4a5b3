"""The landmark files of labelling tools by name: which one a file is, reading, writing, and what each cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.errors import UserError, did_you_mean
from core.formats.coco import is_coco, read_coco, write_coco
from core.formats.cvat import is_cvat, read_cvat, write_cvat
from core.formats.geometry import Geometry, index_to_world, world_to_index
from core.formats.images import find_images, image_id, read_geometry
from core.formats.label_studio import is_label_studio, read_label_studio, write_label_studio
from core.formats.labelme import is_labelme, labelme_files, read_labelme, write_labelme
from core.formats.labels import LabelSet, read_json
from core.formats.markups import MARKUP_SUFFIXES, is_markup, read_labels, read_markups, write_markups
from core.formats.points import FolderRow
from core.formats.tables import is_long, read_table, write_long, write_wide
from core.formats.tps import read_tps, write_tps

FLAT = ("coco", "labelme", "cvat", "label-studio", "tps")  # they count in the pixels of a picture
IN_SPACE = ("slicer", "fcsv")  # in mm of the patient


class Images:
    """The images below a folder, found by the names that label files give them; `paths` are given by name instead."""

    def __init__(self, folder: Path | None = None, paths: dict[str, Path] | None = None) -> None:
        """UserError where there is no such folder."""
        if folder is not None and not folder.is_dir():
            raise UserError(f"folder {folder} of the images does not exist")
        found = [] if folder is None else find_images(folder, recursive=True)
        self.where = folder
        self.paths = paths or {path.relative_to(folder).as_posix(): path for path in found if folder is not None}
        self._by_id = {image_id(name): name for name in self.paths}

    def name(self, written: str) -> str:
        """The path below the folder of the image that a file calls `written`. UserError: none, or several."""
        return self._by_id[match_image(written, self._by_id, str(self.where or "the images"))]

    def geometry(self, written: str) -> Geometry:
        """Where the pixels of that image lie. UserError: no folder was named, as above."""
        if not self.paths:
            raise UserError(f'image "{written}" must be looked at; name the folder of the images with --images')
        return read_geometry(self.paths[self.name(written)])

    def size(self, written: str) -> tuple[int, ...]:
        """Its size in tensor order. UserError: as above."""
        return self.geometry(written).size


class LabelFormat(NamedTuple):
    """How a format is read and written, and what of a `LabelSet` it cannot hold."""

    read: Callable[[Path, Sequence[str] | None, Images], LabelSet]
    write: Callable[[Path, LabelSet, Images], None]
    cannot: tuple[str, ...]
    place: str  # what predict calls its file or folder


def match_image(written: str, ids: Collection[str], where: str) -> str:
    """The one of `ids` that a label file calls `written`: the same id, or one whose path ends alike.

    Tools forget folders or put their own in front. UserError: none, or several.
    """
    key = image_id(written)
    same = [each for each in (written, key) if each in ids]
    ends = same or [each for each in ids if each.endswith(f"/{key}") or key.endswith(f"/{each}")]
    if len(ends) > 1 and not same:
        raise UserError(f'image "{written}" may be {" or ".join(sorted(ends)[:3])} in {where}; write its folder too')
    if not ends:
        raise UserError(f'image "{written}" is not in {where}{did_you_mean(key, sorted(ids))}')
    return ends[0]


def detect(path: Path) -> str:
    """The format of an existing file or folder, from its suffix and content. UserError: none, or two in one folder."""
    name = path.name.lower()
    if path.is_dir():
        kinds = [kind for kind, there in (("slicer", bool(_markup_files(path))), ("labelme", bool(labelme_files(path))))
                 if there]
        if len(kinds) == 1:
            return kinds[0]
        said = "both 3D Slicer's and LabelMe's files" if kinds else "no .mrk.json, .fcsv or LabelMe's .json"
        raise UserError(f"folder {path} holds {said}; name the format with --from")
    if not path.is_file():
        raise UserError(f"landmark file {path} does not exist")
    if name.endswith(".csv"):
        return "long" if is_long(path) else "wide"
    if name.endswith(".tps"):
        return "tps"
    if name.endswith(".xml") and is_cvat(path):
        return "cvat"
    if name.endswith(tuple(MARKUP_SUFFIXES)):
        return "slicer"
    if name.endswith(".json"):
        return _json_kind(path)
    raise UserError(f"{path} is of no known format; name it with --from: {', '.join(FORMATS)}")


def read_label_file(path: Path, names: Sequence[str] | None = None, images: Images | None = None,
                    kind: str | None = None) -> LabelSet:
    """The landmarks of a file or folder of a labelling tool, of any format, in pixels; images called as it calls them.

    UserError: as the format's own reader, and an image that is there twice.
    """
    return _once(FORMATS[kind or detect(path)].read(path, names, images or Images()), path)


def _once(labels: LabelSet, path: Path) -> LabelSet:
    """The same labels; UserError where an image has two rows: which of them counts is not ours to say."""
    seen = set[str]()
    for row in labels.rows:
        if row.image in seen:
            raise UserError(f'{path}: image "{row.image}" is there twice; keep one set of landmarks an image')
        seen.add(row.image)
    return labels


def resolved(labels: LabelSet, images: Images, path: Path) -> LabelSet:
    """Rows with the path and size of their image. UserError: an image not there, there twice, or of another size."""
    rows = []
    for row in labels.rows:
        try:
            name, size = images.name(row.image), images.size(row.image)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        check_size(row, size, path)
        rows.append(replace(row, image=name, size=size))
    return _once(replace(labels, rows=tuple(rows)), path)


def outside(labels: LabelSet) -> list[str]:
    """In words, the landmarks that lie beside their image; where its size is not known, those at negative numbers."""
    said = []
    for row in labels.rows:
        ends = np.full(row.points.shape[1], np.inf) if row.size is None else np.array(row.size)
        beside = ((row.points < -0.5) | (row.points > ends - 0.5)).any(axis=1)  # never of NaN
        for name, point in zip(np.array(labels.names)[beside], row.points[beside, ::-1].tolist(), strict=True):
            said.append(f'"{name}" of image "{row.image}" at ({", ".join(f"{value:g}" for value in point)})')
    return said


def check_size(row: FolderRow, size: tuple[int, ...], path: Path) -> None:
    """UserError where a label file tells another size of an image: its landmarks are those of a smaller copy, say."""
    if row.size is not None and row.size != size:
        told, real = (" x ".join(map(str, each[::-1])) for each in (row.size, size))
        raise UserError(f'{path}: image "{row.image}" is {told} pixels there, but its file has {real}; label the '
                        "images themselves, not copies of another size")


def lost(labels: LabelSet, kind: str) -> list[str]:
    """What `labels` say that a format cannot hold, in words; empty where nothing is lost."""
    cannot, rows = FORMATS[kind].cannot, labels.rows
    hidden = sum(int(row.hidden.sum()) for row in rows if row.hidden is not None)
    spacings = [row.spacing for row in rows if row.spacing is not None]
    used = np.any([~np.isnan(row.points).any(axis=1) for row in rows], axis=0)
    unused = [name for name, some in zip(labels.names, used, strict=True) if not some]
    empty = sum(bool(np.isnan(row.points).all()) for row in rows)
    numbered = tuple(str(number) for number in range(1, len(labels.names) + 1))
    said = {
        "hidden": f"that {hidden} points are hidden" if hidden else "",
        "spacing": f"the spacing of {len(spacings)} images" if spacings else "",
        "uneven": "a spacing that differs between x and y" if any(len(set(each)) > 1 for each in spacings) else "",
        "patients": "patients" if any(row.patient for row in rows) else "",
        "names": f"the names {', '.join(labels.names)}: keep their order" if labels.names != numbered else "",
        "unused": f"landmarks that no image has: {', '.join(unused)}" if unused else "",
        "empty": f"that {empty} images were looked at and have no landmark" if empty else "",
    }
    return [said[what] for what in cannot if said[what]]


def gaps(labels: LabelSet) -> list[str]:
    """'"c" of image "p03.png"': the images that have some landmarks and lack one that others have."""
    there = np.array([~np.isnan(row.points).any(axis=1) for row in labels.rows])
    lacking = ~there & there.any(axis=0)
    return [f'"{labels.names[int(lacking[number].argmax())]}" of image "{row.image}"'
            for number, row in enumerate(labels.rows) if there[number].any() and lacking[number].any()]


def write_label_file(path: Path, labels: LabelSet, kind: str, images: Images | None = None) -> None:
    """Write a file, or for labelme, slicer and fcsv a folder.

    UserError: a volume in a format of pictures, as the writer.
    """
    if kind in FLAT:
        for row in labels.rows:
            if row.points.shape[1] != 2:
                raise UserError(f'{kind} holds flat images only, and "{row.image}" is a volume; choose from '
                                f"{', '.join(name for name in FORMATS if name not in FLAT)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    FORMATS[kind].write(path, labels, images or Images())


def _json_kind(path: Path) -> str:
    if is_labelme(path):
        return "labelme"
    if is_markup(path):
        return "slicer"
    content = read_json(path)
    if is_coco(content):
        return "coco"
    if is_label_studio(content):
        return "label-studio"
    raise UserError(f"{path} is none of COCO's, LabelMe's, Label Studio's and 3D Slicer's JSON files"
                    + ('; export from Label Studio as "JSON"' if isinstance(content, list) else ""))


def _markup_files(path: Path) -> list[Path]:
    every = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in every if file.name.lower().endswith(tuple(MARKUP_SUFFIXES)) and file.is_file()]


def _read_slicer(path: Path, names: Sequence[str] | None, images: Images) -> LabelSet:
    """Files of 3D Slicer in mm -> voxels of their volumes, which must say where they lie."""
    files = _markup_files(path) or [path]
    chosen = tuple(names or dict.fromkeys(label for file in files for label in read_labels(file)))
    rows = []
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        suffix = next(end for end in (*MARKUP_SUFFIXES, ".json") if name.lower().endswith(end))
        image = name[: -len(suffix)]
        affine = images.geometry(image).affine
        if affine is None:
            raise UserError(f'{file} counts in mm of the patient, but image "{image}" does not say where its voxels '
                            "lie")
        rows.append(FolderRow(image, world_to_index(read_markups(file, chosen), affine)))
    return LabelSet(chosen, tuple(rows))


def _write_slicer(path: Path, labels: LabelSet, images: Images, suffix: str = ".mrk.json") -> None:
    """A folder of files ending in `suffix`, or where `path` ends in it that file."""
    for row in labels.rows:
        affine = images.geometry(row.image).affine
        if affine is None or row.points.shape[1] != 3:
            raise UserError(f'3D Slicer counts in mm of the patient, and image "{row.image}" is flat or does not say '
                            "where its voxels lie")
        alone = path.name.lower().endswith(suffix)
        if alone and len(labels.rows) > 1:
            raise UserError(f"{path} holds one volume, but there are {len(labels.rows)}; name a folder")
        file = path if alone else path / f"{row.image}{suffix}"
        write_markups(file, labels.names, index_to_world(row.points, affine))


FORMATS: dict[str, LabelFormat] = {
    "wide": LabelFormat(lambda path, names, _: read_table(path, names),
                        lambda path, labels, _: write_wide(path, labels), ("hidden",), "landmarks.csv"),
    "long": LabelFormat(lambda path, names, _: read_table(path, names),
                        lambda path, labels, _: write_long(path, labels), ("hidden", "spacing"), "landmarks_long.csv"),
    "coco": LabelFormat(lambda path, names, _: read_coco(path, names),
                        lambda path, labels, _: write_coco(path, labels), ("spacing", "patients"), "coco.json"),
    "labelme": LabelFormat(lambda path, names, _: read_labelme(path, names),
                           lambda path, labels, images: write_labelme(path, labels, images.paths),
                           ("hidden", "spacing", "patients", "unused"), "labelme"),
    "cvat": LabelFormat(lambda path, names, _: read_cvat(path, names), lambda path, labels, _: write_cvat(path, labels),
                        ("spacing", "patients", "empty"), "cvat.xml"),
    "label-studio": LabelFormat(lambda path, names, _: read_label_studio(path, names),
                                lambda path, labels, _: write_label_studio(path, labels),
                                ("spacing", "patients", "unused"), "label_studio.json"),
    "tps": LabelFormat(lambda path, names, images: read_tps(path, names, images.size if images.paths else None),
                       lambda path, labels, _: write_tps(path, labels),
                       ("hidden", "uneven", "patients", "names"), "landmarks.tps"),
    "slicer": LabelFormat(_read_slicer, _write_slicer, ("hidden", "spacing", "patients"), "slicer"),
    "fcsv": LabelFormat(_read_slicer, partial(_write_slicer, suffix=".fcsv"),
                        ("hidden", "spacing", "patients", "unused", "empty"), "fcsv"),
}
