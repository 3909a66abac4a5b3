"""What happens to files: each damage is a function of a path. Drawn ones follow a seed, so that all can be repeated."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[Path], None]


def changed(change: Callable[[bytes], bytes]) -> Damage:
    """The damage that puts change(content) in place of the content."""
    return lambda path: _write(path, change(path.read_bytes()))


def flipped(place: float, bit: int) -> Damage:
    """One bit turned over; `place` is a share of the file's length, 0 the first byte."""
    def flip(content: bytes) -> bytes:
        whole = bytearray(content)
        whole[min(int(place * len(whole)), len(whole) - 1)] ^= 1 << bit
        return bytes(whole)

    return changed(flip)


def directory(path: Path) -> None:
    """An empty folder of the file's name."""
    _gone(path)
    path.mkdir()


def loop(path: Path) -> None:
    """A link to itself."""
    _gone(path)
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    """A link to nowhere."""
    _gone(path)
    path.symlink_to("nowhere")


def missing(path: Path) -> None:
    """Nothing."""
    _gone(path)


def unreadable(path: Path) -> None:
    """No rights for anybody; who runs the command must not be root."""
    path.chmod(0)


def _write(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def _gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


WHOLE: dict[str, Damage] = {  # nothing of the file is left that could be used
    "empty": changed(lambda _: b""), "first byte only": changed(lambda whole: whole[:1]),
    "zeros": changed(lambda whole: bytes(len(whole))),
    "noise": changed(lambda whole: random.Random(0).randbytes(len(whole))),
    "an error page": changed(lambda _: b"<html><title>404 Not Found</title></html>\n"),
    "UTF-16": changed(lambda _: '{"a": 1}\n'.encode("utf-16"))}
GONE: dict[str, Damage] = {
    "missing": missing, "a folder": directory, "a link to itself": loop, "a link to nowhere": dangling,
    "unreadable": unreadable}
CUT: dict[str, Damage] = {"half": changed(lambda whole: whole[:len(whole) // 2]),
                          "without its end": changed(lambda whole: whole[:-9])}
FLIPS: dict[str, Damage] = {f"bit {bit} at {place:.0%}": flipped(place, bit)
                            for place, bit in ((0, 7), (0.02, 3), (0.3, 0), (0.6, 6), (0.9, 2), (1, 4))}


def of_json(key: str, value: Any) -> Damage:
    """JSON whose `key`, a path with dots, has another value; ... takes the key out. Numbers count in lists."""
    def change(content: bytes) -> bytes:
        values = json.loads(content)
        *parts, last = key.split(".")
        inner = values
        for part in parts:
            inner = inner[int(part)] if isinstance(inner, list) else inner[part]
        if value is ...:
            del inner[last]
        elif isinstance(inner, list):
            inner[int(last)] = value
        else:
            inner[last] = value
        return json.dumps(values).encode()

    return changed(change)


JSON: dict[str, Damage] = {
    "a list": changed(lambda _: b"[]"), "null": changed(lambda _: b"null"), "a text": changed(lambda _: b'"x"'),
    "nested deep": changed(lambda _: b"[" * 100_000),
    "a long number": changed(lambda _: b'{"a": ' + b"9" * 5000 + b"}"),
    "not UTF-8": changed(lambda whole: whole.replace(b'"', b'"\xff', 1))}


def of_keys(values: dict[str, tuple[Any, ...]]) -> dict[str, Damage]:
    """A damage for each wrong value of each key."""
    return {f"{key} is {'missing' if value is ... else _short(value)}": of_json(key, value)
            for key, wrong in values.items() for value in wrong}


def _short(value: Any) -> str:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else json.dumps(value)[:24]


def of_cell(row: int, column: int, text: str) -> Damage:
    """A comma-separated table one of whose cells has another text; rows count from the header."""
    def change(content: bytes) -> bytes:
        rows = [line.split(",") for line in content.decode().splitlines()]
        rows[row][column] = text
        return "".join(",".join(cells) + "\n" for cells in rows).encode("utf-8", "surrogateescape")

    return changed(change)


CELLS = ("x", "nan", "inf", "1e400", "1_0", "-5", "1e9", "", "\x00", "\udcff", '"3')


def of_table(column: int) -> dict[str, Damage]:
    """Damages of a table whose `column` holds numbers."""
    lines = bytes.splitlines
    return {**{f"cell {text!r}": of_cell(2, column, text) for text in CELLS},
            "no header": changed(lambda whole: b"\n".join(lines(whole)[1:])),
            "the header alone": changed(lambda whole: lines(whole)[0] + b"\n"),
            "a row twice": changed(lambda whole: whole + lines(whole)[1] + b"\n"),
            "a row too short": changed(lambda whole: whole + lines(whole)[1].split(b",")[0] + b"\n"),
            "semicolons": changed(lambda whole: whole.replace(b",", b";")),
            "another header": changed(lambda whole: b"a,b,c\n" + b"\n".join(lines(whole)[1:]))}
