"""What every round of self-training was taught, and what became of it on the validation images."""

from __future__ import annotations

from typing import Any

import pandas as pd

from landmarks_finetuning.report.frames import named_rows
from landmarks_finetuning.report.run_files import read_metrics_json

FIGURES = ("images", "landmarks", "certainty", "moved", "validation_mre")


def round_rows(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """{backbone, variant, shots, round, runs} and FIGURES, means over draws and seeds; NaN where a round has none."""
    found = []
    for run in named_rows(runs):
        metrics = read_metrics_json(run.path)
        found += [{"backbone": run.backbone, "variant": run.variant, "shots": run.shots, **entry}
                  for entry in metrics.get("rounds") or []]
    if not found:
        return []
    table = pd.DataFrame(found).reindex(columns=["backbone", "variant", "shots", "round", *FIGURES])
    by_round = table.groupby(["shots", "backbone", "variant", "round"], sort=True)
    means = by_round[list(FIGURES)].mean().assign(runs=by_round.size()).reset_index()
    return [{str(key): value for key, value in row.items()} for row in means.to_dict("records")]
