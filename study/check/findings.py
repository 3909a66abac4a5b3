"""What the checks hand on: alarms, each about something that one can look at and mend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Alarm(NamedTuple):
    """Something that is probably wrong: `kind` in a few words, the images it concerns, and what was seen."""

    kind: str
    images: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def robust(values: np.ndarray, least: float) -> tuple[float, float]:
    """Median and spread of values, NaN left out: 1.48 times the median distance from it, at least `least`."""
    middle = float(np.nanmedian(values))
    return middle, max(least, 1.4826 * float(np.nanmedian(np.abs(values - middle))))


def some(names: Iterable[str], most: int = 3) -> str:
    """a, b, c and 4 more."""
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
