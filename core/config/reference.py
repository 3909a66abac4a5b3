"""The reference of the config file, docs/config.md, from the models: python -m core.config.reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from core.config.config import Config
from core.config.load import CONFIG_DIR
from core.config.section import Section
from core.config.settings import Setting, all_settings
from core.config.starts import BACKBONES

PAGE = CONFIG_DIR.parent / "docs" / "config.md"
INTRODUCTION = """# The config file

Written by `python -m core.config.reference` from the models in `core/config/`; do not edit. One JSON file describes a
study. `"extends": "config.json"` inherits from another file, `--set section.key=value` on a command line comes last.
Unknown keys and impossible values end in one line that names the key and the valid choices. So does a setting that is
given and cannot act; a default written out, `null`, or a value that a parent file gave may stand.

*Role* says what another value means for runs that are there already. **identity**: it makes another run, of
pre-training, of self-supervision (ssl) or of fine-tuning (training); **scoring**: another score of the same run;
**free**: nothing, it may change at any time.
"""
NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "anything", NoneType: "null"}
SIGNS = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}


def reference() -> str:
    """The whole page as Markdown: one table for each section of the file."""
    tables: dict[str, list[str]] = {}
    for key, setting in all_settings().items():
        tables.setdefault(key.rpartition(".")[0].partition(".")[0], []).append(_row(setting))
    parts = [INTRODUCTION]
    for name, rows in tables.items():
        heading = f"`{name}`: {Config.model_fields[name].description}" if name else "At the top of the file"
        parts.append("\n".join([f"## {heading}", "", "| key | type or choices | default | role | meaning |",
                                "|---|---|---|---|---|", *rows, ""]))
    return "\n".join(parts)


def write_reference(path: Path = PAGE) -> None:
    """Generate docs/config.md."""
    path.write_text(reference(), encoding="utf8")


def _row(setting: Setting) -> str:
    default = setting.default.model_dump(mode="json") if isinstance(setting.default, Section) else setting.default
    cells = (f"`{setting.key}`", _limited(_type(setting.type), setting.limits), f"`{json.dumps(default)}`",
             _role(setting), _meaning(setting))
    return f"| {' | '.join(cell.replace('|', ',') for cell in cells)} |"


def _role(setting: Setting) -> str:
    if setting.role != "identity":
        return setting.role
    return f"identity: {', '.join(setting.counts_for)}"


def _meaning(setting: Setting) -> str:
    parts = [setting.description]
    if setting.backbones is not None and not set(BACKBONES) <= set(setting.backbones):
        parts.append(f"for {', '.join(setting.backbones)}")
    parts += [f"{'only' if each.allowed else 'not'} where {each.key} is "
              f"{' or '.join(json.dumps(value) for value in each.values)}" for each in setting.acts]
    return "; ".join(parts) + (f" (`{setting.slug}-` in a variant's name)" if setting.slug else "")


def _type(annotation: Any) -> str:
    """A field's type in words."""
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return _limited(_type(parts[0]), parts[1:])
    if kind is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if kind in (Union, UnionType):
        return " or ".join(map(_type, parts))
    if kind is tuple:
        return f"list of {_type(parts[0])}" if parts[-1] is ... else f"[{', '.join(map(_type, parts))}]"
    if kind is dict:
        return "object"
    return NAMES.get(annotation, "object")


def _limited(words: str, limits: Sequence[Any]) -> str:
    """A type with its limits, which null has not: "number above 0 or null"."""
    signs = " ".join(f"{sign} {getattr(each, name):g}" for each in limits for name, sign in SIGNS.items()
                     if hasattr(each, name))
    first, *others = words.split(" or ")
    return " or ".join([f"{first} {signs}".strip(), *others])


if __name__ == "__main__":
    write_reference()
