"""The content of a folder of prepared data, by language: figures, a page for people, and a dataset card.

Quality scores and samples are of the held-out documents, which are a random choice (by the hash of their
ids).
"""

import dataclasses
import html
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from babel_jax.config import Source
from babel_jax.data.json_files import read_json
from babel_jax.data.windows.prepared import SETTINGS, PreparedData, open_prepared
from babel_jax.errors import one_line
from babel_jax.files import write_text
from babel_jax.languages import LANGUAGES

PAGE, CARD = "statistics.html", "README.md"
_LONGEST_NAME = 300  # characters
_SAMPLES, _SAMPLE_CHARACTERS, _BINS = 3, 400, 10
# Rows that are no training text: the key in a language's part of the report, and its name for readers.
_FATES = {
    "bad": "unreadable",
    "empty": "empty",
    "duplicates": "duplicates",
    "overlaps": "also held out",
    "reserved": "held out in other languages",
}


@dataclasses.dataclass(frozen=True)
class LanguageStatistics:
    """The figures of one language.

    - kinds: documents, tokens, bytes and windows of each kind
    - dropped: documents by the rule that dropped them
    - sources: the counts of each source
    - scores: the number of documents in each tenth of the quality score, from low to high; empty if rows have
      no score
    - samples: the beginnings of some texts
    """

    code: str
    kinds: dict[str, dict[str, int]]
    rows: int
    heldout_documents: int
    fates: dict[str, int]
    dropped: dict[str, int]
    sources: dict[str, dict[str, Any]]
    tokens_per_character: float | None
    scores: list[int]
    samples: list[str]

    def total(self, name: str) -> int:
        """The sum over all kinds of documents, tokens, bytes or windows."""
        return sum(counts[name] for counts in self.kinds.values())

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 per token. A high value means that the tokenizer suits the language."""
        return self.total("bytes") / max(1, self.total("tokens"))


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


def language_statistics(prepared: PreparedData, code: str) -> LanguageStatistics:
    """The figures of one language."""
    entry, heldout = prepared.report["languages"][code], prepared.heldout(code)
    cleaning: dict[str, dict[str, Any]] = entry.get("cleaning", {})
    dropped = sum((Counter(source["dropped"]) for source in cleaning.values()), Counter[str]())
    kinds = {}
    for kind, counts in entry["kinds"].items():
        kinds[kind] = {name: counts[name] for name in ("documents", "tokens", "bytes", "windows")}

    # The report counts bytes but no characters: characters per byte are those of the held-out text.
    heldout_characters = sum(len(row.text) for row in heldout)
    heldout_bytes = sum(len(row.text.encode()) for row in heldout)
    tokens = sum(counts["tokens"] for counts in kinds.values())
    text_bytes = sum(counts["bytes"] for counts in kinds.values())
    tokens_per_character = None
    if heldout_characters and text_bytes:
        tokens_per_character = tokens / text_bytes * heldout_bytes / heldout_characters

    scores = [row.score for row in heldout if row.score is not None]
    return LanguageStatistics(
        code=code,
        kinds=kinds,
        rows=entry["rows"],
        heldout_documents=entry["heldout_documents"],
        fates={name: entry[name] for name in _FATES},
        dropped=dict(dropped.most_common()),
        sources=cleaning or _sources(entry["sources"]),
        tokens_per_character=tokens_per_character,
        scores=_histogram(scores),
        samples=[_shortened(row.text) for row in heldout[:_SAMPLES]],
    )


def _sources(made_from: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The licence of each source, by the label that reports use."""
    licences = {}
    for entry in made_from:
        # The entry also has the origin of the text, which is no setting.
        settings = {name: value for name, value in entry.items() if name in Source.model_fields}
        source = Source(**settings)
        licences[source.label] = {"licence": source.licence}
    return licences


def page(prepared: PreparedData, languages: Sequence[LanguageStatistics]) -> str:
    """One HTML page without scripts and without network; light or dark as the reader's system is."""
    most_tokens = max((language.total("tokens") for language in languages), default=1)
    rows = []
    for language in languages:
        name = html.escape(LANGUAGES[language.code].name)
        density = language.tokens_per_character
        rows.append(
            (
                f'<a href="#{language.code}">{name}</a>',
                str(LANGUAGES[language.code].resource),
                f"{language.total('documents'):,}",
                f"{language.total('tokens'):,}",
                _bar(language.total("tokens") / most_tokens),
                f"{language.bytes_per_token:.2f}",
                "" if density is None else f"{density:.3f}",
                f"{language.fates['duplicates']:,}",
                f"{sum(language.dropped.values()):,}",
            )
        )
    head = (
        "language",
        "class",
        "documents",
        "tokens",
        "",
        "bytes / token",
        "tokens / character",
        "duplicates",
        "dropped",
    )
    overview = _table(head, rows)

    tokens = sum(language.total("tokens") for language in languages)
    documents = sum(language.total("documents") for language in languages)
    vocab_size = prepared.report["tokenizer"].get("vocab_size", 0)
    about = (
        f"{tokens:,} tokens of {documents:,} documents in {len(languages)} languages, "
        f"in windows of {prepared.seq_len:,} tokens. Tokenizer: {vocab_size:,} entries, "
        f"fingerprint {html.escape(prepared.tokenizer_fingerprint[:16])}."
    )

    title = html.escape(prepared.folder.name)
    sections = "".join(_section(language) for language in languages)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"{_POLICY}\n<title>{title}: statistics</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n<p>{about}</p>\n{overview}\n{sections}</body>\n</html>\n"
    )


