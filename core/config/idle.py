"""A setting that is given and cannot act is an error, not something that is accepted and ignored.

Each file of an `extends` chain, and the command line, answers for what it gives itself. A value that a parent file gave
and that only a child's choice leaves without effect is nobody's mistake; neither is a default written out, or null.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from core.config.section import Condition
from core.config.settings import all_settings

MISSING = object()


def idle_settings(given: Mapping[str, Any], values: Mapping[str, Any], backbones: Collection[str] = ()
                  ) -> dict[str, str]:
    """{key: why, in one line} of the `given` settings that do not act where the whole config is `values`.

    Both are plain values by sections. `backbones` are starts that are run beside those of finetune.backbones.
    """
    if "run" in given:
        return {}  # a run's record, which holds every setting
    idle, compared = {}, {*_value(values, "finetune.backbones"), *backbones}
    for key, setting in all_settings().items():
        value = _lookup(given, key)
        if value is MISSING or value is None or value == _plain(setting.default):
            continue
        for condition in setting.acts:
            others = [_value(values, each) for each in condition.key.split(" and ")]
            if all(any(_is(other, each) for each in condition.values) for other in others) != condition.allowed:
                idle[key] = _explain(key, value, condition, others[0])
        if not setting.may_wait and setting.backbones is not None and compared.isdisjoint(setting.backbones):
            idle[key] = (f"{key} {json.dumps(value)} acts for {_choices(setting.backbones)} only, and none of them is "
                         "in finetune.backbones; add one, or leave the key away")
    entries = _lookup(given, "finetune.losses")
    for entry in entries if isinstance(entries, list) else ():
        inside = {**values, "finetune": {**values["finetune"], **entry, "losses": []}}
        for key, why in idle_settings({"finetune": entry}, inside, backbones).items():
            idle[f"finetune.losses {json.dumps(entry)} {key}"] = f"finetune.losses: {why}"
    return idle


def _explain(key: str, value: Any, condition: Condition, other: Any) -> str:
    verb = "are" if " and " in condition.key else "is"
    only = f" and acts only with {_choices(condition.values)}" if condition.allowed else ""
    return (f"{key} {json.dumps(value)} has no effect: {condition.key} {verb} {json.dumps(other)}{only}; "
            f"{condition.advice or 'change that, or leave the key away'}")


def _choices(values: Collection[Any]) -> str:
    return " or ".join(json.dumps(value) for value in values)


def _is(value: Any, pattern: Any) -> bool:
    if isinstance(value, str) and isinstance(pattern, str):
        return fnmatchcase(value, pattern)
    return value == pattern


def _value(values: Mapping[str, Any], key: str) -> Any:
    value = _lookup(values, key)
    return _plain(all_settings()[key].default) if value is MISSING else value


def _lookup(values: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return MISSING
        values = values[part]
    return values


def _plain(value: Any) -> Any:
    """As JSON would hold it: lists for tuples."""
    return list(value) if isinstance(value, tuple) else value
