"""New folders appear whole or not at all: a folder is filled beside its final name, synced, then renamed.

A folder that is being filled has our mark and belongs to this user; any other folder is left as it is. One
process holds the lock on the mark until the folder has its name. If the file system has no locks, the process
holds a lease in the file .NAME.lease beside the folder. A folder that can be resumed is NAME.partial; other
folders have random names.
"""

import contextlib
import errno
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from babel_jax import sending
from babel_jax.disk_errors import explain_os_errors
from babel_jax.errors import BadInput, InUse
from babel_jax.files import (
    LEFT_SECONDS,
    make_folder,
    open_regular,
    open_to_write,
    sync_file,
    sync_folder,
    unguessable,
)
from babel_jax.lease import alone_in_bucket, lease_in
from babel_jax.locks import lock
from babel_jax.places import PARTIAL, url_of

_TENSORSTORE_PARTIAL = ".__lock"  # ends the name of a file that TensorStore is writing
_MOST_REMOVALS, _ABSENCES, _SECONDS_BETWEEN_REMOVALS = 1_000, 5, 0.01
MARK = "progress.jsonl"  # in a folder being filled: says that the folder is ours


class Unverified(BadInput):
    """The written folder does not read back as it should. It does not get its final name, and is kept, so
    that the next call can resume.
    """


