"""The config's `evaluation` and `report` sections: how predictions are scored and shown."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from core.config.section import Section


class Evaluation(Section):
    """How predictions are scored."""

    split: Literal["test", "validation"] = Field("test", description="choose settings on validation, test once")
    batch_size: int = Field(16, gt=0)
    leaked: Literal["keep", "drop"] = Field(
        "keep", description="images with a twin in train, validation or pre-training: drop = they are not scored")
    sdr_thresholds: tuple[float, ...] | None = Field(None, description="null = the data set's own")
    overlays: int = Field(12, ge=0, description="worst cases drawn in full")
    window_overlap: float = Field(0.5, ge=0, lt=1, description="share of a window that the next one covers again")


class Report(Section):
    """The HTML page."""

    title: str | None = None
    overlays: int = Field(4, ge=0, description="worst cases shown per run")
