"""GU2Net's own scorer, as its release has it: answers and truth on whole pixels of its input, one factor to mm.

Zhu et al., MICCAI 2021. The truth is where the training target has its peak.
"""

from __future__ import annotations

import numpy as np

from core.config.config import Config
from core.data.dataset import ImageSet
from core.formats.geometry import apply_maps
from landmarks_finetuning.detectors.interface import ReleaseScore
from landmarks_finetuning.metrics import radial_errors
from landmarks_finetuning.paper_scorer import CEPHALO_SIZE, CEPHALO_SPACING_MM, PAPER_RULES, why_other_extents

RADII = (2.0, 2.5, 3.0, 4.0, 6.0, 9.0, 10.0)
CHEST_SIDE = 512  # pixels of the frame in which chest radiographs are scored
SQUARE = 0.01  # how far the sides of a pixel may differ, of the larger one: in the release by 0.8 %


def release_score(config: Config, rule: str | None, points: np.ndarray, images: ImageSet) -> ReleaseScore | None:
    """The radial errors (M, N) of `points` (M, N, 2) in stored pixels: mm, or for rule "chest" pixels of 512 x 512.

    Both are rounded to pixels of the network's input, halves to the even one. Cephalograms have one factor on both
    axes, the height's: 240 mm / 512 = 0.46875 mm in the release. Hands: the wrist, landmarks 1 and 5, is 50 mm wide.
    None for the preset "tuned" and without a published rule.
    """
    if config.finetune.gu2net.preset != "released" or rule is None:
        return None
    why = why_undefined(config, rule, images)
    if why is not None:
        return ReleaseScore(None, RADII, why)
    truth = np.rint(apply_maps(images.original_points(), images.maps))
    found = np.rint(apply_maps(points, images.maps))
    size = config.dataset.image_size
    if rule == "cephalo":
        factors = np.full(2, CEPHALO_SIZE[0] * CEPHALO_SPACING_MM / size[0])
    elif rule == "chest":
        factors = CHEST_SIDE / np.array(size)
    else:
        factors = PAPER_RULES[rule](truth, size[0])
    return ReleaseScore(radial_errors((found - truth) * factors, found, truth), RADII)


def why_undefined(config: Config, rule: str, images: ImageSet) -> str | None:
    """Why the release's scorer cannot score these images, in words for people; None where it can."""
    if config.is_3d or config.dataset.makes_windows:
        return "it is defined for whole images that are resized to the network's input"
    if rule != "cephalo":
        return None
    spacing = images.spacings()
    other = why_other_extents(None if spacing is None else images.original_sizes * spacing)
    if other is not None:
        return other
    height, width = np.array(CEPHALO_SIZE) / config.dataset.image_size
    if abs(height - width) > SQUARE * max(height, width):
        size = " x ".join(map(str, config.dataset.image_size))
        return f"it takes pixels to be square, as at 512 x 416; dataset.image_size is {size}"
    return None
