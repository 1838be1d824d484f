"""Records of files (JSON lines, text, Parquet, WARC), TFDS and Hugging Face datasets, streamed, each with its
location.
"""

import glob
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from babel_jax.config import Source
from babel_jax.data.sources.streams import (
    COMPRESSION,
    MAX_DOCUMENT_BYTES,
    MAX_EXPANSION,
    BadRowError,
    check_begun,
    decompressed,
    explained,
    imported,
    one_line,
    opened,
    remote,
    too_long,
)
from babel_jax.data.sources.web_pages import page_records
from babel_jax.errors import BadInput

KIND_KEY = "kind"
_FORMATS = ".jsonl, .json, .txt, .warc and .wet (plain, .gz or .zst) and .parquet"
_PARQUET_ROWS, _PARQUET_BYTES = 1024, 1 << 24  # at a time
_PARQUET_ROWS_LEAST, _PARQUET_LONGEST_BYTES = 16, 1 << 27
_PARQUET_FREE_BYTES = 1 << 28  # columns with few different values may expand more than text
_NAMED = 20  # columns in a message
_TFDS_PART = 100_000
_BLOCK_BYTES = 1 << 18
_MAX_BLANK_LINES = 1 << 20
# Of a line that is skipped; a file with a longer one (such as 4 TB of holes) is no text.
_MAX_LINE_BYTES = 2**30

# A location, such as FILE:LINE, with the record as a dict, or with a BadRowError.
Record = tuple[str, Any]


def source_files(source: Source) -> list[str]:
    """The files of a source's path or glob, sorted by name.

    Raises BadInput if there is none.
    """
    assert source.path is not None
    if "://" in source.path:
        files = _remote_files(source.path)
    else:
        # A name that exists is that file, also if it has brackets or stars in it.
        path = Path(source.path)
        if path.is_dir():
            raise BadInput(f"{path}: a folder; name its files, for example {path}/*.jsonl")
        files = [str(path)] if path.is_file() else []
        if not files and glob.has_magic(source.path):
            matches = glob.glob(source.path, recursive=True)  # noqa: PTH207 - may be absolute
            files = sorted(name for name in matches if Path(name).is_file())
    if not files:
        problem = "no file matches" if glob.has_magic(source.path) else "no such file"
        raise BadInput(f"{source.path}: {problem} (source of language {source.language})")
    return files


def dataset_version(source: Source) -> str:
    """The version of a TFDS dataset (its version and sizes), or of a Hugging Face dataset (commit or times of
    its files).
    """
    if source.tfds is not None:
        info = _tfds(source).dataset_info
        splits = {name: (split.num_examples, split.num_bytes) for name, split in sorted(info.splits.items())}
        return f"{info.full_name} {splits}"
    datasets = imported("datasets", source.label, "hf")
    with explained(source.label, lambda: "nothing"):
        builder = datasets.load_dataset_builder(source.huggingface, source.huggingface_config)
        files = builder.config.data_files or {}
        origins = {}
        for split, split_files in files.items():
            origins[str(split)] = list(map(list, split_files.origin_metadata))
        return json.dumps([str(builder.hash), origins], sort_keys=True)


def parts(source: Source) -> list[str]:
    """The parts of a source that can be read independently: its files, ranges of a TFDS dataset, or shards of
    a Hugging Face dataset.
    """
    if source.path is not None:
        return source_files(source)
    if source.tfds is not None:
        # Ranges of a fixed size: parts do not depend on how the dataset was written.
        length = len(_tfds(source))
        starts = range(0, max(length, 1), _TFDS_PART)
        return [f"{start}:{min(start + _TFDS_PART, length)}" for start in starts]
    number = _huggingface(source).num_shards
    return [f"{shard}/{number}" for shard in range(number)]


def read_records(source: Source, part: str) -> Iterator[Record]:
    """The records of one of `parts(source)`, in order.

    Raises BadInput for a missing, corrupt or truncated file.
    """
    if source.tfds is not None:
        yield from _tfds_records(source, *map(int, part.split(":")))
    elif source.huggingface is not None:
        yield from _huggingface_records(source, *map(int, part.split("/")))
    else:
        yield from _file_records(part, source)


