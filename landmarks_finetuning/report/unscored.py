"""Runs that were trained on every label, and so have no score: what they predict on unlabelled images."""

from __future__ import annotations

from typing import Any

import pandas as pd

from core.config.starts import MEAN_SHAPE
from landmarks_finetuning.pictures.cases import pictured_image
from landmarks_finetuning.report.collect import Experiment
from landmarks_finetuning.report.frames import grouped
from landmarks_finetuning.report.pictures import OVERLAY_WIDTHS, Pictures


def unscored_cases(experiment: Experiment, pictures: Pictures) -> list[dict[str, Any]]:
    """A dict for each start, variant and number of labels, most labels first: of its first draw's first seed.

    Keys: backbone, variant, shots, draw, images, unit, expected_error (mean, None where not known), volumes, folder,
    runs and pictures ({"source", "image"}, the largest expected error first; none where the config wants none).
    """
    if experiment.unscored.empty:
        return []
    wanted = experiment.config.get("report", {}).get("overlays", 4)
    trained = experiment.unscored[experiment.unscored["backbone"] != MEAN_SHAPE]
    cases = []
    for _, group in grouped(trained, ["shots", "backbone", "variant"], sort=True):
        run = group.sort_values(["draw", "seed"]).iloc[0]
        shown = [{"source": pictures.embed(path, OVERLAY_WIDTHS[bool(run["volumes"])], 78),
                  "image": pictured_image(path)} for path in sorted(run["path"].glob("overlays/rank*.png"))[:wanted]]
        expected = None if pd.isna(run["expected_error"]) else float(run["expected_error"])
        cases.append({**{key: run[key] for key in ("dataset", "backbone", "variant", "unit")},
                      **{key: int(run[key]) for key in ("shots", "draw", "images")}, "expected_error": expected,
                      "volumes": bool(run["volumes"]), "runs": len(group),
                      "folder": run["path"].relative_to(experiment.path).as_posix(),
                      "pictures": [each for each in shown if each["source"]]})
    return cases[::-1]
