"""Copies parameters from folder to folder in pieces: the memory depends on the size of a piece, not of the
model.
"""

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from babel_jax.errors import BadInput
from babel_jax.model.shapes import Shape
from babel_jax.model_folders.safetensors_files import Specs
from babel_jax.new_folders import Progress
from babel_jax.progress import Work

# A piece is also a chunk of an Orbax folder, so its size is no setting: the layout must not depend on the
# memory of the machine that converts.
PIECE_BYTES = 32 * 2**20
_PROGRAM_BYTES = 800 * 2**20  # memory of Python, JAX and Orbax
_BYTES_FOR_EACH_WORKER = 8 * PIECE_BYTES  # to read a piece, change it in float32 (noise) and write it
_MOST_WORKERS = 4
_BYTES_BETWEEN_SYNCS = 2**30


class Piece(NamedTuple):
    """Rows `start` to `stop` of a tensor."""

    name: str
    start: int
    stop: int


@runtime_checkable
class TensorSource(Protocol):
    """Tensors by their Hugging Face names, read in pieces by several threads."""

    def dtype(self, name: str) -> np.dtype: ...

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray: ...


class TensorSink(Protocol):
    """Tensors being written in pieces by several threads."""

    def write(self, name: str, start: int, values: np.ndarray) -> None: ...

    def sync(self) -> None: ...

    def together(self, names: Iterable[str]) -> list[str]: ...

    def close(self) -> None: ...


def rows_of_piece(shape: Shape, dtype: np.dtype) -> int:
    """The rows of a tensor in one piece: at least one row, at most about PIECE_BYTES. The last piece may be
    shorter by up to one row per piece.

    Pieces are of nearly equal size, because a chunk of an Orbax folder takes its full size on disk even if it
    has few rows.
    """
    row_bytes = max(1, int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize)
    number = math.ceil(shape[0] / max(1, PIECE_BYTES // row_bytes))
    return math.ceil(shape[0] / number)


def pieces(name: str, shape: Shape, dtype: np.dtype) -> list[Piece]:
    """All pieces of a tensor."""
    rows = rows_of_piece(shape, dtype)
    return [Piece(name, start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def workers_within(memory_limit: int) -> int:
    """The number of pieces that may be processed at once. Raises BadInput if there is no memory for one."""
    workers = (memory_limit - _PROGRAM_BYTES) // _BYTES_FOR_EACH_WORKER
    if workers < 1:
        least = (_PROGRAM_BYTES + _BYTES_FOR_EACH_WORKER) / 2**30
        raise BadInput(
            f"--memory-limit {memory_limit / 2**30:.2f} GiB is too little; give at least {least:.2f}"
        )
    return min(workers, _MOST_WORKERS)


def stream(
    specs: Specs,
    move: Callable[[Piece], None],
    sink: TensorSink,
    progress: Progress,
    memory_limit: int,
    all_written: Callable[[], None] = lambda: None,
) -> None:
    """Writes the tensors of `specs` into `sink`, except those in `progress`; `move` writes one piece.

    Tensors are recorded as done when they are on disk, about once per GiB. Several pieces are read and
    written at once. `all_written` is called when the last piece is written, before the wait for the disk.
    """
    sizes = {
        name: int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for name, (shape, dtype) in specs.items()
    }
    done = sum(size for name, size in sizes.items() if name in progress.done)
    bar = Work[Any]("writing the model", total=sum(sizes.values()), unit="B", initial=done, keep=True)

    def move_and_count(piece: Piece) -> None:
        move(piece)
        rows = specs[piece.name][0][0]
        bar.update(sizes[piece.name] * (piece.stop - piece.start) // rows)

    # Tensors count as done only after a sync, so a stop loses at most one batch.
    remaining = [name for name in specs if name not in progress.done]
    with bar, _workers(workers_within(memory_limit)) as submit:
        while remaining:
            batch: list[str] = []
            while remaining and sum(sizes[name] for name in batch) < _BYTES_BETWEEN_SYNCS:
                batch.append(remaining.pop(0))
            # `submit` returns when all pieces of the batch are written.
            submit(
                move_and_count, itertools.chain.from_iterable(pieces(name, *specs[name]) for name in batch)
            )
            if not remaining:
                all_written()
            sink.sync()
            progress.add(batch)


def digests(specs: Specs, read: Callable[[Piece], np.ndarray], memory_limit: int) -> dict[str, str]:
    """The sha256 of every tensor's bytes."""
    hexdigests: dict[str, str] = {}

    def digest(name: str) -> None:
        hashed = hashlib.sha256()
        for piece in pieces(name, *specs[name]):
            hashed.update(np.ascontiguousarray(read(piece)).reshape(-1).view(np.uint8).data)
        hexdigests[name] = hashed.hexdigest()

    with _workers(workers_within(memory_limit)) as submit:
        submit(digest, Work("verifying", specs, unit="tensors"))
    return {name: hexdigests[name] for name in specs}


@contextlib.contextmanager
def _workers(number: int) -> Iterator[Callable[[Callable[..., None], Iterable[Any]], None]]:
    """A function that calls another one for each of many arguments, on `number` threads, and returns when all
    calls are done.
    """
    with ThreadPoolExecutor(number) as executor:

        def submit(function: Callable[..., None], arguments: Iterable[Any]) -> None:
            running: set[Future[None]] = set()
            for argument in arguments:
                # No more than `number` arguments are taken at once: a piece is in memory from then on.
                if len(running) == number:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        future.result()
                running.add(executor.submit(function, argument))
            for future in running:
                future.result()

        yield submit


def files_now(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file of a folder. A later comparison shows if the source changed while
    it was read.
    """
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            status = file.stat()
            files[str(file.relative_to(folder))] = (status.st_size, status.st_mtime_ns)
    return files


def fingerprint(**what: object) -> str:
    """A digest of everything that an output depends on."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def check_unchanged(folder: Path, before: Mapping[str, tuple[int, int]]) -> None:
    """Raises BadInput if a file of the source was added, removed or changed since `before`."""
    now = files_now(folder)
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        raise BadInput(
            f"{folder}: {', '.join(changed[:3])} changed while it was read; run the command again when "
            "nothing writes there"
        )