# --- files ------------------------------------------------------------------------------------------------


def _file_records(path: str, source: Source) -> Iterator[Record]:
    check_begun(path)
    # The kind of a file is its name's: text.jsonl.gz is JSON lines, compressed.
    suffixes = Path(path).suffixes[-2:] if Path(path).suffix in COMPRESSION else Path(path).suffixes[-1:]
    if suffixes == [".parquet"]:
        yield from _parquet_records(path, source)
    elif suffixes[:1] in ([".jsonl"], [".json"]):
        yield from _jsonl_records(path)
    elif suffixes[:1] == [".txt"]:
        yield from _paragraphs(path, source.text_key)
    elif suffixes[:1] in ([".warc"], [".wet"]):
        yield from page_records(path, source)
    else:
        raise BadInput(f"{path}: not a kind of file that can be read; readable are {_FORMATS}")


def _lines(path: str) -> Iterator[tuple[int, bytes | BadRowError]]:
    """Lines with their line ends and their numbers, from 1."""
    number = blank = 0
    with (
        explained(path, lambda: f"line {number}"),
        decompressed(path) as stream,
        io.BufferedReader(stream, _BLOCK_BYTES) as lines,
    ):
        while line := lines.readline(MAX_DOCUMENT_BYTES):
            number += 1
            blank = blank + 1 if len(line) < 3 else 0
            if blank > _MAX_BLANK_LINES:
                raise BadInput(
                    f"{path}:{number}: more than {_MAX_BLANK_LINES:,} lines of nothing in a row; the file "
                    "is no text"
                )

            # The rest of a line that is too long is skipped.
            if len(line) == MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
                size = len(line)
                while (rest := lines.readline(MAX_DOCUMENT_BYTES)) and not rest.endswith(b"\n"):
                    size += len(rest)
                    if size > _MAX_LINE_BYTES:
                        raise BadInput(
                            f"{path}:{number}: a line of more than {_MAX_LINE_BYTES:,} bytes; the file is "
                            "no text"
                        )
                yield number, too_long()
            else:
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _jsonl_records(path: str) -> Iterator[Record]:
    for number, line in _lines(path):
        if isinstance(line, BadRowError):
            yield f"{path}:{number}", line
            continue
        # A blank line is no row, and no mistake.
        if line.isspace():
            continue
        try:
            yield f"{path}:{number}", json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield (
                f"{path}:{number}",
                BadRowError(f"not UTF-8 ({error.reason} at byte {error.start} of the line)"),
            )
        except (ValueError, RecursionError) as error:
            yield f"{path}:{number}", BadRowError(f"not readable JSON: {one_line(error)}")


def _paragraphs(path: str, text_key: str) -> Iterator[Record]:
    """Plain text: a document is a run of lines between blank lines."""
    paragraph: list[bytes] = []
    start, size = 1, 0
    for number, line in _lines(path):
        blank = not isinstance(line, BadRowError) and line.isspace()
        if not blank:
            # A paragraph that becomes too long is forgotten; only its size is kept.
            size += MAX_DOCUMENT_BYTES if isinstance(line, BadRowError) else len(line)
            if size < MAX_DOCUMENT_BYTES:
                assert isinstance(line, bytes)
                paragraph.append(line)
            else:
                paragraph.clear()
        else:
            yield from _paragraph(path, start, paragraph, size, text_key)
            paragraph, start, size = [], number + 1, 0
    yield from _paragraph(path, start, paragraph, size, text_key)


def _paragraph(path: str, start: int, lines: list[bytes], size: int, text_key: str) -> Iterator[Record]:
    if size:
        long = size >= MAX_DOCUMENT_BYTES
        yield f"{path}:{start}", too_long() if long else {text_key: b"".join(lines).rstrip(b"\r\n")}


