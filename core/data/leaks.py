"""Images that stand on both sides of a split: the same file, the same picture in another file, the same patient.

Two pictures are one when the one leaves hardly anything of the other unexplained. Both are reduced to a coarse grid,
grey values to their ranks (so no monotone change of brightness matters) and blurred; then one is fitted by least
squares with the other, its derivative along each axis (a shift) and that times the position (a stretch). The
residual's share of the variance, the case nearest the limit of each kind:

    the 23 pairs of the public cephalograms                                  at most 0.0007
    JPEG quality 40, resized by 0.9, 0.6 x - 10, gamma 0.6 and 1.6           at most 0.0007
    shifted by 1 %, by 2 %                                                   at most 0.0009, 0.0058
    2 % cut off every side, 4 %                                              at most 0.0014, 0.0093
    two different images: 300 cephalograms, 279 chest X-rays, 10 hands       at least 0.0139, 0.0183, 0.0207
    24 volumes of mouse skulls: shifted by 2 %, two different ones           at most 0.0022, at least 0.0835

Missed: copies brightened until large parts are white (0.02 to 0.07), noisy volumes (0.04), turned or mirrored copies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.stats import rankdata
from tqdm import tqdm

from core.config.dataset import Dataset as DatasetConfig
from core.data.cache import load_one
from core.data.records import DataSource, Record
from core.data.resize import resize
from core.data.store import is_large, open_store
from core.files import parse_json, stamp, write_atomically

VERSION = 1  # of what is looked for; part of the name under which a finding is kept
GRID = {2: 32, 3: 16}  # cells along each axis, by number of axes
BLUR, MARGIN = 1.0, 2  # cells: standard deviation; left out at the borders, where a shifted copy shows something else
LARGEST_UNEXPLAINED = 0.009  # of the same picture
CHUNK = 256  # images compared with all others at a time
PART = 2048  # images held reduced at a time, of those that are not labelled
OTHER_SIDES = {"test": ("train", "validation", "unlabelled"), "validation": ("train",)}
KINDS = {"identical": "identical files", "near": "the same picture", "patient": "the same patient"}
SHOWN = 5  # pairs in a plan


@dataclass(frozen=True)
class Leak:
    """Image `id` of `split` has a twin in `twin_split`, which it must not have; `kind` is a key of KINDS."""

    split: str
    id: str
    twin_split: str
    twin: str
    kind: str

    def __str__(self) -> str:
        return f"{self.split} {self.id} = {self.twin_split} {self.twin} ({KINDS[self.kind]})"


def find_leaks(source: DataSource, config: DatasetConfig) -> tuple[Leak, ...]:
    """Twins of test images in train, validation and unlabelled, and of validation images in train.

    The images are read through the cache of `load_images`, once: what was found is kept in dataset.cache_dir until a
    file, a split or a patient changes. UserError for an image that cannot be read.
    """
    groups = {**source.splits, "unlabelled": source.unlabelled}
    path = None if config.cache_dir is None else Path(config.cache_dir) / f"leaks_{_key(groups, config)}.json"
    if path is not None and path.is_file():
        return tuple(Leak(**entry) for entry in parse_json(path.read_text(encoding="utf8")))
    labelled = {split: list(_reduced_parts(records, config)) for split, records in source.splits.items()}
    leaks: list[Leak] = []
    for split, others in OTHER_SIDES.items():
        for other in others if groups[split] else ():
            parts = labelled[other] if other in labelled else _reduced_parts(groups[other], config)  # never all at once
            leaks += _twins(split, labelled[split], other, parts)
    if path is not None:
        write_atomically(path, json.dumps([asdict(leak) for leak in leaks]).encode())
    return tuple(leaks)


def leaked_ids(leaks: Sequence[Leak], split: str) -> list[str]:
    """The images of `split` that have a twin, sorted."""
    return sorted({leak.id for leak in leaks if leak.split == split})


def leak_lines(leaks: Sequence[Leak]) -> list[str]:
    """What a plan says of them: a count for each split, some pairs, how many more; nothing where there are none."""
    if not leaks:
        return []
    counts = ", ".join(f"{len(leaked_ids(leaks, split))} {split}" for split in OTHER_SIDES if leaked_ids(leaks, split))
    more = [f"    and {len(leaks) - SHOWN} more pairs"] if len(leaks) > SHOWN else []
    return [f"leaks  {counts} images have a twin on the other side of the split (evaluation.leaked says what becomes "
            "of them):", *(f"    {leak}" for leak in leaks[:SHOWN]), *more]


def unexplained(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(M, N) shares of the variance that images `first` (M, *grid) and `second` (N, *grid) leave of each other.

    Of the two ways round the smaller one: 0 = the same but for a small shift and stretch, 1 = nothing in common, as
    everything has with an image of one grey value.
    """
    return np.minimum(_left_over(first, second), _left_over(second, first).T)


