"""The JSON schema of recipes, for editors: `python -m tipdistill.recipes.schema` writes schema.json.

A recipe that begins with `# yaml-language-server: $schema=PATH`, PATH being what `tipdistill recipes schema` prints, is
checked and completed while it is written.
"""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..files import write_text
from .fields import SCHEMA
from .read import TYPES, in_recipes

_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}


def schema() -> dict[str, Any]:
    """The schema of every field that a recipe may hold.

    Example:
        >>> schema()["properties"]["retention"]["type"]
        'number'
    """
    properties: dict[str, Any] = {}
    flags: dict[str, Any] = {}
    for kind in TYPES:
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.init:
                place = properties if in_recipes(field.name) else flags
                place.setdefault(field.name, _property(field, hints[field.name]))
    properties["env"] = {
        "type": "object",
        "description": "Variables of the environment that the run is started with.",
        "additionalProperties": {"type": ["string", "number", "boolean"]},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of tipdistill train",
        "type": "object",
        "additionalProperties": False,
        "properties": dict(sorted(properties.items())),
        "x-flags": flags,
    }


def _property(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds: list[str] = []
    choices: list[Any] = []
    for part in parts:
        origin = get_origin(part) or part
        if origin is NoneType:
            kinds.append("null")
        elif origin is Literal:
            choices += get_args(part)
        elif isinstance(origin, type) and issubclass(origin, Enum):
            choices += [member.value for member in origin]
        else:
            kinds.append(_KINDS.get(origin, "string"))
    described: dict[str, Any] = {
        "description": " ".join(str(field.metadata.get("help", "")).replace("%%", "%").split())
    }
    default = field.default_factory() if callable(field.default_factory) else field.default
    default = default.value if isinstance(default, Enum) else default
    if default is None:
        kinds.append("null")
    if choices:
        described["enum"] = [*choices, *([None] if "null" in kinds else [])]
    else:
        # a float may be written 1, and numbers and texts may be written for a text, as on the command line
        wider = {"string": ["string", "number", "boolean"], "number": ["number"]}
        names = list(dict.fromkeys(name for kind in kinds for name in wider.get(kind, [kind])))
        described["type"] = names[0] if len(names) == 1 else names
    if default is not dataclasses.MISSING and isinstance(default, bool | int | float | str | list):
        described["default"] = default
    return described


def write(path: Path = SCHEMA) -> None:
    """Write the schema."""
    write_text(path, json.dumps(schema(), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write()
