"""DINO: self-distillation without labels (Caron et al.: Emerging Properties in Self-Supervised ViTs, ICCV 2021)."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from core.config.config import Config
from ssl_baselines.heads import Pooled, Projected, Prototypes
from ssl_baselines.views import ViewMaker, global_views, local_views

GLOBAL = 2  # views that the teacher sees


class Student(Projected):
    """Backbone and prototypes, with the running centre of the teacher's outputs, (1, out)."""

    projector: Prototypes
    centre: Tensor

    def __init__(self, backbone: Pooled, head: Prototypes) -> None:
        super().__init__(backbone, head)
        self.register_buffer("centre", torch.zeros(1, head.prototypes.out_features))


class DINO:
    """The student must say of every view what the teacher, its moving average, says of the other global view."""

    keeps_average = True  # the teacher is the better encoder

    def __init__(self, config: Config) -> None:
        self.settings, self.iterations = config.ssl.dino, config.ssl.iterations
        self.momentum, self.momentum_schedule = self.settings.momentum, self.settings.momentum_schedule
        size = config.dataset.image_size
        self.views: list[ViewMaker] = [*global_views(self.settings.views, size), *local_views(self.settings, size)]

    def network(self, backbone: Pooled) -> Student:
        """Three layers to prototypes."""
        dino = self.settings
        return Student(backbone, Prototypes(backbone.width, dino.hidden, dino.bottleneck, dino.out, dino.head_norm))

    def embed(self, model: Student, average: Student, views: list[Tensor], step: int) -> tuple[Tensor, ...]:
        """Two global and V local views -> the student's (2 + V, B, out) and the teacher's (2, B, out) outputs."""
        model.projector.prototypes.requires_grad_(step >= self.settings.freeze_last_layer)
        count = len(views[0])
        seen = [model(torch.cat(views[:GLOBAL]))]
        if len(views) > GLOBAL:
            seen.append(model(torch.cat(views[GLOBAL:])))
        with torch.no_grad():
            taught = average(torch.cat(views[:GLOBAL]))
        return torch.cat(seen).unflatten(0, (-1, count)), taught.unflatten(0, (-1, count))

    def loss(self, model: Student, embedded: tuple[Tensor, ...], step: int) -> Tensor:
        """Cross-entropy of the student to the centred, sharpened teacher; while training, the centre then moves."""
        student, teacher = embedded
        targets = self.targets(model, teacher, step)
        loss = distillation(student / self.settings.student_temperature, targets)
        if model.training:
            model.centre.copy_(moved_centre(model.centre, teacher, self.settings.centre_momentum))
        return loss

    def targets(self, model: Student, teacher: Tensor, step: int) -> Tensor:
        """The teacher's probabilities (2, B, out)."""
        return ((teacher - model.centre) / self.teacher_temperature(step)).softmax(dim=-1)

    def teacher_temperature(self, step: int) -> float:
        """Rising linearly from the warm-up's to its own over teacher_warmup of the iterations."""
        dino = self.settings
        rising = dino.teacher_warmup * self.iterations
        share = min(1.0, step / rising) if rising else 1.0
        return dino.teacher_warmup_temperature + share * (dino.teacher_temperature - dino.teacher_warmup_temperature)

    def figures(self, model: Student, embedded: tuple[Tensor, ...], step: int) -> dict[str, float]:
        """Entropy of the teacher's outputs, and how much less that is than the entropy of their mean (information).

        Both as shares of log(out). Without information every image gets the same answer: collapse. An entropy near 0
        means answers of one prototype, near 1 of all alike.
        """
        targets = self.targets(model, embedded[1], step).flatten(0, 1)
        most = math.log(targets.shape[1])
        each, whole = entropy(targets).mean().item() / most, entropy(targets.mean(dim=0)).item() / most
        return {"teacher_entropy": each, "teacher_information": whole - each}


def distillation(student: Tensor, targets: Tensor) -> Tensor:
    """Student logits (V, B, K), teacher probabilities (G, B, K) -> mean cross-entropy over all pairs of unlike views.

    The first G of the student's views are the teacher's (their algorithm 1, with multi-crop).
    """
    logs = student.log_softmax(dim=-1)
    pairs = [(g, v) for g, v in product(range(len(targets)), range(len(logs))) if g != v]
    return torch.stack([-(targets[g] * logs[v]).sum(dim=-1).mean() for g, v in pairs]).mean()


def moved_centre(centre: Tensor, teacher: Tensor, momentum: float) -> Tensor:
    """(1, K), (G, B, K) -> the centre after a batch of teacher outputs (their equation 4)."""
    return centre * momentum + teacher.flatten(0, -2).mean(dim=0, keepdim=True) * (1 - momentum)


def entropy(probabilities: Tensor) -> Tensor:
    """(..., K) -> (...) in nats."""
    return -torch.special.xlogy(probabilities, probabilities).sum(dim=-1)