def _parquet_records(path: str, source: Source) -> Iterator[Record]:
    with (
        explained(path, lambda: "row 0"),
        opened(path) as source_file,
        pyarrow.parquet.ParquetFile(source_file) as file,
    ):
        names = file.schema_arrow.names
    if source.text_key not in names:
        raise BadInput(
            f"{path}: no column {source.text_key!r}; set text_key to one of {', '.join(names[:_NAMED])}"
        )
    # Other columns are not decoded: they may be larger than the text.
    wanted = (source.text_key, source.id_key, source.score_key, KIND_KEY, *source.where)
    yield from parquet_rows(path, [name for name in dict.fromkeys(wanted) if name in names])


def parquet_rows(path: str, wanted: Sequence[str] | None = None) -> Iterator[Record]:
    """The rows of a Parquet file in bounded memory. wanted: the columns to read, None for all."""
    number = 0
    with (
        explained(path, lambda: f"row {number}"),
        opened(path) as source_file,
        pyarrow.parquet.ParquetFile(source_file, buffer_size=_BLOCK_BYTES, pre_buffer=False) as file,
    ):
        # Checked before any column is decoded.
        _check_expansion(path, file.metadata, wanted)
        left = _most_bytes(file.metadata, wanted)
        for group in range(file.num_row_groups):
            if _is_one_too_long(file.metadata.row_group(group), wanted):
                number += 1
                yield f"{path}:{number}", too_long()
                continue
            size = _rows_at_once(file.metadata.row_group(group))
            for batch in file.iter_batches(size, row_groups=[group], columns=wanted):
                columns = batch.schema.names
                values = [batch.column(name) for name in columns]
                for row in range(batch.num_rows):
                    number += 1
                    record = _parquet_row(columns, values, row)
                    # A dictionary gives one long value to a million rows, and the metadata counts it once.
                    left -= _bytes_of(record)
                    if left < 0:
                        raise BadInput(
                            f"{path}: its first {number:,} rows have over {MAX_EXPANSION} times the bytes of "
                            "the file, which no text does; remove repeated rows"
                        )
                    yield f"{path}:{number}", record


def _most_bytes(metadata: Any, wanted: Sequence[str] | None) -> int:
    """The most bytes that the rows of a Parquet file may have."""
    compressed = 0
    for group in range(metadata.num_row_groups):
        for chunk in _chunks(metadata.row_group(group), wanted):
            compressed += chunk.total_compressed_size
    return max(_PARQUET_FREE_BYTES, MAX_EXPANSION * compressed)


def _bytes_of(record: dict[str, Any] | BadRowError) -> int:
    if isinstance(record, BadRowError):
        return 0
    return sum(len(value) for value in record.values() if isinstance(value, bytes))


def _check_expansion(path: str, metadata: Any, wanted: Sequence[str] | None) -> None:
    """Raises BadInput for a file whose columns expand more than text does, or have values too long for
    memory.
    """
    for group in range(metadata.num_row_groups):
        for chunk in _chunks(metadata.row_group(group), wanted):
            size = chunk.total_uncompressed_size
            if size > max(_PARQUET_FREE_BYTES, MAX_EXPANSION * chunk.total_compressed_size):
                raise BadInput(
                    f"{path}: its column {chunk.path_in_schema!r} expands to {size >> 20} MiB, over "
                    f"{MAX_EXPANSION} times its size, which no text does; leave it out, or write it "
                    "without compression"
                )
            if chunk.num_values > 1 and size > _PARQUET_LONGEST_BYTES * chunk.num_values:
                raise BadInput(
                    f"{path}: the values of its column {chunk.path_in_schema!r} have over "
                    f"{_PARQUET_LONGEST_BYTES >> 20} MiB in the mean, which no document has; leave it out, "
                    "or write each row into a row group of its own"
                )


def _is_one_too_long(group: Any, wanted: Sequence[str] | None) -> bool:
    """True if a row group is one row that is too long. It is not read, because Arrow would hold it three
    times.
    """
    return group.num_rows == 1 and any(
        chunk.total_uncompressed_size > _PARQUET_LONGEST_BYTES for chunk in _chunks(group, wanted)
    )


