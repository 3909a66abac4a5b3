"""The fine-tuning tasks: landmarks in whole images or random crops, and in crops around a first stage's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.config.config import Config
from core.config.recipes import recipe
from core.config.section import Augmentation
from core.data.augment import Crops, augment
from core.data.dataset import ImageSet
from core.data.windows import cut_windows
from core.formats.geometry import apply_maps
from core.networks.weights import save_weights
from core.training.batches import gather, on_device
from core.training.cuda_graphs import Replayed
from core.training.device import resolve_device
from landmarks_finetuning.detectors.interface import Kind
from landmarks_finetuning.metrics import physical_errors
from landmarks_finetuning.refinement import FirstAnswers, decode_crops, run_crops
from landmarks_finetuning.running import Outputs, joined, run_batched
from landmarks_finetuning.shape import Shape

LEAST_WEIGHT = 0.01  # of a landmark that a crop is cut about
MARGIN = 1.5  # of a crop: what is cut out before it is turned and scaled


@dataclass(frozen=True, eq=False)
class WeightedImages:
    """Images with landmarks to learn from.

    order (K,): the image that an index of the batch plan means; weights (M, N): what each landmark counts, None = 1.
    """

    images: ImageSet
    order: np.ndarray
    weights: np.ndarray | None = None

    def pairs(self) -> np.ndarray:
        """(P, 2) image and landmark, in that order, of every annotation that counts anything."""
        counts = ~self.images.truth.isnan().any(dim=2).cpu().numpy()
        if self.weights is not None:
            counts &= self.weights >= LEAST_WEIGHT
        chosen, landmarks = np.nonzero(counts[self.order])
        return np.stack([self.order[chosen], landmarks], axis=1)


class LandmarkRegression:
    """The labelled landmarks in whole images, or in random crops of larger ones, by a detector of `kind`.

    `config` is the one that weights files record, `self.config` is as the kind has it.
    """

    def __init__(self, config: Config, run_dir: Path, header: dict[str, Any], training: WeightedImages,
                 validation: ImageSet | None, kind: Kind) -> None:
        self.recorded, self.run_dir, self.header, self.kind = config, run_dir, header, kind
        self.config = recipe(config, header["backbone"])
        self.device = resolve_device(config.experiment.device)
        self.training, self.order = training.images.to(self.device), training.order
        self.weights = None if training.weights is None else torch.from_numpy(training.weights).float().to(self.device)
        self.validation = None if validation is None else validation.to(self.device)
        self.shape = Shape.stored(header)
        self.seen: dict[int, Tensor] = {}  # landmarks of validation batches in network pixels, by their first image
        self.validating: Replayed | None = None

    @property
    def count(self) -> int:
        """Images, or what else an index of the batch plan means."""
        return len(self.order)

    def loss(self, model: nn.Module, indices: np.ndarray, generator: torch.Generator) -> Tensor:
        """Loss of one augmented micro-batch, of crops where images are larger; drawn on the device."""
        return self.loss_of(model, *self.draw(indices, generator))

    def draw(self, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Augmented images and landmarks of a micro-batch."""
        images, chosen = gather(self.training.images, self.order[indices], self.device)
        images, points = augment(images, self.training.truth[chosen], self.config.finetune.augmentation, generator,
                                 self.training.crops(chosen))
        return (images, points) if self.weights is None else (images, points, self.weights[chosen])

    def loss_of(self, model: nn.Module, *drawn: Tensor) -> Tensor:
        """Loss of drawn images and landmarks, and the landmarks' weights where they have some."""
        images, points, *weights = drawn
        return self.kind.loss(model(images), points, self.config, not self.training.fits, *weights)

    def terms(self, *drawn: Tensor) -> Tensor | int:
        """See core.training.loop.SplitTask; images, where a detector's steps are never split."""
        images, points = drawn[:2]
        if self.kind.terms is None:
            return len(images)
        return self.kind.terms(points, images.shape[2:], self.config, not self.training.fits)

    def names(self, indices: np.ndarray) -> list[str]:
        """File names of a micro-batch."""
        return [self.training.records[i].image.name for i in self.order[indices]]

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Loss and physical mean radial error on the validation images, decoded as in scoring."""
        validation = self.validation
        if validation is None:
            return {}
        losses: list[Tensor] = []  # on the device, one for each image
        errors = []
        truth, spacings = validation.original_points(), validation.spacings()
        batches = run_batched(self._replayed(model), validation, self.config.evaluation, self.device,
                              self.config.experiment.precision, whole=self.kind.heatmaps is None)
        for chosen, outputs, maps in joined(self._with_losses(batches, truth, losses)):
            points = self.kind.locate(outputs, maps, self.config, shape=self.shape, measure=False).points
            errors.append(physical_errors(points, truth[chosen], None if spacings is None else spacings[chosen]))
        return {"validation_loss": float(np.mean(torch.stack(losses).tolist())),
                "validation_mre": float(np.nanmean(np.concatenate(errors)))}

    def _with_losses(self, batches: Iterable[Outputs], truth: np.ndarray, losses: list[Tensor]) -> Iterator[Outputs]:
        """The `batches`, with the loss of each added to `losses` for each of its images."""
        for chosen, outputs, maps in batches:
            if chosen[0] not in self.seen:
                self.seen[chosen[0]] = torch.from_numpy(apply_maps(truth[chosen], maps)).to(self.device)
            losses += [self.kind.loss(outputs, self.seen[chosen[0]], self.config)] * len(chosen)
            yield Outputs(chosen, outputs, maps)

    def _replayed(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """The network of all validations of this run, on a GPU from a shape's fourth batch on as a CUDA graph."""
        if self.device.type != "cuda" or not self.config.experiment.cuda_graphs:
            return model
        if self.validating is None:
            self.validating = Replayed(lambda batches: model(batches[0][0]).float())
        replayed = self.validating
        return lambda inputs: replayed([[inputs]]).clone()  # the next batch overwrites it

    def milestone(self, model: nn.Module, step: int) -> None:
        """The last step of a fixed schedule without validation: these weights are the result."""
        self._save(model, step)

    def improved(self, model: nn.Module, step: int) -> None:
        """A new lowest validation loss: these weights are the best so far."""
        self._save(model, step)

    def _save(self, model: nn.Module, step: int) -> None:
        header = {**self.header, "iteration": step}
        save_weights(self.run_dir / "best.safetensors", model, self.recorded.plain(), header)


