"""Sends files to buckets: from a working copy (places.py) to the bucket that it stands for.

`push` sends a file (called by `files.write_bytes`); `begin` and `publish` send a folder that must appear as a
whole (called by new_folders.py); `settle` sends all changes. For paths outside working copies these functions
do nothing.

A bucket has no rename. So while a folder is being sent, it has the file UNFINISHED in the bucket. The files
by which readers recognize a folder (LAST) are sent last, and readers here refuse a folder with UNFINISHED.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from babel_jax.buckets import LEASE, PROBE, SCHEMES, Stored, explain, filesystem, key, stored_below, tried
from babel_jax.errors import BadInput
from babel_jax.places import (
    COPIES,
    PARTIAL,
    SMALL_BYTES,
    THREADS,
    UNFINISHED,
    copy_of,
    listing,
    note,
    place,
    pull,
    state_of,
    url_of,
    write_state,
)

LAST = ("config.json", "prepared.json")


def output(location: Path | str) -> Path:
    """The path of a folder of results, which may be in a bucket, with its files except large ones.

    Raises BadInput if nothing can be written there.
    """
    folder = place(location)
    if url_of(folder) is not None:
        check_access(folder)
        sizes = {str(path.relative_to(folder)): size for path, size in listing(folder).items()}
        pull(folder, lambda name: sizes[name] <= SMALL_BYTES, fresh=True)
    return folder


def check_access(folder: Path) -> None:
    """Raises BadInput unless files can be written, replaced, read back and deleted in the bucket of a working
    copy's folder.

    Nothing is left there: if a kill leaves a probe, it does not count as a file of the folder
    (`buckets.stored_below`).
    """
    if (url := url_of(folder)) is None:
        return
    if not url.startswith(tuple(f"{scheme}://" for scheme in SCHEMES)):
        raise BadInput(
            f"{url}: files can be written to {' and '.join(f'{scheme}://' for scheme in SCHEMES)} alone; "
            "give one of these"
        )
    # Raises BadInput if the bucket does not exist or cannot be listed.
    stored_below(url)

    # Storage with stale reads would show the first of the two writes.
    probe = f"{url}/{PROBE}{os.urandom(8).hex()}"
    with explain(url, "written"):
        for data in (b"1", b"2"):
            tried(lambda data=data: filesystem(url).pipe_file(key(probe), data))  # type: ignore[misc]
    seen = None
    with explain(url), contextlib.suppress(FileNotFoundError):
        seen = tried(lambda: filesystem(url).cat_file(key(probe)))
    _delete(probe)
    if seen != b"2":
        raise BadInput(
            f"{url}: what was just written is not what is read back; a run needs storage that shows a write "
            "at once, as Google's and Amazon's own do; give another bucket, or a folder on disk"
        )


def push(path: Path) -> None:
    """Sends one file of a working copy to the bucket. The bucket has it when this returns."""
    url, copy = url_of(path), copy_of(path)
    if url is not None and copy is not None:
        _send(path, url)
        note(copy, path)
        copy.writes = True


def remove(path: Path) -> None:
    """Deletes a file, and if it is in a working copy, also the file in the bucket."""
    url, copy = url_of(path), copy_of(path)
    path.unlink(missing_ok=True)
    if url is not None and copy is not None:
        copy.sent.pop(str(path.relative_to(copy.root)), None)
        _delete(url)


def move(folder: Path, other: Path) -> None:
    """Renames a folder, on disk or in the bucket, and removes an older folder of that name.

    In a bucket, files are copied one by one.
    """
    url, new = url_of(folder), url_of(other)
    shutil.rmtree(other, ignore_errors=True)
    if url is None or new is None:
        folder.rename(other)
        return
    shutil.rmtree(folder, ignore_errors=True)
    with explain(url, "renamed"):
        system = filesystem(url)
        # First all copies, then the deletions: a kill between them loses nothing.
        for name in stored_below(url):
            tried(functools.partial(system.cp_file, key(f"{url}/{name}"), key(f"{new}/{name}")))
        for name in stored_below(url):
            _delete(f"{url}/{name}")


def settle(folder: Path, left_out: Iterable[str] = ()) -> None:
    """Sends the changed files of a working copy's folder, except the folders in `left_out`, which other
    libraries write.

    Nothing is deleted in the bucket: someone may have cleaned the scratch disk, so that files are missing
    here.
    """
    copy = copy_of(folder)
    if copy is None or url_of(folder) is None:
        return
    # Files with another size or time than when they were sent.
    files = files_of(folder, tuple(left_out))
    changed = [path for path in files if copy.sent.get(str(path.relative_to(copy.root))) != state_of(path)]
    for path in sorted(changed, key=lambda path: path.name in LAST):
        push(path)


def settle_all() -> None:
    """Settles all working copies that this process has written to."""
    for copy in list(COPIES.values()):
        if copy.writes and not copy.draft and copy.root.is_dir():
            settle(copy.root, ("checkpoints", "compiled"))


def is_taken(folder: Path) -> bool:
    """True if the bucket has any object at the path of a new folder, other than an unfinished folder.

    Removes old files here.
    """
    url = url_of(folder)
    if url is None:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    stored = stored_below(url)
    return bool(stored) and UNFINISHED not in stored


def begin(folder: Path) -> None:
    """Records in the bucket that a folder is being made, before hours of work.

    Raises BadInput if nothing may be written there, and if another living process of this machine makes the
    folder.
    """
    if (url := url_of(folder)) is None:
        return
    check_access(folder)
    mark, name = _maker(), key(f"{url}/{UNFINISHED}")
    with explain(url, "written"), contextlib.suppress(FileNotFoundError):
        # The mark of another process: of a killed one it is replaced, of a living one it is respected.
        other = json.loads(tried(lambda: filesystem(url).cat_file(name)))
        is_another = other.get("host") == mark["host"] and other.get("process") != mark["process"]
        if is_another and _is_alive(other.get("process")):
            raise BadInput(
                f"{url}: process {other['process']} of this machine is writing it; wait for that one"
            )
    with explain(url, "written"):
        tried(lambda: filesystem(url).pipe_file(name, json.dumps(mark).encode()))


def publish(partial: Path, folder: Path) -> None:
    """Sends a complete folder to the bucket at the URL of `folder`. It is complete there after the last file.

    Files that are the same there are not sent again.
    """
    url, copy = url_of(folder), copy_of(folder)
    if url is None or copy is None:
        return
    begin(folder)
    stored = stored_below(url)
    files = files_of(partial)
    first = [path for path in files if path.name not in LAST]
    names = {str(path.relative_to(partial)) for path in files}

    def send(path: Path) -> None:
        name = str(path.relative_to(partial))
        _send_unless(path, f"{url}/{name}", stored.get(name))

    # Everything but the files by which readers know the folder.
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(send, first))
    # Files that an earlier attempt left.
    for name in stored.keys() - names - _listed(partial) - {UNFINISHED}:
        _delete(f"{url}/{name}")

    _check_sizes(url, partial, first)
    if missing := sorted(_listed(partial) - stored_below(url).keys() - names):
        raise BadInput(f"{url}/{missing[0]}: another process has not sent it; run the command again")
    # All other files are there and have their sizes, so the folder may now be recognized.
    for path in files:
        if path.name in LAST:
            _send(path, f"{url}/{path.relative_to(partial)}")
    _delete(f"{url}/{UNFINISHED}")
    copy.writes = copy.writes or partial != folder
    for path in files:
        copy.sent[str((folder / path.relative_to(partial)).relative_to(copy.root))] = state_of(path)


def send_part(partial: Path, folder: Path) -> None:
    """Sends this process's part of a folder that another process publishes: files that are not in LAST."""
    url = url_of(folder)
    assert url is not None
    files = files_of(partial)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda path: _send(path, f"{url}/{path.relative_to(partial)}"), files))
    _check_sizes(url, partial, files)


