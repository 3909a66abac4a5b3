"""Which runs of an experiment may be averaged and compared: those made from, and scored on, the same data.

Labels may be corrected, or a pre-training done again, before every run was. The newest run says what counts now; runs
of other test labels, of other labels for the same draw, or from other start weights stand apart, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.formats.json_files import read_object
from core.runs.inputs import INPUTS, image_changes, read_record


@dataclass(frozen=True)
class Apart:
    """A scored run that is left out of every figure, and why."""

    folder: Path
    reason: str


def set_apart(folders: Sequence[Path]) -> list[Apart]:
    """The scored runs (folders with metrics.json) that are not like the newest of those they would be compared with.

    Runs of versions that recorded nothing are taken as they are. UserError for a damaged record.
    """
    newest_first = sorted(folders, key=lambda folder: (folder / "metrics.json").stat().st_mtime_ns, reverse=True)
    references: dict[tuple[str, ...], Any] = {}
    apart = []
    for folder in newest_first:
        metrics = read_object(folder / "metrics.json", "evaluate that run again")
        record = read_record(folder / INPUTS)
        reason = _difference(folder, metrics, record, references)
        if reason is not None:
            apart.append(Apart(folder, reason))
    return sorted(apart, key=lambda run: str(run.folder))


def _difference(folder: Path, metrics: dict[str, Any], record: dict[str, Any] | None,
                references: dict[tuple[str, ...], Any]) -> str | None:
    """Why the run differs from what newer ones left in `references`; where it does not, it adds its own there."""
    own: dict[tuple[str, ...], Any] = {}
    if "scored_on" in metrics:
        own["test", str(metrics["dataset"]), str(metrics["split"])] = metrics["scored_on"]
    if record is not None:
        finetune = read_object(folder / "config.json", "delete its folder to make that run again").get("finetune", {})
        choice = (str(finetune.get("selection")), str(finetune.get("validation")))  # which decide a draw's images
        for use, images in record["images"].items():
            own[("images", str(metrics["dataset"]), *choice, str(metrics["shots"]), str(metrics["draw"]), use)] = images
        if record["start"] is not None:
            _, backbone, variant, _ = folder.parts[-4:]
            own[("start", backbone, variant)] = record["start"]["sha256"]
    for key, value in own.items():
        reference = references.get(key, value)
        if key[0] == "images":
            changes = image_changes({key[-1]: value}, {key[-1]: reference})
            if changes:
                return f"it was made from other labels than newer runs of this draw: {'; '.join(changes)} since"
        elif reference != value:
            test = ("it answered other unlabelled images than newer runs, as labels were added or changed since"
                    if key[-1] == "unlabelled" else "it was scored on other test images or labels than newer runs")
            return {"test": test,
                    "start": "it started from other weights than newer runs of its kind"}[key[0]]
    for key, value in own.items():
        references.setdefault(key, value)
    return None
