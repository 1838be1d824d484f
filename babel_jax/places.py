"""The location of files: a folder on disk, or a folder in a bucket (gs://, s3://) with a working copy on
disk.

All code uses paths on disk. `place(url)` returns the path of the working copy, in the scratch space, of a
folder in a bucket. `pull` fetches files that the working copy lacks; sending.py sends files that are written
into it. For any other path these functions do nothing, or use the disk. The bucket is authoritative: a
working copy may be lost at any moment.

BABEL_SCRATCH is the scratch space (default ~/.cache/babel-jax). A working copy belongs to one process:
another process of this machine that opens the same URL gets its own.
"""

import atexit
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from babel_jax.buckets import (
    Stored,
    clean,
    explain,
    filesystem,
    is_url,
    key,
    let_orbax_speak_s3,
    set_up_clients,
    stored_below,
    tried,
    without_secrets,
)
from babel_jax.errors import BadInput, show_as

UNFINISHED = "babel-unfinished.json"
PARTIAL = ".partial"
SMALL_BYTES = 16 * 2**20  # of a file that is fetched or sent in one request
FREE_BYTES = 2**30  # of the scratch disk that are left free for others
THREADS = 16
_STATE = "state.json"  # beside a working copy: the files of it that are in the bucket
_SLOTS = 64  # processes of one machine that work on one URL


@dataclasses.dataclass
class Copy:
    """A working copy of a folder in a bucket.

    `sent` has the size and mtime of each file that is unchanged in the bucket. Drafts are not sent.
    """

    url: str
    root: Path
    lock: BinaryIO
    sent: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    draft: bool = False
    writes: bool = False


COPIES: dict[Path, Copy] = {}
_CHANGING = threading.RLock()


def place(location: Path | str) -> Path:
    """The path of a folder: of its working copy for a URL, else the path itself.

    Nothing is fetched, and no folder is made. Raises BadInput for a URL that cannot be a folder of a bucket.
    """
    if not is_url(location):
        return Path(location)
    url = clean(str(location))
    with _CHANGING:
        # The same URL twice in one process is one working copy.
        for copy in COPIES.values():
            if copy.url == url:
                return copy.root

        # Several processes of a machine may work on the same URL: each has its own copy, with a lock on it.
        scratch = Path(os.environ.get("BABEL_SCRATCH") or Path.home() / ".cache" / "babel-jax").absolute()
        for slot in range(_SLOTS):
            above = scratch / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{slot}"
            try:
                above.mkdir(parents=True, exist_ok=True, mode=0o700)
                lock = open(above / "lock", "ab")  # noqa: SIM115 - held until the process ends
            except OSError as error:
                raise BadInput(
                    f"{scratch}: no scratch space can be made here ({error.strerror}); set BABEL_SCRATCH to "
                    "a folder"
                ) from None
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            lock.close()
        else:
            raise BadInput(f"{url}: {_SLOTS} processes of this machine work on it; wait for one of them")

        # Messages and results show the URL in place of the copy's path.
        copy = Copy(url, above / url.rsplit("/", 1)[-1], lock)
        _read_state(copy)
        COPIES[copy.root] = copy
        show_as(str(copy.root), url)
        show_as(str(above), url.rsplit("/", 1)[0])
        atexit.register(_leave, copy)
        return copy.root


def fetched(location: Path | str) -> Path:
    """The path of a folder that is read as a whole; one in a bucket is copied first."""
    folder = place(location)
    pull(folder)
    return folder


def on_disk(location: Path | str, what: str) -> Path:
    """The path of a folder that must be on disk. Raises BadInput for a URL."""
    if is_url(location):
        raise BadInput(
            f"{without_secrets(str(location))}: {what} must be a folder on disk; give one, and copy "
            "it to the bucket afterwards"
        )
    return Path(location)


def url_of(path: Path) -> str | None:
    """The URL of a path in a working copy; None for other paths, for drafts, and for partial files."""
    copy = copy_of(path)
    if copy is None or copy.draft:
        return None
    if path == copy.root:
        return copy.url
    relative = path.relative_to(copy.root)
    is_partial = any(part.endswith(PARTIAL) for part in relative.parts)
    return None if is_partial else f"{copy.url}/{relative}"


def copy_of(path: Path) -> Copy | None:
    """The working copy that contains a path; None for other paths."""
    for root, copy in list(COPIES.items()):
        if path.is_relative_to(root):
            return copy
    return None


def native(path: Path) -> Any:
    """The path for libraries that access buckets themselves (Orbax, JAX).

    For a path in a working copy it is an etils path of the URL.
    """
    from etils import epath

    url = url_of(path)
    if url is not None:
        set_up_clients()
        if url.startswith("s3://"):
            let_orbax_speak_s3()
    return path.absolute() if url is None else epath.Path(url)


def path_of(native_path: Any) -> Path:
    """The path on disk for an output of `native`, or for a path below one."""
    url = str(native_path)
    for copy in list(COPIES.values()):
        # The whole name or a part of it before a slash: gs://b/run is no part of gs://b/run2.
        if url == copy.url or url.startswith(f"{copy.url}/"):
            return copy.root / url[len(copy.url) + 1 :]
    return Path(url)


# --- reading ----------------------------------------------------------------------------------------------


