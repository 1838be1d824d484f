"""The page of all settings, from their classes: type, default, unit and meaning.

The meaning of a setting is the string below it in its class. It may end with its unit: "Unit: tokens."
"""

import functools
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import babel_jax
from babel_jax.config import Config
from babel_jax.config.quality import QualityConfig
from babel_jax.config.settings import Choice

_UNIT = re.compile(r"\s*Unit: ([^.]+)\.$")
_HEAD = """# Settings

A run is one TOML file. `babel init` writes one, and `configs/` has more. `--set` overrides settings for one
command: `--set training.remat=full`; `--set stages.0.tokens=1000` changes the first stage. Unknown keys,
wrong types and impossible combinations are refused with the key, the file and the valid choices. The run
folder has the resolved settings.

A double bracket, as in `[[stages]]`, is a table that may be repeated. *needed*: the setting has no default.
*not set*: the setting may be left out, and then has no value. *follows*: the default follows from other
settings, as its meaning says.

## Of a run

For `babel prepare`, `mixture`, `train`, `sft`, `plan` and `rehearse`.
"""
_QUALITY = """## Of a quality classifier

For `babel judge`, `classifier` and `score`.
"""


def settings_page() -> str:
    """Markdown: a section for each table of a config file."""
    seen: set[type[BaseModel]] = set()
    return "\n".join([_HEAD, *_sections("", Config, seen), _QUALITY, *_sections("", QualityConfig, seen)])


def _sections(table: str, kind: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[str]:
    """The section of a table, then those of the tables in it. Each class has one section."""
    if kind in seen:
        return
    seen.add(kind)
    yield _section(table, kind)
    for name, field in kind.model_fields.items():
        inner_table = f"{table.strip('[]')}.{name}" if table else name
        for inner in classes_in(field.annotation, BaseModel):
            is_list = "tuple" in str(field.annotation)
            yield from _sections(f"[{inner_table}]" if is_list else inner_table, inner, seen)


def _section(table: str, kind: type[BaseModel]) -> str:
    heading = f"`[{table}]`" if table else f"The top of the file {{#{kind.__name__}}}"
    lines = [f"### {heading}", "", inspect.getdoc(kind) or "", ""]
    lines += ["| setting | type | default | unit | meaning |", "| --- | --- | --- | --- | --- |"]
    schema = kind.model_json_schema()
    told = meanings(kind)
    choices: list[type[Choice]] = []
    for name, field in kind.model_fields.items():
        meaning, unit = told[name]
        type_text = _type(schema["properties"][name], schema.get("$defs", {}))
        if not unit and "≥ 0, ≤ 1" in type_text:
            unit = "fraction"
        cells = (f"`{name}`", type_text, _default(field), unit, meaning)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        choices += classes_in(field.annotation, Choice)
    for choice in dict.fromkeys(choices):
        values = ", ".join(f"`{value}`" for value in choice)
        lines += ["", f"**{choice.__name__}** ({values}). {inspect.getdoc(choice)}"]
    return "\n".join(lines) + "\n"


def meanings(kind: type[BaseModel]) -> dict[str, tuple[str, str]]:
    """For each setting of a class: its meaning and its unit, from the string below it."""
    members: dict[str, Any] = {}
    # A setting may be declared in a base class.
    for declared in reversed(kind.__mro__):
        if declared.__module__.startswith("babel_jax.config."):
            module = _config_package()[declared.__module__.removeprefix("babel_jax.config.")]
            members |= module[declared.__name__].members
    found = {}
    for name in kind.model_fields:
        docstring = members[name].docstring
        text = " ".join(docstring.value.split()) if docstring is not None else ""
        unit = _UNIT.search(text)
        found[name] = (_UNIT.sub("", text), unit[1] if unit else "")
    return found


@functools.cache
def _config_package() -> griffe.Module:
    package = griffe.load("babel_jax.config", search_paths=[str(Path(babel_jax.__file__).parents[1])])
    assert isinstance(package, griffe.Module)
    return package


def classes_in(annotation: Any, base: type) -> list[type]:
    """The subclasses of `base` within an annotation such as `tuple[Stage, ...] | None`."""
    if inspect.isclass(annotation) and not typing.get_args(annotation):
        return [annotation] if issubclass(annotation, base) else []
    found = []
    for argument in typing.get_args(annotation):
        found += classes_in(argument, base)
    return found


def _type(schema: dict[str, Any], defined: dict[str, Any]) -> str:
    """A JSON schema in words, such as "whole number > 0"."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if "enum" in defined[name]:
            return "one of " + ", ".join(f"`{value}`" for value in defined[name]["enum"])
        return "table"
    if "anyOf" in schema:
        present = [part for part in schema["anyOf"] if part.get("type") != "null"]
        return " or ".join(_type(part, defined) for part in present)
    match schema.get("type"):
        case "array" if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])}: {_type(schema['prefixItems'][0], defined)}"
        case "array":
            return f"list: {_type(schema['items'], defined)}"
        case "object":
            return f"table: {_type(schema['additionalProperties'], defined)}"
        case "integer" | "number" as number:
            return ("whole number" if number == "integer" else "number") + _range(schema)
        case "boolean":
            return "`true` or `false`"
    return str(schema.get("format", "string"))


def _range(schema: dict[str, Any]) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    bounds = [f"{sign} {schema[key]:.10g}" for key, sign in signs.items() if key in schema]
    return f" {', '.join(bounds)}" if bounds else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*needed*"
    if field.default_factory is not None:
        return "*follows*"
    if field.default is None:
        return "*not set*"
    if classes_in(field.annotation, BaseModel):
        return "the defaults below" if field.default else "none"
    # Longer defaults are in the class; a cell of the table has no room for them.
    text = tomli_w.dumps({"x": _plain(field.default)}, multiline_strings=False)
    value = " ".join(text.removeprefix("[x]").removeprefix("x = ").split())
    return f"`{value}`" if 0 < len(value) <= MOST_CHARACTERS else ("none" if not value else "see the class")


MOST_CHARACTERS = 80  # of a default in a table


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Choice) else value
