"""Lists of SHA-256 digests beside files: written when a folder is made, and checked later.

A list is a file SHA256SUMS (or SHA256SUMS.SOMETHING, for the files of one of several processes) in the format
of sha256sum, so that `sha256sum -c SHA256SUMS` can check it too. It covers files of its folder and of folders
below, but no hidden files.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from babel_jax.errors import BadInput, one_line
from babel_jax.files import make_folder, open_regular, read_text, write_text
from babel_jax.new_folders import MARK
from babel_jax.places import UNFINISHED, listing, open_stored, pull, sizes_of, url_of

SUMS = "SHA256SUMS"
EDITABLE = ("README.md",)  # files that the user is asked to edit; their digests are not compared
MOST_LIST_BYTES = 256 * 2**20  # some two million files
_THREADS = min(8, os.cpu_count() or 1)  # hashing leaves Python's lock, so threads share the cores
_READ_BYTES = 2**18  # at a time
_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")


@dataclasses.dataclass(frozen=True)
class Checked:
    """The result of a check: the number of files, their bytes, and the damaged files, each with the
    reason.
    """

    files: int
    bytes: int
    damaged: Mapping[Path, str]


def file_sum(path: Path, below: Path | None = None, stored: bool = True) -> str:
    """The SHA-256 of a regular file, in hex; the memory does not depend on its size. `below` is as for
    `open_regular`.

    For a file in a bucket, the stored bytes are read; with `stored` False, those of the working copy.
    """
    with open_regular(path, below) if not stored or url_of(path) is None else open_stored(path) as file:
        # By its type a BinaryIO has no readinto; every file that is opened has.
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def is_list(path: Path) -> bool:
    """True if a file is a list of digests, by its name."""
    return path.name == SUMS or path.name.startswith(f"{SUMS}.")


def files_below(folder: Path) -> list[Path]:
    """The files below a folder, without lists, hidden files and the mark of an unfinished folder."""
    visible = [path for path in listing(folder) if not path.name.startswith(".")]
    return [path for path in visible if not is_list(path) and path.name not in (MARK, UNFINISHED)]


class _Growth:
    """How many bytes are written without a gap from the start of a file, while several threads write it, each
    at its own place.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._written: dict[int, int] = {}  # beyond a gap: the start and end of each part
        self._length = 0
        self._abandoned = False

    def add(self, start: int, stop: int) -> None:
        """Notes that the bytes from `start` to before `stop` are written."""
        with self._changed:
            if stop > start:
                self._written[start] = stop
            # A part that begins where the known length ends extends it; later parts wait for theirs.
            while self._length in self._written:
                self._length = self._written.pop(self._length)
            self._changed.notify_all()

    def finish(self, abandoned: bool = False) -> None:
        """Notes that the whole file is written, or that nobody needs its digest."""
        with self._changed:
            self._length, self._abandoned = sys.maxsize, abandoned
            self._changed.notify_all()

    def longer_than(self, length: int) -> int:
        """Waits until more than `length` bytes are written without a gap; returns how many.

        Raises CancelledError if nobody needs the digest.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._length > length)
            if self._abandoned:
                raise concurrent.futures.CancelledError
            return self._length


def _sum_as_it_grows(path: Path, growth: _Growth) -> str:
    """The SHA-256 of a file of its final size, computed while its bytes are written."""
    digest, done = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        while done < size:
            # Only bytes that have their last values may be read.
            length = min(growth.longer_than(done), size)
            count = file.readinto(buffer[: length - done])
            if not count:
                raise OSError(f"{path} became shorter while it was read")
            digest.update(buffer[:count])
            done += count
    return digest.hexdigest()


class EarlySums:
    """Digests of files that are computed while the process writes them or waits for the disk. As a context
    manager: at its end, files that were not begun are left out.
    """

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS)
        self._begun: dict[Path, tuple[tuple[int, int], concurrent.futures.Future[str]]] = {}
        self._growing: dict[Path, tuple[_Growth, concurrent.futures.Future[str]]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "EarlySums":
        return self

    def __exit__(self, *_: object) -> None:
        for growth, _future in self._growing.values():
            growth.finish(abandoned=True)
        self._pool.shutdown(cancel_futures=True)

    def written(self, file: Path, start: int, stop: int) -> None:
        """Notes that the bytes from `start` to before `stop` of a file have their last values; the file has
        its last size. Threads may call this.
        """
        with self._lock:
            # The first bytes of a file start the thread that follows it.
            if file not in self._growing:
                growth = _Growth()
                self._growing[file] = growth, self._pool.submit(_sum_as_it_grows, file, growth)
        self._growing[file][0].add(start, stop)

    def begin(self, files: Iterable[Path]) -> None:
        """Begins to compute the digests of files that are written, though perhaps not yet on disk."""
        for file in files:
            if file in self._growing:
                growth, digest = self._growing[file]
                growth.finish()
            else:
                digest = self._pool.submit(file_sum, file)
            self._begun[file] = (_state(file), digest)

    def sum_of(self, file: Path) -> str:
        """The digest of a file; computed anew if the file has another size or time than at its `begin`."""
        state, begun = self._begun.get(file, (None, None))
        if begun is None or state != _state(file):
            return file_sum(file)
        return begun.result()


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def write_sums(
    folder: Path,
    files: Iterable[Path] | None = None,
    name: str = SUMS,
    sum_of: Callable[[Path], str] = file_sum,
) -> None:
    """Writes the list `name` of some files below a folder; without `files`, of all files."""
    chosen = sorted(files_below(folder) if files is None else files)
    # Another library may write the folder into a bucket: then its working copy does not exist yet.
    make_folder(folder)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(sum_of, chosen))
    lines = [_line(digest, path.relative_to(folder)) for path, digest in zip(chosen, sums, strict=True)]
    write_text(folder / name, "".join(lines))


def merge_sums(folder: Path) -> None:
    """Merges the lists of a folder into one."""
    lists = sorted(folder.glob(f"{SUMS}.*"))
    digests: dict[Path, str] = {}
    for part in lists:
        digests |= read_sums(part)
    lines = [_line(digest, path.relative_to(folder)) for path, digest in sorted(digests.items())]
    write_text(folder / SUMS, "".join(lines))
    for part in lists:
        part.unlink()


def read_sums(path: Path) -> dict[Path, str]:
    """The digests of a list, by the paths of the files.

    Raises BadInput for a damaged list, and for a file outside the list's folder.
    """
    digests = {}
    for number, line in enumerate(read_text(path, most_bytes=MOST_LIST_BYTES).split("\n")[:-1], 1):
        # A list may be of a stranger: a name must not lead out of its folder.
        match = _LINE.fullmatch(line)
        name = Path(_unescaped(match[3]) if match[1] else match[3]) if match else Path()
        if match is None or name.is_absolute() or ".." in name.parts:
            raise BadInput(
                f"{path}:{number}: no digest and name of a file below this folder; the list is damaged"
            )
        digests[path.parent / name] = match[2]
    return digests


def lists_below(folder: Path) -> list[Path]:
    """The lists in a folder and below."""
    pull(folder, lambda name: is_list(Path(name)))
    return [path for path in listing(folder) if is_list(path)]


def check_sums(
    lists: Sequence[Path],
    below: Path,
    mine: Callable[[Mapping[Path, int]], Iterable[Path]] | None = None,
    seen: Callable[[int], object] = lambda size: None,
    stored: bool = True,
) -> Checked:
    """Compares files with lists of digests. Links that lead out of the folder `below` are not followed.

    mine: chooses, of all files with their sizes, those to read, so that several processes can share them.
    seen: receives the bytes of each file read. For a folder in a bucket, the stored files are read; with
    `stored` False, those of the working copy.
    """
    wanted: dict[Path, str] = {}
    damaged: dict[Path, str] = {}
    for path in lists:
        try:
            wanted |= read_sums(path)
        except (BadInput, OSError) as error:
            damaged[path] = one_line(error)

    # People write on the card of a model; it may have other bytes than were written.
    wanted = {path: digest for path, digest in wanted.items() if path.name not in EDITABLE}

    # A missing file is damaged too; no digest of it is computed.
    sizes = sizes_of(wanted, below, stored)
    damaged |= {path: "missing" for path in wanted if path not in sizes}
    chosen = list(sizes if mine is None else mine(sizes))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        reasons = pool.map(lambda path: _difference(path, wanted[path], below, stored), chosen)
        for path, reason in zip(chosen, reasons, strict=True):
            seen(sizes[path])
            if reason is not None:
                damaged[path] = reason
    return Checked(len(chosen), sum(sizes[path] for path in chosen), damaged)


def unlisted(folder: Path, lists: Sequence[Path]) -> list[Path]:
    """The files below a folder that are in none of the lists that can be read."""
    listed: set[Path] = set()
    for path in lists:
        listed.update(read_sums(path))
    return [path for path in files_below(folder) if path not in listed]


def _difference(path: Path, wanted: str, below: Path, stored: bool) -> str | None:
    try:
        return None if file_sum(path, below, stored) == wanted else "not the bytes that were written"
    except Exception as error:  # the packages behind fsspec raise errors of many types
        return one_line(error)


def _line(digest: str, name: Path) -> str:
    text = str(name)
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == text else chr(92)}{digest}  {escaped}\n"


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: {"n": "\n", "r": "\r"}.get(match[1], match[1]), text)
