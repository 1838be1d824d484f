"""Text rows from files and TFDS datasets, streamed, with every unusable row counted and located."""

import dataclasses
import glob
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from babel_jax.config import BadRows, Source
from babel_jax.config.data import CONVERSATION_KEYS
from babel_jax.data.conversations import conversation_text
from babel_jax.errors import BadInput

KIND_KEY = "kind"
MAX_LOCATED = 20
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_FORMATS = ".jsonl, .txt (plain, .gz or .zst) and .parquet"
_KIND = re.compile(r"[a-z][a-z0-9_]*")
_PARQUET_BATCH = 1024


@dataclasses.dataclass(frozen=True)
class Row:
    """One document. `id` is the row's own, or FILE:LINE where it has none; `kind` is its own or its source's."""

    id: str
    text: str
    kind: str


@dataclasses.dataclass
class RowCounts:
    """What reading met: rows seen, bad ones (with where the first are), rows whose text is empty or white space."""

    rows: int = 0
    bad: int = 0
    empty: int = 0
    located: list[str] = dataclasses.field(default_factory=list)


class _BadRowError(Exception):
    """Why one row cannot be used."""


def read_rows(source: Source, bad_rows: BadRows, counts: RowCounts) -> Iterator[Row]:
    """The usable rows of a source, in the order of its files' names; `counts` is updated on the way.

    A bad row (unreadable JSON, no text, text that is no string or not UTF-8, an id or kind that cannot be one) is skipped and counted,
    or refused with BadInput that names its place. A missing, corrupt or truncated file is BadInput in any case.
    """
    if not _KIND.fullmatch(source.kind):
        raise BadInput(f"data.sources: kind = {source.kind!r}; a kind is lower-case letters, digits and _, such as web or textbook")
    for place, record in _records(source):
        counts.rows += 1
        try:
            row = _row(record, place, source)
        except _BadRowError as problem:
            if bad_rows is BadRows.REFUSE:
                raise BadInput(f'{place}: {problem}; repair or remove the row (a run may skip such rows: data.bad_rows = "skip")') from None
            counts.bad += 1
            if len(counts.located) < MAX_LOCATED:
                counts.located.append(f"{place}: {problem}")
            continue
        if row.text.isspace() or not row.text:
            counts.empty += 1
            continue
        yield row


def source_files(source: Source) -> list[Path]:
    """The files that a source's path or glob stands for, sorted by name. Raises BadInput when there is none."""
    assert source.path is not None
    path = Path(source.path)
    if path.is_file():
        return [path]
    if path.is_dir():
        raise BadInput(f"{path}: a folder; name its files, for example {path}/*.jsonl")
    if not glob.has_magic(source.path):
        raise BadInput(f"{path}: no such file (source of language {source.language})")
    files = sorted(Path(found) for found in glob.glob(source.path, recursive=True) if Path(found).is_file())  # noqa: PTH207 - the pattern may be absolute
    if not files:
        raise BadInput(f"{path}: no file matches (source of language {source.language})")
    return files


