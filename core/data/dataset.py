"""Records -> tensors: decode and resize once into a cache keyed by content, few-shot subsets, portable packs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from core.bounds import require_memory
from core.config.dataset import Dataset as DatasetConfig
from core.data.augment import Crops, draw_crops
from core.data.cache import decoded_size, is_packed, load_one
from core.data.packs import Loaded
from core.data.records import Record
from core.data.resize import normalise
from core.data.store import DECODERS, Store, is_large, open_store
from core.files import stamp
from core.formats.geometry import apply_maps, inverse

CHANNELS = 1  # images are grey
ON_DEVICE_BYTES = 4 << 30  # image sets up to this size live on the GPU
KEPT_SETS, KEPT_BYTES = 3, 1 << 30  # how many image sets stay in memory for the next run, and how large ones at most
_kept: dict[tuple, ImageSet] = {}


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Records as tensors on one canvas.

    images: (M, C, *canvas) float32, intensities as the config asks; points: (M, N, D) float64 in network pixels, NaN =
    not annotated (None for unlabelled sets); maps: (M, D, D + 1) from stored to network pixels; sizes: (M, D) int64,
    what of the canvas each image fills, from `firsts` (M, D) on, the rest being 0; original_sizes: (M, D) int64.
    network_size is what the network takes: the canvas itself, unless images are resampled to a common spacing.
    """

    records: tuple[Record, ...]
    images: Tensor
    points: Tensor | None
    maps: np.ndarray
    firsts: Tensor
    sizes: Tensor
    original_sizes: np.ndarray
    network_size: tuple[int, ...]

    @property
    def truth(self) -> Tensor:
        """`points` of a labelled set; ValueError for one without labels."""
        if self.points is None:
            raise ValueError("these images have no labels")
        return self.points

    @property
    def fits(self) -> bool:
        """Whether every image has the network's size, so that neither crops nor windows are needed."""
        return tuple(self.images.shape[2:]) == self.network_size

    def seen(self, index: int) -> tuple[slice, ...]:
        """The part of the canvas that image `index` fills, with what it takes about it to reach the network's size."""
        first, size = self.firsts[index].cpu().numpy(), self.sizes[index].cpu().numpy()
        missing = np.maximum(self.network_size - size, 0)
        first = np.minimum(first - missing // 2, self.images.shape[2:] - size - missing).clip(min=0)
        return tuple(map(slice, first.tolist(), (first + size + missing).tolist()))

    def crops(self, chosen: Tensor) -> Crops | None:
        """Random crops of the network's size in the `chosen` images, None where they have it."""
        return None if self.fits else random_crops(self.network_size, self.firsts[chosen], self.sizes[chosen])

    def to(self, device: torch.device) -> ImageSet:
        """The set on `device`; images stay where they are when they are too many for a GPU."""
        small = self.images.numel() * self.images.element_size() <= ON_DEVICE_BYTES
        return replace(self, images=self.images.to(device) if small else self.images,
                       points=None if self.points is None else self.points.to(device), sizes=self.sizes.to(device),
                       firsts=self.firsts.to(device))

    def _centres(self) -> np.ndarray:
        """(M, 1, D) network pixels: the middle of what each image fills of the canvas."""
        return (self.firsts.cpu().numpy() + (self.sizes.cpu().numpy() - 1) / 2)[:, None]

    def centred_points(self) -> np.ndarray:
        """Annotations (M, N, D) in network pixels from the middle of each image, wherever it lies on the canvas."""
        return apply_maps(self.original_points(), self.maps) - self._centres()

    def from_centred(self, points: np.ndarray) -> np.ndarray:
        """Points (N, D) or (M, N, D) from the middle of each image, in network pixels -> (M, N, D) stored pixels."""
        return apply_maps(points + self._centres(), inverse(self.maps))

    def original_points(self) -> np.ndarray:
        """Annotations (M, N, D) in stored pixels."""
        return np.stack([record.truth for record in self.records])

    def spacings(self) -> np.ndarray | None:
        """(M, D) reporting units per stored pixel, or None where unknown."""
        if any(record.spacing is None for record in self.records):
            return None
        return np.array([record.spacing for record in self.records])


def random_crops(size: tuple[int, ...], firsts: Tensor, sizes: Tensor) -> Crops:
    """Crops of `size` at random places of what images fill of their canvas, see `draw_crops`."""
    return Crops(size, lambda generator: draw_crops(firsts, sizes, size, generator))


def load_images(records: Sequence[Record], config: DatasetConfig, progress: str | None = None) -> ImageSet:
    """Decode, resample and normalise `records`, through the cache; a bad file raises UserError with its name.

    Without dataset.resample_mm every image gets exactly dataset.image_size; with it the canvas is the smallest that
    holds all of them and image_size, and each lies in its middle. The last few sets stay in memory, so that the runs of
    a study share what they validate and test on; like all sets they must not be written to.
    """
    key = (tuple(records), config, tuple(stamp(record.image) for record in records))
    found = _kept.pop(key, None) or _read_images(key[0], config, progress)
    if found.images.nbytes <= KEPT_BYTES:
        _kept[key] = found  # as the last one
    while len(_kept) > KEPT_SETS:
        del _kept[next(iter(_kept))]
    return found


def _read_images(records: tuple[Record, ...], config: DatasetConfig, progress: str | None) -> ImageSet:
    hidden = None if progress else True  # None: shown on a terminal only, so that a log holds no torn bars
    sizes = np.array([config.whole_size if is_packed(record, config) else decoded_size(record, config)
                      for record in records])
    canvas = np.maximum(sizes.max(axis=0), config.image_size)
    firsts = (canvas - sizes) // 2
    shape = (len(records), CHANNELS, *canvas.tolist())
    require_memory(f"{len(records)} images of {' x '.join(map(str, shape[2:]))} pixels", 4 * math.prod(shape),
                   "choose a smaller dataset.image_size, or fewer images")
    images = torch.zeros(shape)

    def fill(index: int) -> Loaded:
        """Put image `index` in its place; what else is known of it."""
        image = load_one(records[index], config)
        part = (slice(None), *map(slice, firsts[index], firsts[index] + sizes[index]))
        images[index][part] = torch.from_numpy(normalise(image.pixels, config))
        return image._replace(pixels=np.empty(0))

    pool = ThreadPoolExecutor(DECODERS)  # decoders work without the interpreter's lock
    try:
        filled = tqdm(pool.map(fill, range(len(records))), progress, len(records), leave=False, disable=hidden)
        loaded = list(filled)
    finally:
        pool.shutdown(cancel_futures=True)  # after a bad file, or Ctrl-C, the rest is not read
    maps = np.stack([image.map for image in loaded])
    maps[:, :, -1] += firsts
    points = None
    if all(record.landmarks is not None for record in records):
        points = torch.from_numpy(apply_maps(np.stack([record.truth for record in records]), maps))
    return ImageSet(records, images, points, maps, torch.from_numpy(firsts),
                    torch.from_numpy(sizes), np.array([image.original_size for image in loaded]),
                    tuple(config.image_size))


@dataclass(frozen=True, eq=False)
class PackedSet:
    """Unlabelled records whose images stay on disk; what an ImageSet says of its images, for as many as a disk holds.

    canvas: its size in network pixels; firsts, sizes: as in ImageSet; ranges: (M, 2) float32, the raw intensities that
    become 0 and 1.
    """

    records: tuple[Record, ...]
    store: Store
    canvas: tuple[int, ...]
    firsts: Tensor
    sizes: Tensor
    ranges: Tensor
    network_size: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, C, *canvas)."""
        return len(self.records), int(self.store.shapes[0, 0]), *self.canvas

    @property
    def fits(self) -> bool:
        """See ImageSet."""
        return self.canvas == self.network_size

    def crops(self, chosen: Tensor) -> Crops | None:
        """See ImageSet."""
        return None if self.fits else random_crops(self.network_size, self.firsts[chosen], self.sizes[chosen])

    def to(self, device: torch.device) -> PackedSet:
        """The set with what is known of its images on `device`; the images stay on disk."""
        return replace(self, firsts=self.firsts.to(device), sizes=self.sizes.to(device), ranges=self.ranges.to(device))

    def read(self, indices: np.ndarray, pinned: bool = False) -> Tensor:
        """Raw intensities (B, C, *canvas) in the store's depth, 0 where an image does not reach; for any thread."""
        kind = torch.from_numpy(np.empty(0, self.store.depth)).dtype
        batch = torch.zeros((len(indices), *self.shape[1:]), dtype=kind, pin_memory=pinned)
        for place, index in zip(batch.numpy(), indices.tolist(), strict=True):
            size = self.store.shapes[index, 1:]
            first = (np.array(self.canvas) - size) // 2
            self.store.read(index, place[(slice(None), *map(slice, first, first + size))])
        return batch

    def normalised(self, raw: Tensor, chosen: Tensor) -> Tensor:
        """What `read` gave of the `chosen` images -> float32 in [0, 1], on the device of all three."""
        shape = (-1, *(1,) * (raw.ndim - 1))
        low, high = (limit.view(shape) for limit in self.ranges[chosen].unbind(1))
        images = raw.float()  # of float32 no copy: what was read is wanted by nobody else
        images.sub_(low).div_((high - low).clamp(min=1e-12)).clamp_(0, 1)
        if self.fits:
            return images
        for axis, (first, size) in enumerate(zip(self.firsts[chosen].T, self.sizes[chosen].T, strict=True), start=2):
            steps = torch.arange(raw.shape[axis], device=raw.device) - first[:, None]
            inside = (steps >= 0) & (steps < size[:, None])
            images *= inside.view(-1, 1, *(raw.shape[axis] if a == axis else 1 for a in range(2, raw.ndim)))
        return images

    def beginning(self, count: int) -> ImageSet:
        """Its first images in memory."""
        indices = np.arange(min(count, len(self.records)))
        images = self.normalised(self.read(indices).to(self.ranges.device), torch.from_numpy(indices))
        maps = self.store.maps[indices]
        maps[:, :, -1] += self.firsts[: len(indices)].cpu().numpy()
        return ImageSet(self.records[: len(indices)], images, None, maps, self.firsts[: len(indices)],
                        self.sizes[: len(indices)], self.store.original_sizes[indices], self.network_size)


def load_unlabelled(records: Sequence[Record], config: DatasetConfig, progress: str | None = None
                    ) -> ImageSet | PackedSet:
    """`load_images` of a set that fits into memory (LARGE_BYTES), else a PackedSet. UserError as there."""
    if not is_large(records, config):
        return load_images(records, config, progress)
    store = open_store(records, config, progress)
    sizes = store.shapes[:, 1:]
    canvas = np.maximum(sizes.max(axis=0), config.image_size)
    return PackedSet(tuple(records), store, tuple(canvas.tolist()), torch.from_numpy((canvas - sizes) // 2),
                     torch.from_numpy(sizes.copy()), torch.from_numpy(store.ranges), tuple(config.image_size))
