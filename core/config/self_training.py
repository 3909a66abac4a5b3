"""The config's `finetune.self_training` section: learning from what the detector itself sees in unlabelled images."""

from __future__ import annotations

from core.config.refine import MANY
from core.config.section import Count, Index, Section, Share, setting, unless

ON = unless("finetune.self_training.rounds and finetune.self_training.matching", 0)


class SelfTraining(Section):
    """Rounds of training on the labels and on the detector's own answers in unlabelled training images."""

    rounds: Index | None = setting(
        0, "rounds after the first training; each trains anew on labels and on the answers of the round before; null = "
        "1 below 20 labelled images, 0 from there on and where no image is unlabelled; 0 = off", slug="rounds",
        null_slug="auto")
    matching: Index | None = setting(
        0, "runs of ddpm with at most so many labels have answers in the first training as well: what the diffusion "
        "features of the labelled landmarks match; null = 1, none where no image is unlabelled; 0 = off", slug="match",
        null_slug="auto", backbones=("ddpm",))
    images: Count = setting(200, "unlabelled images that are answered, at most", slug="pseudo", acts=[ON])
    share: Share = setting(0.5, "share of them among the images that a step sees", slug="pseudo-share", acts=[ON])
    power: float = setting(2.0, "an answer weighs as much as its certainty to this power; 0 = all alike",
                           slug="pseudo-power", ge=0, acts=[ON])

    def rounds_of(self, labels: int) -> int:
        """`rounds` of a run with so many labelled images, where there are unlabelled ones."""
        return (1 if labels < MANY else 0) if self.rounds is None else self.rounds

    def matches(self, backbone: str, labels: int) -> bool:
        """Whether such a run of `backbone` begins with what diffusion features match."""
        return backbone == "ddpm" and labels <= (1 if self.matching is None else self.matching)

    def answers(self, backbone: str, labels: int) -> bool:
        """Whether such a run of `backbone` has answers in unlabelled images."""
        return self.rounds_of(labels) > 0 or self.matches(backbone, labels)

    def insists(self, backbone: str, labels: int) -> bool:
        """Whether it was asked for them, and cannot be trained where no image is unlabelled."""
        return bool(self.rounds) or (bool(self.matching) and self.matches(backbone, labels))
