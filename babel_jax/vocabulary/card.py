"""The entries about a larger vocabulary in config.json and in the model card."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from babel_jax import __version__
from babel_jax.errors import BadInput
from babel_jax.languages import LANGUAGES
from babel_jax.model_folders.folder import model_name
from babel_jax.model_folders.model_card import markdown_code
from babel_jax.vocabulary.extension import Extension
from babel_jax.vocabulary.growth import Growth

PROVENANCE = "babel_vocabulary"
TAG = "vocabulary-extension"
UNTRAINED = (
    "## Intended use and limits\n\nThe rows of the new tokens have not been trained. The model is meant to "
    "be trained on (`babel train`)."
)


def extended_hf_config(
    hf: Mapping[str, Any], extension: Extension, growth: Growth, source_name: str
) -> dict[str, Any]:
    """The config.json of the larger model, with what was done under `babel_vocabulary`."""
    settings, figures = extension.settings, extension.figures
    entry = {
        "babel_jax": __version__,
        "source": source_name,
        "source_vocab_size": growth.old_rows,
        "tokens": len(extension.rows),
        "tokens_by_language": figures["tokens_by_language"],
        "new_rows": _runs([row.id for row in extension.rows]),
        "tokenizer_size": extension.size,
        "shares": str(settings.shares),
        "protect": list(settings.protect),
        "marks": str(settings.marks),
        "reused_ids": figures["reused_ids"],
        "init": str(settings.init),
        "languages": figures["languages"],
        **({"donor": model_name(Path(settings.donor))} if settings.donor else {}),
        **({"before": hf[PROVENANCE]} if PROVENANCE in hf else {}),
    }
    return {**hf, "vocab_size": growth.rows, PROVENANCE: entry}


def new_rows_of(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids of the rows that the last extension of the vocabulary added, from config.json; empty without.

    Raises BadInput if `babel_vocabulary` has another form.
    """
    if PROVENANCE not in hf:
        return ()
    entry = hf[PROVENANCE]
    runs = entry.get("new_rows") if isinstance(entry, dict) else None
    size = hf.get("vocab_size")
    rows: list[int] = []
    for run in runs if isinstance(runs, list) else [None]:
        # `type(end) is int`, because JSON's true and false are ints for `isinstance`.
        ends = run if isinstance(run, list) and all(type(end) is int for end in run) else []
        if len(ends) != 2 or not isinstance(size, int) or not 0 <= ends[0] < ends[1] <= size:
            raise BadInput(
                f"config.json: {PROVENANCE}.new_rows is {str(runs)[:80]}; a list of [start, stop] is needed"
            )
        rows += range(ends[0], ends[1])
    return tuple(rows)


def vocabulary_section(hf_config: Mapping[str, Any]) -> str:
    """Markdown: what each extension of the vocabulary did; empty if there was none."""
    parts: list[str] = []
    entry = hf_config.get(PROVENANCE)
    while isinstance(entry, dict):
        # The config.json may be from elsewhere: an entry without these figures is left out.
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            parts.append(_section_of(entry))
        entry = entry.get("before")
    return "\n\n".join(["## Vocabulary", *parts[::-1]]) if parts else ""


def _section_of(entry: Mapping[str, Any]) -> str:
    added = f"{markdown_code(entry['source'])} got {entry['tokens']:,} new tokens"
    lines = [f"{added}; their rows began as: {markdown_code(entry['init'])}.", ""]
    lines += [
        "| language | new tokens | tokens per byte before | after |",
        "| --- | ---: | ---: | ---: |",
    ]
    for code, figures in entry["languages"].items():
        name = LANGUAGES[code].name if code in LANGUAGES else markdown_code(code)
        lines.append(
            f"| {name} | {entry['tokens_by_language'].get(code, 0):,} | "
            f"{figures['tokens_per_byte_before']:.3f} | {figures['tokens_per_byte_after']:.3f} |"
        )
    return "\n".join(lines)


def _runs(ids: Sequence[int]) -> list[list[int]]:
    """Ids as runs [first, last + 1]."""
    runs: list[list[int]] = []
    for number in sorted(ids):
        if runs and runs[-1][1] == number:
            runs[-1][1] = number + 1
        else:
            runs.append([number, number + 1])
    return runs
