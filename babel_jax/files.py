"""Reading and writing files: only regular files of bounded size are read, and a file is written whole or not
at all.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from babel_jax.disk_errors import explain_os_errors, is_full
from babel_jax.errors import BadInput, one_line, shown
from babel_jax.json_text import parse_json
from babel_jax.places import PARTIAL, url_of
from babel_jax.sending import push

MOST_TEXT_BYTES = 16 * 2**20  # of a file that is read whole, where the caller names no other bound
MOST_LINE_BYTES = 16 * 2**20  # of a file of JSON lines that this program or a server writes
LEFT_SECONDS = 3600  # an older NAME.partial was left by a killed process
_FICLONE = 0x40049409  # Linux, ioctl_ficlone(2): XFS, Btrfs and others
_WITHOUT_PREALLOCATION = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
# As of some network and FUSE file systems.
WITHOUT_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)


def regular_file(path: Path, below: Path | None = None) -> Path:
    """The real path of a regular file; links are followed.

    below: a folder that may come from a stranger. Links may then lead only to files inside of it; in the
    Hugging Face hub's cache also from snapshots/ to blobs/. Raises FileNotFoundError if nothing has that
    name. Raises BadInput for a folder, a FIFO, a device, a link that leads elsewhere or nowhere, and a name
    that the system does not allow.
    """
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise BadInput(
                f"{path}: a link to {path.readlink()}, which is not there; remove it or fetch the file again"
            ) from None
        raise
    # pathlib raises RuntimeError for a circle of links, and ValueError for a NUL in a name.
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"{one_line(path, 200)}: no such file ({getattr(error, 'strerror', None) or error})"
        ) from None
    if below is not None and not _leads_inside(real, below.resolve()):
        raise BadInput(
            f"{path}: a link to {real}, outside of the folder {below}; put the file itself there if you "
            "trust the link"
        )
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file (a device, pipe or socket)"
        raise BadInput(f"{path}: {kind}; a file is needed")
    return real


def _leads_inside(real: Path, folder: Path) -> bool:
    # In the hub's cache, snapshots/COMMIT/FILE is a link to blobs/DIGEST.
    in_cache = folder.parent.name == "snapshots" and real.parent == folder.parent.parent / "blobs"
    return in_cache or real.is_relative_to(folder)


def open_regular(path: Path, below: Path | None = None) -> BinaryIO:
    """Opens a regular file to read bytes. Arguments and errors are those of `regular_file`.

    A FIFO or a device is refused, not waited for.
    """
    real = regular_file(path, below)
    handle = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    # Somebody may have exchanged the file since the check.
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BadInput(f"{path}: no regular file; a file is needed")
    return os.fdopen(handle, "rb")


def read_bytes(path: Path, below: Path | None = None, most_bytes: int = MOST_TEXT_BYTES) -> bytes:
    """The content of a regular file.

    Raises BadInput if it has more than `most_bytes`, and as `regular_file`.
    """
    with explain_os_errors(path), open_regular(path, below) as file:
        # One byte more than allowed shows that the file is too large, however large it is.
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise BadInput(f"{path}: larger than the {most_bytes:,} bytes that such a file may have")
    return data


def read_text(path: Path, below: Path | None = None, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises BadInput for other bytes, and as `read_bytes` does.
    """
    try:
        return read_bytes(path, below, most_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error})") from None


def read_json(
    path: Path, below: Path | None = None, most_bytes: int = MOST_TEXT_BYTES, unique_keys: bool = True
) -> Any:
    """The value of a JSON file.

    Raises FileNotFoundError without one, and BadInput as `read_bytes` and `parse_json` do.
    """
    return parse_json(read_bytes(path, below, most_bytes), str(path), unique_keys)