@contextlib.contextmanager
def _marked(partial: Path, final: Path) -> Iterator[BinaryIO]:
    """The mark of a folder that is being filled; created if there is none, and locked until the end of the
    block.

    The mark moves with the folder, so the lock holds until the folder has its name. Raises InUse if another
    process fills the folder, and FileNotFoundError if another process has just given it its name.
    """
    mark = partial / MARK
    with open_to_write(mark) as file, contextlib.ExitStack() as held:
        locked = lock(file, partial)
        # Of a folder for a bucket, `sending.begin` refuses other processes of this machine.
        if not locked and url_of(final) is None:
            held.enter_context(lease_in(final.with_name(f".{final.name}.lease"), final))
        # Between opening and locking, another process may have renamed the folder or removed the mark.
        found, opened = mark.lstat(), os.fstat(file.fileno())
        if (found.st_dev, found.st_ino) != (opened.st_dev, opened.st_ino):
            raise FileNotFoundError(mark)
        yield file


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to fill. On success it is synced and renamed to `final`; on any exception it is removed.

    A folder that a killed process left beside `final` is removed by the next call for the same name. Raises
    BadInput if `final` exists at the start or at the end, and if the disk is full or not writable.
    """
    final = Path(final)
    remove_mark(final)
    check_free(final)
    make_folder(final.parent)
    sending.check_access(final)
    with explain_os_errors(final), alone_in_bucket(final):
        # Again: another machine may have finished before this one had the lease.
        check_free(final)
        sending.begin(final)
        partial = unguessable(final)
        partial.mkdir()
        try:
            with _marked(partial, final):
                _remove_leftovers(final, partial)
                yield partial
                _move_into_place(partial, final)
        except BaseException:
            _remove(partial)
            sending.abandon(final)
            raise


def _remove_leftovers(final: Path, partial: Path) -> None:
    """Removes the folders that killed processes were filling. Without locks no other process fills one,
    because this process has the lease.
    """
    # Only names that `unguessable` makes; a user's folder with a like name stays.
    ours = re.compile(re.escape(f"{final.name[:100]}.") + "[0-9a-f]{16}" + re.escape(PARTIAL))
    for path in final.parent.iterdir():
        if path == partial or not ours.fullmatch(path.name) or not is_ours(path):
            continue
        if (path / MARK).exists():
            with contextlib.suppress(InUse, FileNotFoundError), open_to_write(path / MARK) as file:
                lock(file, path)
                _remove(path)
        elif time.time() - path.stat().st_mtime > LEFT_SECONDS:
            # A younger folder without a mark may be of a process that has just begun.
            with contextlib.suppress(OSError):
                path.rmdir()


def remove_mark(final: Path, fingerprint: str = "") -> None:
    """Removes a mark from a finished folder: its process was killed between the rename and the removal of the
    mark.

    Removes only a mark that begins with the line `fingerprint` (for `new_folder`: an empty mark), so that no
    file of others is removed.
    """
    mark = final / MARK
    # Another process may be about to remove the mark, or the folder may be read-only: then nothing is done.
    with contextlib.suppress(BadInput, OSError):
        if not mark.is_symlink() and mark.is_file() and is_ours(final) and _begins_with(mark, fingerprint):
            mark.unlink()


def _begins_with(mark: Path, fingerprint: str) -> bool:
    begin = f"{fingerprint}\n".encode() if fingerprint else b""
    with open_regular(mark) as file:
        return file.read(max(len(begin), 1)) == begin


def check_free(final: Path) -> None:
    """Raises BadInput if something other than an empty folder has the name of the folder to be made."""
    taken = sending.is_taken(final)
    try:
        # The name NAME.partial must be possible too.
        final.with_name(final.name + PARTIAL).is_symlink()
        taken = (
            taken
            or final.is_symlink()
            or (final.exists() and not (final.is_dir() and not any(final.iterdir())))
        )
    except OSError as error:
        raise BadInput(
            f"{final}: no folder can be made here ({error.strerror}); give another place"
        ) from None
    if taken:
        raise BadInput(f"{final}: exists already; give another output folder or remove it first")


def is_ours(partial: Path) -> bool:
    """True for a folder that this program began for this user, and for an empty folder of this user."""
    found = partial.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return False
    mark = partial / MARK
    return (mark.is_file() and not mark.is_symlink()) or not any(partial.iterdir())


def _remove(folder: Path) -> None:
    """Removes a folder.

    Threads of Orbax and TensorStore may still write into it after one of them has raised, and may make it
    anew. So it counts as removed when it was away several times in a row.
    """
    absences = 0
    for _ in range(_MOST_REMOVALS):
        # The mark is removed last: a folder without a mark is not recognized as ours after a kill.
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name != MARK:
                _remove_one(path)
        shutil.rmtree(folder, ignore_errors=True)
        absences = 0 if folder.exists() else absences + 1
        if absences == _ABSENCES:
            return
        time.sleep(_SECONDS_BETWEEN_REMOVALS)


def _remove_one(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _move_into_place(partial: Path, final: Path) -> None:
    # Contents first, then the names: after a power cut a renamed folder must have all its files.
    for file in sorted(partial.rglob("*")):
        if file.is_file():
            sync_file(file)
        else:
            sync_folder(file)
    sync_folder(partial)
    sending.publish(partial, final)
    try:
        if final.exists():
            final.rmdir()
        partial.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise BadInput(
                f"{final}: appeared while it was made; give another output folder or remove it first"
            ) from None
        raise
    sync_folder(final.parent)
    (final / MARK).unlink(missing_ok=True)


def _half_written(folder: Path) -> list[Path]:
    """Files that a killed process was writing."""
    endings = (PARTIAL, _TENSORSTORE_PARTIAL)
    return [path for path in folder.rglob("*") if path.name.endswith(endings) and not path.is_dir()]


class Progress:
    """The parts of a folder that are on disk already, kept in its mark. The first line of the mark is the
    fingerprint of the source; each further line has the parts of one `add`.
    """

    def __init__(self, folder: Path, fingerprint: str, mark: BinaryIO):
        """Resumes a folder that was begun with the same fingerprint, and empties any other folder. `mark` is
        its locked mark.
        """
        self._file = mark
        lines = self._file.read().decode("utf-8", "replace").splitlines(keepends=True)
        # The last line counts only with its line end: a kill may have cut it off.
        begun, *done = [line[:-1] for line in lines if line.endswith("\n")] or [""]
        self._lines, self._fingerprint = done if begun == fingerprint else [], fingerprint
        self.done = {part for line in self._lines for part in line.split()}
        for path in _half_written(folder):
            path.unlink()
        if begun != fingerprint or not all(line.endswith("\n") for line in lines):
            self._restart(folder)

    def _restart(self, folder: Path) -> None:
        """Rewrites the mark without a line that was cut off. Empties the folder, if no part of it counts."""
        if not self._lines:
            for path in folder.iterdir():
                if path.name != MARK:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._rewrite()

    def add(self, parts: Sequence[str]) -> None:
        """Notes parts that are on disk, in one line: after a kill all of them count, or none."""
        self._lines.append(" ".join(parts))
        self._write(self._lines[-1:])
        self.done.update(parts)

    def forget(self, parts: Sequence[str]) -> None:
        """Notes that parts are to be written again."""
        self.done -= set(parts)
        self._lines = [" ".join(sorted(self.done))]
        self._rewrite()

    def _rewrite(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._write([self._fingerprint, *self._lines])

    def _write(self, lines: list[str]) -> None:
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


@contextlib.contextmanager
def resumable_folder(final: Path, fingerprint: str) -> Iterator[tuple[Path, Progress]]:
    """As `new_folder`, for long work: after Ctrl-C, a kill or a full disk, the next call with the same
    fingerprint resumes.

    The folder is NAME.partial until it is finished. It is removed if no part is done yet or the source is
    bad, and kept if the written parts could not be verified (`Unverified`).
    """
    final = Path(final)
    remove_mark(final, fingerprint)
    check_free(final)
    make_folder(final.parent)
    partial = final.with_name(final.name + PARTIAL)
    with explain_os_errors(final), contextlib.ExitStack() as held:
        if partial.is_symlink() or (partial.exists() and not is_ours(partial)):
            raise BadInput(
                f"{partial}: not begun by this program for this user; remove it, or give another output "
                "folder"
            )
        partial.mkdir(exist_ok=True)
        try:
            mark = held.enter_context(_marked(partial, final))
        except FileNotFoundError:
            raise BadInput(f"{final}: another process has just made it") from None
        progress = Progress(partial, fingerprint, mark)
        try:
            sending.check_access(final)
            held.enter_context(alone_in_bucket(final))
            # Again: another process may have finished before this one had the lock.
            check_free(final)
            sending.begin(final)
            yield partial, progress
            _move_into_place(partial, final)
        except BaseException as error:
            bad = isinstance(error, BadInput) and not isinstance(error, Unverified)
            if bad or not progress.done:
                _remove(partial)
                sending.abandon(final)
            raise