def _listed(folder: Path) -> set[str]:
    """The files in the folder's own list of digests; other processes may have sent some of them."""
    path = folder / "SHA256SUMS"
    if not path.is_file():
        return set()
    return {line.partition("  ")[2] for line in path.read_text(encoding="utf-8").splitlines()}


def abandon(folder: Path) -> None:
    """Removes the record of `begin`, if no file of the folder is in the bucket yet."""
    if (url := url_of(folder)) is not None:
        with contextlib.suppress(BadInput):
            if stored_below(url).keys() == {UNFINISHED}:
                _delete(f"{url}/{UNFINISHED}")


@contextlib.contextmanager
def drafted(
    folder: Path,
    wanted: Callable[[str], bool],
    alone: Callable[[Path], contextlib.AbstractContextManager[None]],
) -> Iterator[None]:
    """A block that makes a folder on this disk, resuming earlier work there; after the block, the folder is
    published.

    At the start of the block, a complete folder of the bucket is here: its `wanted` files, by name, except
    large ones. If the bucket has no file of the folder, nothing is here. For an unfinished folder, the files
    of this machine are here. `alone` keeps other machines out while the folder is made
    (`lease.alone_in_bucket`, which this module cannot import).
    """
    url, copy = url_of(folder), copy_of(folder)
    if url is None or copy is None:
        yield
        return
    with contextlib.ExitStack() as held:
        stored = stored_below(url)
        if not stored or UNFINISHED in stored:
            check_access(folder)
            held.enter_context(alone(folder))
            # Another machine may have finished before the lease was ours.
            stored = stored_below(url)
        is_complete = bool(stored) and UNFINISHED not in stored
        if is_complete:
            pull(folder, lambda name: wanted(name) and stored[name].size <= SMALL_BYTES)
        else:
            if not stored:
                shutil.rmtree(folder, ignore_errors=True)
            begin(folder)
        before = _snapshot(folder)

        # In the block the folder is a plain folder on this disk: nothing is sent before it is complete.
        copy.draft = True
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            copy.draft = False

        if not is_complete:
            publish(folder, folder)
            published = stored_below(url)
            for path in files_of(folder):
                if (file := published.get(str(path.relative_to(folder)))) is not None:
                    note(copy, path, file.version)
            write_state(copy)
        elif _snapshot(folder) != before:
            settle(folder)


