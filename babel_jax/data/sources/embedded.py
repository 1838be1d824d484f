"""The corpus inside the package, and folders with one file of rows for each language."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from babel_jax.config import BadRows, Source
from babel_jax.data.sources.rows import Row, RowCounts, read_rows
from babel_jax.errors import BadInput
from babel_jax.languages import CODES, language

_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def embedded_folder() -> Path:
    """Where the package keeps its own text: `xx.jsonl` with keys id, kind and text; ids are the same in all
    languages (parallel).
    """
    return Path(str(files("babel_jax.data.sources"))) / "corpus"


def embedded_corpus() -> dict[str, list[Row]]:
    """The rows of the embedded corpus by language."""
    return {
        source.language: list(read_rows(source, BadRows.REFUSE, RowCounts()))
        for source in corpus_sources(embedded_folder())
    }


def corpus_sources(folder: Path | str) -> tuple[Source, ...]:
    """One source for each `xx.jsonl`, `xx.jsonl.gz` or `xx.jsonl.zst` in `folder` named by a language's code,
    in the report's order.

    Raises BadInput when the folder is missing, has no such file, or has a language twice. Files of other
    names are left alone.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder of text")
    sources = []
    for code in CODES:
        found = [folder / f"{code}{suffix}" for suffix in _SUFFIXES if (folder / f"{code}{suffix}").is_file()]
        if len(found) > 1:
            raise BadInput(
                f"{folder}: {code} is there twice: {', '.join(path.name for path in found)}; keep one"
            )
        sources += [Source(language=code, path=str(path)) for path in found]
    if not sources:
        raise BadInput(f"{folder}: no file named by a language, such as en{_SUFFIXES[0]} or sw{_SUFFIXES[1]}")
    return tuple(sources)


def read_texts(folder: Path | str | None, languages: Sequence[str] | None = None) -> dict[str, list[str]]:
    """The texts of a folder, or of the embedded corpus without one, by language: all that it has, or those
    that are named.

    Raises BadInput as `corpus_sources` does, for rows that cannot be read, and for a named language without a
    file.
    """
    sources = {source.language: source for source in corpus_sources(folder or embedded_folder())}
    wanted = [language(code).code for code in languages] if languages else list(sources)
    missing = sorted(set(wanted) - set(sources))
    if missing:
        raise BadInput(f"{folder or 'the embedded corpus'}: no text for {', '.join(missing)}")
    return {
        code: [row.text for row in read_rows(sources[code], BadRows.REFUSE, RowCounts())] for code in wanted
    }
