"""Unlabelled sets that outgrow memory: decoded images in a few files on disk, in the images' own depth.

A shard is two files in dataset.cache_dir/packed_<settings>: `.pixels`, the images one after the other, and `.npz`, what
lies where. It is written once, whole, and never changed; images that are added later go into shards of their own, and
an interrupted filling loses no more than its last ones. Pixels are rounded to the depth of what was read: 8-bit images
to 8 bits, other whole numbers to 16, anything else stays float32. They are read by position, not mapped: pages that are
mapped count as the memory of the process.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import secrets
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from core.config.dataset import Dataset as DatasetConfig
from core.data.cache import CACHE_VERSION, decode, decoded_size, is_packed
from core.data.digests import pixel_digests
from core.data.packs import Loaded
from core.data.records import Record
from core.data.resize import intensity_range
from core.files import atomic_file, write_atomically

LARGE_BYTES = 4 << 30  # float32 sets above this, too large for a GPU, are read from disk, batch by batch
SHARD_BYTES = 1 << 30
DECODERS = min(8, os.cpu_count() or 1)  # images decoded at a time: more would only hold more memory
AT_A_TIME = 256  # images decoded between two writes: what is in memory at most
COLUMNS = ("offsets", "shapes", "original_sizes", "maps", "ranges")
INDEX_DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, NotImplementedError, RuntimeError, SyntaxError,
                struct.error, tokenize.TokenError, zlib.error, zipfile.BadZipFile)  # fmt: skip
INTEGERS = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.int16))


def is_large(records: Sequence[Record], config: DatasetConfig) -> bool:
    """Whether the decoded images would take more than LARGE_BYTES of memory; those of a pack are there already."""
    if not records or is_packed(records[0], config) or config.cache_dir is None:
        return False
    if config.resample_mm is None:
        return 4 * len(records) * math.prod(config.whole_size) > LARGE_BYTES
    return 4 * sum(math.prod(decoded_size(record, config)) for record in records) > LARGE_BYTES


@dataclass(frozen=True, eq=False)
class Store:
    """The images of one set: image m is `shapes[m]` numbers of `depths[which[m]]` at byte `offsets[m]` of its file.

    digests: of the files; which, offsets: (M,); shapes: (M, D + 1), with the channels; original_sizes: (M, D);
    maps: (M, D, D + 1), stored -> network pixels; ranges: (M, 2) float32, the intensities that become 0 and 1.
    """

    files: list[int]
    depths: list[np.dtype]
    digests: list[str | None]
    which: np.ndarray
    offsets: np.ndarray
    shapes: np.ndarray
    original_sizes: np.ndarray
    maps: np.ndarray
    ranges: np.ndarray

    @property
    def depth(self) -> np.dtype:
        """What holds every image's numbers."""
        return np.result_type(*self.depths)

    def __len__(self) -> int:
        return len(self.which)

    def read(self, index: int, place: np.ndarray | None = None) -> np.ndarray:
        """Image `index` (C, *size) in its own depth, read into `place` where that is contiguous and as deep."""
        which, shape = int(self.which[index]), tuple(self.shapes[index].tolist())
        depth = self.depths[which]
        direct = place is not None and place.flags.c_contiguous and place.dtype == depth
        pixels = place if place is not None and direct else np.empty(shape, depth)
        read = os.preadv(self.files[which], [pixels.reshape(-1).view(np.uint8).data], int(self.offsets[index]))
        if read != pixels.nbytes:
            raise OSError(f"image {index} of the packed images was cut off while they were read")
        if place is not None and not direct:
            place[:] = pixels
        return pixels

    def __del__(self) -> None:
        for file in self.files:
            os.close(file)


def open_store(records: Sequence[Record], config: DatasetConfig, progress: str | None = None) -> Store:
    """The decoded images of `records`; those that no shard has yet are decoded first. UserError for a bad file."""
    if config.cache_dir is None:
        raise ValueError("packed images need a folder")
    folder = Path(config.cache_dir) / f"packed_{_settings_digest(config)}"
    digests = pixel_digests(records, config)
    names = [_name(record, digest, config) for record, digest in zip(records, digests, strict=True)]
    stored = _read_shards(folder)
    missing = {name: record for name, record in zip(names, records, strict=True) if name not in stored.rows}
    if missing:
        _fill(folder, missing, config, progress)
        stored = _read_shards(folder)
    rows = np.array([stored.rows[name] for name in names])
    used, which = np.unique(stored.shards[rows], return_inverse=True)
    files = [os.open(stored.paths[shard], os.O_RDONLY) for shard in used]
    return Store(files, [stored.depths[shard] for shard in used], digests, which,
                 **{key: stored.columns[key][rows] for key in COLUMNS})


