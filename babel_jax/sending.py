"""Writing into buckets: what is written into a working copy (places.py) is sent to the bucket that it stands
for.

A file is sent by `push` (called by `files.write_bytes`), a folder that appears as one by `begin` and
`publish` (called by new_folders.py), all that changed by `settle`. For paths outside of working copies these
functions do nothing.

A bucket has no rename. So a folder that is being sent has the file UNFINISHED in the bucket from its begin to
its end, the files by which readers know a folder (LAST) are sent last, and readers here refuse a folder that
has UNFINISHED.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from babel_jax.buckets import PROBE, SCHEMES, Stored, explain, filesystem, key, stored_below, tried
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


def output(where: Path | str) -> Path:
    """The path of a folder of results, which may be in a bucket: with what is there already, but for large
    files.

    Raises BadInput where nothing can be written there.
    """
    folder = place(where)
    if url_of(folder) is not None:
        check_access(folder)
        there = {str(path.relative_to(folder)): size for path, size in listing(folder).items()}
        pull(folder, lambda name: there[name] <= SMALL_BYTES, fresh=True)
    return folder


def check_access(folder: Path) -> None:
    """Raises BadInput unless files can be written, replaced, read back and deleted where a working copy's
    folder stands.

    Nothing is left there; what a kill leaves in the middle is no file of the folder (`buckets.stored_below`).
    """
    if (url := url_of(folder)) is None:
        return
    if not url.startswith(tuple(f"{scheme}://" for scheme in SCHEMES)):
        raise BadInput(
            f"{url}: files can be written to {' and '.join(f'{scheme}://' for scheme in SCHEMES)} alone; "
            "give one of these"
        )
    stored_below(url)
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
            "at once, as Google's and "
            "Amazon's own do; give another bucket, or a folder on disk"
        )


def push(path: Path) -> None:
    """Sends one file of a working copy to the bucket. It is there when this returns."""
    url, copy = url_of(path), copy_of(path)
    if url is not None and copy is not None:
        _send(path, url)
        note(copy, path)
        copy.writes = True


def remove(path: Path) -> None:
    """Deletes a file, and where it is in a working copy also what it stands for."""
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
        for name in stored_below(url):
            tried(lambda name=name: system.cp_file(key(f"{url}/{name}"), key(f"{new}/{name}")))  # type: ignore[misc]
        for name in stored_below(url):
            _delete(f"{url}/{name}")


def settle(folder: Path, left_out: Iterable[str] = ()) -> None:
    """Sends what changed in the working copy of a folder, but for the folders named in `left_out`, which
    other libraries write.

    Nothing is deleted in the bucket: what is missing here may have been taken by one who cleans the scratch
    disk.
    """
    copy = copy_of(folder)
    if copy is None or url_of(folder) is None:
        return
    files = files_of(folder, tuple(left_out))
    changed = [path for path in files if copy.sent.get(str(path.relative_to(copy.root))) != state_of(path)]
    for path in sorted(changed, key=lambda path: path.name in LAST):
        push(path)


def settle_all() -> None:
    """Settles all working copies into which this process has written."""
    for copy in list(COPIES.values()):
        if copy.writes and not copy.draft and copy.root.is_dir():
            settle(copy.root, ("checkpoints", "compiled"))


def is_taken(folder: Path) -> bool:
    """Whether the bucket has any object where a new folder is to be, other than the mark of an unfinished
    one.

    Removes old files here.
    """
    url = url_of(folder)
    if url is None:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    found = stored_below(url)
    return bool(found) and UNFINISHED not in found


def begin(folder: Path) -> None:
    """Notes in the bucket that a folder is being made, before hours of work. Raises BadInput where nothing
    may be written there.

    Raises it also where a living process of this machine makes the folder.
    """
    if (url := url_of(folder)) is None:
        return
    check_access(folder)
    mark, name = _maker(), key(f"{url}/{UNFINISHED}")
    with explain(url, "written"), contextlib.suppress(FileNotFoundError):
        found = json.loads(tried(lambda: filesystem(url).cat_file(name)))
        if (
            found.get("host") == mark["host"]
            and found.get("process") != mark["process"]
            and _is_alive(found.get("process"))
        ):
            raise BadInput(
                f"{url}: process {found['process']} of this machine is writing it; wait for that one"
            )
    with explain(url, "written"):
        tried(lambda: filesystem(url).pipe_file(name, json.dumps(mark).encode()))


def publish(partial: Path, folder: Path) -> None:
    """Sends a complete folder to the bucket, where `folder` stands for it. It is complete there when the last
    file has arrived.

    Files that are there as they are here are not sent again.
    """
    url, copy = url_of(folder), copy_of(folder)
    if url is None or copy is None:
        return
    begin(folder)
    there = stored_below(url)
    files = files_of(partial)
    first = [path for path in files if path.name not in LAST]
    names = {str(path.relative_to(partial)) for path in files}

    def send(path: Path) -> None:
        name = str(path.relative_to(partial))
        _send_unless(path, f"{url}/{name}", there.get(name))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(send, first))
    for name in there.keys() - names - _listed(partial) - {UNFINISHED}:  # of an earlier begin
        _delete(f"{url}/{name}")
    _check_sizes(url, partial, first)
    if missing := sorted(_listed(partial) - stored_below(url).keys() - names):
        raise BadInput(f"{url}/{missing[0]}: another process has not sent it; run the command again")
    for path in files:
        if path.name in LAST:
            _send(path, f"{url}/{path.relative_to(partial)}")
    _delete(f"{url}/{UNFINISHED}")
    copy.writes = copy.writes or partial != folder
    for path in files:
        copy.sent[str((folder / path.relative_to(partial)).relative_to(copy.root))] = state_of(path)


def send_part(partial: Path, folder: Path) -> None:
    """Sends this process's part of a folder that another one publishes: files that LAST does not name."""
    url = url_of(folder)
    assert url is not None
    files = files_of(partial)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda path: _send(path, f"{url}/{path.relative_to(partial)}"), files))
    _check_sizes(url, partial, files)


