"""Reads settings from TOML files; each mistake is explained in one line."""

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from babel_jax.config import Config, Settings
from babel_jax.config.languages import WithLanguages
from babel_jax.errors import BadInput, one_line
from babel_jax.files import read_text

_MOST_DOTS = 5_000  # in a line of TOML; a dotted key has far fewer

S = TypeVar("S", bound=Settings)


def load_config(path: Path | str, overrides: tuple[str, ...] = ()) -> Config:
    """The run of a TOML file; see `load_settings`."""
    return load_settings(Config, path, overrides)


def load_settings(kind: type[S], path: Path | str, overrides: tuple[str, ...] = ()) -> S:
    """Reads a TOML file and applies overrides of the form `a.b=value` (value in TOML syntax; anything else is
    a string).

    Raises BadInput with the file, the dotted key and the valid choices for anything that does not fit.
    """
    values = read_toml(Path(path))
    for override in overrides:
        _override(values, override)
    return parse_settings(kind, values, str(path))


def declare_languages(path: Path | str) -> None:
    """Makes the languages known that the `[[languages]]` of a config declare. Its other settings are not
    read.

    Raises BadInput as `load_settings` does.
    """
    parse_settings(WithLanguages, {"languages": read_toml(Path(path)).get("languages", [])}, str(path))


def configs_folder() -> Path:
    """The shipped configs: beside the package in a clone, inside it when installed from a wheel."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())


def shipped_config(
    name: str, made: dict[str, Any], overrides: tuple[str, ...] = (), languages: Collection[str] | None = None
) -> Config:
    """One of the shipped configs. The values of `made` replace its own (tables are merged), then the
    overrides apply.

    With `languages`, shares of other languages are removed from its mixtures, because there is no text for
    them.
    """
    values = read_toml(configs_folder() / name)
    if languages is not None:
        for stage in values.get("stages", []):
            _keep_languages(stage.get("mixture", {}), languages)
    for key, value in made.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    for override in overrides:
        _override(values, override)
    return parse_settings(Config, values, name)


def _keep_languages(mixture: dict[str, Any], languages: Collection[str]) -> None:
    for name in ("weights", "curated", "curated_extra"):
        if name in mixture:
            mixture[name] = {code: share for code, share in mixture[name].items() if code in languages}
    if "languages" in mixture:
        mixture["languages"] = [code for code in mixture["languages"] if code in languages]
    # Weights of which no language is left: the mixture has its default strategy.
    if mixture.get("strategy") == "weights" and not mixture.get("weights"):
        del mixture["strategy"]


def read_toml(path: Path) -> dict[str, Any]:
    """The plain values of a TOML file. Raises BadInput if it is missing or cannot be parsed."""
    try:
        return _toml(read_text(path))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such config file") from None
    except (ValueError, OSError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: not a readable TOML file: {one_line(error, 300)}") from None


def _toml(text: str) -> dict[str, Any]:
    """The values of TOML text. Raises ValueError if it is no TOML, or is nested too deeply."""
    # tomllib takes time by the square of the parts of a dotted key.
    if any(line.count(".") > _MOST_DOTS for line in text.splitlines()):
        raise ValueError(f"a line with more than {_MOST_DOTS:,} dots, which no config has")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("values are nested too deep in each other") from None


def parse_settings(kind: type[S], values: dict[str, Any], location: str) -> S:
    """Settings of one class from plain values; messages name `location`.

    Raises BadInput that names every mistake in one line.
    """
    try:
        # Passed through JSON, because strict validation of JSON accepts lists for tuples and strings for
        # enums, and nothing else.
        as_json = json.dumps(values, default=str)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits
        raise BadInput(f"{location}: a value that no setting has: {one_line(error, 300)}") from None
    try:
        return kind.model_validate_json(as_json)
    except ValidationError as error:
        # A default that is computed from other settings fails as well if one of them is wrong. Only the wrong
        # one is told.
        mistakes = [problem for problem in error.errors() if problem["type"] != "default_factory_not_called"]
        raise BadInput(f"{location}: " + "; ".join(_explain(kind, mistake) for mistake in mistakes)) from None


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise BadInput(
            f"--set {override}: not of the form key=value, for example training.global_batch_size=16"
        )
    try:
        # Text without quotes is no TOML, such as runs/one in --set out=runs/one. It is a string then.
        value = _toml(f"value = {text}")["value"]
    except ValueError:
        value = text

    # The table or list that has the last part of the key.
    *parents, last = (part.strip() for part in key.split("."))
    container: Any = values
    for part in parents:
        container = _enter(container, part, override)
    if isinstance(container, list):
        container[_index(container, last, override)] = value
    else:
        container[last] = value


def _enter(container: Any, part: str, override: str) -> Any:
    if isinstance(container, list):
        below = container[_index(container, part, override)]
    else:
        below = container.setdefault(part, {})
    if not isinstance(below, dict | list):
        raise BadInput(f"--set {override}: {part} is a single value, so it has no keys below it")
    return below


def _index(values: list[Any], part: str, override: str) -> int:
    # A number of more digits is of no list, and Python refuses to read thousands of digits.
    if not part.isdecimal() or len(part) > 9 or int(part) >= len(values):
        raise BadInput(f"--set {override}: {part} must be a number from 0 to {len(values) - 1}")
    return int(part)


_MAY_HOLD_SECRETS = ("endpoint", "key_variable")  # of judge: no message repeats their values


def _explain(kind: type[BaseModel], problem: ErrorDetails) -> str:
    """One mistake as `key: the error; valid choices`."""
    location = problem["loc"]
    key = ".".join(str(part) for part in location) or "config"
    if problem["type"] == "extra_forbidden":
        # The table that has the unknown key decides which keys are valid.
        valid = sorted(_class_at(kind, location[:-1]).model_fields)
        near = difflib.get_close_matches(str(location[-1]), valid, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{key}: unknown key; {hint}valid keys: {', '.join(valid)}"
    if problem["type"] == "missing":
        return f"{key}: missing; this key is needed"
    message = problem["msg"].removeprefix("Value error, ")
    # Our own validators (value_error) word the whole message. Other messages get the given value, unless it
    # may be a secret.
    hidden = problem["type"] == "value_error" or location[-1] in _MAY_HOLD_SECRETS
    return f"{key}: {message}" + ("" if hidden else f" (given: {problem['input']!r})")


def _class_at(kind: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The settings class at a location such as ("stages", 0, "schedule")."""
    for part in location:
        # The number of an entry in a list does not change the class.
        if isinstance(part, int):
            continue
        kind = _classes_in(kind.model_fields[part].annotation)[0]
    return kind


def _classes_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes within an annotation such as `tuple[Stage, ...] | None`."""
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        return [annotation]
    classes: list[type[BaseModel]] = []
    for argument in typing.get_args(annotation):
        classes += _classes_in(argument)
    return classes
