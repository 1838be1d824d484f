"""Writes the dataset of one language and kind: rows become windows of token ids, with counts and digests."""

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from babel_jax.config import DataSettings
from babel_jax.data.sources.rows import Row
from babel_jax.data.tokens.chat_format import ChatFormat, open_chat_format
from babel_jax.data.tokens.tokenizer import Tokenizer
from babel_jax.data.windows.conversations import conversation_windows
from babel_jax.data.windows.packing import pack
from babel_jax.data.windows.prepared import COUNTS
from babel_jax.data.windows.storage import MASKED_FIELDS, write_windows
from babel_jax.digests import write_sums
from babel_jax.disk_errors import explain_os_errors
from babel_jax.errors import BadInput
from babel_jax.files import write_text
from babel_jax.new_folders import new_folder
from babel_jax.progress import Work

_BATCH_CHARACTERS = 1 << 20


def write_dataset(
    dataset: Path,
    settings: DataSettings,
    language: str,
    kind: str,
    rows: Iterator[Row],
    documents: int,
    tokenizer: Tokenizer,
) -> None:
    """Writes the folder `dataset` from its rows, with counts and digests; a kill leaves no half-written
    folder.

    documents: the number of rows, for the progress bar. Raises BadInput if no conversation has an answer
    within a window.
    """
    counts = {"tokens": 0, "documents": 0, "bytes": 0, "windows": 0}
    progress = Work[Row](f"tokenizing {language} {kind}", total=documents, unit="documents")
    with progress, new_folder(dataset) as partial:
        # Conversations stay whole and have a mask. Other text is cut where a window ends.
        if settings.conversations:
            assert settings.tokenizer is not None
            format = opened_chat_format(settings.tokenizer, settings.chat_template)
            texts = (row.text for row in _watched(rows, progress))
            masked = conversation_windows(texts, format, settings.seq_len, counts)
            masked = _at_least_one(masked, language, kind, counts, settings)
            write_windows(partial, dataset.name, _counted(masked, counts), settings.seq_len, MASKED_FIELDS)
        else:
            token_ids = _tokenized(rows, tokenizer, counts, progress)
            windows = pack(token_ids, settings.seq_len, tokenizer.eos_id)
            write_windows(partial, dataset.name, _counted(windows, counts), settings.seq_len)

        # Generators above have filled the counts: they are complete only now.
        write_json(partial / COUNTS, counts)
        write_sums(partial)


def _tokenized(
    rows: Iterator[Row], tokenizer: Tokenizer, counts: dict[str, int], progress: Work[Row]
) -> Iterator[list[int]]:
    """The token ids of each row's text, tokenized in batches. Adds to `counts` as rows are read."""
    for texts in _batches(row.text for row in rows):
        encoded = tokenizer.encode_batch(texts)
        counts["documents"] += len(texts)
        counts["bytes"] += sum(len(text.encode()) for text in texts)
        documents = [[*tokenizer.begin_ids, *ids] for ids in encoded]
        # `pack` adds one end token to each document.
        counts["tokens"] += sum(map(len, documents)) + len(documents)
        progress.update(len(texts))
        yield from documents


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def opened_chat_format(tokenizer: str, template: str | None) -> ChatFormat:
    """A chat format, opened once for all languages of a process, since its template runs in a separate
    process.
    """
    return open_chat_format(tokenizer, template)


def _watched(rows: Iterator[Row], progress: Work[Row]) -> Iterator[Row]:
    for row in rows:
        yield row
        progress.update()


def _at_least_one(
    windows: Iterator[Any], language: str, kind: str, counts: dict[str, int], settings: DataSettings
) -> Iterator[Any]:
    """The same windows. Raises BadInput if there is none, because every conversation is too long."""
    first = next(windows, None)
    if first is None:
        raise BadInput(
            f"{language} {kind}: no conversation has an answer within data.seq_len = {settings.seq_len} "
            f"tokens, so all {counts['left_out']} would be left out; set data.seq_len higher"
        )
    yield from itertools.chain([first], windows)


def _counted(
    windows: Iterator[tuple[np.ndarray, ...]], counts: dict[str, int]
) -> Iterator[tuple[np.ndarray, ...]]:
    for window in windows:
        counts["windows"] += 1
        yield window


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes values as a JSON file and makes its folder where needed; a kill leaves no half-written file."""
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
