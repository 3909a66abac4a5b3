"""Pictures on the page: embedded as JPEG within a budget, and each run's worst cases or why there are none."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from core.errors import UserError
from landmarks_finetuning.pictures.cases import pictured_image
from landmarks_finetuning.report.collect import Experiment, error_matrix, select
from landmarks_finetuning.report.findings import UNTRAINED
from landmarks_finetuning.report.order import best_first

OVERLAY_WIDTHS = {False: 640, True: 1200}  # pixels of an embedded overlay, of images and of volumes
IMAGE_BUDGET_BYTES = 5_500_000  # of base64, for the whole page


@dataclass
class Pictures:
    """Embeds pictures as JPEG data addresses until the page's budget is spent; counts what was left out."""

    remaining_bytes: int = IMAGE_BUDGET_BYTES
    left_out: int = 0

    def embed(self, path: Path, width: int, quality: int = 82) -> str | None:
        """A data address of the picture, at most `width` pixels wide, or None when the budget does not allow it."""
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


def worst_cases(experiment: Experiment, slug: str, runs: pd.DataFrame, pictures: Pictures) -> list[dict[str, Any]]:
    """Worst images first, most labels first: for each trained main variant the first draw's first seed.

    A dict per run: id, backbone, variant, shots, draw, images ({"source", "image", "error"}) and note, which says what
    is missing and where it is, empty where nothing is. Empty where the config wants no pictures.
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
            errors = error_matrix(run["path"])[0].mean(axis=1)
            width = OVERLAY_WIDTHS[bool(run["volumes"])]
            images = [{"source": pictures.embed(path, width, 78), "image": pictured_image(path)}
                      for path in files]
            images = [{**i, "error": errors.get(i["image"])} for i in images if i["source"]]
            groups.append({"id": f"{slug}-cases-{len(groups)}", "backbone": backbone, "variant": variant,
                           "shots": int(shots), "draw": int(run["draw"]), "images": images,
                           "note": _missing(run["path"], experiment.path, len(files), len(files) - len(images))})
    return groups


def _missing(folder: Path, experiment: Path, files: int, left_out: int) -> str:
    place = (folder / "overlays").relative_to(experiment).as_posix()
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
