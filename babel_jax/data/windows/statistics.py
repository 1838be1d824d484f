"""What a folder of prepared data holds, by language: figures, a page for people, and a dataset card.

Quality and samples are those of the held-out documents, which the hash of their ids chose among all.
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
# What the rest of the rows became, by its key in a language's part of the report.
_FATES = {
    "bad": "unreadable",
    "empty": "empty",
    "duplicates": "duplicates",
    "overlaps": "also held out",
    "reserved": "held out in other languages",
}


@dataclasses.dataclass(frozen=True)
class LanguageStatistics:
    """One language. `kinds` has documents, tokens, bytes and windows of each; `dropped` counts documents by
    rule, `sources` what each source gave; `scores` are documents by tenths of the quality score, empty where
    rows had none; `samples` are beginnings of texts."""

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
        """Documents, tokens, bytes or windows of all kinds together."""
        return sum(counts[name] for counts in self.kinds.values())

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 for each token: high where the tokenizer suits the language."""
        return self.total("bytes") / max(1, self.total("tokens"))


def write_statistics(folder: Path | str) -> dict[str, Any]:
    """Writes statistics.html and README.md (a dataset card) into a folder of prepared data.

    Returns {"page", "card", "documents", "tokens", "languages": {code: fields of LanguageStatistics without
    samples}, "summary"}.
    """
    prepared = open_prepared(folder)
    found = [language_statistics(prepared, code) for code in prepared.languages]
    write_text(prepared.folder / PAGE, page(prepared, found))
    write_text(prepared.folder / CARD, card(prepared, found))
    languages = {}
    for own in found:
        fields = {
            name: value for name, value in dataclasses.asdict(own).items() if name not in ("code", "samples")
        }
        languages[own.code] = {**fields, "bytes_per_token": own.bytes_per_token}
    return {
        "page": str(prepared.folder / PAGE),
        "card": str(prepared.folder / CARD),
        **{name: sum(own.total(name) for own in found) for name in ("documents", "tokens")},
        "languages": languages,
        "summary": "\n".join(
            [_markdown_table(found), "", f"Page: {prepared.folder / PAGE}", f"Card: {prepared.folder / CARD}"]
        ),
    }


def language_statistics(prepared: PreparedData, code: str) -> LanguageStatistics:
    """The figures of one language."""
    entry, heldout = prepared.report["languages"][code], prepared.heldout(code)
    cleaning: dict[str, dict[str, Any]] = entry.get("cleaning", {})
    dropped = sum((Counter(source["dropped"]) for source in cleaning.values()), Counter[str]())
    # Tokens for each character as on the held-out text, from bytes: the report counts no characters.
    characters, size = sum(len(row.text) for row in heldout), sum(len(row.text.encode()) for row in heldout)
    tokens, read = (sum(counts[name] for counts in entry["kinds"].values()) for name in ("tokens", "bytes"))
    scores = [row.score for row in heldout if row.score is not None]
    return LanguageStatistics(
        code=code,
        kinds={
            kind: {name: counts[name] for name in ("documents", "tokens", "bytes", "windows")}
            for kind, counts in entry["kinds"].items()
        },
        rows=entry["rows"],
        heldout_documents=entry["heldout_documents"],
        fates={name: entry[name] for name in _FATES},
        dropped=dict(dropped.most_common()),
        sources=cleaning or _sources(entry["sources"]),
        tokens_per_character=tokens / read * size / characters if characters and read else None,
        scores=_histogram(scores),
        samples=[_shortened(row.text) for row in heldout[:_SAMPLES]],
    )


