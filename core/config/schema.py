"""The JSON Schema of the config file, which editors complete and check with: python -m core.config.schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core.config.config import Config
from core.config.load import CONFIG_DIR


def write_schema(path: Path = CONFIG_DIR / "schema.json") -> None:
    """Generate the JSON Schema that editors use to complete and check configs."""
    schema = _plain(Config.model_json_schema())
    schema["properties"]["extends"] = {"type": "string", "description": "a config file to inherit from"}
    schema["required"] = []
    path.write_text(json.dumps(schema, indent=2) + "\n", encoding="utf8")


def _plain(schema: Any) -> Any:
    """Without what our metadata adds to each key (`setting`)."""
    if isinstance(schema, dict):
        return {key: _plain(value) for key, value in schema.items() if key != "setting"}
    return [_plain(value) for value in schema] if isinstance(schema, list) else schema


if __name__ == "__main__":
    write_schema()
