"""The config's `dataset` section: where images and landmarks come from and how they become tensors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from core.config.section import Count, Section


class PhantomData(Section):
    """Synthetic radiographs or volumes written to dataset.root when it does not exist yet."""

    count: int = Field(210, gt=0, description="radiographs: 150 for training and validation, the rest for testing")
    size: tuple[Count, ...] = Field((300, 242), min_length=2, max_length=3,
                                    description="height, width in pixels; depth, height, width for volumes")
    seed: int = 0

    @model_validator(mode="after")
    def _enough(self) -> PhantomData:
        least = 152 if len(self.size) == 2 else 10
        if self.count < least:
            raise ValueError(f"dataset.phantom.count must be at least {least}, so that every split has images")
        return self


class Dataset(Section):
    """Where images and landmarks come from and how they become tensors."""

    name: str = Field("dataset", pattern=r"^[\w.-]+$")
    layout: Literal["cephalo", "chest", "hand", "folder"] = "folder"
    root: str = "datasets/mine"
    description: str | None = Field(None, description="folder layout: a dataset.json in another place than root")
    image_size: tuple[int, ...] = Field((256, 256), description="height, width (3D: depth, height, width) of the "
                                        "network's input; a crop of this size where resample_mm is given")
    resample_mm: float | None = Field(None, gt=0, description="null: each image is resized to image_size; a number: "
                                      "isotropic pixels of so many mm, training on crops, predicting in windows")
    check_geometry: bool = Field(True, description="compare volumes' spacings and landmarks' orientation")
    unlabelled_dirs: tuple[str, ...] = ()
    exclude: tuple[str, ...] = Field((), description="image ids left out of every split")
    spacing_mm: float | None = Field(None, gt=0, description="overrides the layout's mm per pixel")
    cache_dir: str = "runs/cache"
    intensity: Literal["minmax", "percentile", "window"] = "minmax"
    percentiles: tuple[float, float] = (1.0, 99.0)
    window: tuple[float, float] | None = Field(None, description="low, high intensities mapped to 0..1")
    phantom: PhantomData | None = None

    @model_validator(mode="after")
    def _window_is_given(self) -> Dataset:
        if self.intensity == "window" and (self.window is None or self.window[0] >= self.window[1]):
            raise ValueError('dataset.intensity "window" needs dataset.window = [low, high] with low < high')
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError("dataset.percentiles must be two numbers, 0 <= low < high <= 100")
        if self.description is not None and self.layout != "folder":
            raise ValueError(f'dataset.description belongs to layout "folder", not "{self.layout}"')
        if self.resample_mm is not None and self.layout not in ("folder", "cephalo"):
            raise ValueError('dataset.resample_mm needs images in mm: layout "folder" or "cephalo", not '
                             f'"{self.layout}"')
        if self.phantom is None:
            return self
        dims = len(self.phantom.size)
        if dims != len(self.image_size) or self.layout != ("cephalo", "folder")[dims - 2]:
            raise ValueError('dataset.phantom writes radiographs of two sizes in layout "cephalo" and volumes of three '
                             f'in layout "folder"; size {list(self.phantom.size)}, image_size {list(self.image_size)}, '
                             f'layout "{self.layout}"')
        return self


def check_divisible(size: tuple[int, ...], levels: int, who: str = "") -> None:
    """Raise ValueError in one line, naming `who` and the nearest sizes, where the levels' halvings do not divide."""
    step = 2 ** (levels - 1)
    bad = next((n for n in size if n % step or n < step), None)
    if bad is not None:
        below = bad // step * step
        near = f"{below} or {below + step}" if below >= step else f"{step}"
        raise ValueError(f"dataset.image_size {list(size)}: {who}{levels} levels need multiples of {step}; "
                         f"nearest to {bad}: {near}")
