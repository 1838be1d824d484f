"""The content of a folder of prepared data, by language: figures, a page for people, and a dataset card."""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from babel_jax.data.json_files import read_json
from babel_jax.data.windows.language_statistics import LanguageStatistics, language_statistics
from babel_jax.data.windows.prepared import SETTINGS, PreparedData, open_prepared
from babel_jax.data.windows.statistics_page import page
from babel_jax.errors import one_line
from babel_jax.files import write_text
from babel_jax.languages import LANGUAGES

PAGE, CARD = "statistics.html", "README.md"
_LONGEST_NAME = 300  # characters


def write_statistics(folder: Path | str) -> dict[str, Any]:
    """Writes statistics.html and README.md (a dataset card) into a folder of prepared data.

    Returns {"page", "card", "documents", "tokens", "languages": {code: fields of LanguageStatistics without
    samples}, "summary"}.
    """
    prepared = open_prepared(folder)
    statistics = [language_statistics(prepared, code) for code in prepared.languages]
    page_path, card_path = prepared.folder / PAGE, prepared.folder / CARD
    write_text(page_path, page(prepared, statistics))
    write_text(card_path, card(prepared, statistics))

    # The fields for --json; samples of text are on the page alone.
    languages = {}
    for language in statistics:
        fields = dataclasses.asdict(language)
        del fields["code"], fields["samples"]
        for source in fields["sources"].values():
            source.pop("examples", None)
        languages[language.code] = {**fields, "bytes_per_token": language.bytes_per_token}

    summary = [_markdown_table(statistics), "", f"Page: {page_path}", f"Card: {card_path}"]
    return {
        "page": str(page_path),
        "card": str(card_path),
        "documents": sum(language.total("documents") for language in statistics),
        "tokens": sum(language.total("tokens") for language in statistics),
        "languages": languages,
        "summary": "\n".join(summary),
    }


def card(prepared: PreparedData, languages: Sequence[LanguageStatistics]) -> str:
    """A dataset card: YAML front matter as hubs read it, then the content of the folder and how it was
    made.
    """
    source_lines, licences = _sources(languages)
    settings = {}
    for name, value in read_json(prepared.folder / SETTINGS).items():
        if value is not None:
            settings[name] = value
    return "\n".join(
        [
            "---",
            *_front_matter(prepared, languages),
            "---",
            "",
            f"# {_markdown(prepared.folder.name)}",
            "",
            f"Packed windows of {prepared.seq_len:,} tokens for training: a TFDS dataset (ArrayRecord)",
            "`windows/LANGUAGE-KIND` for each language and kind of text, made by `babel prepare`.",
            "`statistics.html` has figures, documents dropped by each rule, and samples.",
            "",
            _markdown_table(languages),
            "",
            "## Sources and licences",
            "",
            f"The licence of each text is the licence of its source. {licences}",
            "",
            *source_lines,
            "",
            "## Made with",
            "",
            "```json",
            json.dumps(settings, indent=2, ensure_ascii=False),
            "```",
            "",
        ]
    )


def _front_matter(prepared: PreparedData, languages: Sequence[LanguageStatistics]) -> list[str]:
    """The lines of the card's YAML."""
    documents = sum(language.total("documents") for language in languages)
    front = {
        "pretty_name": prepared.folder.name,
        "language": [language.code for language in languages],
        "license": "other",
        "task_categories": ["text-generation"],
        "size_categories": [_size_category(documents)],
        "tags": ["babel-jax", "multilingual", "pretraining"],
    }
    # Every JSON value is a YAML value.
    return [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()]


def _sources(languages: Sequence[LanguageStatistics]) -> tuple[list[str], str]:
    """A line for each source, and a sentence on the licences that the settings name."""
    lines, licences = [], set()
    for language in languages:
        for name, source in language.sources.items():
            licence = source.get("licence")
            line = f"- {language.code}: {_markdown(name)}"
            if licence:
                licences.add(str(licence))
                line += f" ({_markdown(licence)})"
            lines.append(line)
    if not licences:
        return lines, "None was named."
    return lines, f"Named are: {', '.join(map(_markdown, sorted(licences)))}."


def _markdown_table(languages: Sequence[LanguageStatistics]) -> str:
    lines = [
        "| language | documents | tokens | bytes / token | duplicates | dropped | kinds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for language in languages:
        cells = (
            f"{LANGUAGES[language.code].name} ({language.code})",
            f"{language.total('documents'):,}",
            f"{language.total('tokens'):,}",
            f"{language.bytes_per_token:.2f}",
            f"{language.fates['duplicates']:,}",
            f"{sum(language.dropped.values()):,}",
            ", ".join(language.kinds),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _markdown(text: object) -> str:
    """A name from a stranger, escaped as plain text of one line: no link, no image, no HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", one_line(text, _LONGEST_NAME))


def _size_category(documents: int) -> str:
    """The size of a dataset by the names of the Hugging Face hub, such as "10K<n<100K"."""
    names: Mapping[int, str] = {
        10**3: "1K",
        10**4: "10K",
        10**5: "100K",
        10**6: "1M",
        10**7: "10M",
        10**8: "100M",
        10**9: "1B",
    }
    edges = list(names)
    if documents < edges[0]:
        return "n<1K"
    for low, high in itertools.pairwise(edges):
        if documents < high:
            return f"{names[low]}<n<{names[high]}"
    return "n>1B"
