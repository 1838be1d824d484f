"""The report on a tokenizer: table, JSON, plot and page of what it costs each language."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from babel_jax.config import BadRows
from babel_jax.data.sources.embedded import corpus_sources, embedded_folder
from babel_jax.data.sources.rows import Row, RowCounts, read_rows
from babel_jax.errors import BadInput
from babel_jax.files import make_folder, write_text
from babel_jax.languages import LANGUAGES, language
from babel_jax.model_folders.folder import model_name
from babel_jax.plots import saved_figure
from babel_jax.vocabulary.cost import Cost, VocabularyCost, vocabulary_cost
from babel_jax.vocabulary.editable import open_vocabulary
from babel_jax.vocabulary.marks import splits_marks
from babel_jax.vocabulary.report_page import cost_page

HEADS = (
    "language", "tokens per byte", "per character", "per sentence, English = 1", "single bytes, %",
    "bytes in 4,096 tokens", "= tokens of English",
)  # fmt: skip


def tokenizer_report(
    model: Path | str, data: Path | str | None, languages: Sequence[str] | None, out: Path
) -> dict[str, Any]:
    """Writes tokenizer.html, .png, .md and .json into `out`; returns the figures and a summary.

    data: a folder of xx.jsonl text; None for the package's. Rows of two languages with one id are
    translations of each other. Raises BadInput for a tokenizer that cannot be read, and for a language
    without text.
    """
    vocabulary = open_vocabulary(model)
    rows = _rows(data, languages)
    cost = vocabulary_cost(vocabulary, rows, splits_marks(vocabulary.description))
    if not cost.languages:
        raise BadInput(f"{data}: no text")
    make_folder(out)
    name = model_name(vocabulary.folder)
    # The same rows for Markdown and for the page.
    table = [row_of(code, entry) for code, entry in cost.languages.items()]
    lines = [f"| {' | '.join(HEADS)} |", "| --- |" + " ---: |" * (len(HEADS) - 1)]
    lines += [f"| {' | '.join(cells)} |" for cells in table]
    text = "\n".join([f"# The tokenizer of {name}", "", *facts(cost), "", *lines])
    _plot(out / "tokenizer.png", cost)
    write_text(out / "tokenizer.html", cost_page(name, cost, HEADS, table, facts(cost)))
    write_text(out / "tokenizer.md", text + "\n")
    result = {
        "model": str(model),
        "kind": str(cost.kind),
        "entries": cost.entries,
        "added_tokens": cost.added,
        "unused": cost.unused,
        "unreachable": {
            "by_merges": len(cost.dead.by_merges),
            "by_splitting": len(cost.dead.by_splitting),
            "reusable": len(cost.dead.dead),
        },
        "splits_marks": cost.splits_marks,
        "languages": {code: dataclasses.asdict(entry) for code, entry in cost.languages.items()},
    }
    write_text(out / "tokenizer.json", json.dumps(result, indent=2) + "\n")
    return {**result, "out": str(out), "summary": f"{text}\n\nPage: {out / 'tokenizer.html'}"}


def extension_summary(written: Mapping[str, Any]) -> str:
    """The result of `extend_folder` in words and a table."""
    figures = written["vocabulary"]
    revived = f", {figures['revived']:,} old tokens that no text gave before" if figures["revived"] else ""
    lines = [
        f"{written['path']}: {written['new_tokens']:,} new tokens{revived}; {written['vocab_size']:,} rows.",
        "",
        "| language | new tokens | tokens per byte before | after | words unchanged, % |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for code, values in figures["languages"].items():
        lines.append(
            f"| {LANGUAGES[code].name} | {figures['tokens_by_language'].get(code, 0):,} | "
            f"{values['tokens_per_byte_before']:.3f} | {values['tokens_per_byte_after']:.3f} | "
            f"{100 * values['unchanged_words']:.2f} |"
        )
    return "\n".join(lines)


def row_of(code: str, cost: Cost) -> list[str]:
    """The cells of a language."""
    return [
        LANGUAGES[code].name,
        f"{cost.tokens_per_byte:.3f}",
        f"{cost.tokens_per_character:.3f}",
        "" if cost.relative is None else f"{cost.relative:.2f}",
        f"{100 * cost.single_byte:.1f}",
        f"{cost.window_bytes:,.0f}",
        "" if cost.window_english is None else f"{cost.window_english:,.0f}",
    ]


def facts(cost: VocabularyCost) -> list[str]:
    """Sentences about the vocabulary as a whole."""
    dead = cost.dead
    found = [
        f"{cost.kind}: {cost.entries:,} entries and {cost.added:,} added tokens. The text uses "
        f"{cost.entries - cost.unused:,} of the entries.",
        f"{len(dead.by_merges) + len(dead.by_splitting):,} entries cannot occur in any text: "
        f"{len(dead.by_merges):,} that no merges make, {len(dead.by_splitting):,} that are always split "
        f"before. {len(dead.dead):,} of them may be reused.",
    ]
    if cost.splits_marks:
        found.append(
            "Words end at combining marks (vowel signs of Burmese, Tamil, Hindi, Bengali, Thai): no token is "
            "longer than the letters between two marks. `babel tokenizer extend --marks join` changes this."
        )
    return found


def _rows(data: Path | str | None, languages: Sequence[str] | None) -> dict[str, list[Row]]:
    sources = {source.language: source for source in corpus_sources(data or embedded_folder())}
    wanted = [language(code).code for code in languages] if languages else list(sources)
    missing = [code for code in wanted if code not in sources]
    if missing:
        raise BadInput(f"{data or 'the embedded corpus'}: no text for {', '.join(missing)}")
    rows = {}
    for code in wanted:
        rows[code] = list(read_rows(sources[code], BadRows.REFUSE, RowCounts()))
    return rows


def _plot(path: Path, cost: VocabularyCost) -> None:
    ordered = sorted(cost.languages.items(), key=lambda item: _height(item[1]))
    with saved_figure(path, 1, (7.5, 1.2 + 0.24 * len(ordered))) as axes:
        has_relative = any(entry.relative for _, entry in ordered)
        axes.barh(
            [LANGUAGES[code].name for code, _ in ordered], [_height(entry) for _, entry in ordered], 0.7
        )
        axes.set_title("Tokens of the same text, English = 1" if has_relative else "Tokens per byte")
        axes.grid(visible=False, axis="y")


def _height(cost: Cost) -> float:
    return cost.tokens_per_byte if cost.relative is None else cost.relative
