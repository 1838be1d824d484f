"""Cleaned documents on disk: parquet shards with, until duplicates are found, what is needed to compare them.

cleaned/xx/SSS-PPPPP.json                 counts of part P of the language's source S and its shards; written
when they are whole cleaned/xx/SSS-PPPPP-NNN.parquet          documents: id, text, kind, score, source
cleaned/xx/SSS-PPPPP-NNN.documents.npy    of each a digest of the text, its length and score
                     ....signatures.npy   MinHash values
                     ....keys.npy, .order.npy  by band the sorted keys and whose they are
                     ....removed.npy      which are duplicates; written when they have been found
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
from babel_jax.files import PARTIAL

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
        """One of its arrays, mapped into memory for as long as it is in use: kept open, all of them would be
        resident in the end.
        """
        path = self.beside(name)
        status = path.stat()
        shape, dtype, begin = _header(path, status.st_mtime_ns, status.st_size)
        if not math.prod(shape):
            return np.empty(shape, dtype)
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, dtype, math.prod(shape), begin).reshape(shape)

    def beside(self, name: str) -> Path:
        """The file of one of its arrays."""
        return self.stem.with_name(f"{self.stem.name}.{name}.npy")

    def rows(self) -> Iterator[Row]:
        """Its documents, without those that were found to be duplicates."""
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
        """Its documents by row group. Raises BadInput where the file is damaged."""
        path = f"{self.stem}.parquet"
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    yield from file.read_row_group(group, columns).to_batches()
        except (OSError, pyarrow.ArrowException) as error:
            raise BadInput(
                f"{path}: damaged; remove the folder of prepared data and run `babel prepare` again"
            ) from error


# np.load would take longer to read headers than pairs of documents: each is looked at by every bucket of
# every band.
@functools.lru_cache(maxsize=1 << 16)
def _header(path: Path, changed: int, size: int) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and type of an array in a .npy file, and where its values begin."""
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
        """One more document."""
        self._waiting.append(row)
        self._waiting_characters += len(row.text)
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
            order = np.argsort(keys, axis=1, kind="stable").astype(np.uint32)
            arrays = {
                "documents": documents,
                "keys": np.take_along_axis(keys, order.astype(np.int64), 1),
                "order": order,
            }
            for name, array in (arrays if signature is None else {**arrays, "signatures": signature}).items():
                write_array(Shard(self._path, self._written).beside(name), array)
        self.shards.append(Shard(self._path, self._written))

    def close(self) -> list[Shard]:
        """Ends the last shard and gives all of them."""
        self._end()
        if not self.shards[-1].documents and len(self.shards) > 1:
            self.shards.pop()
        return self.shards

    def abandon(self) -> None:
        """Lets go of the shard that is being written."""
        with contextlib.suppress(Exception):
            self._file.close()
        Path(f"{self._path}.parquet{PARTIAL}").unlink(missing_ok=True)


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an array in one step."""

    def write(file: BinaryIO) -> None:
        # On a file NumPy writes through C, and of a full disk says no more than how many values were written.
        content = io.BytesIO()
        np.save(content, array)
        file.write(content.getbuffer())

    write_file(path, write)


def write_file(path: Path, write: Callable[[Any], None]) -> None:
    """Writes a file in one step, whatever its size."""
    partial = path.with_name(path.name + PARTIAL)
    with open(partial, "wb") as file:
        write(file)
    _into_place(partial)


@contextlib.contextmanager
def json_lines(path: Path | None) -> Iterator[Any]:
    """A function that writes an object as a line into a compressed file, which appears when it is whole;
    without a path it does nothing.
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
    """What cleaning noted of each part of a language's sources, in the order of sources and parts."""
    return [read_json(path) for path in part_files(folder)]


def part_files(folder: Path) -> list[Path]:
    """Where cleaning noted it."""
    return sorted(folder.glob("[0-9][0-9][0-9]-*.json"))


def shards_of(folder: Path) -> list[Shard]:
    """All shards of a language, in the order of sources and parts."""
    return [
        Shard(folder / name, documents)
        for counts in part_counts(folder)
        for name, documents in counts["shards"]
    ]
