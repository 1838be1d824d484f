"""Errors of disks, permissions and file systems, as one line each for the user."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from babel_jax.buckets import explain, is_of_bucket
from babel_jax.errors import BadInput, one_line
from babel_jax.places import url_of

_FULL = (errno.ENOSPC, errno.EDQUOT)


_FAILED = (errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN)


_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


_BAD_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)


# The forms of Rust, Arrow and TensorStore.
_NUMBER_IN_WORDS = re.compile(r"\b(?:os error |errno |os_error_code=')([0-9]+)", re.IGNORECASE)


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turns a full or broken disk, and a missing permission, into BadInput that names `path`."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        if (line := os_error_line(error, path)) is not None:
            raise BadInput(line) from error
        raise


@contextlib.contextmanager
def explain_storage_errors(path: Path) -> Iterator[None]:
    """As `explain_os_errors`; for a path in a working copy, also explains errors of its bucket."""
    url = url_of(path)
    try:
        with explain_os_errors(path):
            yield
    except BadInput:
        raise
    except Exception as error:
        if url is None or not is_of_bucket(error):
            raise
        with explain(url, "written"):
            raise


def os_error_line(error: Exception, path: Path | None = None) -> str | None:
    """One line for an error of a disk, its permissions or its file system; None for any other error."""
    location = getattr(error, "filename", None) or path or "the disk"
    if is_full(error):
        return f"{path or location}: no space left on the disk; free some or choose another place"
    if isinstance(error, PermissionError) or _named(error, _FORBIDDEN):
        return f"{location}: not permitted; check the owner and mode of the folder"
    if failed := _named(error, _FAILED):
        return (
            f"{location}: the disk or its connection failed ({failed}); when it works again, the same "
            "command resumes"
        )
    number = _number_of(error)
    if number in _BAD_NAMES:
        return f"{one_line(location, 300)}: {os.strerror(number)}; give another name"
    # Too many open files: of this process, or of the system.
    if number in (errno.EMFILE, errno.ENFILE):
        return f"{location}: {os.strerror(number)}; raise the limit (ulimit -n)"
    # A missing file may be a fault of the program, so it keeps its traceback.
    if number is None or number == errno.ENOENT:
        return None
    return (
        f"{one_line(location, 300)}: the file system refused ({os.strerror(number)}); run the same command "
        "again, or choose another place"
    )


def is_full(error: Exception) -> bool:
    """True if an error means that the disk is full."""
    return _named(error, _FULL) is not None


def _named(error: Exception, numbers: Sequence[int]) -> str | None:
    """The system's text for the error number of an error, if it is one of these; else None.

    Libraries that write through C++ or Rust raise errors of their own types; they have only the system's text
    in common.
    """
    if (number := _number_of(error)) is not None:
        return os.strerror(number) if number in numbers else None
    for number in numbers:
        if os.strerror(number) in str(error):
            return os.strerror(number)
    return None


def _number_of(error: Exception) -> int | None:
    """The system's number of an error, even if a library has it only in its message."""
    number = getattr(error, "errno", None)
    if not isinstance(number, int) and (found := _NUMBER_IN_WORDS.search(str(error))):
        number = int(found[1])
    return number if isinstance(number, int) and number in errno.errorcode else None
