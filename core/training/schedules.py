"""Learning rates that rise and fall more than once: factors of the peak, pure functions of the step."""

from __future__ import annotations

import math

LOWEST = 0.01  # of the peak: where a cycle begins and ends


def triangle(step: int, rise: int) -> float:
    """Up from LOWEST in `rise` steps and down in as many, half as high each time ("triangular2" of Smith 2017)."""
    cycle, place = divmod(step, 2 * rise)
    return LOWEST + (1 - LOWEST) * (1 - abs(place / rise - 1)) * 0.5**cycle


def cosine_restarts(step: int, first: int) -> float:
    """From 1 along a cosine to 0 in `first` steps, then in twice as many, and so on (Loshchilov and Hutter 2017)."""
    period = first
    while step >= period:
        step, period = step - period, 2 * period
    return 0.5 * (1 + math.cos(math.pi * step / period))
