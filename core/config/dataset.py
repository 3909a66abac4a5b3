"""The config's `dataset` section: where images and landmarks come from and how they become tensors."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from core.config.section import FREE, Count, Section, folder_name, only, setting, unless

NO_PACK = unless("root", "*.npz", advice="a pack is as it was made: pack the data again with this key")


class PhantomData(Section):
    """Synthetic radiographs or volumes written to dataset.root when it does not exist yet."""

    count: Count = setting(210, "synthetic radiographs or volumes to make; of radiographs 150 are for training and "
                           "validation, the rest for testing (dataset.phantom null: real data)")
    size: tuple[Count, ...] = setting((300, 242), "height, width in pixels; depth, height, width for volumes",
                                      min_length=2, max_length=3)
    seed: int = setting(0, "seed of the drawing")

    @model_validator(mode="after")
    def _enough(self) -> PhantomData:
        least = 152 if len(self.size) == 2 else 10
        if self.count < least:
            raise ValueError(f"dataset.phantom.count must be at least {least}, so that every split has images")
        return self


class Dataset(Section):
    """Where images and landmarks come from and how they become tensors."""

    name: str = setting("dataset", "what tables and weights files call the data", pattern=r"^[\w.-]+$")
    layout: Literal["cephalo", "chest", "hand", "folder"] = setting(
        "folder", "how the files below root are arranged: folder = your own data, the others are the paper's data sets")
    root: str = setting("datasets/mine", "folder of the data, or a pack (.npz) of python -m core.data.make_pack",
                        counts_for=FREE)
    description: str | None = setting(None, "folder layout: a dataset.json in another place than root",
                                      acts=[only("layout", "folder"), NO_PACK])
    image_size: tuple[int, ...] = setting(
        (256, 256), "height, width (3D: depth, height, width) of the network's input in pixels; a crop of this size "
        "where canvas_size or resample_mm is given")
    canvas_size: tuple[Count, ...] | None = setting(
        None, "null: each image is resized to image_size; a larger size: it is resized to that, and image_size is that "
        "of crops in training and of windows in prediction", acts=[only("resample_mm", None), NO_PACK])
    resample_mm: float | None = setting(
        None, "null: each image is resized to image_size; a number: isotropic pixels of so many mm, training on crops, "
        "predicting in windows", gt=0, acts=[NO_PACK])
    check_geometry: bool = setting(True, "compare volumes' spacings and landmarks' orientation",
                                   acts=[only("is_3d", True), NO_PACK])
    unlabelled_dirs: tuple[str, ...] = setting((), "folders with more images for pre-training", acts=[NO_PACK])
    exclude: tuple[str, ...] = setting((), "image ids that are in no split; the others keep theirs")
    spacing_mm: float | None = setting(None, "mm per pixel in place of the data's own, of labelled, unlabelled and "
                                       "predicted images alike; layouts cephalo and folder",
                                       gt=0, acts=[only("layout", "cephalo", "folder"), NO_PACK])
    max_megapixels: float | None = setting(
        None, "largest image that is read, in millions of pixels or voxels of about 8 bytes of memory each; null: 300, "
        "2000 for volumes", gt=0, counts_for=FREE, before=None, acts=[NO_PACK])
    cache_dir: str | None = setting("runs/cache", "folder for resized images; null: they are not kept", counts_for=FREE)
    intensity: Literal["minmax", "percentile", "window"] = setting(
        "minmax", "what becomes 0 and 1: each image's darkest and brightest pixel, its percentiles, or a fixed window")
    percentiles: tuple[float, float] = setting((1.0, 99.0), "percentiles of an image that become 0 and 1",
                                               acts=[only("intensity", "percentile")])
    window: tuple[float, float] | None = setting(None, "low, high intensities that become 0 and 1",
                                                 acts=[only("intensity", "window")])
    phantom: PhantomData | None = setting(None, "synthetic data, made where root does not exist yet; null = real data")

    @field_validator("name")
    @classmethod
    def _names_files(cls, name: str) -> str:
        return folder_name("dataset.name", name)

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
        canvas = self.canvas_size
        if canvas is not None and (len(canvas) != len(self.image_size)
                                   or any(whole < part for whole, part in zip(canvas, self.image_size, strict=True))):
            raise ValueError(f"dataset.canvas_size {list(canvas)} must be no smaller than dataset.image_size "
                             f"{list(self.image_size)}, axis by axis")
        if self.phantom is None:
            return self
        dims = len(self.phantom.size)
        if dims != len(self.image_size) or self.layout != ("cephalo", "folder")[dims - 2]:
            raise ValueError('dataset.phantom writes radiographs of two sizes in layout "cephalo" and volumes of three '
                             f'in layout "folder"; size {list(self.phantom.size)}, image_size {list(self.image_size)}, '
                             f'layout "{self.layout}"')
        return self

    @property
    def largest(self) -> int:
        """Pixels or voxels of the largest image that is read."""
        return round(1e6 * (self.max_megapixels or {2: 300, 3: 2000}.get(len(self.image_size), 300)))

    @property
    def whole_size(self) -> tuple[int, ...]:
        """The size that whole images are resized to without resample_mm."""
        return self.canvas_size or self.image_size

    @property
    def makes_windows(self) -> bool:
        """Whether image_size is that of crops and windows, not that of whole images."""
        return self.resample_mm is not None or self.canvas_size is not None


def check_divisible(size: tuple[int, ...], levels: int, who: str = "", key: str = "dataset.image_size") -> None:
    """Raise ValueError in one line, naming `who` and the nearest sizes, where the levels' halvings do not divide."""
    step = 2 ** (levels - 1)
    bad = next((n for n in size if n % step or n < step), None)
    if bad is not None:
        below = bad // step * step
        near = f"{below} or {below + step}" if below >= step else f"{step}"
        raise ValueError(f"{key} {list(size)}: {who}{levels} levels need multiples of {step}; "
                         f"nearest to {bad}: {near}")
