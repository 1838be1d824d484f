"""The text that a vocabulary is learned from."""

from collections.abc import Iterable

from babel_jax.config import BadRows, Source
from babel_jax.data.sources.embedded import corpus_sources, embedded_folder
from babel_jax.data.sources.rows import RowCounts, read_rows
from babel_jax.draws import Purpose, unit_draw
from babel_jax.errors import BadInput


def texts_of(
    sources: Iterable[Source],
    languages: Iterable[str],
    protect: Iterable[str],
    max_bytes: int,
    bad_rows: BadRows = BadRows.REFUSE,
    heldout_fraction: float = 0.0,
) -> dict[str, list[str]]:
    """Texts by language, up to `max_bytes` of each. Protected languages without a source have the package's.

    heldout_fraction: of the rows are left out, those that `survey` holds out to measure the model by.
    Raises BadInput for another language without a source, and for rows that cannot be read, unless they are
    to be skipped.
    """
    by_language: dict[str, list[Source]] = {}
    for source in sources:
        by_language.setdefault(source.language, []).append(source)
    embedded = {source.language: source for source in corpus_sources(embedded_folder())}
    missing = [code for code in languages if code not in by_language]
    missing += [code for code in protect if code not in by_language and code not in embedded]
    if missing:
        raise BadInput(
            f"no text for {', '.join(missing)} to learn new tokens from; there is text for "
            f"{', '.join(sorted(by_language)) or 'no language'}"
        )
    texts: dict[str, list[str]] = {}
    for code in (*languages, *protect):
        chosen = by_language.get(code) or [embedded[code]]
        texts[code] = _first_texts(chosen, max_bytes, bad_rows, heldout_fraction)
    return texts


def _first_texts(
    sources: Iterable[Source], max_bytes: int, bad_rows: BadRows, heldout_fraction: float
) -> list[str]:
    texts: list[str] = []
    remaining = max_bytes
    for source in sources:
        for row in read_rows(source, bad_rows, RowCounts()):
            if remaining <= 0:
                return texts
            if unit_draw(Purpose.HELDOUT, row.id) < heldout_fraction:
                continue
            remaining -= len(row.text.encode())
            texts.append(row.text)
    return texts
