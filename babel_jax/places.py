"""Where files are: in a folder on disk, or in a bucket (gs://, s3://), for which a folder on disk stands in.

All code names files by paths on disk. `place(url)` gives the path of a folder in the scratch space that is
the working copy of a folder in a bucket. What the working copy lacks is fetched by `pull`; what is written
into it is sent by sending.py. For any other path these functions do nothing, or look at the disk. The bucket
is what holds: a working copy may be lost at any moment.

BABEL_SCRATCH is the scratch space (default ~/.cache/babel-jax). A working copy belongs to one process:
another process of this machine that opens the same URL has one of its own.
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
FREE_BYTES = 2**30  # of the scratch disk that are left to others
THREADS = 16
_STATE = "state.json"  # beside a working copy: what of it is in the bucket
_SLOTS = 64  # processes of one machine that work on one URL


@dataclasses.dataclass
class Copy:
    """A working copy of a folder in a bucket.

    `sent` has size and mtime of each file that is the same in the bucket. Drafts are not sent.
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


def place(where: Path | str) -> Path:
    """The path of a folder: that of its working copy for a URL, the path itself for any other.

    Nothing is fetched, and no folder is made. Raises BadInput for a URL that can be no folder of a bucket.
    """
    if not is_url(where):
        return Path(where)
    url = clean(str(where))
    with _CHANGING:
        for copy in COPIES.values():
            if copy.url == url:
                return copy.root
        scratch = Path(os.environ.get("BABEL_SCRATCH") or Path.home() / ".cache" / "babel-jax").absolute()
        for slot in range(_SLOTS):
            above = scratch / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{slot}"
            try:
                above.mkdir(parents=True, exist_ok=True, mode=0o700)
                lock = open(above / "lock", "ab")  # noqa: SIM115 - held as long as the process lives
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
        copy = Copy(url, above / url.rsplit("/", 1)[-1], lock)
        _read_state(copy)
        COPIES[copy.root] = copy
        show_as(str(copy.root), url)
        show_as(str(above), url.rsplit("/", 1)[0])
        atexit.register(_leave, copy)
        return copy.root


def fetched(where: Path | str) -> Path:
    """The path of a folder that is read as a whole; one in a bucket is copied here first."""
    folder = place(where)
    pull(folder)
    return folder


def on_disk(where: Path | str, what: str) -> Path:
    """The path of a folder that must be on disk. Raises BadInput for a URL."""
    if is_url(where):
        raise BadInput(
            f"{without_secrets(str(where))}: {what} must be a folder on disk; give one, and copy it to the "
            "bucket afterwards"
        )
    return Path(where)


def url_of(path: Path) -> str | None:
    """The URL that a path in a working copy stands for; None for any other path, for drafts, and for the mark
    of an unfinished folder.
    """
    copy = copy_of(path)
    if (
        copy is None
        or copy.draft
        or any(part.endswith(PARTIAL) for part in path.relative_to(copy.root).parts)
    ):
        return None
    return f"{copy.url}/{path.relative_to(copy.root)}" if path != copy.root else copy.url


def copy_of(path: Path) -> Copy | None:
    """The working copy that a path is in; None for any other path."""
    if not COPIES:
        return None
    return next(
        (copy for root, copy in list(COPIES.items()) if path == root or path.is_relative_to(root)), None
    )


