"""Several data sets at once: every step sees a batch of the run's own images and one of each other data set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.config.config import Config
from core.data.augment import augment
from core.data.dataset import ImageSet, load_images
from core.data.together import other_data
from core.networks.gu2net import GU2Net
from landmarks_finetuning.detectors.interface import Kind
from landmarks_finetuning.regression import LandmarkRegression, WeightedImages


class JointRegression(LandmarkRegression):
    """The run's own landmarks, and those of the data sets in finetune.gu2net.together, by one network.

    Losses are added up. Validation and the choice of the weights are the own data set's. With none named it is
    `LandmarkRegression`.
    """

    def __init__(self, config: Config, run_dir: Path, header: dict[str, Any], training: WeightedImages,
                 validation: ImageSet | None, kind: Kind) -> None:
        super().__init__(config, run_dir, header, training, validation, kind)
        others = other_data(config, header["backbone"], header["shots"], header["draw"])
        self.others = [load_images(other.records, other.dataset).to(self.device) for other in others]
        self.configs = [self.config.model_copy(update={"dataset": other.dataset}) for other in others]

    def draw(self, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Augmented images and landmarks of each other data set, then those of the own one, as many of each."""
        drawn: list[Tensor] = []
        for images in self.others:
            chosen = torch.randint(len(images.records), (len(indices),), generator=generator, device=self.device)
            drawn += augment(images.images[chosen.to(images.images.device)].to(self.device), images.truth[chosen],
                             self.config.finetune.augmentation, generator, images.crops(chosen))
        return (*drawn, *super().draw(indices, generator))

    def loss_of(self, model: nn.Module, *drawn: Tensor) -> Tensor:
        """The sum of the data sets' losses."""
        count = 2 * len(self.others)
        total = super().loss_of(model, *drawn[count:])
        for number, (images, config) in enumerate(zip(self.others, self.configs, strict=True), start=1):
            inputs, points = drawn[2 * number - 2 : 2 * number]
            with answering_for(model, number):
                outputs = model(inputs)
            total = total + self.kind.loss(outputs, points, config, not images.fits)
        return total


@contextmanager
def answering_for(model: nn.Module, number: int) -> Iterator[None]:
    """While it lasts, a GU2Net answers for its data set `number`; of a compiled one, the network within."""
    network = getattr(model, "_orig_mod", model)
    if not isinstance(network, GU2Net):
        raise TypeError(f"{type(network).__name__} has one data set")
    network.data_set = number
    try:
        yield
    finally:
        network.data_set = 0
