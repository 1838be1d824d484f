"""The catalogue: the corpora of the report and newer ones, with the location of each and its configurations
by language (catalogue.toml): for Babel's 25 as they were seen, for others by rule.
"""

import difflib
import functools
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from babel_jax.languages import in_order, language


@functools.cache
def catalogue() -> dict[str, dict[str, Any]]:
    """The entries by name; catalogue.toml describes their keys."""
    entries = tomllib.loads((Path(__file__).parent / "catalogue.toml").read_text(encoding="utf-8"))
    for entry in entries.values():
        # The names of another corpus.
        if isinstance(entry["configurations"], str):
            names = entries[entry["configurations"]]["configurations"]
            entry["configurations"] = {
                code: name for code, name in names.items() if code not in entry["absent"]
            }
    return entries


def expand(given: Any, valid: Collection[str]) -> list[Any]:
    """The sources that an entry of data.sources means: itself, or the sources of the catalogue that it names.

    `{"catalogue": NAME, "language": "sw"}` is the corpus in that language; without `language`, in all
    languages that it has. Other keys, of those that are `valid`, replace those of the catalogue. Raises
    ValueError for an unknown name or key, and for a language that the corpus does not have.
    """
    if not isinstance(given, dict) or "catalogue" not in given:
        return [given]
    name = given["catalogue"]
    if name not in catalogue():
        raise ValueError(f"no corpus {name!r} in the catalogue; it has {', '.join(catalogue())}")
    entry = catalogue()[name]
    parameters = entry.get("parameters", {})
    keys = sorted({*valid, *parameters, "catalogue"})
    for key in given:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{name}: unknown key {key}; {hint}valid keys: {', '.join(keys)}")
    configurations = entry["configurations"]
    wanted = in_order(configurations)
    if "language" in given:
        wanted = [language(given["language"]).code]
    missing = [code for code in wanted if code not in configurations]
    # Languages beyond the table: a name by the corpus's rule, except where text is known to be missing.
    if (
        missing
        and missing[0] not in entry["absent"]
        and (by_rule := name_by_rule(entry, missing[0])) is not None
    ):
        configurations, missing = {missing[0]: by_rule}, []
    if missing:
        others = []
        for other, one in catalogue().items():
            is_named = missing[0] in one["configurations"]
            if is_named or (missing[0] not in one["absent"] and name_by_rule(one, missing[0]) is not None):
                others.append(other)
        raise ValueError(
            f"{name} has no text in {', '.join(missing)}; it has {' '.join(configurations)}; corpora with "
            f"{missing[0]}: {', '.join(others) or 'none'}"
        )
    # Parameters fill blanks in the names of files. All other keys replace keys of the catalogue.
    filled = {key: str(given.get(key, default)) for key, default in parameters.items()}
    settings = {
        key: value
        for key, value in given.items()
        if key not in ("catalogue", "language") and key not in parameters
    }
    sources = []
    for code in wanted:
        # One configuration of the corpus, or a list of them.
        of_language = configurations[code]
        for configuration in [of_language] if isinstance(of_language, str) else of_language:
            words = {**filled, "configuration": configuration}
            source = {key: _filled(value, words) for key, value in entry["source"].items()}
            about = {"name": name, "licence": entry["licence"]}
            sources.append({**about, **source, **settings, "language": code})
    return sources


def name_by_rule(entry: Mapping[str, Any], code: str) -> str | None:
    """The name of a language in a corpus by its rule `others`; None if the corpus has no rule, or its rule
    names no second scripts. Whether there is text, the listing of the corpus says.
    """
    one = language(code)
    match entry.get("others"):
        case "code" if "_" not in one.code:
            return one.iso639_1 or one.iso639_3
        case "name":
            # FLORES+ adds the variety to some names.
            return "_".join(one.flores_plus.split("_")[:2])
    return None


def _filled(value: Any, words: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, words) for key, inner in value.items()}
    if isinstance(value, str):
        for name, word in words.items():
            value = value.replace(f"{{{name}}}", word)
    return value
