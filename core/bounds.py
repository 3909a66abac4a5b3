"""What there is of memory, and the refusal, before anything is allocated, of what would take more."""

from __future__ import annotations

from pathlib import Path

from core.errors import UserError

MEMINFO = Path("/proc/meminfo")
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def machine_bytes() -> int | None:
    """Bytes of memory that a process can have at most: what is built in and swap, or its cgroup's limit.

    None where the machine does not say. What other processes hold counts as there: they may end.
    """
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        most = sum(int(lines[key].split()[0]) for key in ("MemTotal", "SwapTotal")) * 1024
    except (OSError, ValueError, KeyError):
        return None
    for path in CGROUPS:
        try:
            most = min(most, int(path.read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return most


def require_memory(what: str, needed: int, advice: str, there: int | None = None, whose: str = "this machine") -> None:
    """UserError where `what`, a key and its value, takes more bytes than `there` are (None: of this machine)."""
    most = machine_bytes() if there is None else there
    if most is not None and needed > most:
        raise UserError(f"{what} takes at least {gib(needed)} of memory, and {whose} has {gib(most)}; {advice}")


def gib(bytes_: int) -> str:
    """Bytes as people read them."""
    return f"{bytes_ / 2**30:.1f} GiB" if bytes_ < 2**70 else "more than 2^40 GiB"
