"""The fine-tuning tasks: heatmaps of whole images or random crops, and of crops around a first stage's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.config.config import Config
from core.config.second_stage import second_stage
from core.data.augment import Crops, augment
from core.data.dataset import ImageSet
from core.data.windows import cut_windows
from core.formats.geometry import apply_maps, inverse
from core.networks.weights import save_weights
from core.training.batches import gather, on_device
from core.training.cuda_graphs import Replayed
from core.training.device import resolve_device
from landmarks_finetuning.heatmaps import draw_target
from landmarks_finetuning.inference import Heatmaps, decode_maps, joined, run_batched, sigma_pixels
from landmarks_finetuning.losses import LOSSES
from landmarks_finetuning.metrics import physical_errors
from landmarks_finetuning.refinement import FirstAnswers, decode_crops, run_crops
from landmarks_finetuning.shape import stored_shape

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


class HeatmapRegression:
    """Heatmaps of the labelled landmarks in whole images, or in random crops of larger ones."""

    def __init__(self, config: Config, run_dir: Path, header: dict[str, Any], training: WeightedImages,
                 validation: ImageSet | None) -> None:
        self.config, self.run_dir, self.header = config, run_dir, header
        self.device = resolve_device(config.experiment.device)
        self.training, self.order = training.images.to(self.device), training.order
        self.weights = None if training.weights is None else torch.from_numpy(training.weights).float().to(self.device)
        self.validation = None if validation is None else validation.to(self.device)
        self.shape = stored_shape(header)
        self.sigma = sigma_pixels(config.finetune.sigma, config.dataset)
        self.seen: dict[int, Tensor] = {}  # landmarks of validation batches in network pixels, by their first image
        self.validating: Replayed | None = None

    def _loss(self, outputs: Tensor, points: Tensor, crop: bool = False, weights: Tensor | None = None) -> Tensor:
        target, absent = self._target(points, outputs.shape[2:], crop)
        return LOSSES[self.config.finetune.loss](outputs.float(), target, absent, weights)

    def _target(self, points: Tensor, size: Sequence[int], crop: bool) -> tuple[Tensor, Tensor | None]:
        """What is learned, and of crops which landmarks are known to lie outside."""
        target = draw_target(points, size, self.config.finetune.target, self.sigma)
        return target, ~points.isnan().any(dim=2) & ~target.flatten(2).any(dim=2) if crop else None

    def loss(self, model: nn.Module, indices: np.ndarray, generator: torch.Generator) -> Tensor:
        """Heatmap loss of one augmented micro-batch, of crops where images are larger; drawn on the device."""
        return self.loss_of(model, *self.draw(indices, generator))

    def draw(self, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Augmented images and landmarks of a micro-batch."""
        images, chosen = gather(self.training.images, self.order[indices], self.device)
        images, points = augment(images, self.training.truth[chosen], self.config.finetune.augmentation, generator,
                                 self.training.crops(chosen))
        return (images, points) if self.weights is None else (images, points, self.weights[chosen])

    def loss_of(self, model: nn.Module, *drawn: Tensor) -> Tensor:
        """Heatmap loss of drawn images and landmarks, and the landmarks' weights where they have some."""
        images, points, *weights = drawn
        return self._loss(model(images), points, not self.training.fits, *weights)

    def terms(self, *drawn: Tensor) -> Tensor | int:
        """See core.training.loop.SplitTask: images, or the landmarks that the softmax over pixels averages over."""
        images, points = drawn[:2]
        if self.config.finetune.loss == "cross_entropy_channels":
            return len(images)
        target, absent = self._target(points, images.shape[2:], not self.training.fits)
        present = target.flatten(2).any(dim=2)
        return (present if absent is None else present | absent).sum().clamp(min=1)

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
                              self.config.experiment.precision)
        for chosen, outputs, maps in joined(self._with_losses(batches, truth, losses)):
            decoded = decode_maps(outputs, self.config.finetune, self.sigma, shape=self.shape)
            points = apply_maps(decoded.points.numpy(), inverse(maps))
            errors.append(physical_errors(points, truth[chosen], None if spacings is None else spacings[chosen]))
        return {"validation_loss": float(np.mean(torch.stack(losses).tolist())),
                "validation_mre": float(np.nanmean(np.concatenate(errors)))}

    def _with_losses(self, batches: Iterable[Heatmaps], truth: np.ndarray, losses: list[Tensor]) -> Iterator[Heatmaps]:
        """The `batches`, with the loss of each added to `losses` for each of its images."""
        for chosen, outputs, maps in batches:
            if chosen[0] not in self.seen:
                self.seen[chosen[0]] = torch.from_numpy(apply_maps(truth[chosen], maps)).to(self.device)
            losses += [self._loss(outputs, self.seen[chosen[0]])] * len(chosen)
            yield Heatmaps(chosen, outputs, maps)

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
        save_weights(self.run_dir / "best.safetensors", model, self.config.plain(), {**self.header, "iteration": step})


class CropRegression(HeatmapRegression):
    """Heatmaps of the landmarks in crops about one of them, as far off as the first stage's answers are.

    Image sets are those of the second stage; `first` are the first stage's answers on the validation images and the
    errors that it makes.
    """

    def __init__(self, study: Config, run_dir: Path, header: dict[str, Any], training: WeightedImages,
                 validation: ImageSet | None, first: FirstAnswers) -> None:
        super().__init__(second_stage(study), run_dir, header, training, validation)
        self.study, self.first = study, first
        self.errors = torch.from_numpy(first.errors).to(self.device)
        self.pairs = training.pairs()
        self.order = self.pairs[:, 0]

    def draw(self, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Augmented crops (B, C, *size) and the landmarks (B, N, D) in them."""
        size, (image, landmark) = self.training.network_size, on_device(self.pairs[indices].T.copy(), self.device)
        points = self.training.truth[image]
        centres = points[torch.arange(len(image), device=self.device), landmark] + self._offsets(len(image), generator)
        window = tuple(int(np.ceil(length * MARGIN)) for length in size)
        corners = (centres - (torch.tensor(window, device=self.device) - 1) / 2).round()
        windows = cut_windows(self.training.images, image, corners.long(), window)
        crops = Crops(size, centres - corners - (torch.tensor(size, device=self.device) - 1) / 2)
        drawn = augment(windows, points - corners[:, None], self.config.finetune.augmentation, generator, crops)
        return drawn if self.weights is None else (*drawn, self.weights[image])

    def _offsets(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, D) displacements of a crop's centre: errors of the first stage, mirrored at random."""
        device = self.device
        drawn = self.errors[torch.randint(len(self.errors), (count,), generator=generator, device=device)]
        signs = torch.randint(2, drawn.shape, generator=generator, device=device) * 2 - 1
        stretch = torch.rand((count, 1), generator=generator, device=device, dtype=drawn.dtype) + 0.5
        return drawn * signs * stretch

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
            losses.append(self._loss(crops.outputs, at))
            refined[where] = decode_crops(crops, self.first.spread, self.study).points[:, 0]
        error = physical_errors(refined, truth, validation.spacings())
        return {"validation_loss": float(np.mean(torch.stack(losses).tolist())),
                "validation_mre": float(np.nanmean(error))}
