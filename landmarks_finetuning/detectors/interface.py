"""What a detector is to everything around it: one module that says how it starts, learns, answers and is read again.

docs/design.md, "Add a detector", goes through it with the ones there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn

from core.config.config import Config
from core.data.dataset import ImageSet
from core.data.records import Record
from core.networks.encoders import EncoderUNet
from core.networks.gu2net import GU2Net
from core.networks.patches import GlobalNetwork, LocalNetworks
from core.networks.weights import Weights
from core.training.loop import SplitTask
from landmarks_finetuning.decoding import Located
from landmarks_finetuning.detectors.heatmap_unet import HeatmapUNet
from landmarks_finetuning.shape import Shape
from landmarks_finetuning.uncertainty import Calibration

Network = HeatmapUNet | EncoderUNet | GU2Net | GlobalNetwork | LocalNetworks


class Start(Protocol):
    """A fresh network of `backbone`, which knows its channels, its out_channels and its `identity`.

    `start`: a weights file in place of the one that the config names; what starts from random weights has no use for
    it.
    """

    def __call__(self, config: Config, backbone: str, channels: int, landmarks: int, start: Path | None = None, /
                 ) -> Network: ...


class Loss(Protocol):
    """Outputs (B, ...) of a network and landmarks (B, N, D) in pixels of its input -> a scalar.

    NaN landmarks cost nothing. `crop`: landmarks may lie outside the input; `weights` (B, N): what each one counts.
    """

    def __call__(self, outputs: Tensor, points: Tensor, config: Config, crop: bool = False,
                 weights: Tensor | None = None) -> Tensor: ...


class Terms(Protocol):
    """Over how many terms a loss is the mean, for landmarks (B, N, D) in inputs of `size`; see core.training.loop."""

    def __call__(self, points: Tensor, size: Sequence[int], config: Config, crop: bool) -> Tensor | int: ...


class Locate(Protocol):
    """Outputs (B, ...) of a network and `maps` (B, D, D + 1) from stored to its pixels -> landmarks in stored pixels.

    `shape` is the labels' common one, `spacing` (B, D) mm per stored pixel, `measure` whether expected errors are
    wanted; a detector may have no use for them.
    """

    def __call__(self, outputs: Tensor, maps: np.ndarray, config: Config, decoder: str | None = None,
                 shape: Shape | None = None, spacing: np.ndarray | None = None,
                 calibration: Calibration | None = None, measure: bool = True) -> Located: ...


class Refine(Protocol):
    """The first stage's `answers` (M, N, D) in stored pixels, looked at again by the network of the second stage.

    `spread`: the root mean square of the first stage's errors along an axis, in the second one's pixels. `config` is
    the study's.
    """

    def __call__(self, model: nn.Module, records: Sequence[Record], answers: np.ndarray, spread: float, config: Config,
                 calibration: Calibration | None = None) -> Located: ...


class ReleaseScore(NamedTuple):
    """What the scorer of a system's own release says of its answers.

    errors (M, N), None where that scorer is not defined for these images: `left_out` says why; radii: its success
    rates'.
    """

    errors: np.ndarray | None
    radii: tuple[float, ...]
    left_out: str | None = None


class ReleaseScorer(Protocol):
    """Answers `points` (M, N, D) in stored pixels of labelled images -> what the system's own release says of them.

    `rule`: the data set's published one. None where the run is not meant to be like the release.
    """

    def __call__(self, config: Config, rule: str | None, points: np.ndarray, images: ImageSet
                 ) -> ReleaseScore | None: ...


class StageTask(SplitTask, Protocol):
    """What a stage trains: `header` is that of its weights files."""

    header: dict[str, Any]

    @property
    def count(self) -> int:
        """Of what it draws from in an epoch."""


class SecondStage(NamedTuple):
    """How a second network looks again about the first one's answers.

    network: its key in DETECTORS, None = another one of the first stage's kind; task: trains it, a class.
    """

    network: str | None
    task: Callable[..., StageTask]
    refine: Refine


class Kind(NamedTuple):
    """A kind of detector.

    start: a fresh network, whose `identity` a weights file must say for it to be rebuilt; rebuild: (weights, size of
    its input) -> that network; loss and locate: what it learns from and how its outputs are read; terms: None where a
    step may not be split, for batch normalisation; heatmaps: outputs -> maps that the published decoder can threshold,
    None where the outputs are no heatmaps; deepest: the size of the map at its deepest batch normalisation, None
    without any; task: trains it, a class; second: how its answers are refined, None where it is a second stage; scorer:
    that of its release, None where there is none of its own.
    """

    start: Start
    rebuild: Callable[[Weights, tuple[int, ...]], Network]
    loss: Loss
    terms: Terms | None
    locate: Locate
    heatmaps: Callable[[Tensor], Tensor] | None
    deepest: Callable[[Config], tuple[int, ...]] | None
    task: Callable[..., StageTask]
    second: SecondStage | None
    scorer: ReleaseScorer | None = None