def _chunks(group: Any, wanted: Sequence[str] | None) -> Iterator[Any]:
    for number in range(group.num_columns):
        chunk = group.column(number)
        if wanted is None or chunk.path_in_schema.split(".")[0] in wanted:
            yield chunk


def _rows_at_once(group: Any) -> int:
    """The number of rows to read at a time: many short ones, or few long ones.

    A file of a kilobyte can have one long value in a million rows (by a dictionary), so the longest possible
    value also counts: no value is longer than its column.
    """
    # Both from the file's own metadata, before anything is decoded.
    mean = group.total_byte_size // max(1, group.num_rows)
    longest = max(
        (group.column(number).total_uncompressed_size for number in range(group.num_columns)), default=0
    )
    by_longest = max(_PARQUET_ROWS_LEAST, _PARQUET_LONGEST_BYTES // max(1, longest))
    result: int = max(1, min(_PARQUET_ROWS, by_longest, _PARQUET_BYTES // max(1, mean)))
    return result


def _parquet_row(
    columns: Sequence[str], values: Sequence[pyarrow.Array], row: int
) -> dict[str, Any] | BadRowError:
    """One row. Strings are bytes, so that a value that is not UTF-8 makes only its own row a bad one."""
    values_of_row = {}
    for name, column in zip(columns, values, strict=True):
        scalar = column[row]
        # A column that Arrow wrote as a dictionary.
        if isinstance(scalar, pyarrow.DictionaryScalar):
            scalar = scalar.value
        if isinstance(scalar, pyarrow.BinaryScalar | pyarrow.LargeBinaryScalar | pyarrow.BinaryViewScalar):
            buffer = scalar.as_buffer()
            if buffer is not None and buffer.size >= MAX_DOCUMENT_BYTES:
                return too_long()
            values_of_row[name] = None if buffer is None else buffer.to_pybytes()
        else:
            values_of_row[name] = scalar.as_py()
    return values_of_row


def _remote_files(path: str) -> list[str]:
    system, name = remote(path)
    try:
        files = [match for match in sorted(system.glob(name)) if system.isfile(match)]
        return [system.unstrip_protocol(file) for file in files]
    except Exception as error:  # each store raises errors of its own
        raise BadInput(f"{path}: cannot be listed: {one_line(error)}") from error


# --- datasets ---------------------------------------------------------------------------------------------


def _tfds(source: Source) -> Any:
    # Slow to import, and few sources need it.
    import tensorflow_datasets

    try:
        rows = tensorflow_datasets.data_source(
            source.tfds, split=source.tfds_split, data_dir=source.tfds_folder
        )
        len(rows)
    except Exception as error:  # TFDS raises errors of many types; without TensorFlow, ModuleNotFoundError
        raise BadInput(
            f"TFDS dataset {source.tfds} (split {source.tfds_split}) cannot be read: {one_line(error)}"
        ) from error
    return rows


def _tfds_records(source: Source, start: int, stop: int) -> Iterator[Record]:
    rows = _tfds(source)
    for number in range(start, stop):
        yield f"{source.tfds}/{source.tfds_split}:{number + 1}", rows[number]


def _huggingface(source: Source) -> Any:
    datasets = imported("datasets", source.label, "hf")
    try:
        return datasets.load_dataset(
            source.huggingface, source.huggingface_config, split=source.huggingface_split, streaming=True
        )
    except Exception as error:  # from the hub, the file system and the formats
        raise BadInput(
            f"Hugging Face dataset {source.label} (split {source.huggingface_split}) cannot be read: "
            f"{one_line(error)}"
        ) from error


def _huggingface_records(source: Source, shard: int, number: int) -> Iterator[Record]:
    # Streamed: a shard is never whole in memory or on disk.
    rows = iter(_huggingface(source).shard(num_shards=number, index=shard))
    row = 0
    with explained(source.label, lambda: f"row {row} of shard {shard}"):
        for record in rows:
            row += 1
            yield f"{source.label}/{source.huggingface_split}-{shard}:{row}", record