def cut_about(images: ImageSet, chosen: Tensor, centres: Tensor, points: Tensor, settings: Augmentation,
              generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Augmented crops (B, C, *size) of the `chosen` images about `centres` (B, D), and `points` (B, K, D) in them.

    Both are given in pixels of the canvas.
    """
    size, device = images.network_size, centres.device
    window = tuple(int(np.ceil(length * MARGIN)) for length in size)
    corners = (centres - (torch.tensor(window, device=device) - 1) / 2).round()
    windows = cut_windows(images.images, chosen, corners.long(), window)
    crops = Crops(size, centres - corners - (torch.tensor(size, device=device) - 1) / 2)
    return augment(windows, points - corners[:, None], settings, generator, crops)


def draw_errors(errors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, D) displacements of a crop's centre: `errors` (K, D) of the first stage, mirrored and stretched."""
    device = errors.device
    drawn = errors[torch.randint(len(errors), (count,), generator=generator, device=device)]
    signs = torch.randint(2, drawn.shape, generator=generator, device=device) * 2 - 1
    stretch = torch.rand((count, 1), generator=generator, device=device, dtype=drawn.dtype) + 0.5
    return drawn * signs * stretch


class CropRegression(LandmarkRegression):
    """Outputs of the landmarks in crops about one of them, as far off as the first stage's answers are.

    `config` and image sets are those of the second stage of `study`; `first` are the first stage's answers on the
    validation images and the errors that it makes.
    """

    def __init__(self, config: Config, run_dir: Path, header: dict[str, Any], training: WeightedImages,
                 validation: ImageSet | None, kind: Kind, study: Config, first: FirstAnswers) -> None:
        super().__init__(config, run_dir, header, training, validation, kind)
        self.study, self.first = study, first
        self.errors = torch.from_numpy(first.errors).to(self.device)
        self.pairs = training.pairs()
        self.order = self.pairs[:, 0]

    def draw(self, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Augmented crops (B, C, *size) and the landmarks (B, N, D) in them."""
        image, landmark = on_device(self.pairs[indices].T.copy(), self.device)
        points = self.training.truth[image]
        own = points[torch.arange(len(image), device=self.device), landmark]
        centres = own + draw_errors(self.errors, len(image), generator)
        drawn = cut_about(self.training, image, centres, points, self.config.finetune.augmentation, generator)
        return drawn if self.weights is None else (*drawn, self.weights[image])

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Loss, and physical mean radial error after refinement, on the first stage's answers in validation images."""
        validation, answers = self.validation, self.first.validation
        if validation is None or answers is None:
            return {}
        truth, refined = validation.original_points(), answers.copy()
        losses: list[Tensor] = []  # on the device
        for crops in run_crops(model, validation, answers, self.config):
            where = (crops.image, crops.landmark)
            at = torch.from_numpy(apply_maps(truth[where][:, None], crops.maps)).to(self.device)
            losses.append(self.kind.loss(crops.outputs, at, self.config))
            refined[where] = decode_crops(crops, self.first.spread, self.study).points[:, 0]
        error = physical_errors(refined, truth, validation.spacings())
        return {"validation_loss": float(np.mean(torch.stack(losses).tolist())),
                "validation_mre": float(np.nanmean(error))}
