"""Text in the cells of CSV files: a spreadsheet takes what begins with = + - @ for a formula and works it out.

Such text gets an apostrophe before it, which our readers take off again; numbers stay as they are.
"""

from __future__ import annotations

import re
from typing import Any

FORMULA = re.compile(r"'*[=+\-@\t\r]")
WRITTEN = re.compile(r"'+[=+\-@\t\r]")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)")


def harmless(cell: Any) -> Any:
    """Text that no spreadsheet takes for a formula; anything but text as it is."""
    if isinstance(cell, str) and FORMULA.match(cell) and not NUMBER.fullmatch(cell):
        return f"'{cell}"
    return cell


def meant(cell: str) -> str:
    """The text that `harmless` made a cell of."""
    return cell[1:] if WRITTEN.match(cell) else cell
