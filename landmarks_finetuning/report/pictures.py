"""Pictures on the page: embedded as JPEG within a budget, and each run's worst cases or why there are none."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from core.errors import UserError
from landmarks_finetuning.pictures.cases import pictured_image
from landmarks_finetuning.report.collect import Experiment, select
from landmarks_finetuning.report.findings import UNTRAINED
from landmarks_finetuning.report.order import best_first
from landmarks_finetuning.report.run_files import error_matrix

OVERLAY_WIDTHS = {False: 640, True: 1200}  # pixels of an embedded overlay, of images and of volumes
IMAGE_BUDGET_BYTES = 5_500_000  # of base64, for the whole page
SPENT_BYTES = 100_000  # fewer left of it: it is spent where a picture was too large


@dataclass
class Pictures:
    """Embeds pictures as JPEG data addresses until the page's budget is spent; counts what was left out."""

    remaining_bytes: int = IMAGE_BUDGET_BYTES
    left_out: int = 0

    def embed(self, path: Path, width: int, quality: int = 82) -> str | None:
        """A data address of the picture, at most `width` pixels wide, or None when the budget does not allow it."""
        if self.left_out and self.remaining_bytes < SPENT_BYTES:  # not to draw hundreds that do not fit
            self.left_out += 1
            return None
        try:
            with Image.open(path) as picture:
                colours = picture.convert("RGB")
        except OSError as error:
            raise UserError(f"{path} is not a readable picture ({error}); delete it, or make it again") from error
        return self.embed_picture(colours, width, quality)

    def embed_picture(self, picture: Image.Image, width: int, quality: int = 82) -> str | None:
        """The same of a picture (RGB) that was just drawn."""
        if picture.width > width:
            picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
        text = base64.b64encode(buffer.getvalue()).decode()
        if len(text) > self.remaining_bytes:
            self.left_out += 1
            return None
        self.remaining_bytes -= len(text)
        return f"data:image/jpeg;base64,{text}"


def worst_cases(experiment: Experiment, slug: str, runs: pd.DataFrame) -> list[dict[str, Any]]:
    """Worst images first, most labels first: for each trained main variant the first draw's first seed.

    A dict per run: id, backbone, variant, shots, draw, and what `embed_cases` makes images and a note of. Empty where
    the config wants no pictures.
    """
    wanted = experiment.config.get("report", {}).get("overlays", 4)
    variants = best_first(runs)
    groups: list[dict[str, Any]] = []
    for shots in sorted(runs["shots"].unique(), reverse=True) if wanted else ():
        for backbone, variant in variants.items():
            group = select(runs, backbone, variant, shots)
            if group.empty or backbone == UNTRAINED:
                continue
            run = group.sort_values(["draw", "seed"]).iloc[0]
            files = sorted(run["path"].glob("overlays/rank*.png"))[:wanted]
            groups.append({"id": f"{slug}-cases-{len(groups)}", "backbone": backbone, "variant": variant,
                           "shots": int(shots), "draw": int(run["draw"]), "files": files, "images": [],
                           "width": OVERLAY_WIDTHS[bool(run["volumes"])], "path": run["path"],
                           "place": (run["path"] / "overlays").relative_to(experiment.path).as_posix()})
    return groups


def embed_cases(groups: Sequence[dict[str, Any]], pictures: Pictures, report: Path) -> None:
    """Give each of the `worst_cases` its images ({"source", "image", "error"}), note and folder.

    The worst image of every run is embedded before the second one of any, as far as the page's budget goes. The note
    says what is missing, empty where nothing is; folder is where it is, seen from `report`.
    """
    for rank in range(max((len(group["files"]) for group in groups), default=0)):
        for group in groups:
            for path in group["files"][rank:rank + 1]:
                source = pictures.embed(path, group["width"], 78)
                if source is not None:
                    image = pictured_image(path)
                    error = error_matrix(group["path"])[0].mean(axis=1).get(image)
                    group["images"].append({"source": source, "image": image, "error": error})
    for group in groups:
        left_out = len(group["files"]) - len(group["images"])
        group["note"] = _missing(group["place"], len(group["files"]), left_out)
        group["folder"] = Path(os.path.relpath(group["path"] / "overlays", report)).as_posix() if left_out else None


def _missing(place: str, files: int, left_out: int) -> str:
    if not files:
        return f"This run has no overlays: nothing is in {place}. Evaluating it again draws them."
    if not left_out:
        return ""
    return f"{left_out} of {files} pictures were left out to keep this page small; they are in {place}."


def find_cases(row: dict[str, Any], cases: list[dict[str, Any]]) -> dict[str, str]:
    """What a row of the results shows when it is selected: the id of its run's `cases`, or why there is none."""
    for group in cases:
        if all(group[key] == row[key] for key in ("backbone", "variant", "shots")):
            return {"cases": group["id"]}
    if row["backbone"] == UNTRAINED:
        return {"missing": "The mean shape does not look at the image: this page shows no overlays of it."}
    if not cases:
        return {"missing": "This report was made without overlays (report.overlays is 0)."}
    return {"missing": "This page shows overlays of each start’s variant with most runs alone; those of this run are "
                       f"in landmarks/{row['backbone']}/{row['variant'].replace('iter-best', 'iter*')}."}
