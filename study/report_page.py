"""The report of a study, built again only where what it is made of has changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from core.files import write_atomically
from core.runs.claims import claim

REPORTED = (".json", ".jsonl", ".csv", ".png", ".npz")  # what of a study a report may show
REPORTING = (".py", ".j2", ".js", ".css", ".csv")  # what of the code makes it


def ingredients(experiment_dir: Path) -> str:
    """A digest of names, sizes and times of everything a report is made of and by: the study's files and the code.

    Not the commit: it says nothing of code that was changed since, nor of runs that were deleted.
    """
    report, project = experiment_dir / "report", Path(__file__).resolve().parents[1]
    places = [(experiment_dir, REPORTED), *((project / room, REPORTING) for room in ("core", "landmarks_finetuning"))]
    digest = hashlib.sha256()
    for folder, suffixes in places:
        for path in sorted(folder.rglob("*")):
            if path.suffix in suffixes and report not in path.parents and path.is_file():
                status = path.stat()
                digest.update(f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def build(experiment_dir: Path) -> None:
    """Build the report; its libraries take seconds to import, which a page that is there should not cost."""
    from landmarks_finetuning.report.build import build_report

    build_report([experiment_dir])


def report_page(experiment_dir: Path) -> Path:
    """The study's report, built unless it is there and made of the same files by the same code."""
    folder = experiment_dir / "report"
    page, label = folder / "index.html", folder / "ingredients.sha256"

    def is_current(digest: str) -> bool:
        return page.is_file() and label.is_file() and label.read_text() == digest

    if is_current(ingredients(experiment_dir)):
        return page
    with claim(folder, wait=True):
        digest = ingredients(experiment_dir)  # before it is built: what changes meanwhile calls for another one
        if not is_current(digest):
            build(experiment_dir)
            write_atomically(label, digest.encode())
    return page
