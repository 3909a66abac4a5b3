"""The config's `finetune.gu2net` and `finetune.global_to_local` sections: two earlier systems."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from core.config.refine import CropAugmentation
from core.config.section import Count, Index, Rate, Section, only, setting, unless

TUNED = only("finetune.gu2net.preset", "tuned")
RELEASED = only("finetune.gu2net.preset", "released")
TWO_STEPS = unless("finetune.global_to_local.local.iterations", 0)


class GU2Net(Section):
    """GU2Net (Zhu et al., MICCAI 2021): a U-Net of separable convolutions times a global branch."""

    preset: Literal["tuned", "released"] = setting(
        "tuned", "tuned: this section's network and loss with finetune's own training and decoding; released: as the "
        "authors' code trains it (target of 3 pixels, Adam in cycles, batches of 4, no augmentation, argmax), for as "
        "many steps as finetune says", slug="preset")
    learning_rate: Rate = setting(1e-2, "Adam's peak learning rate; a cycle begins at a hundredth of it", slug="lr",
                                  acts=[RELEASED])
    cycle_iterations: Count = setting(2000, "steps in which it rises, and in which it falls again", slug="cycle",
                                      acts=[RELEASED])
    together: tuple[str, ...] = setting(
        (), "config files of other studies: their labelled training images are learned from as well, by kernels of "
        "their own and shared ones, as many shots of each as of the study's own", slug="with")


class LocalStep(Section):
    """The second step: a small network for each landmark, on a window about the first step's answer."""

    iterations: Index = setting(600, "optimiser steps; 0 = the first step alone", slug="local-steps")
    window: Count = setting(16, "sides of a window in its own pixels, even", slug="window", acts=[TWO_STEPS])
    window_mm: Rate | None = setting(
        None, "sides of a window in mm, data of layouts cephalo and folder; null = by zoom", slug="window-mm",
        acts=[TWO_STEPS])
    zoom: float = setting(4.0, "how many times finer its pixels are than the first step's", slug="zoom", gt=1,
                          acts=[TWO_STEPS, only("window_mm", None)])
    batch_size: Count = setting(4, "images of a micro-batch, each with the windows of all landmarks",
                                slug="local-batch", acts=[TWO_STEPS])
    channels: Count = setting(32, "of the first convolutions; the last ones have twice as many", slug="local-width",
                              acts=[TWO_STEPS])
    cycle_iterations: Count = setting(10000, "steps until the learning rate starts over for the first time",
                                      acts=[TWO_STEPS, only("finetune.global_to_local.preset", "released")])
    augmentation: CropAugmentation = setting(
        CropAugmentation(), "random changes of windows and landmarks",
        acts=[TWO_STEPS, only("finetune.global_to_local.preset", "tuned")])

    @model_validator(mode="after")
    def _window_has_patches(self) -> LocalStep:
        if self.window % 2 or self.window < 4:
            raise ValueError(f"finetune.global_to_local.local.window {self.window} must be an even number from 4 on: "
                             "its patches are 2 pixels")
        return self


class GlobalToLocal(Section):
    """Global-to-local localisation (Noothout et al., IEEE TMI 2020): displacements and presence, patch by patch."""

    preset: Literal["tuned", "released"] = setting(
        "tuned", "tuned: this section's networks and losses with finetune's own training; released: as the authors' "
        "code trains them (AMSGrad, batches of 4, no augmentation, windows drawn evenly), for as many steps as "
        "finetune and local say", slug="preset")
    patch: Literal[2, 4, 8, 16, 32] | None = setting(
        None, "sides in pixels of what one answer of the first step is about; null = 32 of images, 8 of volumes",
        slug="patch")
    presence_weight: float = setting(
        20.0, "weight of the cross-entropy of presence beside the displacements' L1; published: 20 cephalometric, 8 "
        "cardiac CT, 2 olfactory MR", slug="presence", gt=0)
    channels: Count = setting(32, "of the first of four stages, each of which doubles them; the stem has half",
                              slug="width")
    local: LocalStep = setting(LocalStep(), "the second step")

    @model_validator(mode="after")
    def _stem_has_half(self) -> GlobalToLocal:
        if self.channels % 2:
            raise ValueError(f"finetune.global_to_local.channels {self.channels} must be even: the stem has half")
        return self
