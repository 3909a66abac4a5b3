"""Files that are never seen half written, and which code wrote them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

DISTRIBUTION = "few-shot-landmarks"  # its name in pyproject.toml
LEFT_BEHIND = re.compile(r"\..+\.[0-9a-f]{16}\.tmp|\..+\.partial-[0-9a-f]{16}")
JUST_SECONDS = 1.0  # between a temporary file's making and its mark


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` when the block ends well (fsync, rename), and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_once(path.parent.absolute())
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # machines that share a folder share pids
    try:
        with temporary.open("wb") as file:
            hold(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a folder that becomes `path` when the block ends well, and vanishes otherwise.

    OSError where `path` is there by then and is not an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_once(path.parent.absolute())
    part = path.with_name(f".{path.name}.partial-{secrets.token_hex(8)}")
    part.mkdir()
    descriptor = os.open(part, os.O_RDONLY)
    hold(descriptor)
    try:
        yield part
        part.rename(path)
    finally:
        os.close(descriptor)
        shutil.rmtree(part, ignore_errors=True)


@lru_cache(maxsize=1 << 12)
def clear_once(folder: Path) -> None:
    """Delete what killed writers have left in `folder` itself, an absolute path, the first time a process asks."""
    with suppress(OSError):  # no such folder yet, or one that nobody may read
        for entry in os.scandir(folder):
            if LEFT_BEHIND.fullmatch(entry.name):
                drop_if_left(Path(entry.path))


def hold(descriptor: int) -> bool:
    """Mark an open file or folder as in use, for as long as it is open; False where another process has marked it.

    A file system without locks knows no marks: then nothing counts as left behind.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def drop_left_behind(folder: Path) -> None:
    """Delete temporary files and folders below `folder` whose writers were killed: those that no process holds."""
    for entry in list(walk(folder)):
        if LEFT_BEHIND.fullmatch(entry.name):
            drop_if_left(Path(entry.path))


def drop_if_left(path: Path) -> None:
    """Delete a temporary file or folder, unless a process holds it or has just made it."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            if time.time() - os.fstat(descriptor).st_mtime < JUST_SECONDS or not hold(descriptor):
                return
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path`: readers see the old file or the new one, never a part."""
    with atomic_file(path) as file:
        file.write(data)


def write_json(path: Path, values: Any) -> None:
    """Write `values` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


def parse_json(text: str | bytes) -> Any:
    """What JSON says; ValueError for text that is none, is nested too deep, or has numbers too long to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deep") from None


def stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Place, size and time of a file, or of all files of a folder: another stamp, another content."""
    place = path.absolute()
    try:
        status = place.stat()
    except (FileNotFoundError, NotADirectoryError):
        return ()
    if not stat.S_ISDIR(status.st_mode):
        return ((str(place), status.st_size, status.st_mtime_ns),) if stat.S_ISREG(status.st_mode) else ()
    entries = []
    for entry in walk(place):
        with suppress(FileNotFoundError):  # a link to nowhere
            status = entry.stat()
            if stat.S_ISREG(status.st_mode):
                entries.append((entry.path, status.st_size, status.st_mtime_ns))
    return tuple(sorted(entries))


def walk(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """All files and folders below `folder`, in no order; of links to folders what they lead to is left out."""
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        return
    for entry in entries:
        yield entry
        if entry.is_dir(follow_symlinks=False):
            yield from walk(entry.path)


def content_digest(*files: Path) -> str:
    """SHA-256 of the files' contents, one after the other; read again only after a change."""
    return _digest_of(tuple(entry for file in files for entry in stamp(file)))


@lru_cache(maxsize=1 << 16)
def _digest_of(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in files:
        with Path(name).open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def code_version() -> str:
    """The commit of this code, what is installed of it outside a git checkout, or "unknown".

    An environment may lie in the checkout of another project, whose commit says nothing.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        try:
            return f"{DISTRIBUTION} {version(DISTRIBUTION)}"
        except PackageNotFoundError:
            return "unknown"
    try:
        done = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"],
                              capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def drop_states(run_dir: Path) -> None:
    """Delete the training states of a run that is done: those of hundreds of runs fill a disk."""
    for name in ("last.pt", "previous.pt"):
        for path in run_dir.rglob(name):
            path.unlink(missing_ok=True)
