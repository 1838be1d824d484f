"""The text that a vocabulary is learned from."""

import functools
from collections.abc import Iterable, Sequence

import regex

from babel_jax.config import BadRows, Source
from babel_jax.data.sources.embedded import corpus_sources, embedded_folder
from babel_jax.data.sources.rows import RowCounts, read_rows
from babel_jax.draws import Purpose, unit_draw
from babel_jax.errors import BadInput
from babel_jax.languages import LANGUAGES

_LETTER = regex.compile(r"\p{L}")
_LETTERS_READ = 100_000  # enough to tell a script
_LEAST_IN_SCRIPT = 0.1  # of the letters: text of the web has much Latin in any language
# Codes of ISO 15924 that are several scripts of Unicode.
_SCRIPTS_OF = {
    "Hans": ("Hani",),
    "Hant": ("Hani",),
    "Jpan": ("Hani", "Hira", "Kana"),
    "Kore": ("Hang", "Hani"),
}


def texts_of(
    sources: Iterable[Source],
    languages: Iterable[str],
    protect: Iterable[str],
    max_bytes: int,
    bad_rows: BadRows = BadRows.REFUSE,
    heldout_fraction: float = 0.0,
) -> dict[str, list[str]]:
    """Texts by language, up to `max_bytes` of each. Protected languages without a source have the package's.

    heldout_fraction: this fraction of the rows is left out, the rows that `survey` holds out to measure the
    model. Raises BadInput for another language without a source, for text in another script than its
    language's, and for rows that cannot be read, unless they are to be skipped.
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
        _check_script(code, texts[code])
    return texts


def _check_script(code: str, texts: Sequence[str]) -> None:
    """Raises BadInput for text without letters, and for text in another script than its language's."""
    letters = in_script = 0
    pattern = letters_of(LANGUAGES[code].script)
    for text in texts:
        letters += len(_LETTER.findall(text))
        in_script += len(pattern.findall(text))
        if letters > _LETTERS_READ:
            break
    name, script = LANGUAGES[code].name, LANGUAGES[code].writing.name
    if letters == 0:
        raise BadInput(f"{code}: its text to learn new tokens from has no letter; give text in {name}")
    if in_script < _LEAST_IN_SCRIPT * letters:
        raise BadInput(
            f"{code}: {in_script / letters:.0%} of the letters of its text are {script}; give text in "
            f"{name}, or the code of the language that it is in"
        )


@functools.cache
def letters_of(script: str) -> regex.Pattern[str]:
    """Matches each letter of a script."""
    names = [rf"\p{{Script={one}}}" for one in _SCRIPTS_OF.get(script, (script,))]
    return regex.compile(rf"(?=\p{{L}})[{''.join(names)}]")


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
