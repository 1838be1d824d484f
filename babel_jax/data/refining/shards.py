"""Cleaned documents on disk: Parquet shards and, until duplicates are found, the arrays to compare them.

cleaned/xx/SSS-PPPPP.json               counts of part P of source S of the language, and the names of
its shards; written after the shards
cleaned/xx/SSS-PPPPP-NNN.parquet        documents: id, text, kind, score, source
cleaned/xx/SSS-PPPPP-NNN.documents.npy  digest of the text, length and score of each document
....signatures.npy MinHash values
....keys.npy       keys, sorted within each band
....order.npy      the document of each key
....removed.npy    True for duplicates; written after they have been found
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard

from babel_jax.config import DeduplicationSettings
from babel_jax.data.json_files import read_json
from babel_jax.data.refining.deduplication import band_keys, digests, signatures
from babel_jax.data.sources.rows import Row
from babel_jax.errors import BadInput
from babel_jax.places import PARTIAL

DOCUMENT = np.dtype([("digest", "<u8", (2,)), ("length", "<u4"), ("score", "<f4")])
_BATCH_CHARACTERS = 1 << 20
_SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("text", pyarrow.large_string()),
        ("kind", pyarrow.string()),
        ("score", pyarrow.float32()),
        ("source", pyarrow.string()),
    ]
)
SKETCHES = ("documents", "signatures", "keys", "order")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard: `stem` is its path without a suffix."""

    stem: Path
    documents: int

    def array(self, name: str) -> np.ndarray:
        """An array of the shard, mapped into memory only while it is used: if all were kept open, all would
        become resident.
        """
        path = self.beside(name)
        status = path.stat()
        shape, dtype, begin = _header(path, status.st_mtime_ns, status.st_size)
        # An empty file cannot be mapped.
        if not math.prod(shape):
            return np.empty(shape, dtype)
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, dtype, math.prod(shape), begin).reshape(shape)

    def beside(self, name: str) -> Path:
        """The file of an array of the shard."""
        return self.stem.with_name(f"{self.stem.name}.{name}.npy")

    def rows(self) -> Iterator[Row]:
        """The documents of the shard, except documents that are marked as duplicates."""
        # Before the duplicates are found, no document is marked.
        removed = (
            self.array("removed") if self.beside("removed").is_file() else np.zeros(self.documents, bool)
        )
        number = 0
        for batch in self.batches():
            for values in batch.to_pylist():
                if not removed[number]:
                    yield Row(**values)
                number += 1

    def batches(self, columns: list[str] | None = None) -> Iterator[pyarrow.RecordBatch]:
        """Its documents by row group. Raises BadInput if the file is damaged."""
        path = f"{self.stem}.parquet"
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    yield from file.read_row_group(group, columns).to_batches()
        except (OSError, pyarrow.ArrowException) as error:
            raise BadInput(
                f"{path}: damaged; remove the folder of prepared data and run `babel prepare` again"
            ) from error


