"""Files and folders that appear whole or not at all: written beside their final name, synced, then renamed."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from babel_jax.errors import BadInput

PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def sync_folder(folder: Path) -> None:
    """Makes the names inside `folder` durable (POSIX: a rename survives a power cut only after the folder's fsync)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` (UTF-8) in one step."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` in one step."""
    partial = path.with_name(path.name + PARTIAL)
    with explain_os_errors(path):
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to fill; on success it is synced and renamed to `final`, on any exception it is removed.

    A killed process leaves `NAME.partial` beside `final`, which the next call for the same name removes.
    Raises BadInput when `final` exists already, or when the disk is full or not writable.
    """
    final = Path(final)
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise BadInput(f"{final}: exists already; give another output folder or remove it first")
    partial = final.with_name(final.name + PARTIAL)
    with explain_os_errors(final):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in sorted(partial.rglob("*")):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
                else:
                    sync_folder(file)
            sync_folder(partial)
            if final.exists():
                final.rmdir()
            partial.rename(final)
            sync_folder(final.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turns a full disk and missing permission into BadInput that names `path`."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        # Libraries that write through C++ or Rust raise types of their own; the system's words for a full disk are all they share.
        number = getattr(error, "errno", None)
        if number in _FULL or any(os.strerror(full) in str(error) for full in _FULL):
            raise BadInput(f"{path}: no space left on the disk; free some or choose another place") from error
        if isinstance(error, PermissionError) or number == errno.EROFS:
            raise BadInput(f"{getattr(error, 'filename', None) or path}: not permitted; check the owner and mode of the folder") from error
        raise
