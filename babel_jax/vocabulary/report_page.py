"""The page of a report on a tokenizer."""

from collections.abc import Sequence

from babel_jax.languages import LANGUAGES
from babel_jax.pages.charts import Figure, Table, bars
from babel_jax.pages.document import Section, Tile, page_text
from babel_jax.vocabulary.cost import Cost, VocabularyCost


def cost_page(
    model: str,
    cost: VocabularyCost,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    facts: Sequence[str],
) -> str:
    """One HTML page. heads, rows: the table of all languages. facts: sentences about the vocabulary."""
    figures = []
    parallel = {code: entry for code, entry in cost.languages.items() if entry.relative is not None}
    if len(parallel) > 1:
        figures.append(
            _figure(
                "relative",
                "Tokens of the same text",
                "Rows that English has too, under the same id; English is 1.",
                {code: entry.relative or 0.0 for code, entry in parallel.items()},
                Table(heads, rows),
            )
        )
    figures.append(
        _figure(
            "bytes",
            "Tokens per byte",
            "Scripts with three bytes for a character have fewer tokens per byte at the same number of "
            "characters.",
            {code: entry.tokens_per_byte for code, entry in cost.languages.items()},
            Table(heads, rows),
        )
    )
    worst = max(cost.languages.items(), key=lambda item: _cost_of(item[1]))
    tiles = [
        Tile("Entries", f"{cost.entries:,}", f"{cost.kind}, and {cost.added:,} added tokens"),
        Tile(
            "Never given by any text",
            f"{len(cost.dead.by_merges) + len(cost.dead.by_splitting):,}",
            "entries",
        ),
        Tile("Highest cost", LANGUAGES[worst[0]].name, f"{_cost_of(worst[1]):.2f}"),
    ]
    section = Section("cost", "What each language pays", figures, " ".join(facts), tiles)
    return page_text("Tokenizer", model, [f"{len(cost.languages)} languages"], [section])


def _cost_of(cost: Cost) -> float:
    return cost.tokens_per_byte if cost.relative is None else cost.relative


def _figure(name: str, title: str, words: str, values: dict[str, float], table: Table) -> Figure:
    ordered = sorted(values.items(), key=lambda item: -item[1])
    groups = {"": {LANGUAGES[code].name: [value] for code, value in ordered}}
    return Figure(name, title, words, [("", "", bars(groups, {title: 3}, "tokens"))], table)
