"""How much embeddings still say of their images, and the alarm when they say nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_baselines.dino import entropy

ROUNDING = 1e-12  # of the embeddings' norm: what is left of equal ones when their mean is taken away
LEAST_SPREAD = 0.02  # of embeddings spread evenly over the sphere
LEAST_ENTROPY = LEAST_INFORMATION = 0.01  # of log(out)


def embedding_spread(embeddings: Tensor) -> float:
    """(M, D) -> mean standard deviation of the directions' coordinates, times sqrt(D): 0 alike, 1 evenly spread."""
    directions = F.normalize(embeddings.double(), dim=1)
    return (directions.std(dim=0, correction=0).mean() * embeddings.shape[1] ** 0.5).item()


def effective_rank(embeddings: Tensor) -> float:
    """(M, D) -> exp of the entropy of the centred embeddings' singular values (Roy & Vetterli, 2007); 0 if alike."""
    exact = embeddings.double()
    values = torch.linalg.svdvals(exact - exact.mean(dim=0))
    total = values.sum()
    return entropy(values / total).exp().item() if total > ROUNDING * exact.norm() else 0.0


def alarm(figures: dict[str, float]) -> str | None:
    """One line of what has vanished, with what to try; None while nothing has."""
    signs = {"embedding_spread": ("all images get nearly one embedding", LEAST_SPREAD),
             "teacher_entropy": ("the teacher answers with one prototype", LEAST_ENTROPY),
             "teacher_information": ("the teacher answers alike to all images", LEAST_INFORMATION)}
    signs_of_collapse = [f"{key} {figures[key]:.2g}: {meaning}" for key, (meaning, least) in signs.items()
             if key in figures and not figures[key] >= least]
    advice = ("lower ssl.dino.teacher_temperature below the student's, or the learning rate"
              if "teacher_entropy" in figures else "lower ssl.learning_rate, or give larger batches")
    return f"the encoder is collapsing ({'; '.join(signs_of_collapse)}); {advice}" if signs_of_collapse else None
