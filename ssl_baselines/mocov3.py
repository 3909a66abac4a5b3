"""MoCo v3: momentum contrast without a queue (Chen, Xie, He: An Empirical Study of Training Self-Supervised ViTs)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from core.config.config import Config
from ssl_baselines.heads import Pooled, Projected, normalised_mlp
from ssl_baselines.views import ViewMaker, global_views


class MoCoV3:
    """Each view's prediction must find the other view's momentum projection among those of the batch."""

    keeps_average = False  # the encoder that is kept is the one that learns by gradients

    def __init__(self, config: Config) -> None:
        self.settings = config.ssl.mocov3
        self.momentum, self.momentum_schedule = self.settings.momentum, self.settings.momentum_schedule
        self.views: list[ViewMaker] = global_views(self.settings.views, config.dataset.image_size)

    def network(self, backbone: Pooled) -> Projected:
        """Projector of three layers, as for their ViT, and predictor of two."""
        hidden, out = self.settings.hidden, self.settings.out
        return Projected(backbone, normalised_mlp(backbone.width, hidden, hidden, out),
                         normalised_mlp(out, hidden, out, last_norm=False))

    def embed(self, model: Projected, average: Projected, views: list[Tensor], step: int) -> tuple[Tensor, ...]:
        """Two views (B, C, H, W) -> queries of each, keys of each: four times (B, out)."""
        queries = [model(view) for view in views]
        with torch.no_grad():
            keys = [average.project(view) for view in views]
        return (*queries, *keys)

    def loss(self, model: Projected, embedded: tuple[Tensor, ...], step: int) -> Tensor:
        """Symmetric contrast: each view's queries against the other's keys."""
        first_queries, second_queries, first_keys, second_keys = embedded
        loss = (contrast(first_queries, second_keys, self.settings.temperature)
                + contrast(second_queries, first_keys, self.settings.temperature))
        return loss * 2 * self.settings.temperature if self.settings.scaled_loss else loss

    def figures(self, model: Projected, embedded: tuple[Tensor, ...], step: int) -> dict[str, float]:
        """Nothing beside the loss and what is logged for every method."""
        return {}


def contrast(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """InfoNCE: (B, D), (B, D) -> the mean of -log softmax(q . k / temperature) at the own key; lengths do not count."""
    cosines = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T
    return F.cross_entropy(cosines / temperature, torch.arange(len(queries), device=queries.device))
