"""The few labelled images of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core.data.records import Record
from core.errors import UserError


def select_shots(records: Sequence[Record], shots: int, draw: int, selection: str) -> tuple[Record, ...]:
    """The few labelled images: the first k (the paper) or draw number `draw` of a seeded shuffle.

    Draws are nested: a larger k contains the smaller. UserError when there are fewer records than shots.
    """
    if shots > len(records):
        raise UserError(f"finetune.shots {shots} is above the training split's {len(records)} labelled images")
    if selection == "first":
        return tuple(records[:shots])
    order = np.random.default_rng([draw, len(records)]).permutation(len(records))
    return tuple(records[i] for i in sorted(order[:shots]))