# Every bucket of every band opens each array. np.load would take longer for the headers than for the data.
@functools.lru_cache(maxsize=1 << 16)
def _header(path: Path, changed: int, size: int) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and type of the array in a .npy file, and the offset of its values in bytes."""
    with open(path, "rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0), path
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        assert not fortran_order, path
        return shape, dtype, file.tell()


class ShardWriter:
    """Writes documents into shards of at most `shard_documents`; the same documents give the same bytes."""

    def __init__(self, stem: Path, shard_documents: int, deduplication: DeduplicationSettings | None):
        self._stem, self._most, self._deduplication = stem, shard_documents, deduplication
        self.shards: list[Shard] = []
        self._waiting: list[Row] = []
        self._waiting_characters = 0
        self._begin()

    def _begin(self) -> None:
        self._path = self._stem.with_name(f"{self._stem.name}-{len(self.shards):03d}")
        self._file = pyarrow.parquet.ParquetWriter(
            f"{self._path}.parquet{PARTIAL}", _SCHEMA, compression="zstd"
        )
        self._documents: list[np.ndarray] = []
        self._signatures: list[np.ndarray] = []
        self._written = 0

    def add(self, row: Row) -> None:
        """Adds a document."""
        self._waiting.append(row)
        self._waiting_characters += len(row.text)
        # Batches bound the memory; a full shard ends its batch early.
        full = self._written + len(self._waiting) == self._most
        if self._waiting_characters >= _BATCH_CHARACTERS or full:
            self._flush()
        if full:
            self._end()
            self._begin()

    def _flush(self) -> None:
        rows, self._waiting, self._waiting_characters = self._waiting, [], 0
        if not rows:
            return
        self._file.write_batch(
            pyarrow.RecordBatch.from_pylist([dataclasses.asdict(row) for row in rows], schema=_SCHEMA)
        )
        self._written += len(rows)
        if self._deduplication is None:
            return

        # The search for duplicates reads these arrays in place of the text.
        texts = [row.text for row in rows]
        documents = np.zeros(len(rows), DOCUMENT)
        documents["digest"] = digests(texts)
        documents["length"] = [len(text) for text in texts]
        documents["score"] = [-np.inf if row.score is None else row.score for row in rows]
        self._documents.append(documents)
        if self._deduplication.near:
            self._signatures.append(signatures(texts, self._deduplication))

    def _end(self) -> None:
        self._flush()
        self._file.close()
        _into_place(Path(f"{self._path}.parquet{PARTIAL}"))
        if self._deduplication is not None:
            documents = np.concatenate([np.empty(0, DOCUMENT), *self._documents])
            signature = np.concatenate(self._signatures) if self._signatures else None
            keys = band_keys(documents["digest"], signature, self._deduplication)
            # Sorted keys, so that a range of keys is a slice.
            order = np.argsort(keys, axis=1, kind="stable").astype(np.uint32)
            arrays = {
                "documents": documents,
                "keys": np.take_along_axis(keys, order.astype(np.int64), 1),
                "order": order,
            }
            if signature is not None:
                arrays["signatures"] = signature
            for name, array in arrays.items():
                write_array(Shard(self._path, self._written).beside(name), array)
        self.shards.append(Shard(self._path, self._written))

    def close(self) -> list[Shard]:
        """Ends the last shard and returns all shards."""
        self._end()
        if not self.shards[-1].documents and len(self.shards) > 1:
            self.shards.pop()
        return self.shards

    def abandon(self) -> None:
        """Removes the shard that is being written."""
        with contextlib.suppress(Exception):
            self._file.close()
        Path(f"{self._path}.parquet{PARTIAL}").unlink(missing_ok=True)


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an array as a .npy file in one step."""

    def write(file: BinaryIO) -> None:
        # NumPy writes to a file through C; its error for a full disk names only the number of values written.
        content = io.BytesIO()
        np.save(content, array)
        file.write(content.getbuffer())

    write_file(path, write)


def write_file(path: Path, write: Callable[[Any], None]) -> None:
    """Writes a file of any size in one step."""
    partial = path.with_name(path.name + PARTIAL)
    with open(partial, "wb") as file:
        write(file)
    _into_place(partial)


@contextlib.contextmanager
def json_lines(path: Path | None) -> Iterator[Any]:
    """A function that writes an object as a line of a compressed file. The file appears when it is complete.
    Without a path the function does nothing.
    """
    if path is None:
        yield lambda values: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with zstandard.open(partial, "wt", encoding="utf-8") as lines:
            yield lambda values: lines.write(json.dumps(values, ensure_ascii=False) + "\n")
        _into_place(partial)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _into_place(partial: Path) -> None:
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, partial.with_name(partial.name.removesuffix(PARTIAL)))


def part_counts(folder: Path) -> list[dict[str, Any]]:
    """The counts that cleaning wrote for each part of a language's sources, in the order of sources and
    parts.
    """
    return [read_json(path) for path in part_files(folder)]


def part_files(folder: Path) -> list[Path]:
    """The files of these counts."""
    return sorted(folder.glob("[0-9][0-9][0-9]-*.json"))


def shards_of(folder: Path) -> list[Shard]:
    """All shards of a language, in the order of sources and parts."""
    shards = []
    for counts in part_counts(folder):
        for name, documents in counts["shards"]:
            shards.append(Shard(folder / name, documents))
    return shards
