"""An append-only file of JSON lines, each on disk before it counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from core.errors import UserError


class Journal:
    """`entries` is what the file holds, in order; one writer at a time.

    A last line without its end was cut by a crash before anybody was told that it is there: it is dropped. UserError
    for a damaged line before it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.entries = path, list[dict[str, Any]]()
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self.entries.append(json.loads(line))
            except ValueError:
                raise UserError(f"{path}, line {number} is damaged; remove that line (the labels themselves are not "
                                "in this file)") from None
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        self._size = self._before_last = len(whole)

    def append(self, entry: dict[str, Any]) -> None:
        """Write `entry` behind the others; it is on disk when this returns."""
        line = json.dumps(entry, allow_nan=False, ensure_ascii=False).encode() + b"\n"
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._before_last, self._size = self._size, self._size + len(line)
        self.entries.append(entry)

    def drop_last(self) -> None:
        """Take back the entry that was just appended: what it announced could not be done."""
        with self.path.open("r+b") as file:
            file.truncate(self._before_last)
            os.fsync(file.fileno())
        self._size = self._before_last
        self.entries.pop()
