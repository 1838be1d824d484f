"""The page of a folder of prepared data: tokens by language, what was left out and why, sources, quality, and
examples of kept and of dropped text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from babel_jax.data.json_files import read_json
from babel_jax.data.refining.reasons import EXAMPLES, dropped_in_words, losses, reason
from babel_jax.data.windows.language_statistics import BINS, FATES, LanguageStatistics
from babel_jax.data.windows.prepared import SETTINGS, PreparedData
from babel_jax.languages import LANGUAGES, Resource
from babel_jax.pages.charts import Figure, Table, bars
from babel_jax.pages.document import Section, page_text

_SERIES = 2  # the colour of bars
_TITLES = {Resource.HIGH: "High-resource", Resource.LOW: "Low-resource"}


def page(prepared: PreparedData, languages: Sequence[LanguageStatistics]) -> str:
    """One HTML page in the style of a run's report."""
    settings = read_json(prepared.folder / SETTINGS).get("cleaning")
    tokens = sum(language.total("tokens") for language in languages)
    documents = sum(language.total("documents") for language in languages)
    facts = [
        f"{tokens:,} tokens of {documents:,} documents",
        f"{len(languages)} languages",
        f"windows of {prepared.seq_len:,} tokens",
        f"tokenizer of {prepared.report['tokenizer'].get('vocab_size', 0):,} entries",
    ]
    warnings = _warnings(languages, settings)
    sections = [
        Section("tokens", "Tokens", [_tokens_figure(languages)]),
        Section(
            "left-out",
            "Left out",
            _left_out_figures(languages, settings),
            body=warnings,
        ),
        *(_section(language, settings) for language in languages),
    ]
    return page_text("prepared data of babel-jax", prepared.folder.name, facts, sections)


def _grouped(languages: Sequence[LanguageStatistics], row_of: Any) -> dict[str, dict[str, list[float]]]:
    """The values of each language, by resource class."""
    groups: dict[str, dict[str, list[float]]] = {}
    for resource, title in _TITLES.items():
        for language in languages:
            known = LANGUAGES[language.code]
            if known.resource is resource:
                groups.setdefault(title, {})[known.name] = row_of(language)
    return groups


def _tokens_figure(languages: Sequence[LanguageStatistics]) -> Figure:
    groups = _grouped(languages, lambda language: [language.total("tokens")])
    rows = []
    for language in languages:
        density = language.tokens_per_character
        rows.append(
            [
                LANGUAGES[language.code].name,
                f"{language.total('tokens'):,}",
                str(LANGUAGES[language.code].resource),
                f"{language.total('documents'):,}",
                f"{language.heldout_documents:,}",
                f"{language.bytes_per_token:.2f}",
                "" if density is None else f"{density:.3f}",
            ]
        )
    heads = ["Language", "Tokens", "Class", "Documents", "Held out", "Bytes a token", "Tokens a character"]
    return Figure(
        "tokens",
        "Tokens by language",
        "Tokens to train on. Many bytes a token mean that the tokenizer suits the language.",
        [("", "", bars(groups, {"tokens": _SERIES}, "tokens"))],
        Table(heads, rows),
        open_table=True,
    )


def _left_out_figures(
    languages: Sequence[LanguageStatistics], settings: Mapping[str, Any] | None
) -> list[Figure]:
    """The part of each language's rows that is no training text, and the reasons in words."""
    names = {"dropped in cleaning": 1, "duplicates": 3}

    def parts(language: LanguageStatistics) -> list[float]:
        dropped, rows = sum(language.dropped.values()), max(1, language.rows)
        return [100 * dropped / rows, 100 * language.fates["duplicates"] / rows]

    rows = []
    for language in languages:
        for label, count, why in _left_out(language, settings):
            part = f"{100 * count / max(1, language.rows):.2f}%"
            rows.append([LANGUAGES[language.code].name, f"{count:,}", part, label, why])
    if not rows:
        return []
    return [
        Figure(
            "left-out",
            "Rows that are no training text",
            "Part of the rows that were read, by language; the table has each reason with the setting that "
            "decides.",
            [("", "", bars(_grouped(languages, parts), names, "% of the rows"))],
            Table(["Language", "Rows", "Of all", "Reason", "In words"], rows),
            names,
            open_table=True,
        )
    ]


