"""The config's `finetune.refine` section: a second stage on finer crops around what the first one found."""

from __future__ import annotations

from typing import Literal

from core.config.section import (
    Augmentation,
    Count,
    Degrees,
    Fraction,
    Rate,
    Section,
    Share,
    setting,
    unless,
    with_default,
)

ON = unless("finetune.refine.zoom", None)
MANY = 20  # images, from which on a sharper target and more steps gain (docs/results/cephalograms.md)


class CropAugmentation(Augmentation):
    """Random changes of crops, whose place is drawn by the first stage's errors."""

    probability: Share = with_default(Augmentation, "probability", 1.0)
    rotation_degrees: Degrees | tuple[Degrees, Degrees, Degrees] = with_default(Augmentation, "rotation_degrees", 12.0)
    scale: Fraction = with_default(Augmentation, "scale", 0.12)
    translation: Fraction = with_default(Augmentation, "translation", 0.0)
    intensity: Fraction = with_default(Augmentation, "intensity", 0.3)


class Refine(Section):
    """A second detector on crops around the first one's answers, at a finer resolution (coarse to fine)."""

    zoom: float | None = setting(
        None, "how many times finer the second stage's pixels are than the first one's; null = one stage", slug="zoom",
        gt=1)
    crop: Count = setting(96, "sides of the second stage's input in its own pixels", slug="crop", acts=[ON])
    start: Literal["images", "crops"] = setting(
        "images", "what the second network of backbone ddpm starts from: the pre-training on whole images, or one on "
        "crops of the unlabelled images", slug="fine", backbones=("ddpm",), acts=[ON])
    sigma: float | None = setting(
        None, "width of the target's Gaussian in the second stage's pixels; null = 1.5, and 0.5 from 20 labelled "
        "images on", slug="fine-sigma", gt=0, acts=[ON])
    prior: Rate | None = setting(
        1.5, "width of the Gaussian by which the first stage's answer weighs on the second one's, in root mean square "
        "errors of the first stage on the validation images; null = it only places the crop", counts_for=("scoring",),
        slug="fine-prior", null_slug="off", acts=[ON])
    iterations: Count | None = setting(
        None, "optimiser steps of the second stage; null = 600, and 1500 from 20 images on, labelled or with answers "
        "of a round before", slug="fine-steps", acts=[ON])
    batch_size: Count = setting(8, "crops of a micro-batch", slug="fine-batch", acts=[ON])
    augmentation: CropAugmentation = setting(CropAugmentation(), "random changes of crops and landmarks", acts=[ON])

    def sigma_of(self, labels: int) -> float:
        """`sigma` for a run of so many labelled images."""
        return self.sigma or (0.5 if labels >= MANY else 1.5)

    def iterations_of(self, images: int) -> int:
        """`iterations` for a training of so many images, labelled or with answers of a round before."""
        return self.iterations or (1500 if images >= MANY else 600)