def _left_over(explaining: np.ndarray, explained: np.ndarray) -> np.ndarray:
    """(M, N) shares of the variance of each `explained` image that is left by a fit of each `explaining` one."""
    target = _columns([explained])[:, 0]
    variance = np.square(target).sum(axis=1)
    shares = np.ones((len(explaining), len(explained)))
    for start in range(0, len(explaining), CHUNK):
        columns = _columns(_terms(explaining[start : start + CHUNK]))
        products = columns @ target.T
        weights = np.linalg.pinv(columns @ columns.transpose(0, 2, 1), rcond=1e-9, hermitian=True) @ products
        shares[start : start + CHUNK] -= (products * weights).sum(axis=1) / np.maximum(variance, 1e-9)
    return shares


def _terms(images: np.ndarray) -> list[np.ndarray]:
    """What an image (M, *grid) may be fitted with: itself, its derivatives, and those times the position."""
    dims = images.ndim - 1
    places = np.meshgrid(*(np.linspace(-1, 1, n) for n in images.shape[1:]), indexing="ij")
    slopes = np.gradient(images, axis=tuple(range(1, dims + 1)))
    return [images, *slopes, *(place * slope for place, slope in zip(places, slopes, strict=True))]


def _columns(terms: Sequence[np.ndarray]) -> np.ndarray:
    """T x (M, *grid) -> (M, T, inner cells), each of mean 0."""
    inner = (slice(None), *[slice(MARGIN, -MARGIN)] * (terms[0].ndim - 1))
    stacked = np.stack([term[inner].reshape(len(term), -1) for term in terms], axis=1)
    return stacked - stacked.mean(axis=2, keepdims=True)


def reduced(pixels: np.ndarray) -> np.ndarray:
    """(C, *size) -> (*grid) float64: the mean of the channels on a coarse grid, as blurred ranks from 0 to 1."""
    dims = pixels.ndim - 1
    coarse = resize(pixels.mean(axis=0, keepdims=True), (GRID[dims],) * dims)[0]
    return gaussian_filter(rankdata(coarse).reshape(coarse.shape) / coarse.size, BLUR, mode="nearest")


class _Part(NamedTuple):
    """Some images: digests of their files (None where a pack does not hold them), reduced images (M, *grid)."""

    records: Sequence[Record]
    digests: list[str | None]
    images: np.ndarray


def _reduced_parts(records: Sequence[Record], config: DatasetConfig) -> Iterator[_Part]:
    """Digests and reduced images of `records`, PART at a time."""
    dims = len(config.image_size)
    store = open_store(records, config, "images") if is_large(records, config) else None
    with tqdm(desc="looking for leaks", total=len(records), leave=False, disable=None) as bar:
        for start in range(0, len(records), PART):
            some = records[start : start + PART]
            digests, images = [], np.zeros((len(some), *[GRID[dims]] * dims))
            for index, record in enumerate(some):
                if store is None:
                    loaded = load_one(record, config)
                    digest, pixels = loaded.digest, loaded.pixels
                else:
                    digest, pixels = store.digests[start + index], store.read(start + index)
                digests.append(digest)
                images[index] = reduced(pixels)
                bar.update()
            yield _Part(some, digests, images)


def _twins(split: str, ours: Sequence[_Part], other: str, theirs: Iterable[_Part]) -> list[Leak]:
    """The pairs across two groups, each once, by the strongest of the reasons, in the order of `ours`."""
    records = [record for part in ours for record in part.records]
    images = np.concatenate([part.images for part in ours])
    by_digest = _places([digest for part in ours for digest in part.digests])
    by_patient = _places([record.patient for record in records])
    pairs: list[tuple[int, int, str, str]] = []  # place here, place there, id there, kind
    first = 0
    for part in theirs:
        kinds: dict[tuple[int, int], str] = {}
        for n, record in enumerate(part.records):
            kinds.update(((m, n), "patient") for m in by_patient.get(record.patient, ()))
        near = np.argwhere(unexplained(images, part.images) <= LARGEST_UNEXPLAINED)
        kinds.update(((m, n), "near") for m, n in near.tolist())
        for n, digest in enumerate(part.digests):
            kinds.update(((m, n), "identical") for m in by_digest.get(digest, ()))
        pairs += [(m, first + n, part.records[n].id, kind) for (m, n), kind in kinds.items()]
        first += len(part.records)
    return [Leak(split, records[m].id, other, twin, kind) for m, _, twin, kind in sorted(pairs)]


def _places(values: Sequence[str | None]) -> dict[str | None, list[int]]:
    """Where each value stands, those that are None nowhere."""
    places: dict[str | None, list[int]] = {}
    for place, value in enumerate(values):
        if value is not None:
            places.setdefault(value, []).append(place)
    return places


def _key(groups: dict[str, tuple[Record, ...]], config: DatasetConfig) -> str:
    """Of everything a finding depends on; files by place, size and time, so that nothing needs to be read."""
    parts = [VERSION, config.whole_size, config.resample_mm, config.spacing_mm]
    parts += [(split, record.id, record.patient, stamp(record.image)) for split, group in groups.items()
             for record in group]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