def listing(folder: Path) -> dict[Path, int]:
    """The sizes of all files below a folder, on disk or in its bucket; empty if there is no folder."""
    if url_of(folder) is None:
        return {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    return {folder / name: stored.size for name, stored in sorted(stored_in(folder).items())}


def sizes_of(paths: Iterable[Path], folder: Path, stored: bool = True) -> dict[Path, int]:
    """The sizes of files below a folder, by path: on disk, or with `stored` in the bucket.

    Paths without a file are left out.
    """
    if not stored or url_of(folder) is None:
        return {path: path.stat().st_size for path in paths if path.is_file()}
    sizes = listing(folder)
    return {path: sizes[path] for path in paths if path in sizes}


def open_stored(path: Path) -> BinaryIO:
    """A file in a bucket, to be read from its start to its end. Only for a path in a working copy."""
    url = url_of(path)
    assert url is not None
    result: BinaryIO = filesystem(url).open(key(url), "rb", block_size=SMALL_BYTES, cache_type="readahead")
    return result


def pull(folder: Path, wanted: Callable[[str], bool] = lambda name: True, fresh: bool = False) -> list[Path]:
    """Fetches the files of a folder that the bucket has and the working copy lacks; returns the fetched
    files.

    wanted: chooses files by their names within the folder. fresh: empty the working copy first. Every file is
    checked by its size, and by its digest if the bucket has one. Raises BadInput if the bucket cannot be
    read, the scratch disk has no room, or the folder is incomplete.
    """
    url, copy = url_of(folder), copy_of(folder)
    if url is None or copy is None:
        return []
    # The bucket is asked each time: another process may have written since.
    stored = stored_in(folder)
    if UNFINISHED in stored:
        raise BadInput(
            f"{url}: not whole: a command is writing it, or was killed as it did; run that command again, "
            "or remove the folder"
        )
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)

    # Folders below that are unfinished are not fetched.
    unfinished = tuple(name[: -len(UNFINISHED)] for name in stored if name.endswith(f"/{UNFINISHED}"))
    missing = {}
    for name, file in stored.items():
        is_whole = not name.startswith(unfinished)
        if wanted(name) and is_whole and not _is_here(copy, folder / name, file):
            missing[name] = file

    # Checked before anything is fetched, and not found out in the middle.
    needed = sum(file.size for file in missing.values())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free - FREE_BYTES
    if needed > free:
        raise BadInput(
            f"{url}: {needed:,} bytes are to be copied to the scratch space, whose disk has "
            f"{max(free, 0):,} free; set BABEL_SCRATCH to a folder on a larger disk"
        )

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda item: _fetch(f"{url}/{item[0]}", folder / item[0], item[1]), missing.items()))
    # Only now, when all files came: a fetch that failed leaves no record of a file.
    for name, file in missing.items():
        note(copy, folder / name, file.version)
    if missing or fresh:
        write_state(copy)
    return [folder / name for name in missing]


def fetch_part(folder: Path, other: Path, wanted: Callable[[Path], bool]) -> None:
    """Fetches files of a folder in a bucket into another folder; `wanted` chooses them by their paths."""
    url = url_of(folder)
    assert url is not None
    for name, stored in stored_in(folder).items():
        if wanted(Path(name)):
            _fetch(f"{url}/{name}", other / name, stored)


def stored_in(folder: Path) -> dict[str, Stored]:
    """The files in the bucket below a folder of a working copy, by their relative names."""
    url = url_of(folder)
    assert url is not None
    return stored_below(url)


def _is_here(copy: Copy, path: Path, stored: Stored) -> bool:
    """True if the working copy has this version of a file, unchanged."""
    name = str(path.relative_to(copy.root))
    if not path.is_file() or copy.versions.get(name) != stored.version:
        return False
    return copy.sent.get(name) == state_of(path)


def _fetch(url: str, path: Path, stored: Stored) -> None:
    """Copies a file here; a failure leaves no half-written file."""
    partial = path.with_name(path.name + PARTIAL)

    def fetch() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        filesystem(url).get_file(key(url), str(partial))
        # A connection that broke may give fewer bytes without an error. Then the fetch is repeated.
        size = partial.stat().st_size
        if size != stored.size:
            raise ConnectionError(f"{size} of {stored.size} bytes came")
        if stored.md5 is not None:
            with open(partial, "rb") as file:
                if hashlib.file_digest(file, "md5").hexdigest() != stored.md5:
                    raise ConnectionError("other bytes came than the bucket holds")

    with explain(url):
        try:
            tried(fetch)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


# --- The record of a working copy. ------------------------------------------------------------------------


def state_of(path: Path) -> list[int]:
    """The size and time of change of a file on disk: if they differ, the file was changed."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def note(copy: Copy, path: Path, version: str = "") -> None:
    """Records that the bucket has a file as it is here, with this version."""
    name = str(path.relative_to(copy.root))
    copy.sent[name] = state_of(path)
    copy.versions[name] = version


def _read_state(copy: Copy) -> None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        state = json.loads((copy.root.parent / _STATE).read_bytes())
        copy.sent, copy.versions = dict(state["sent"]), dict(state["versions"])


def write_state(copy: Copy) -> None:
    """Writes the record of a working copy, for the next process that uses it."""
    partial = copy.root.parent / (_STATE + PARTIAL)
    partial.write_text(json.dumps({"url": copy.url, "sent": copy.sent, "versions": copy.versions}))
    os.replace(partial, copy.root.parent / _STATE)


def _leave(copy: Copy) -> None:
    """Runs at the end of the process: removes working copies that were written (and sent), and keeps those
    that were only read.
    """
    if copy.writes:
        shutil.rmtree(copy.root, ignore_errors=True)