def _listed(folder: Path) -> set[str]:
    """The files that the folder's own list of digests names: some may have been sent by other processes."""
    path = folder / "SHA256SUMS"
    return (
        {line.partition("  ")[2] for line in path.read_text(encoding="utf-8").splitlines()}
        if path.is_file()
        else set()
    )


def abandon(folder: Path) -> None:
    """Takes back what `begin` noted, where nothing of the folder has come to the bucket."""
    if (url := url_of(folder)) is not None:
        with contextlib.suppress(BadInput):
            if stored_below(url).keys() == {UNFINISHED}:
                _delete(f"{url}/{UNFINISHED}")


@contextlib.contextmanager
def drafted(folder: Path, wanted: Callable[[str], bool]) -> Iterator[None]:
    """The block makes a folder on this disk and may resume earlier work there; after the block the folder is
    published.

    What the bucket has of a whole folder is here when the block begins: the `wanted` files, by name, that are
    not large. Of a folder that the bucket has nothing of nothing is here; of a begun one there is what this
    machine has of it.
    """
    url, copy = url_of(folder), copy_of(folder)
    if url is None or copy is None:
        yield
        return
    there = stored_below(url)
    if there and UNFINISHED not in there:
        pull(folder, lambda name: wanted(name) and there[name].size <= SMALL_BYTES)
        before = _snapshot(folder)
    else:
        if not there:
            shutil.rmtree(folder, ignore_errors=True)
        begin(folder)
        before = None
    copy.draft = True
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        copy.draft = False
    if before is None:
        publish(folder, folder)
        there = stored_below(url)
        for path in files_of(folder):
            if (found := there.get(str(path.relative_to(folder)))) is not None:
                note(copy, path, found.version)
        write_state(copy)
    elif _snapshot(folder) != before:
        settle(folder)


def _snapshot(folder: Path) -> dict[Path, list[int]]:
    return {path: state_of(path) for path in files_of(folder)}


def files_of(folder: Path, left_out: tuple[str, ...] = ()) -> list[Path]:
    """The files of a working copy that belong in the bucket."""
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        mine = parts[0] not in left_out and not any(part.endswith(PARTIAL) for part in parts)
        if mine and path.is_file() and path.name not in ("progress.jsonl", "lease.json"):
            found.append(path)
    return found


def _send_unless(path: Path, url: str, there: Stored | None) -> None:
    if there is not None and there.size == path.stat().st_size and there.md5 is not None:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "md5").hexdigest() == there.md5:
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
    there = stored_below(url)
    for path in files:
        found = there.get(str(path.relative_to(folder)))
        if found is None or found.size != path.stat().st_size:
            raise BadInput(
                f"{url}/{path.relative_to(folder)}: not in the bucket as it was sent; run the command again"
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
