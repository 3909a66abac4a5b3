"""What no value of a config file may be, whatever its key: found in the plain values, before any of them is used."""

from __future__ import annotations

import math
from typing import Any

MOST_LEVELS = 20  # of values within values
LARGEST = 2**62  # of whole numbers: sums of seeds and steps stay within 64 bits
SHOWN = 40  # characters of a value in a message


def broken_limit(values: Any) -> str | None:
    """What is wrong with the first value that can be no setting, with its key; None where nothing is.

    Infinite numbers and NaN, whole numbers beyond LARGEST, text with a NUL or half a character, more than MOST_LEVELS.
    """
    ahead: list[tuple[str, Any, int]] = [("", values, 0)]
    while ahead:
        key, value, level = ahead.pop()
        if level > MOST_LEVELS:
            return f"{key[:SHOWN]}...: values are nested more than {MOST_LEVELS} deep"
        if isinstance(value, dict):
            strange = next((name for name in value if not _is_text(str(name))), None)
            if strange is not None:
                return f"key {strange!r:.{SHOWN}} holds a character that no file can"
            ahead += [(f"{key}.{name}" if key else str(name), each, level + 1) for name, each in value.items()]
        elif isinstance(value, list):
            ahead += [(f"{key}.{place}", each, level + 1) for place, each in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            return f"{key}: a finite number is needed, got {value}"
        elif isinstance(value, int) and abs(value) > LARGEST:
            digits = len(str(value)) if value.bit_length() < 10_000 else "thousands of"
            return f"{key}: whole numbers lie within 64 bits (at most 2^62), got one of {digits} digits"
        elif isinstance(value, str) and not _is_text(value):
            return f"{key}: {value!r:.{SHOWN}} holds a character that no file name can"
    return None


def _is_text(text: str) -> bool:
    """Whether there is neither a NUL nor half a character (a surrogate) in it."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)
