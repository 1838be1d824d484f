"""The text that a vocabulary is learned from."""

from collections.abc import Iterable

from babel_jax.config import BadRows, Source
from babel_jax.data.sources.embedded import corpus_sources, embedded_folder
from babel_jax.data.sources.rows import RowCounts, read_rows
from babel_jax.errors import BadInput


def texts_of(
    sources: Iterable[Source], languages: Iterable[str], protect: Iterable[str], max_bytes: int
) -> dict[str, list[str]]:
    """Texts by language, up to `max_bytes` of each; protected ones without
    a source have the package's.

    Raises BadInput for another language without a source.
    """
    by_language: dict[str, list[Source]] = {}
    for source in sources:
        by_language.setdefault(source.language, []).append(source)
    embedded = {source.language: source for source in corpus_sources(embedded_folder())}
    missing = [code for code in languages if code not in by_language]
    if missing:
        raise BadInput(
            f"no text for {', '.join(missing)} to learn new tokens from; there is text for "
            f"{', '.join(sorted(by_language)) or 'no language'}"
        )
    texts: dict[str, list[str]] = {}
    for code in (*languages, *protect):
        chosen = by_language.get(code) or [embedded[code]]
        texts[code] = _first_texts(chosen, max_bytes)
    return texts


def _first_texts(sources: Iterable[Source], max_bytes: int) -> list[str]:
    texts: list[str] = []
    remaining = max_bytes
    for source in sources:
        for row in read_rows(source, BadRows.SKIP, RowCounts()):
            if remaining <= 0:
                return texts
            remaining -= len(row.text.encode())
            texts.append(row.text)
    return texts
