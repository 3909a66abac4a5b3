"""Which process works on a run: a lock on a file in its folder, which the kernel releases when its owner ends.

A lock (flock) and not a file whose presence counts: after a crash or kill -9 nothing has to be cleaned up, no heartbeat
is kept and no clocks are compared. Assumed of a folder that several machines share: its file system carries flock from
one to the other, as NFS does on Linux (a machine that vanished loses its locks with its lease, in about 90 s), GPFS,
CephFS, and Lustre mounted with `flock`. Where locks hold on one machine only (NFS with `nolock`, Lustre with
`localflock`, BeeGFS without `tuneUseGlobalFileLocks`), all processes of a study must run on one machine.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from core.errors import UserError

LOCK = "claim.lock"
TRIES = 100  # to lock a file whose owner removes it at that moment
_held: set[int] = set()  # descriptors of this process' locks


class Claimed(UserError):
    """Another process holds the run; the message says which."""


@contextmanager
def claim(run_dir: Path, wait: bool = False) -> Iterator[None]:
    """Hold `run_dir` against every other process while the block runs; a folder that stays empty vanishes again.

    Raises Claimed when another process has it, unless told to `wait` until it is free, and UserError where nothing can
    be locked.
    """
    new = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    descriptor = _lock(run_dir, wait)
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # not so in a forked process
            with suppress(FileNotFoundError):  # somebody deleted the folder
                (run_dir / LOCK).unlink()
            _held.remove(descriptor)
            os.close(descriptor)
            with suppress(OSError):  # not empty: the usual case
                for folder in new:
                    folder.rmdir()


def _lock(run_dir: Path, wait: bool) -> int:
    """The descriptor of the locked file, which says whose it is."""
    path = run_dir / LOCK
    for _ in range(TRIES):
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            continue  # its last owner has just removed the empty folder
        except OSError as error:
            why = "it is a link; delete it" if path.is_symlink() else error.strerror
            raise UserError(f"{path if path.is_symlink() else run_dir} cannot be claimed: {why}") from None
        locked = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _identity().encode(), 0)
                os.fsync(descriptor)
                locked = True
                return descriptor
        except FileNotFoundError:
            pass  # its last owner has just removed the file: lock a new one
        except BlockingIOError:
            owner = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
            raise Claimed(f"{run_dir} is being worked on by {owner}; wait for it, or stop it") from None
        except OSError as error:
            raise UserError(f"{path} cannot be locked: {error.strerror}; runs need a file system with locks (flock)"
                            ) from None
        finally:
            if not locked:
                os.close(descriptor)
    raise UserError(f"{run_dir} cannot be claimed: no folder or file can be made there; correct "
                    "experiment.output_dir")


def held_by(run_dir: Path, pid: int) -> bool:
    """Whether process `pid` of this machine holds `run_dir`, or was killed while it did and nobody has it since."""
    try:
        return (run_dir / LOCK).read_text(errors="replace").startswith(f"{_name(pid)} ")
    except FileNotFoundError:
        return False


def _identity() -> str:
    return f"{_name(os.getpid())} since {datetime.now():%Y-%m-%d %H:%M:%S}"


def _name(pid: int) -> str:
    return f"process {pid} on {socket.gethostname()}"


def _let_go() -> None:
    """In a forked process, such as a loader's worker: its copy must not keep a lock when the owner is killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
