"""The best run of a study: `runs/<experiment>/best` leads to it, and stands in place of a run's folder."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from core.errors import UserError
from core.files import write_atomically

WEIGHTS = "best.safetensors"  # in a run's folder
BEST = "best"  # in the experiment's folder: a link to a run's folder, or a file that names it


def point_to_best(experiment_dir: Path, run_dir: Path) -> Path:
    """Have experiment_dir/best lead to `run_dir`, which lies below the experiment; returns its path.

    It is a relative link, so that the experiment may be moved, replaced in one step; where links cannot be made it is
    a file that holds the same relative path. UserError where a folder of that name is there.
    """
    pointer, target = experiment_dir / BEST, os.path.relpath(run_dir, experiment_dir)
    if pointer.is_dir() and not pointer.is_symlink():
        raise UserError(f"{pointer} is a folder, not the link to the best run; move it away")
    if pointer.is_symlink() and str(pointer.readlink()) == target:
        return pointer
    temporary = pointer.with_name(f".{BEST}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.symlink_to(target, target_is_directory=True)
    except (OSError, NotImplementedError):  # of a file system without links, or on a share that forbids them
        write_atomically(pointer, f"{target}\n".encode())
        return pointer
    try:
        temporary.replace(pointer)
    finally:
        temporary.unlink(missing_ok=True)
    return pointer


def run_folder(path: Path) -> Path:
    """The run that `path` stands for: a run's folder or its weights, an experiment's, or the experiment's `best`.

    UserError where the experiment has no best run, or where that is gone, and for a file that is no run's weights.
    Other paths are given back as they are.
    """
    if path.is_file() and path.name != BEST:
        if path.name != WEIGHTS:
            raise UserError(f"{path} is a file; name a run's folder, or the {WEIGHTS} in it")
        return path.parent
    if path.name == BEST and (path.is_symlink() or path.is_file()):
        return _followed(path)
    if os.path.lexists(path / BEST):
        return _followed(path / BEST)
    if (path / "landmarks").is_dir() or (path / "ddpm/config.json").is_file():  # landmarks/ddpm has none
        run = next(iter(sorted(path.glob("landmarks/*/*/shots*/best.safetensors"))), None)
        example = "it holds no trained run yet" if run is None else f"or name a run, such as {run.parent}"
        raise UserError(f"{path} has no best run: a launch ends by naming it (stage report); {example}")
    return path


def _followed(pointer: Path) -> Path:
    """Where `pointer` leads, read once: a launch may replace it meanwhile."""
    if pointer.is_symlink():
        target = pointer.readlink()
    elif pointer.is_file():
        target = Path(pointer.read_text(encoding="utf8", errors="replace").strip())
    else:
        return pointer
    run_dir = pointer.parent / target
    if not run_dir.is_dir():
        raise UserError(f"{pointer} leads to {run_dir}, which is not there; launch the study again (--stages report is "
                        "enough)")
    return run_dir
