"""Random views of radiographs with albumentations: a pure function of (seed, step), made ahead by worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core.config.ssl import DINO, Views
from core.training.batches import BatchPlan

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or it asks the network for news when imported
import albumentations as A  # noqa: E402, N812

CROP_RATIO = (3 / 4, 4 / 3)
BLUR_SIGMA = (0.1, 2.0)  # of images of BLUR_SIZE pixels
BLUR_SIZE = 224
SMALLEST_LOCAL = 32  # pixels: a smaller view leaves nothing after an encoder's five halvings
PREFETCH = 4  # micro-batches that each worker makes ahead


@dataclass(frozen=True)
class ViewMaker:
    """One view: its transforms and its size (height, width)."""

    transforms: A.Compose
    size: tuple[int, ...]


def view_maker(views: Views, order: int, size: tuple[int, ...], area: tuple[float, float]) -> ViewMaker:
    """The view number `order` (0 or 1) of an image: crop of `area`, flip, turn, brightness and contrast, blur, ..."""
    strength, scale = views.jitter_strength, min(size) / BLUR_SIZE
    factors = (1 - strength, 1 + strength)
    sigma = (BLUR_SIGMA[0] * scale, BLUR_SIGMA[1] * scale)
    steps = [
        (1.0, A.RandomResizedCrop(size, scale=area, ratio=CROP_RATIO, p=1.0)),
        (views.flip, A.HorizontalFlip(p=views.flip)),
        (views.rotation_degrees, A.Rotate(views.rotation_degrees, border_mode=cv2.BORDER_REPLICATE, p=1.0)),
        (views.jitter * strength, A.ColorJitter(factors, factors, (1, 1), (0, 0), p=views.jitter)),
        (views.blur[order], A.GaussianBlur(blur_limit=0, sigma_limit=sigma, p=views.blur[order])),
        (views.solarise[order], A.Solarize((0.5, 0.5), p=views.solarise[order])),
    ]
    return ViewMaker(A.Compose([transform for used, transform in steps if used]), size)


def global_views(views: Views, size: tuple[int, ...]) -> list[ViewMaker]:
    """The two views that every method compares."""
    return [view_maker(views, order, size, views.crop_area) for order in range(2)]


def local_views(dino: DINO, size: tuple[int, ...]) -> list[ViewMaker]:
    """DINO's smaller views of smaller parts."""
    small = tuple(max(SMALLEST_LOCAL, round(dino.local_size * n)) for n in size)
    return [view_maker(dino.views, 0, small, dino.local_area) for _ in range(dino.local_crops)]


class ViewBatches(Dataset):
    """Micro-batch number k of a run -> its views, each (B, 1, *size) uint8."""

    def __init__(self, images: Sequence[np.ndarray], makers: Sequence[ViewMaker], plan: BatchPlan, seed: int) -> None:
        self.images, self.makers, self.plan, self.seed = images, makers, plan, seed

    def __getitem__(self, position: int) -> list[Tensor]:
        step, micro = divmod(position, self.plan.accumulation)
        return make_views(self.images, self.plan.groups(step)[micro], self.makers, [self.seed, step, micro])


def make_views(images: Sequence[np.ndarray], indices: Sequence[int] | np.ndarray, makers: Sequence[ViewMaker],
               entropy: Sequence[int]) -> list[Tensor]:
    """Every maker's view of every image (H, W) uint8, each image drawn by itself -> (B, 1, *size) uint8 per maker."""
    seeds = np.random.SeedSequence(entropy).generate_state(len(makers))
    batches = []
    for maker, seed in zip(makers, seeds, strict=True):
        maker.transforms.set_random_seed(int(seed))
        made = [maker.transforms(image=images[index])["image"] for index in indices]
        batches.append(torch.from_numpy(np.stack(made))[:, None])
    return batches


def view_stream(batches: ViewBatches, first: int, last: int, workers: int, pin: bool) -> Iterator[list[Tensor]]:
    """The views of micro-batches `first` to `last` - 1 in order, made ahead by `workers` processes (0: when asked)."""
    return iter(DataLoader(batches, batch_size=None, sampler=range(first, last), num_workers=workers,
                           pin_memory=pin, prefetch_factor=PREFETCH if workers else None,
                           worker_init_fn=_prepare_worker if workers else None))


def _prepare_worker(_worker: int) -> None:
    """One thread, and a process group of its own: a Ctrl-C is for the main process, which must save first."""
    cv2.setNumThreads(0)
    os.setpgid(0, 0)


def default_workers(device: torch.device) -> int:
    """On a GPU a process for each core but one, up to 16; on a CPU the cores are all busy with the network: none."""
    return min(16, (os.cpu_count() or 2) - 1) if device.type == "cuda" else 0