def _sources(made_from: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The licence of each source, by what reports call it."""
    sources = [
        Source(**{name: value for name, value in described.items() if name in Source.model_fields})
        for described in made_from
    ]
    return {source.label: {"licence": source.licence} for source in sources}


def page(prepared: PreparedData, languages: Sequence[LanguageStatistics]) -> str:
    """One HTML page that needs nothing else: no scripts, no network; light or dark as the reader has it."""
    most = max((own.total("tokens") for own in languages), default=1)
    overview = _table(
        (
            "language",
            "class",
            "documents",
            "tokens",
            "",
            "bytes / token",
            "tokens / character",
            "duplicates",
            "dropped",
        ),
        (
            (
                f'<a href="#{own.code}">{html.escape(LANGUAGES[own.code].name)}</a>',
                str(LANGUAGES[own.code].resource),
                f"{own.total('documents'):,}",
                f"{own.total('tokens'):,}",
                _bar(own.total("tokens") / most),
                f"{own.bytes_per_token:.2f}",
                "" if own.tokens_per_character is None else f"{own.tokens_per_character:.3f}",
                f"{own.fates['duplicates']:,}",
                f"{sum(own.dropped.values()):,}",
            )
            for own in languages
        ),
    )
    tokenizer = prepared.report["tokenizer"]
    about = (
        f"{sum(own.total('tokens') for own in languages):,} tokens of "
        f"{sum(own.total('documents') for own in languages):,} documents in "
        f"{len(languages)} languages, in windows of {prepared.seq_len:,} tokens. Tokenizer: "
        f"{tokenizer.get('vocab_size', 0):,} entries, "
        f"fingerprint {html.escape(prepared.tokenizer_fingerprint[:16])}."
    )
    title = html.escape(prepared.folder.name)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{_POLICY}\n<title>{title}: '
        "statistics</title>\n"
        '<meta name="viewport" content="width=device-width, '
        f'initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        f"<h1>{title}</h1>\n<p>{about}</p>\n{overview}\n{''.join(map(_section, languages))}</body>\n</html>\n"
    )


def card(prepared: PreparedData, languages: Sequence[LanguageStatistics]) -> str:
    """A dataset card: YAML front matter as hubs read it, then what the data are and how they were made."""
    documents = sum(own.total("documents") for own in languages)
    licences = sorted(
        {
            str(source["licence"])
            for own in languages
            for source in own.sources.values()
            if source.get("licence")
        }
    )
    front = {
        "pretty_name": prepared.folder.name,
        "language": [own.code for own in languages],
        "license": "other",
        "task_categories": ["text-generation"],
        "size_categories": [_size_category(documents)],
        "tags": ["babel-jax", "multilingual", "pretraining"],
    }
    settings = {
        name: value for name, value in read_json(prepared.folder / SETTINGS).items() if value is not None
    }
    return "\n".join(
        [
            "---",
            *(
                f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()
            ),  # JSON is YAML
            "---",
            "",
            f"# {_markdown(prepared.folder.name)}",
            "",
            (
                f"Packed windows of {prepared.seq_len:,} tokens for training: a TFDS dataset (ArrayRecord) "
                "`windows/LANGUAGE-KIND` for each"
            ),
            (
                "language and kind of text, made by `babel prepare`. Figures, drops by rule and samples "
                "are in `statistics.html`."
            ),
            "",
            _markdown_table(languages),
            "",
            "## Sources and licences",
            "",
            "The licence of each text is its source's."
            + (f" Named are: {', '.join(map(_markdown, licences))}." if licences else " None was named."),
            "",
            *(
                f"- {own.code}: {_markdown(name)}"
                + (f" ({_markdown(source['licence'])})" if source.get("licence") else "")
                for own in languages
                for name, source in own.sources.items()
            ),
            "",
            "## Made with",
            "",
            "```json",
            json.dumps(settings, indent=2, ensure_ascii=False),
            "```",
            "",
        ]
    )


def _section(own: LanguageStatistics) -> str:
    language = LANGUAGES[own.code]
    kinds = _table(
        ("kind", "documents", "tokens", "bytes", "windows"),
        (
            (html.escape(kind), *(f"{value:,}" for value in counts.values()))
            for kind, counts in own.kinds.items()
        ),
    )
    gone = {
        **{label: own.fates[name] for name, label in _FATES.items()},
        **{f"rule: {rule}": count for rule, count in own.dropped.items()},
    }
    gone = {name: count for name, count in gone.items() if count}
    rows = [
        (html.escape(name), f"{count:,}", _bar(count / max(1, own.rows)), _percent(count, own.rows))
        for name, count in gone.items()
    ]
    left_out = _table(("left out", "rows", "", "of all"), rows) if rows else "<p>Nothing was left out.</p>"
    sources = _table(
        ("source", "documents", "kept", "exact duplicates", "near duplicates", "dropped"),
        (
            (
                html.escape(name),
                *(f"{source[key]:,}" for key in ("documents", "kept")),
                *(f"{source.get('duplicates', {}).get(key, 0):,}" for key in ("exact", "near")),
                html.escape(", ".join(f"{rule} {count:,}" for rule, count in source["dropped"].items())),
            )
            for name, source in own.sources.items()
            if "documents" in source
        ),
    )
    has_counts = any("documents" in source for source in own.sources.values())
    quality = ""
    if own.scores:
        most = max(own.scores)
        bins = (
            (f"{place / _BINS:.1f} to {(place + 1) / _BINS:.1f}", f"{count:,}", _bar(count / most))
            for place, count in enumerate(own.scores)
        )
        quality = "<h3>Quality of held-out documents</h3>" + _table(("score", "documents", ""), bins)
    quoted = (
        f'<blockquote lang="{own.code}" dir="{language.direction}">{html.escape(text)}</blockquote>'
        for text in own.samples
    )
    return (
        f'<section id="{own.code}"><h2>{html.escape(language.name)}</h2>\n<p>{own.rows:,} rows read, '
        f"{own.heldout_documents:,} "
        f"documents held out.</p>\n{kinds}{left_out}{sources if has_counts else ''}{quality}"
        f"<details><summary>Samples</summary>{''.join(quoted)}</details></section>\n"
    )


def _markdown_table(languages: Sequence[LanguageStatistics]) -> str:
    lines = [
        "| language | documents | tokens | bytes / token | duplicates | dropped | kinds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [
        f"| {LANGUAGES[own.code].name} ({own.code}) | {own.total('documents'):,} | {own.total('tokens'):,} "
        f"| {own.bytes_per_token:.2f} "
        f"| {own.fates['duplicates']:,} | {sum(own.dropped.values()):,} | {', '.join(own.kinds)} |"
        for own in languages
    ]
    return "\n".join(lines)


def _markdown(text: object) -> str:
    """A name that somebody else has given, as text of Markdown and nothing else: no link, no image, no HTML,
    one line.
    """
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", one_line(text, _LONGEST_NAME))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    names = "".join(f"<th>{name}</th>" for name in head)
    return f"<table><thead><tr>{names}</tr></thead>\n<tbody>{body}</tbody></table>\n"


def _bar(part: float) -> str:
    return f'<span class="bar" style="width:{max(0.0, min(1.0, part)) * 8:.3f}rem"></span>'


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}%" if whole else ""


def _histogram(scores: Sequence[float]) -> list[int]:
    """Scores from 0 to 1 by tenths; others count in the first and last."""
    return np.histogram(np.clip(scores, 0.0, 1.0), _BINS, (0.0, 1.0))[0].tolist() if scores else []


def _shortened(text: str) -> str:
    return text if len(text) <= _SAMPLE_CHARACTERS else text[:_SAMPLE_CHARACTERS] + " …"


def _size_category(documents: int) -> str:
    """The Hugging Face hub's names of sizes."""
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


# The page has styles of its own and nothing else, as the report of a run.
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
