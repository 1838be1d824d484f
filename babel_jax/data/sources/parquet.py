"""The rows of Parquet files, in bounded memory: a file of a kilobyte can mean gigabytes."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from babel_jax.config import Source
from babel_jax.data.sources.streams import (
    KIND_KEY,
    MAX_DOCUMENT_BYTES,
    MAX_EXPANSION,
    BadRowError,
    Record,
    explained,
    opened,
    too_long,
)
from babel_jax.errors import BadInput

_BLOCK_BYTES = 1 << 18
_PARQUET_ROWS, _PARQUET_BYTES = 1024, 1 << 24  # at a time
_PARQUET_ROWS_LEAST, _PARQUET_LONGEST_BYTES = 16, 1 << 27
_PARQUET_FREE_BYTES = 1 << 28  # columns with few different values may expand more than text
_NAMED = 20  # columns in a message


def parquet_records(path: str, source: Source) -> Iterator[Record]:
    """The rows of a Parquet file of a source, with the columns that the source names.

    Raises BadInput if the file has no column of text.
    """
    with (
        explained(path, lambda: "row 0"),
        opened(path) as source_file,
        pyarrow.parquet.ParquetFile(source_file) as file,
    ):
        # Only the footer of the file is read here.
        names = file.schema_arrow.names
    if source.text_key not in names:
        raise BadInput(
            f"{path}: no column {source.text_key!r}; set text_key to one of {', '.join(names[:_NAMED])}"
        )
    # Other columns are not decoded: they may be larger than the text.
    translation = (source.parallel.text_key,) if source.parallel is not None else ()
    wanted = (source.text_key, *translation, source.id_key, source.score_key, KIND_KEY, *source.where)
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
            # Arrow holds a whole value in memory. One row alone in its group is skipped later instead.
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
            # The size is known before the bytes are copied out of Arrow's memory.
            buffer = scalar.as_buffer()
            if buffer is not None and buffer.size >= MAX_DOCUMENT_BYTES:
                return too_long()
            values_of_row[name] = None if buffer is None else buffer.to_pybytes()
        else:
            values_of_row[name] = scalar.as_py()
    return values_of_row