def _snapshot(folder: Path) -> dict[Path, list[int]]:
    return {path: state_of(path) for path in files_of(folder)}


def files_of(folder: Path, left_out: tuple[str, ...] = ()) -> list[Path]:
    """The files of a working copy that belong in the bucket."""
    files = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_sent = parts[0] not in left_out and not any(part.endswith(PARTIAL) for part in parts)
        if is_sent and path.is_file() and path.name not in ("progress.jsonl", LEASE):
            files.append(path)
    return files


def _send_unless(path: Path, url: str, stored: Stored | None) -> None:
    """Sends a file, unless the bucket has the same bytes."""
    if stored is not None and stored.size == path.stat().st_size and stored.md5 is not None:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "md5").hexdigest() == stored.md5:
                return
    _send(path, url)


def _send(path: Path, url: str) -> None:
    def send() -> None:
        if path.stat().st_size <= SMALL_BYTES:
            filesystem(url).pipe_file(key(url), path.read_bytes())
        else:
            filesystem(url).put_file(str(path), key(url))

    with explain(url, "written"):
        tried(send)


def _delete(url: str) -> None:
    def delete() -> None:
        with contextlib.suppress(FileNotFoundError):
            filesystem(url).rm_file(key(url))

    with explain(url, "deleted"):
        tried(delete)


def _check_sizes(url: str, folder: Path, files: Iterable[Path]) -> None:
    """Raises BadInput if a file in the bucket is missing or has another size than here."""
    stored = stored_below(url)
    for path in files:
        sent, size = stored.get(str(path.relative_to(folder))), path.stat().st_size
        if sent is None or sent.size != size:
            there_is = "missing" if sent is None else f"{sent.size:,} bytes, not {size:,}"
            raise BadInput(
                f"{url}/{path.relative_to(folder)}: not in the bucket as it was sent ({there_is}); run the "
                "command again"
            )


def _maker() -> dict[str, Any]:
    return {"host": socket.gethostname(), "process": os.getpid()}


def _is_alive(process: Any) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError, ValueError, TypeError):
        return False
    except PermissionError:
        pass
    return True