def _settings_digest(config: DatasetConfig) -> str:
    """Of all settings that decide what a shard holds."""
    settings = [CACHE_VERSION, config.whole_size, config.resample_mm, config.spacing_mm, config.intensity,
                config.percentiles, config.window]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _name(record: Record, digest: str | None, config: DatasetConfig) -> str:
    """Of an image in a store: its content, and the spacing where that decides how it is resampled."""
    spacing = "" if config.resample_mm is None else "x".join(f"{value:g}" for value in record.spacing or ())
    return f"{digest}_{spacing}"


class _Shards(NamedTuple):
    """What the shards of a folder hold, all together; paths and depths by shard, columns by row."""

    paths: list[Path]
    depths: list[np.dtype]
    rows: dict[str, int]  # by name
    shards: np.ndarray  # of each row
    columns: dict[str, np.ndarray]


def _read_shards(folder: Path) -> _Shards:
    """A shard whose pixels are missing or cut off, or whose index is damaged, does not count: it is made anew."""
    paths, depths, names = [], [], []
    columns: dict[str, list[np.ndarray]] = {key: [] for key in COLUMNS}
    for path in sorted(folder.glob("*.npz")):
        pixels = path.with_suffix(".pixels")
        try:
            with np.load(path) as index:
                content = {key: index[key] for key in ("bytes", "depth", "names", *COLUMNS)}
            whole = pixels.stat().st_size == int(content["bytes"])
        except INDEX_DAMAGE:
            continue
        if whole:
            paths.append(pixels)
            depths.append(np.dtype(str(content["depth"])))
            names.append(content["names"].tolist())
            for key, column in columns.items():
                column.append(content[key])
    rows = {name: row for row, name in enumerate(chain.from_iterable(names))}
    shards = np.repeat(np.arange(len(paths)), [len(some) for some in names])
    return _Shards(paths, depths, rows, shards, {key: np.concatenate(c) for key, c in columns.items() if c})


@dataclass
class _NewShard:
    """A shard that is being written: of one image after the other its name and its row of COLUMNS."""

    path: Path
    depth: np.dtype
    file: BinaryIO
    names: list[str] = field(default_factory=list)
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    bytes: int = 0

    def add(self, name: str, loaded: Loaded, config: DatasetConfig) -> None:
        """Append one image."""
        limits = np.array(intensity_range(loaded.pixels, config), dtype=np.float32)
        self.names.append(name)
        self.rows.append((self.bytes, loaded.pixels.shape, loaded.original_size, loaded.map, limits))
        self.bytes += self.file.write(quantised(loaded.pixels, self.depth).tobytes())

    def write_index(self) -> None:
        """What makes the shard count."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {"names": self.names, "depth": self.depth.str, "bytes": self.bytes,
                                  **dict(zip(COLUMNS, zip(*self.rows, strict=True), strict=True))}
        savez: Any = np.savez  # its stub takes the arrays' names for options
        savez(buffer, **{key: np.array(value) for key, value in arrays.items()})
        write_atomically(self.path.with_suffix(".npz"), buffer.getvalue())


def quantised(pixels: np.ndarray, depth: np.dtype) -> np.ndarray:
    """Float32 pixels in `depth`, rounded to whole numbers where it is one of INTEGERS."""
    return np.rint(pixels).astype(depth) if depth in INTEGERS else pixels.astype(depth, copy=False)


def _fill(folder: Path, missing: dict[str, Record], config: DatasetConfig, progress: str | None) -> None:
    """Write shards with the images `missing`, by name."""
    remaining = _decoded(missing, config, progress)
    image = next(remaining, None)
    while image is not None:  # one round a shard of each depth
        with ExitStack() as stack:
            shards: dict[np.dtype, _NewShard] = {}
            while image is not None and all(shard.bytes < SHARD_BYTES for shard in shards.values()):
                name, loaded, depth = image
                if depth not in shards:
                    path = folder / f"{depth.name}_{secrets.token_hex(8)}.pixels"
                    shards[depth] = _NewShard(path, depth, stack.enter_context(atomic_file(path)))
                shards[depth].add(name, loaded, config)
                image = next(remaining, None)
        for shard in shards.values():
            shard.write_index()


def _decoded(missing: dict[str, Record], config: DatasetConfig, progress: str | None
             ) -> Iterator[tuple[str, Loaded, np.dtype]]:
    """Name, image and depth of all images `missing`, decoded by threads, a few at a time."""
    names = list(missing)
    with (ThreadPoolExecutor(DECODERS) as pool,
          tqdm(desc=progress, total=len(names), leave=False, disable=None if progress else True) as bar):
        for start in range(0, len(names), AT_A_TIME):
            part = names[start : start + AT_A_TIME]
            for name, (loaded, depth) in zip(part, pool.map(partial(decode, config=config), map(missing.get, part)),
                                             strict=True):
                yield name, loaded, depth
                bar.update()