def native(path: Path) -> Any:
    """The path for libraries that speak to buckets themselves (Orbax, JAX).

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
    """The path on disk for one that `native` gave, or one below it."""
    url = str(native_path)
    for copy in list(COPIES.values()):
        if url == copy.url or url.startswith(f"{copy.url}/"):
            return copy.root / url[len(copy.url) + 1 :]
    return Path(url)


# --- reading ----------------------------------------------------------------------------------------------


def listing(folder: Path) -> dict[Path, int]:
    """The sizes of all files below a folder, on disk or in the bucket that it stands for; none where there is
    no folder.
    """
    if url_of(folder) is None:
        return {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    return {folder / name: found.size for name, found in sorted(stored_in(folder).items())}


def sizes_of(paths: Iterable[Path], folder: Path, stored: bool = True) -> dict[Path, int]:
    """The sizes, by path, of files below a folder: on disk, or with `stored` in the bucket.

    Paths without a file are left out.
    """
    if not stored or url_of(folder) is None:
        return {path: path.stat().st_size for path in paths if path.is_file()}
    found = listing(folder)
    return {path: found[path] for path in paths if path in found}


def open_stored(path: Path) -> BinaryIO:
    """A file of a bucket, to be read from its begin to its end. For a path in a working copy alone."""
    url = url_of(path)
    assert url is not None
    return filesystem(url).open(key(url), "rb", block_size=SMALL_BYTES, cache_type="readahead")


def pull(folder: Path, wanted: Callable[[str], bool] = lambda name: True, fresh: bool = False) -> list[Path]:
    """Fetches what the bucket has of a folder, and the working copy has not; gives the files that were
    fetched.

    `wanted` says by its name within the folder which file is needed. With `fresh` the working copy is emptied
    first. Every file is checked by its size, and by its digest where the bucket knows one. Raises BadInput
    where the bucket cannot be read, the scratch disk has no room, or the folder is not whole.
    """
    url, copy = url_of(folder), copy_of(folder)
    if url is None or copy is None:
        return []
    stored = stored_in(folder)
    if UNFINISHED in stored:
        raise BadInput(
            f"{url}: not whole: a command is writing it, or was killed as it did; run that command again, "
            "or remove the folder"
        )
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    begun = {name[: -len(UNFINISHED)] for name in stored if name.endswith(f"/{UNFINISHED}")}
    missing = {}
    for name, found in stored.items():
        if (
            wanted(name)
            and not any(name.startswith(other) for other in begun)
            and not _is_here(copy, folder / name, found)
        ):
            missing[name] = found
    needed = sum(found.size for found in missing.values())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free - FREE_BYTES
    if needed > free:
        raise BadInput(
            f"{url}: {needed:,} bytes are to be copied to the scratch space, whose disk has "
            f"{max(free, 0):,} free; set BABEL_SCRATCH to a "
            "folder on a larger disk"
        )
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda item: _fetch(f"{url}/{item[0]}", folder / item[0], item[1]), missing.items()))
    for name, found in missing.items():
        note(copy, folder / name, found.version)
    if missing or fresh:
        write_state(copy)
    return [folder / name for name in missing]


def fetch_part(folder: Path, other: Path, wanted: Callable[[Path], bool]) -> None:
    """Fetches what the bucket has of a folder into another one; `wanted` says by its path which file is
    needed.
    """
    url = url_of(folder)
    assert url is not None
    for name, found in stored_in(folder).items():
        if wanted(Path(name)):
            _fetch(f"{url}/{name}", other / name, found)


def stored_in(folder: Path) -> dict[str, Stored]:
    """The files of the bucket below a folder of a working copy, by their names there."""
    url = url_of(folder)
    assert url is not None
    return stored_below(url)


def _is_here(copy: Copy, path: Path, found: Stored) -> bool:
    name = str(path.relative_to(copy.root))
    return (
        path.is_file() and copy.versions.get(name) == found.version and copy.sent.get(name) == state_of(path)
    )


def _fetch(url: str, path: Path, found: Stored) -> None:
    """Copies a file here, whole or not at all."""
    partial = path.with_name(path.name + PARTIAL)

    def fetch() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        filesystem(url).get_file(key(url), str(partial))
        size = partial.stat().st_size
        if size != found.size:
            raise ConnectionError(f"{size} of {found.size} bytes came")
        if found.md5 is not None:
            with open(partial, "rb") as file:
                if hashlib.file_digest(file, "md5").hexdigest() != found.md5:
                    raise ConnectionError("other bytes came than the bucket holds")

    with explain(url):
        try:
            tried(fetch)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


# --- what a working copy is known to hold -----------------------------------------------------------------


def state_of(path: Path) -> list[int]:
    """The size and time of change of a file on disk: if they differ, the file was changed."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def note(copy: Copy, path: Path, version: str = "") -> None:
    """Notes that a file is in the bucket, with that version, as it is here."""
    name = str(path.relative_to(copy.root))
    copy.sent[name] = state_of(path)
    copy.versions[name] = version


def _read_state(copy: Copy) -> None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads((copy.root.parent / _STATE).read_bytes())
        copy.sent, copy.versions = dict(found["sent"]), dict(found["versions"])


def write_state(copy: Copy) -> None:
    """Keeps what was noted, for the next process that has this working copy."""
    partial = copy.root.parent / (_STATE + PARTIAL)
    partial.write_text(json.dumps({"url": copy.url, "sent": copy.sent, "versions": copy.versions}))
    os.replace(partial, copy.root.parent / _STATE)


def _leave(copy: Copy) -> None:
    """Runs at the end of the process: removes working copies that were written and sent, and keeps those that
    were read, for the next.
    """
    if copy.writes:
        shutil.rmtree(copy.root, ignore_errors=True)
