"""Files and folders that appear whole or not at all: written beside their final name, synced, then renamed."""

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from babel_jax.errors import BadInput

PARTIAL = ".partial"
_FICLONE = 0x40049409  # Linux, ioctl_ficlone(2): XFS, Btrfs and others
_FULL = (errno.ENOSPC, errno.EDQUOT)


def sync_file(file: Path) -> None:
    """Returns when the content of a file is on disk."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


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
    if path.is_dir() or not path.parent.is_dir():
        raise BadInput(f"{path}: " + ("a folder; give the name of a file" if path.is_dir() else f"there is no folder {path.parent}"))
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
    check_free(final)
    partial = final.with_name(final.name + PARTIAL)
    make_folder(final.parent)
    with explain_os_errors(final):
        _remove(partial)
        partial.mkdir()
        try:
            yield partial
            _move_into_place(partial, final)
        except BaseException:
            _remove(partial)
            raise


def check_free(final: Path) -> None:
    """Raises BadInput when there is something under the name of a folder to be made."""
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise BadInput(f"{final}: exists already; give another output folder or remove it first")


def _remove(folder: Path) -> None:
    """Removes a folder in which threads of Orbax and TensorStore may still be writing after one of them has raised an error."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.01)


def _move_into_place(partial: Path, final: Path) -> None:
    for file in sorted(partial.rglob("*")):
        if file.is_file():
            sync_file(file)
        else:
            sync_folder(file)
    sync_folder(partial)
    if final.exists():
        final.rmdir()
    partial.rename(final)
    sync_folder(final.parent)


class Progress:
    """Which parts of a folder being made are on disk, in a file inside it."""

    NAME = "progress.jsonl"

    def __init__(self, folder: Path, fingerprint: str):
        """Goes on with a folder that was begun with the same fingerprint; otherwise it is emptied. Raises BadInput when another process
        is at work in it."""
        make_folder(folder)
        self._file = open(folder / self.NAME, "a+", encoding="utf-8")  # noqa: SIM115 - closed by close()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise BadInput(f"{folder}: another process is writing it; wait for that one") from None
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        begun, *done = [line[:-1] for line in lines if line.endswith("\n")] or [""]
        self.done = {part for line in done for part in line.split()}
        if begun != fingerprint or not all(line.endswith("\n") for line in lines):
            self._restart(folder, fingerprint, done if begun == fingerprint else [])

    def _restart(self, folder: Path, fingerprint: str, lines: list[str]) -> None:
        """Without the line that was being written when the process was killed; without all else, where nothing of it counts."""
        if not lines:
            self.done.clear()
            for path in folder.iterdir():
                if path.name != self.NAME:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._file.truncate(0)
        self._write([fingerprint, *lines])

    def add(self, parts: Sequence[str]) -> None:
        """Notes parts that are on disk: one line, so that a kill meanwhile leaves all or none."""
        self._write([" ".join(parts)])
        self.done.update(parts)

    def _write(self, lines: list[str]) -> None:
        self._file.write("".join(f"{line}\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Lets the folder go."""
        self._file.close()


@contextlib.contextmanager
def resumable_folder(final: Path, fingerprint: str) -> Iterator[tuple[Path, Progress]]:
    """As `new_folder`, for long work: after Ctrl-C, a kill or a full disk, the next call of the same fingerprint goes on.

    What was done stands in NAME.partial, with a list of its parts. It is removed when nothing is done yet or the source turns out to be
    bad.
    """
    final = Path(final)
    check_free(final)
    partial = final.with_name(final.name + PARTIAL)
    with explain_os_errors(final):
        progress = Progress(partial, fingerprint)
        try:
            yield partial, progress
            (partial / Progress.NAME).unlink()
            _move_into_place(partial, final)
        except BaseException as error:
            if isinstance(error, BadInput) or not progress.done:
                _remove(partial)
            raise
        finally:
            progress.close()


def share_file(source: Path, target: Path) -> bool:
    """Makes `target` a clone of a file (the disk then holds it once, until one of them changes) or else a hard link; False where neither
    can be."""
    try:
        with open(source, "rb") as read, open(target, "xb") as write:
            fcntl.ioctl(write, _FICLONE, read.fileno())
        return True
    except OSError:
        target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        return False
    return True


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, where they are not there yet. Raises BadInput where that cannot be done."""
    with explain_os_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if isinstance(error, PermissionError) or error.errno in (*_FULL, errno.EROFS):
                raise
            raise BadInput(f"{path}: no folder can be made here ({error.strerror}); give another place") from None


@contextlib.contextmanager
def only_process_in(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keeps other processes of this host out of a folder; the lock goes with the process. Raises BadInput, or waits, where one is in it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BadInput(f"{folder}: another process is at work in it; wait for that one, or give another folder") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turns a full disk and missing permission into BadInput that names `path`."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        if is_full(error):
            raise BadInput(f"{path}: no space left on the disk; free some or choose another place") from error
        if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
            raise BadInput(f"{getattr(error, 'filename', None) or path}: not permitted; check the owner and mode of the folder") from error
        raise


def is_full(error: Exception) -> bool:
    """Whether an error says that the disk is full.

    Libraries that write through C++ or Rust raise types of their own; the system's words are all they share.
    """
    return getattr(error, "errno", None) in _FULL or any(os.strerror(full) in str(error) for full in _FULL)
