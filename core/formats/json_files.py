"""JSON files that this project writes itself, read back: an object, or one line that says what is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.errors import DamagedFile
from core.files import parse_json


def read_object(path: Path, way_on: str) -> dict[str, Any]:
    """The object in the file; DamagedFile where there is none, with `way_on`: what to do then."""
    try:
        values = parse_json(path.read_text(encoding="utf8"))
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read ({error.strerror}); {way_on}") from None
    except ValueError as error:
        raise DamagedFile(f"{path} is damaged, no valid JSON ({' '.join(str(error).split())}); {way_on}") from None
    if not isinstance(values, dict):
        raise DamagedFile(f"{path} is damaged, it holds no JSON object; {way_on}")
    return values