def card(prepared: PreparedData, languages: Sequence[LanguageStatistics]) -> str:
    """A dataset card: YAML front matter as hubs read it, then the content of the folder and how it was
    made.
    """
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
    front_lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()]

    licences = set()
    source_lines = []
    for language in languages:
        for name, source in language.sources.items():
            licence = source.get("licence")
            line = f"- {language.code}: {_markdown(name)}"
            if licence:
                licences.add(str(licence))
                line += f" ({_markdown(licence)})"
            source_lines.append(line)
    named = "None was named."
    if licences:
        named = f"Named are: {', '.join(map(_markdown, sorted(licences)))}."

    settings = {
        name: value for name, value in read_json(prepared.folder / SETTINGS).items() if value is not None
    }
    return "\n".join(
        [
            "---",
            *front_lines,
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
            f"The licence of each text is the licence of its source. {named}",
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


def _section(statistics: LanguageStatistics) -> str:
    """The part of the page about one language: kinds, rows left out, sources, quality, samples."""
    language = LANGUAGES[statistics.code]
    quoted = (
        f'<blockquote lang="{statistics.code}" dir="{language.direction}">{html.escape(text)}</blockquote>'
        for text in statistics.samples
    )
    return (
        f'<section id="{statistics.code}"><h2>{html.escape(language.name)}</h2>\n'
        f"<p>{statistics.rows:,} rows read, {statistics.heldout_documents:,} documents held out.</p>\n"
        f"{_kinds_table(statistics)}{_left_out_table(statistics)}"
        f"{_sources_table(statistics)}{_quality_table(statistics)}"
        f"<details><summary>Samples</summary>{''.join(quoted)}</details></section>\n"
    )


def _kinds_table(statistics: LanguageStatistics) -> str:
    rows = []
    for kind, counts in statistics.kinds.items():
        rows.append((html.escape(kind), *(f"{value:,}" for value in counts.values())))
    return _table(("kind", "documents", "tokens", "bytes", "windows"), rows)


def _left_out_table(statistics: LanguageStatistics) -> str:
    """Rows that are no training text, by the reason; reasons without rows are not shown."""
    left_out = {label: statistics.fates[name] for name, label in _FATES.items()}
    left_out |= {f"rule: {rule}": count for rule, count in statistics.dropped.items()}
    rows = []
    for reason, count in left_out.items():
        if count:
            bar = _bar(count / max(1, statistics.rows))
            rows.append((html.escape(reason), f"{count:,}", bar, _percent(count, statistics.rows)))
    if not rows:
        return "<p>Nothing was left out.</p>"
    return _table(("left out", "rows", "", "of all"), rows)


def _sources_table(statistics: LanguageStatistics) -> str:
    """The counts of each source; empty for text that was not refined, which has no counts by source."""
    rows = []
    for name, source in statistics.sources.items():
        if "documents" not in source:
            continue
        duplicates = source.get("duplicates", {})
        dropped = ", ".join(f"{rule} {count:,}" for rule, count in source["dropped"].items())
        rows.append(
            (
                html.escape(name),
                f"{source['documents']:,}",
                f"{source['kept']:,}",
                f"{duplicates.get('exact', 0):,}",
                f"{duplicates.get('near', 0):,}",
                html.escape(dropped),
            )
        )
    if not rows:
        return ""
    head = ("source", "documents", "kept", "exact duplicates", "near duplicates", "dropped")
    return _table(head, rows)


def _quality_table(statistics: LanguageStatistics) -> str:
    """Held-out documents by tenths of the quality score; empty if rows have no score."""
    if not statistics.scores:
        return ""
    most = max(statistics.scores)
    rows = []
    for number, count in enumerate(statistics.scores):
        score = f"{number / _BINS:.1f} to {(number + 1) / _BINS:.1f}"
        rows.append((score, f"{count:,}", _bar(count / most)))
    return "<h3>Quality of held-out documents</h3>" + _table(("score", "documents", ""), rows)


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


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table. The cells must be escaped already."""
    body = ""
    for row in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in row)
        body += f"<tr>{cells}</tr>\n"
    names = "".join(f"<th>{name}</th>" for name in head)
    return f"<table><thead><tr>{names}</tr></thead>\n<tbody>{body}</tbody></table>\n"


def _bar(part: float) -> str:
    return f'<span class="bar" style="width:{max(0.0, min(1.0, part)) * 8:.3f}rem"></span>'


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}%" if whole else ""


def _histogram(scores: Sequence[float]) -> list[int]:
    """The number of scores in each tenth from 0 to 1; scores outside count in the first or last tenth."""
    return np.histogram(np.clip(scores, 0.0, 1.0), _BINS, (0.0, 1.0))[0].tolist() if scores else []


def _shortened(text: str) -> str:
    return text if len(text) <= _SAMPLE_CHARACTERS else text[:_SAMPLE_CHARACTERS] + " …"


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


# The browser loads nothing but the styles within the page, as for the report of a run.
_POLICY = (
    """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""
)
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: end; }
th, td { border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); }
th:first-child, td:first-child { text-align: start; }
td:has(.bar) { text-align: start; }
.bar { display: inline-block; height: .7rem; vertical-align: middle; }
.bar { background: light-dark(#3367b5, #7ba7ea); }
blockquote { white-space: pre-wrap; overflow-wrap: anywhere; margin: 1rem 0; padding: .5rem 1rem;
  border-inline-start: 4px solid light-dark(#3367b5, #7ba7ea); }
"""