def _left_out(language: LanguageStatistics, settings: Mapping[str, Any] | None) -> list[tuple[str, int, str]]:
    """(reason, rows, words) of the rows of a language that are no training text, those of cleaning first."""
    found = []
    for rule, count in language.dropped.items():
        found.append((f"rule {rule}", count, reason(rule, settings)))
    for name, (label, words) in FATES.items():
        found.append((label, language.fates[name], words))
    return [part for part in found if part[1]]


def _warnings(languages: Sequence[LanguageStatistics], settings: Mapping[str, Any] | None) -> Markup:
    """A box with the sources of which cleaning drops more than half; empty if there are none."""
    lines = []
    for language in languages:
        # Sources that were not cleaned have a licence and no counts.
        cleaned = {name: source for name, source in language.sources.items() if "documents" in source}
        for line in losses(cleaned, settings):
            lines.append(Markup("<li>{}, {}.</li>").format(LANGUAGES[language.code].name, line))
    if not lines:
        return Markup()
    box = '<div class="gate bad"><h3>More than half of a source is dropped</h3><ul>{}</ul></div>'
    return Markup(box).format(Markup().join(lines))


def _section(language: LanguageStatistics, settings: Mapping[str, Any] | None) -> Section:
    """The part of the page about one language: kinds, sources, quality, kept and dropped text."""
    code, known = language.code, LANGUAGES[language.code]
    kinds = []
    for kind, counts in language.kinds.items():
        kinds.append([kind, *(f"{value:,}" for value in counts.values())])
    figures = [
        Figure(
            f"kinds-{code}",
            "Kinds of text",
            f"{language.rows:,} rows read, {language.heldout_documents:,} documents held out.",
            [],
            Table(["Kind", "Documents", "Tokens", "Bytes", "Windows"], kinds),
        )
    ]
    # Only rows with a quality score have this figure.
    if language.scores:
        tenths, rows = {}, []
        for number, count in enumerate(language.scores):
            label = f"{number / BINS:.1f} to {(number + 1) / BINS:.1f}"
            tenths[label] = [count]
            rows.append([label, f"{count:,}"])
        figures.append(
            Figure(
                f"quality-{code}",
                "Quality",
                "Held-out documents by tenths of the quality score.",
                [("", "", bars({"Score": tenths}, {"documents": _SERIES}, "documents"))],
                Table(["Score", "Documents"], rows),
            )
        )
    sources = []
    for name, source in language.sources.items():
        if "documents" in source:
            numbers = [source["documents"], source["kept"], *_duplicates(source)]
            words = dropped_in_words(source["dropped"], settings)
            sources.append([name, *(f"{count:,}" for count in numbers), words])
    if sources:
        heads = ["Source", "Documents", "Kept", "Exact duplicates", "Near duplicates", "Dropped"]
        sources_figure = Figure(
            f"sources-{code}", "Sources", "Documents by source.", [], Table(heads, sources), open_table=True
        )
        figures.append(sources_figure)

    text = [_texts("Samples of held-out text", language.code, language.samples)]
    for rule, examples in _examples(language).items():
        title = f"Dropped: {reason(rule, settings)} ({language.dropped.get(rule, len(examples)):,} documents)"
        text.append(_texts(title, code, examples))
    return Section(code, known.name, figures, body=Markup().join(text))


def _duplicates(source: Mapping[str, Any]) -> list[int]:
    duplicates = source.get("duplicates", {})
    return [duplicates.get("exact", 0), duplicates.get("near", 0)]


def _examples(language: LanguageStatistics) -> dict[str, list[str]]:
    """Some dropped documents by rule, over all sources; in the order of the rules that drop most."""
    examples: dict[str, list[str]] = {rule: [] for rule in language.dropped}
    for source in language.sources.values():
        for rule, texts in source.get("examples", {}).items():
            examples.setdefault(rule, []).extend(texts)
    return {rule: texts[:EXAMPLES] for rule, texts in examples.items() if texts}


def _texts(title: str, code: str, texts: Sequence[str]) -> Markup:
    """Texts that a click shows."""
    quote = Markup('<blockquote lang="{}" dir="{}">{}</blockquote>')
    quoted = [quote.format(LANGUAGES[code].tag, LANGUAGES[code].direction, text) for text in texts]
    if not quoted:
        return Markup()
    return Markup("<details><summary>{}</summary>{}</details>").format(title, Markup().join(quoted))