def sync_file(file: Path) -> None:
    """Waits until the content of a file is on disk."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names inside `folder` are on disk. By POSIX, a rename survives a power cut only after
    this.

    Does nothing if the file system cannot sync folders.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in WITHOUT_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def remove_folder(folder: Path) -> None:
    """Removes a folder and all in it, if there is one.

    Raises OSError if a part of it cannot be removed: that part would be taken for new work.
    """
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` (UTF-8) in one step.

    In text for a bucket, paths of the working copy are replaced by the URL.
    """
    write_bytes(path, (text if url_of(path) is None else shown(text)).encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` in one step; in a bucket too, if `path` is in its working copy.

    Two processes may write one path at once: each writes a file of its own, and the last rename wins.
    """
    with explain_os_errors(path):
        if path.is_dir() or not path.parent.is_dir():
            raise BadInput(
                f"{path}: "
                + (
                    "a folder; give the name of a file"
                    if path.is_dir()
                    else f"there is no folder {path.parent}"
                )
            )
        try:
            partial, file = _new_file_beside(path)
        except FileNotFoundError:  # such as /proc, or a folder that was removed just now
            raise BadInput(f"{path}: no file can be made in {path.parent}; give another folder") from None
        try:
            with file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    push(path)


def _new_file_beside(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside `path`, of this process alone: NAME.partial, or another name if
    NAME.partial exists.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        return partial, open(partial, "xb", opener=_not_through_links)
    except FileExistsError:
        # Another process is writing it, was killed while writing it, or has laid a link there.
        with contextlib.suppress(OSError):
            if time.time() - partial.lstat().st_mtime > LEFT_SECONDS:
                partial.unlink()
        partial = unguessable(path)
        return partial, open(partial, "xb", opener=_not_through_links)


def remove_left_files(paths: Iterable[Path]) -> None:
    """Removes those of `paths` that are files NAME.partial of a killed process.

    The caller keeps other processes out of their folder.
    """
    for partial in list(paths):
        if partial.name.endswith(PARTIAL) and (partial.is_symlink() or partial.is_file()):
            partial.unlink(missing_ok=True)


def unguessable(final: Path) -> Path:
    """A random name beside `final`, for a file that is renamed to it later.

    Nobody can have laid a link there.
    """
    return final.with_name(f"{final.name[:100]}.{secrets.token_hex(8)}{PARTIAL}")


def open_to_write(path: Path, buffering: int = -1) -> BinaryIO:
    """Opens a file to read and write; creates it if there is none. Raises OSError if `path` is a link."""
    return os.fdopen(_not_through_links(str(path), os.O_RDWR | os.O_CREAT), "r+b", buffering)


def open_to_append(path: Path) -> BinaryIO:
    """Opens a file to add lines; creates it if there is none. If a kill cut off the last line, a line end is
    added.

    Raises BadInput for a link, and for anything but a regular file: a FIFO would wait for a reader.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.fdopen(os.open(path, flags, 0o666), "ab")
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.ESPIPE):
            raise BadInput(f"{path}: a link or no regular file; remove it") from None
        raise
    # The opened file is looked at, not its name: the name may lead elsewhere by now.
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        file.close()
        raise BadInput(f"{path}: no regular file; remove it")
    # A line that a kill has cut off gets its end, so that the next one begins a line.
    if status.st_size and os.pread(file.fileno(), 1, status.st_size - 1) != b"\n":
        file.write(b"\n")
    return file


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a regular file; bytes that are not UTF-8 are replaced.

    Raises BadInput for a line of more than MOST_LINE_BYTES.
    """
    with explain_os_errors(path), open_regular(path) as file:
        number = 0
        while line := file.readline(MOST_LINE_BYTES + 1):
            number += 1
            if len(line) > MOST_LINE_BYTES:
                raise BadInput(
                    f"{path}:{number}: a line of more than {MOST_LINE_BYTES:,} bytes; the file is damaged, "
                    "or is another one"
                )
            yield line.decode("utf-8", "replace")


def _not_through_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def preallocate(file: BinaryIO, size: int) -> None:
    """Gives a file its size and, if the file system can, reserves its space. So a full disk shows now, not
    hours later.
    """
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    # macOS has no such function.
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in _WITHOUT_PREALLOCATION:
            raise
        file.truncate(size)


def share_file(source: Path, target: Path) -> bool:
    """Makes `target` a clone of a file: both share their blocks on disk until one of them changes.

    Returns False if the file system cannot clone.
    """
    try:
        with open_regular(source) as read, open(target, "xb", opener=_not_through_links) as write:
            try:
                fcntl.ioctl(write, _FICLONE, read.fileno())
            except OSError:
                target.unlink()
                raise
        return True
    except OSError:
        return False


def link_file(source: Path, target: Path) -> bool:
    """Makes `target` a second name (hard link) of a file: a write into one changes both.

    Returns False if that is not possible.
    """
    try:
        os.link(source.resolve(), target)
        return True
    except OSError:
        return False


def make_folder(path: Path) -> None:
    """Makes a folder and its parents, if they do not exist. Raises BadInput if that is not possible."""
    with explain_os_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if isinstance(error, PermissionError) or is_full(error) or error.errno == errno.EROFS:
                raise
            raise BadInput(
                f"{path}: no folder can be made here ({error.strerror}); give another place"
            ) from None