def _records(source: Source) -> Iterator[tuple[str, Any]]:
    """Pairs of a place (FILE:LINE) and a record: a dict, or the _BadRowError met in its stead."""
    if source.tfds is not None:
        yield from _tfds_records(source)
        return
    for path in source_files(source):
        suffixes = path.suffixes[-2:] if path.suffix in _COMPRESSION else path.suffixes[-1:]
        if suffixes == [".parquet"]:
            yield from _parquet_records(path, source)
        elif suffixes[:1] == [".jsonl"]:
            yield from _jsonl_records(path)
        elif suffixes[:1] == [".txt"]:
            yield from _paragraphs(path, source.text_key)
        else:
            raise BadInput(f"{path}: not a kind of file that can be read; readable are {_FORMATS}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines (from 1) with their line ends. Arrow notices cut streams of both compressions; zstandard's own reader does not."""
    number = 0
    try:
        stream = pyarrow.input_stream(str(path), compression=_COMPRESSION.get(path.suffix))
        with io.BufferedReader(stream) as lines:
            for number, line in enumerate(lines, 1):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (OSError, pyarrow.ArrowException) as error:
        raise BadInput(f"{path}: unreadable after line {number}: {_one_line(error)}; the file is corrupt or cut short") from error


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        if line.isspace():
            continue
        try:
            yield f"{path}:{number}", json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield f"{path}:{number}", _BadRowError(f"not UTF-8 ({error.reason} at byte {error.start} of the line)")
        except (ValueError, RecursionError) as error:
            yield f"{path}:{number}", _BadRowError(f"not readable JSON: {_one_line(error)}")


def _paragraphs(path: Path, text_key: str) -> Iterator[tuple[str, Any]]:
    """Plain text: documents are the runs of lines between blank lines."""
    paragraph: list[bytes] = []
    start = 1
    for number, line in _lines(path):
        if line.isspace():
            if paragraph:
                yield f"{path}:{start}", {text_key: b"".join(paragraph).rstrip(b"\r\n")}
            paragraph, start = [], number + 1
        else:
            paragraph.append(line)
    if paragraph:
        yield f"{path}:{start}", {text_key: b"".join(paragraph).rstrip(b"\r\n")}


def _parquet_records(path: Path, source: Source) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if source.text_key not in schema.names:
                raise BadInput(f"{path}: no column {source.text_key!r}; set text_key to one of {', '.join(schema.names)}")
            columns = [name for name in (source.text_key, source.id_key, KIND_KEY) if name in schema.names]
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH, columns=columns):
                values = {name: _as_bytes(batch.column(name)).to_pylist() for name in columns}
                for row in range(batch.num_rows):
                    number += 1
                    yield f"{path}:{number}", {name: values[name][row] for name in columns}
    except (OSError, pyarrow.ArrowException) as error:
        raise BadInput(f"{path}: unreadable after row {number}: {_one_line(error)}; the file is corrupt or cut short") from error


def _as_bytes(column: pyarrow.Array) -> pyarrow.Array:
    """Strings as bytes, so that one value that is not UTF-8 spoils only its own row."""
    text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    return column.cast(pyarrow.large_binary()) if text else column


def _tfds_records(source: Source) -> Iterator[tuple[str, Any]]:
    import tensorflow_datasets  # slow to import, and few sources need it

    try:
        rows = tensorflow_datasets.data_source(source.tfds, split=source.tfds_split, data_dir=source.tfds_folder)
        length = len(rows)
    except Exception as error:  # TFDS raises errors of many unrelated types, and TensorFlow's absence as a missing module
        raise BadInput(f"TFDS dataset {source.tfds} (split {source.tfds_split}) cannot be read: {_one_line(error)}") from error
    for number in range(length):
        yield f"{source.tfds}/{source.tfds_split}:{number + 1}", rows[number]


def _row(record: Any, place: str, source: Source) -> Row:
    if isinstance(record, _BadRowError):
        raise record
    if not isinstance(record, dict):
        raise _BadRowError(f"a JSON object is needed, not {type(record).__name__}")
    if record.get(source.text_key) is None:
        raise _BadRowError(f"no {source.text_key!r}; its keys are {', '.join(map(str, record)) or 'none'}")
    identifier = record.get(source.id_key)
    if identifier is None:
        identifier = f"{Path(place).name}"
    elif isinstance(identifier, int) and not isinstance(identifier, bool):
        identifier = str(identifier)
    kind = record.get(KIND_KEY)
    kind = source.kind if kind is None else _string(kind, KIND_KEY)
    if not _KIND.fullmatch(kind):
        raise _BadRowError(f"{KIND_KEY} {kind!r} is not of lower-case letters, digits and _")
    text = record[source.text_key]
    if source.text_key in CONVERSATION_KEYS:
        try:
            text = conversation_text(text)
        except ValueError as problem:
            raise _BadRowError(str(problem)) from None
    return Row(_string(identifier, source.id_key), _string(text, source.text_key), kind)


def _string(value: Any, key: str) -> str:
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if isinstance(value, str):
            value.encode("utf-8")  # JSON can spell half a surrogate pair, which no text holds
            return value
    except UnicodeError as error:
        raise _BadRowError(f"{key!r} is not UTF-8 ({error.reason})") from None  # type: ignore[attr-defined]
    raise _BadRowError(f"{key!r} is not a string but {type(value).__name__}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
