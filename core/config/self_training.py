"""The config's `finetune.self_training` section: learning from what the detector itself sees in unlabelled images."""

from __future__ import annotations

from core.config.section import Count, Index, Section, Share, setting, unless

ON = unless("finetune.self_training.rounds and finetune.self_training.matching", 0)


class SelfTraining(Section):
    """Rounds of training on the labels and on the detector's own answers in unlabelled training images."""

    rounds: Index = setting(0, "rounds after the first training; each trains anew on labels and on the answers of the "
                            "round before; 0 = off", slug="rounds")
    matching: Index = setting(0, "runs of ddpm with at most so many labels have answers in the first training as well: "
                              "what the diffusion features of the labelled landmarks match; 0 = off", slug="match",
                              backbones=("ddpm",))
    images: Count = setting(200, "unlabelled images that are answered, at most", slug="pseudo", acts=[ON])
    share: Share = setting(0.5, "share of them among the images that a step sees", slug="pseudo-share", acts=[ON])
    power: float = setting(2.0, "an answer weighs as much as its certainty to this power; 0 = all alike",
                           slug="pseudo-power", ge=0, acts=[ON])

    def matches(self, backbone: str, shots: int) -> bool:
        """Whether runs of `backbone` with `shots` labels begin with what diffusion features match."""
        return backbone == "ddpm" and shots <= self.matching
