"""Locks of files and folders among the processes of one host (flock)."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from babel_jax.errors import InUse
from babel_jax.files import WITHOUT_FOLDER_SYNC

_WITHOUT_LOCKS = (*WITHOUT_FOLDER_SYNC, errno.ENOLCK)


def lock(file: int | BinaryIO, what: Path) -> bool:
    """Locks an open file or folder until it is closed; the lock goes with the process too.

    Raises InUse, which names `what`, if another process of this host has the lock. Returns False if the file
    system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUse(
            f"{what}: another process is at work in it{_holder_of(file)}; wait for that one, or give another "
            "folder"
        ) from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        return False
    return True


def _holder_of(file: int | BinaryIO) -> str:
    """The process that has locked an open file, such as " (process 4711)"; empty if Linux does not tell."""
    # /proc/locks names a file by the numbers of its device and its inode.
    status = os.fstat(file if isinstance(file, int) else file.fileno())
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            # Example: 1: FLOCK  ADVISORY  WRITE 4711 fd:00:1835011 0 EOF
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5] == place:
                return f" (process {fields[4]})"
    return ""


@contextlib.contextmanager
def only_process_in(folder: Path) -> Iterator[bool]:
    """Keeps other processes of this host out of a folder, until the block or the process ends. Raises InUse
    if a process is in it.

    Yields False if the file system has no locks: then another process may be in the folder.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield lock(handle, folder)
    finally:
        os.close(handle)
