"""Moving parameters from folder to folder in pieces: memory depends on the size of a
piece, not of the model.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from babel_jax.errors import BadInput
from babel_jax.model_folders.layout import Shape
from babel_jax.model_folders.safetensors_files import Specs
from babel_jax.new_folders import Progress

# A piece is also a chunk of an Orbax folder, so its size is no setting: one layout, whatever memory the
# converting machine had.
PIECE_BYTES = 32 * 2**20
_PROGRAM_BYTES = 800 * 2**20  # what Python, JAX and Orbax take by themselves
_BYTES_FOR_EACH_WORKER = 8 * PIECE_BYTES  # read, changed in float32 (noise) and written
_MOST_WORKERS = 4
_BYTES_BETWEEN_SYNCS = 2**30


class Piece(NamedTuple):
    """Rows `start` to `stop` of a tensor."""

    name: str
    start: int
    stop: int


@runtime_checkable
class Source(Protocol):
    """Tensors by their Hugging Face names, read in pieces from several threads."""

    def dtype(self, name: str) -> np.dtype: ...

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray: ...


class Sink(Protocol):
    """Tensors being written, in pieces, from several threads."""

    def write(self, name: str, start: int, values: np.ndarray) -> None: ...

    def sync(self) -> None: ...

    def together(self, names: Iterable[str]) -> list[str]: ...

    def close(self) -> None: ...


def rows_of_piece(shape: Shape, dtype: np.dtype) -> int:
    """How many rows of a tensor make a piece: at least one, at most about PIECE_BYTES, and less than one row
    a piece is missing at the end.

    A chunk of an Orbax folder takes its full size on the disk, however few rows are left for it.
    """
    row_bytes = max(1, int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize)
    number = math.ceil(shape[0] / max(1, PIECE_BYTES // row_bytes))
    return math.ceil(shape[0] / number)


def pieces(name: str, shape: Shape, dtype: np.dtype) -> list[Piece]:
    """All of a tensor."""
    rows = rows_of_piece(shape, dtype)
    return [Piece(name, start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def workers_within(memory_limit: int) -> int:
    """How many pieces may be on their way at once. Raises BadInput when not even one fits."""
    workers = (memory_limit - _PROGRAM_BYTES) // _BYTES_FOR_EACH_WORKER
    if workers < 1:
        least = (_PROGRAM_BYTES + _BYTES_FOR_EACH_WORKER) / 2**30
        raise BadInput(
            f"--memory-limit {memory_limit / 2**30:.2f} GiB is too little; give at least {least:.2f}"
        )
    return min(workers, _MOST_WORKERS)


def stream(
    specs: Specs, read: Callable[[Piece], np.ndarray], sink: Sink, progress: Progress, memory_limit: int
) -> None:
    """Writes the tensors of `specs` into `sink`, but those that `progress` has already; `read` gives their
    pieces.

    Tensors are noted as done when they are on disk, about once in a GiB. Reading and writing of several
    pieces overlap.
    """
    sizes = {
        name: int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for name, (shape, dtype) in specs.items()
    }
    bar = tqdm(total=sum(sizes.values()), desc="write tensors", unit="B", unit_scale=True, disable=None)
    bar.update(sum(size for name, size in sizes.items() if name in progress.done))

    def move(piece: Piece) -> None:
        values = read(piece)
        sink.write(piece.name, piece.start, values)
        bar.update(values.nbytes)

    left = [name for name in specs if name not in progress.done]
    with bar, _workers(workers_within(memory_limit)) as submit:
        while left:
            batch: list[str] = []
            while left and sum(sizes[name] for name in batch) < _BYTES_BETWEEN_SYNCS:
                batch.append(left.pop(0))
            submit(move, (piece for name in batch for piece in pieces(name, *specs[name])))
            sink.sync()
            progress.add(batch)


def digests(specs: Specs, read: Callable[[Piece], np.ndarray], memory_limit: int) -> dict[str, str]:
    """The sha256 of every tensor's bytes."""
    found: dict[str, str] = {}

    def digest(name: str) -> None:
        hashed = hashlib.sha256()
        for piece in pieces(name, *specs[name]):
            hashed.update(np.ascontiguousarray(read(piece)).reshape(-1).view(np.uint8).data)
        found[name] = hashed.hexdigest()

    with _workers(workers_within(memory_limit)) as submit:
        submit(digest, tqdm(specs, "verify", unit=" tensors", leave=False, disable=None))
    return {name: found[name] for name in specs}


@contextlib.contextmanager
def _workers(number: int) -> Iterator[Callable[[Callable, Iterator | tqdm], None]]:
    """A function that calls another with each of many arguments, on `number` threads, and returns when all
    are done.
    """
    with ThreadPoolExecutor(number) as executor:

        def submit(function: Callable, arguments: Iterator | tqdm) -> None:
            running: set[Future] = set()
            for argument in arguments:
                if len(running) == number:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        future.result()
                running.add(executor.submit(function, argument))
            for future in running:
                future.result()

        yield submit


def files_now(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file of a folder, by which a source that changed while it was read is
    found out.
    """
    found = {
        str(file.relative_to(folder)): file.stat() for file in sorted(folder.rglob("*")) if file.is_file()
    }
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def fingerprint(**what: object) -> str:
    """A short name for all that an output depends on."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def check_unchanged(folder: Path, before: Mapping[str, tuple[int, int]]) -> None:
    """Raises BadInput when a file of the source came, went or changed since `before`."""
    now = files_now(folder)
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        raise BadInput(
            f"{folder}: {', '.join(changed[:3])} changed while it was read; run the command again when "
            "nothing writes there"
        )
