"""The config's `evaluation` and `report` sections: how predictions are scored and shown."""

from __future__ import annotations

from typing import Literal

from core.config.section import Count, Fraction, Index, Rate, Section, only, setting, unless
from core.config.starts import BACKBONES, HEATMAP_STARTS, MEAN_SHAPE


class Evaluation(Section):
    """How predictions are scored."""

    split: Literal["test", "validation"] = setting(
        "test", "images that are scored: choose settings on validation, test once", counts_for=("scoring",),
        acts=[only("folds", None)])
    folds: int | None = setting(
        None, "cross-validation: the labels for training in so many parts, by patient, each predicted by runs trained "
        "on finetune.shots of the others; as many as patients = leave-one-out; null = none", counts_for=("training",),
        backbones=(MEAN_SHAPE, *BACKBONES), slug="folds", ge=2)
    batch_size: Count = setting(16, "images, or windows, that go through a network at once")
    views: Count = setting(1, "looks at each image whose heatmaps are averaged: itself, then a little turned, zoomed, "
                           "shifted and with other contrast; 1 = itself alone", counts_for=("scoring",),
                           backbones=HEATMAP_STARTS, before=1)
    leaked: Literal["keep", "drop"] = setting(
        "keep", "images with a twin in train, validation or pre-training: drop = they are not scored",
        counts_for=("scoring",), before="keep")
    sdr_thresholds: tuple[Rate, ...] | None = setting(
        None, "success detection rates: largest errors that succeed, mm or pixels; null = the data set's own",
        counts_for=("scoring",))
    overlays: Index = setting(12, "worst cases drawn in full")
    window_overlap: Fraction = setting(
        0.5, "share of a window that the next one covers again, in images larger than the network's input",
        counts_for=("scoring",), backbones=HEATMAP_STARTS,
        acts=[unless("dataset.resample_mm and dataset.canvas_size", None)])


class Report(Section):
    """The HTML page."""

    title: str | None = setting(None, "heading of the page; null = the study's name")
    overlays: Index = setting(4, "worst cases shown for each run")
