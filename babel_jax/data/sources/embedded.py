"""The corpus inside the package, and folders with one file of rows for each language."""

import logging
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from babel_jax.config import BadRows, Source
from babel_jax.data.sources.rows import Row, RowCounts, read_rows
from babel_jax.errors import BadInput
from babel_jax.languages import in_order, known_language, language

log = logging.getLogger("babel")

_CODE = re.compile(r"[a-z]{2,3}([_-][A-Z][a-z]{3})?")
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def embedded_folder() -> Path:
    """The folder of the package's text: `xx.jsonl` with keys id, kind and text. All languages have the same
    ids: the rows are translations of each other.
    """
    return Path(str(files("babel_jax.data.sources"))) / "corpus"


def embedded_corpus() -> dict[str, list[Row]]:
    """The rows of the embedded corpus by language."""
    corpus = {}
    for source in corpus_sources(embedded_folder()):
        corpus[source.language] = list(read_rows(source, BadRows.REFUSE, RowCounts()))
    return corpus


def corpus_sources(folder: Path | str) -> tuple[Source, ...]:
    """A source for each `xx.jsonl`, `xx.jsonl.gz` or `xx.jsonl.zst` in a folder, where xx is a language code;
    in the registry's order. xx may be any code that `language` knows, such as `yor` or `yo`.

    Raises BadInput if the folder is missing, has no such file, or has two files for a language. Files with
    other names are ignored, with a warning if the name looks like a code.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder of text")
    paths: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in _SUFFIXES if path.name.endswith(suffix)), None)
        if suffix is None:
            continue
        name = path.name.removesuffix(suffix)
        # Files of one language under several of its codes are found together: yo.jsonl and yor.jsonl.
        if (known := known_language(name)) is not None:
            paths.setdefault(known.code, []).append(path)
        elif _CODE.fullmatch(name):
            log.warning("%s is not read: no language %s is known; [[languages]] declares it", path, name)
    sources = []
    for code in in_order(paths):
        if len(paths[code]) > 1:
            names = ", ".join(path.name for path in paths[code])
            raise BadInput(f"{folder}: {code} is there twice: {names}; keep one")
        sources.append(Source(language=code, path=str(paths[code][0])))
    if not sources:
        raise BadInput(f"{folder}: no file named by a language, such as en{_SUFFIXES[0]} or sw{_SUFFIXES[1]}")
    return tuple(sources)


def read_texts(folder: Path | str | None, languages: Sequence[str] | None = None) -> dict[str, list[str]]:
    """The texts of a folder by language; without a folder, of the embedded corpus. `languages`: only these.

    Raises BadInput as `corpus_sources` does, for rows that cannot be read, and for a language without a file.
    """
    sources = {source.language: source for source in corpus_sources(folder or embedded_folder())}
    wanted = [language(code).code for code in languages] if languages else list(sources)
    missing = sorted(set(wanted) - set(sources))
    if missing:
        raise BadInput(f"{folder or 'the embedded corpus'}: no text for {', '.join(missing)}")
    texts = {}
    for code in wanted:
        rows = read_rows(sources[code], BadRows.REFUSE, RowCounts())
        texts[code] = [row.text for row in rows]
    return texts
