"""One JSON file for a whole study: `extends`, `--set` overrides, one-line errors and a generated JSON Schema."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from copy import deepcopy
from itertools import accumulate
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from core.config.config import Config
from core.config.finetune import fill_in_losses
from core.config.idle import idle_settings
from core.config.limits import SHOWN, broken_limit
from core.config.section import Section
from core.config.settings import section_of
from core.config.ssl import fill_in_preset, merge
from core.errors import UserError, did_you_mean
from core.files import parse_json

MOST_EXTENDED = 50  # files that extend one another
CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"


def load_config(path: str | Path, overrides: Sequence[str] = (), backbones: Sequence[str] = ()) -> Config:
    """Read `path`, follow its `extends`, apply `section.key=value` overrides and validate.

    `backbones` are starts that a command runs beside those of finetune.backbones. Raises UserError, also where a file
    or an override gives a setting that cannot act.
    """
    layers = _read(Path(path), ())
    merged = list(accumulate(layers, merge))
    given: dict[str, Any] = {}
    values = deepcopy(merged[-1])
    for override in overrides:
        _apply(values, override)
        _apply(given, override)
    config = parse_config(values, str(path))
    last, *earlier = (fill_in_losses(fill_in_preset(whole)) for whole in (values, *merged))
    for layer, whole in zip([*layers, given], [*earlier, last], strict=True):
        then = idle_settings(layer, whole, backbones)
        for key, why in idle_settings(layer, last, backbones).items():
            if key in then:
                raise UserError(f"{path}: {why}")
    return config


def parse_config(values: dict[str, Any], where: str) -> Config:
    """Fill in ssl.preset and finetune.losses, and validate; `where` names these values in the one-line UserError."""
    check_values(values, where)
    try:
        return Config.model_validate_json(json.dumps(fill_in_losses(fill_in_preset(values))), strict=True)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None


def check_values(values: Any, where: str) -> None:
    """UserError for a value that can be no setting: see core.config.limits."""
    broken = broken_limit(values)
    if broken is not None:
        raise UserError(f"{where}: {broken}")


def parse_recorded_config(values: dict[str, Any], where: str) -> Config:
    """The config that a weights file recorded, without keys that this version does not have: a later one wrote them.

    What rebuilds the network is read strictly, by core.networks.weights.
    """
    return parse_config(_without_unknown(Config, values), where)


def _without_unknown(model: type[Section], values: dict[str, Any]) -> dict[str, Any]:
    """The values without the keys that `model` does not have, section by section."""
    fields = {field.alias or name: section_of(field.annotation) for name, field in model.model_fields.items()}
    return {key: _without_unknown(section, value) if (section := fields[key]) and isinstance(value, dict) else value
            for key, value in values.items() if key in fields}


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The --config and --set options that every command shares."""
    parser.add_argument("--config", default=str(CONFIG_DIR / "demo.json"), help="the study's JSON file")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="SECTION.KEY=VALUE",
                        help="override single values, for example --set ddpm.iterations=2000")


def add_resume_argument(parser: argparse.ArgumentParser) -> None:
    """The --resume option of the commands that train."""
    parser.add_argument("--resume", nargs="?", const="last", choices=("last", "previous"),
                        help="continue from last.pt (done anyway when it is there) or from previous.pt")


def _read(path: Path, seen: tuple[Path, ...]) -> list[dict[str, Any]]:
    """The values of the files that `path` extends, the first ancestor first, and its own.

    A bare name that is no file beside `path` is that of a shipped config.
    """
    if len(seen) > MOST_EXTENDED:
        raise UserError(f"{seen[0]}: extends through more than {MOST_EXTENDED} files, the last one {path}")
    if not path.is_file():  # a link to itself is none
        names = ", ".join(sorted(p.name for p in CONFIG_DIR.glob("*.json") if p.name != "schema.json"))
        which = f", which {seen[-1]} extends," if seen else ""
        raise UserError(f"config file {path}{which} does not exist; configs/ holds {names}")
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    try:
        values = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold one JSON object")
    check_values(values, str(path))
    parent = values.pop("extends", None)
    if parent is None:
        return [values]
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends must name one file")
    beside, shipped = path.parent / parent, CONFIG_DIR / parent
    own = beside.is_file() or Path(parent).name != parent or not shipped.is_file()
    return [*_read(beside if own else shipped, (*seen, path.resolve())), values]


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--set {override}: must read section.key=value")
    try:
        value = parse_json(text)
    except json.JSONDecodeError:
        value = text
    except ValueError as error:
        raise UserError(f"--set {override[:SHOWN]}...: {error}") from None
    check_values({key: value}, "--set")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {override}: {section} is not a section")
    values[last] = value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    place = tuple(part for part in first["loc"] if not str(part).startswith("literal["))  # not a union's branch
    key = ".".join(map(str, place))
    if first["type"] == "extra_forbidden":
        model: Any = Config
        for part in (p for p in first["loc"][:-1] if isinstance(p, str)):  # a number is a place in a list
            model = model.model_fields[part].annotation
            model = next((a for a in (model, *getattr(model, "__args__", ())) if hasattr(a, "model_fields")), Section)
        names = sorted(f.alias or n for n, f in model.model_fields.items())
        return f"unknown key {key}{did_you_mean(str(first['loc'][-1]), names)}; valid: {', '.join(names)}"
    if first["type"] == "value_error":
        entry = f"{key}: " if any(isinstance(part, int) for part in place) else ""
        return entry + first["msg"].removeprefix("Value error, ")
    allowed = [e["msg"] for e in error.errors() if e["loc"][:len(place)] == place]  # one for each of a union's branches
    return f"{key}: {', or '.join(m[0].lower() + m[1:] for m in allowed)}, got {first['input']!r}"




