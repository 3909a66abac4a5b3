"""SimCLR v2: contrast within the batch, a deeper projector (Chen et al.: Big Self-Supervised Models, NeurIPS 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from core.config.config import Config
from ssl_baselines.heads import Pooled, Projected, normalised_mlp
from ssl_baselines.views import ViewMaker, global_views


class SimCLRv2:
    """Each view must find the other view of its image among all other views of the batch."""

    keeps_average = False
    momentum: float | None = None
    momentum_schedule = "constant"

    def __init__(self, config: Config) -> None:
        self.settings = config.ssl.simclrv2
        self.views: list[ViewMaker] = global_views(self.settings.views, config.dataset.image_size)

    def network(self, backbone: Pooled) -> Projected:
        """A projector of three layers."""
        hidden, out = self.settings.hidden, self.settings.out
        return Projected(backbone, normalised_mlp(backbone.width, hidden, hidden, out))

    def embed(self, model: Projected, average: Projected, views: list[Tensor], step: int) -> tuple[Tensor, ...]:
        """Two views (B, C, H, W), normalised as one batch -> two times (B, out)."""
        return model(torch.cat(views)).chunk(2)

    def loss(self, model: Projected, embedded: tuple[Tensor, ...], step: int) -> Tensor:
        """NT-Xent."""
        first, second = embedded
        return nt_xent(first, second, self.settings.temperature)

    def figures(self, model: Projected, embedded: tuple[Tensor, ...], step: int) -> dict[str, float]:
        """Nothing beside the loss and what is logged for every method."""
        return {}


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """(B, D), (B, D) -> mean over the 2 B views of -log softmax(cosine / temperature) at the image's other view.

    A view is compared with all 2 B - 1 others (Chen et al., ICML 2020, equation 1).
    """
    count = len(first)
    views = F.normalize(torch.cat((first, second)), dim=1)
    logits = (views @ views.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * count, device=views.device).roll(count)
    return F.cross_entropy(logits, partner)
