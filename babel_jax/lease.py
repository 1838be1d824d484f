"""One job at a time in a folder, also if several hosts share the disk, and if the disk has no locks."""

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from babel_jax.buckets import LEASE, explain, kvstore
from babel_jax.disk_errors import explain_os_errors
from babel_jax.errors import BadInput, InUse, one_line
from babel_jax.files import read_json, unguessable, write_text
from babel_jax.locks import only_process_in
from babel_jax.places import copy_of, url_of

log = logging.getLogger("babel")

NAME = LEASE
_SECONDS_BETWEEN_BEATS = 10.0
_BEATS_OF_PATIENCE = 8  # more than the 60 seconds for which gcsfuse, by default, shows a file as it was
_WRITING_SECONDS = 0.5  # a lease that stays unreadable for longer is damaged
_LONGEST_WAIT_HOURS = 24.0  # for another process to finish
_LOOK_SECONDS, _TELL_SECONDS = 1.0, 60.0  # between two looks at a folder in use; between two messages


@contextlib.contextmanager
def leased(folder: Path, beat: float = _SECONDS_BETWEEN_BEATS) -> Iterator[None]:
    """Keeps other jobs out of a folder while the block runs. Raises InUse if a job is in it.

    Jobs of this host are kept out by a lock, which ends with its process. A network disk may not show the
    locks of other hosts, and some disks have no locks: there a lease keeps other jobs out (`lease_in`). In a
    bucket each write of the lease has the condition that nobody else has written since.
    """
    if (url := url_of(folder)) is not None:
        with _leased_in_bucket(url, beat):
            yield
        return
    with only_process_in(folder) as locked, lease_in(folder / NAME, folder, beat, bool(locked)):
        yield


def seems_held(folder: Path) -> bool:
    """True if a job has lately renewed its lease of a folder on disk, by this host's clock.

    For display only: another host's clock may differ.
    """
    try:
        silent_seconds = time.time() - (folder / NAME).stat().st_mtime
    except FileNotFoundError:
        return False
    return silent_seconds < _BEATS_OF_PATIENCE * _SECONDS_BETWEEN_BEATS


@contextlib.contextmanager
def alone_in_bucket(folder: Path) -> Iterator[None]:
    """Keeps other machines from making the same folder of a bucket while the block runs. Raises InUse if a
    machine makes it.

    Does nothing on disk, nor for a folder inside of a run folder, which has a lease of its own.
    """
    copy = copy_of(folder)
    if copy is None or copy.root != folder or url_of(folder) is None:
        yield
        return
    with leased(folder):
        yield


@contextlib.contextmanager
def alone_in(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keeps other processes out of a folder while the block runs: by a lock, or by a lease if the file system
    has no locks.

    Raises InUse if another process is in it. With `wait`, waits and says so every minute, and raises InUse
    after _LONGEST_WAIT_HOURS.
    """
    begun, told = time.monotonic(), -_TELL_SECONDS
    with contextlib.ExitStack() as held:
        while True:
            try:
                _enter(held, folder)
                break
            except InUse as busy:
                waited = time.monotonic() - begun
                if not wait or waited > _LONGEST_WAIT_HOURS * 3600:
                    raise
                if waited - told >= _TELL_SECONDS:
                    log.info("%s (waiting, %.0f minutes so far)", busy, waited / 60)
                    told = waited
                time.sleep(_LOOK_SECONDS)
        yield


def _enter(held: contextlib.ExitStack, folder: Path) -> None:
    with contextlib.ExitStack() as entered:
        locked = entered.enter_context(only_process_in(folder))
        # If this process cannot write into the folder, it needs no lease: it only reads.
        if not locked and os.access(folder, os.W_OK):
            entered.enter_context(leased(folder))
        # Only if both were entered, the outer stack takes them over. Else the inner stack leaves what it
        # entered.
        held.enter_context(entered.pop_all())


@contextlib.contextmanager
def lease_in(
    path: Path, folder: Path, beat: float = _SECONDS_BETWEEN_BEATS, locked: bool = False
) -> Iterator[None]:
    """Holds the lease of a folder, the file `path`, while the block runs. Raises InUse if another job has it.

    The holder writes a new number into the file every `beat` seconds. If the number stays the same for eight
    beats, the job was killed, and its lease is taken over. Clocks of hosts are not compared. A holder that
    was replaced (because it or its disk had hung) ends its process. locked: no other process of this machine
    can be in the folder.
    """
    holder, ended = uuid.uuid4().hex, threading.Event()
    found = _settled(path)
    if found is not None and not _is_over(found, locked):
        _wait_for_silence(path, folder, found, beat)
    _take(path, folder, found, _lease(holder, 0))
    keeper = threading.Thread(
        target=_keep, args=(path, folder, holder, beat, ended), name="lease", daemon=True
    )
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()
        if (_read(path) or {}).get("holder") == holder:
            path.unlink(missing_ok=True)


def _settled(path: Path) -> dict[str, Any] | None:
    """The lease in a file; None if there is no file, and if the file stays unreadable."""
    until = time.monotonic() + _WRITING_SECONDS
    while (found := _read(path)) is None and path.exists() and time.monotonic() < until:
        time.sleep(_WRITING_SECONDS / 10)
    return found


def _take(path: Path, folder: Path, found: dict[str, Any] | None, lease: str) -> None:
    """Writes a lease in place of `found`, whose job has ended.

    Raises InUse if another job does the same at this moment: only one of them can move the old lease away,
    and only one can create the new file.
    """
    aside = unguessable(path)
    with explain_os_errors(path):
        # Another job may have taken the lease since `found` was read, so the moved file is compared with it.
        with contextlib.suppress(FileNotFoundError):
            path.rename(aside)
            if (moved := _read(aside)) != found:
                aside.rename(path)
                raise _in_use(folder, moved or {})
            aside.unlink()
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            raise _in_use(folder, _settled(path) or {}) from None
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(lease)
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _in_use(folder: Path | str, lease: dict[str, Any]) -> InUse:
    where = f"process {lease.get('process')} on {lease.get('host')}"
    return InUse(f"{folder}: another job is at work in it ({where}); wait for that one, or give another out")


def _is_over(found: dict[str, Any], locked: bool) -> bool:
    """True if the job of a lease has ended for sure: it was on this machine, and its lock
    or process is gone.
    """
    if found.get("machine") != _machine():
        return False
    # With the lock of the folder in hand, the job has ended.
    if locked:
        return True
    # Without the lock, the number of the job's process may tell.
    process = found.get("process")
    if not isinstance(process, int) or process < 1:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    # A process of another user has this number: it may be the job.
    except PermissionError:
        pass
    return False


def _wait_for_silence(path: Path, folder: Path, found: dict[str, Any], beat: float) -> None:
    """Waits until a lease has not changed for eight beats, or is gone. Raises InUse if it changes."""
    begun, told = time.monotonic(), False
    while (waited := time.monotonic() - begun) < beat * _BEATS_OF_PATIENCE:
        # The lease of a living job changes within two beats.
        if waited > 2 * beat and not told:
            seconds = beat * _BEATS_OF_PATIENCE - waited
            log.info(
                "%s: of a job on %s; waiting %.0f s for a sign of life", path, found.get("host"), seconds
            )
            told = True
        time.sleep(beat / 4)
        now = _read(path)
        # The job has ended, and has removed its lease.
        if now is None:
            return
        if now != found:
            raise _in_use(folder, now)


def _keep(path: Path, folder: Path, holder: str, beat: float, ended: threading.Event) -> None:
    number = 0
    while not ended.wait(beat):
        try:
            found = _read(path)
            # Another job took this one for dead, for example after a disk hung. Two jobs would damage the
            # folder.
            if found is not None and found.get("holder") != holder:
                print(
                    f"babel: {folder}: taken over by a job on {found.get('host')}; this one ends",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(2)
            number += 1
            write_text(path, _lease(holder, number))
        except (OSError, BadInput) as error:
            log.warning("%s: %s", path, error)


def _machine() -> str:
    """A text that differs between hosts, containers, and restarts of a host."""
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    started = boot.read_text().strip() if boot.is_file() else ""
    return f"{socket.gethostname()} {started} {processes.readlink() if processes.is_symlink() else ''}"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = read_json(path)
    except (OSError, BadInput):  # not there, or cut off while it was written
        return None
    return found if isinstance(found, dict) else None


@contextlib.contextmanager
def _leased_in_bucket(url: str, beat: float) -> Iterator[None]:
    holder, ended = uuid.uuid4().hex, threading.Event()
    with explain(url, "written"):
        store = kvstore(url)
        before = store.read(NAME).result()
        found = _parsed(before.value)
        if found is not None and not _is_over(found, locked=False):
            before = _silent_in_bucket(store, url, before, beat)
        generation = _exchanged(store, before.stamp.generation, _lease(holder, 0))
        now = store.read(NAME).result()
        if (other := _parsed(now.value) or {}).get("holder") == holder:
            generation = now.stamp.generation  # also where the answer to our write was lost
        else:
            raise InUse(
                f"{url}: another job has just begun in it (on {other.get('host')}); wait for that one, or "
                "give another out"
            )
    held = [generation or b""]
    keeper = threading.Thread(
        target=_keep_in_bucket, args=(store, url, holder, held, beat, ended), name="lease", daemon=True
    )
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()
        # If the lease cannot be removed, others take it over after eight beats.
        with contextlib.suppress(ValueError):
            # Deletes the lease only if it is still the one that this job wrote last.
            store.write(NAME, None, if_equal=held[0]).result()


def _exchanged(store: Any, generation: bytes, text: str) -> bytes | None:
    """Writes a lease if the bucket still has `generation` of it. Returns the new generation, or None."""
    return store.write(NAME, text.encode(), if_equal=generation).result().generation or None


def _silent_in_bucket(store: Any, url: str, before: Any, beat: float) -> Any:
    """Waits until a lease has not changed for eight beats, and returns it. Raises InUse if it changes."""
    found = _parsed(before.value) or {}
    log.info(
        "%s/%s: of a job on %s; waiting %.0f s for a sign of life",
        url,
        NAME,
        found.get("host"),
        beat * _BEATS_OF_PATIENCE,
    )
    until = time.monotonic() + beat * _BEATS_OF_PATIENCE
    while time.monotonic() < until:
        time.sleep(beat / 4)
        now = store.read(NAME).result()
        if now.state == "missing":
            return now
        if now.stamp.generation != before.stamp.generation:
            raise _in_use(url, found)
    return before


def _keep_in_bucket(
    store: Any, url: str, holder: str, held: list[bytes], beat: float, ended: threading.Event
) -> None:
    number = 0
    while not ended.wait(beat):
        number += 1
        try:
            generation = _exchanged(store, held[0], _lease(holder, number))
            if generation is None:
                # A write whose answer was lost is ours all the same.
                now = store.read(NAME).result()
                if (found := _parsed(now.value) or {}).get("holder") != holder:
                    print(
                        f"babel: {url}: taken over by a job on {found.get('host')}; this one ends",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(2)
                generation = now.stamp.generation
            held[0] = generation
        except ValueError as error:  # as TensorStore raises for whatever it meets
            log.warning("%s/%s: %s", url, NAME, one_line(error, 200))


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _lease(holder: str, beat: int) -> str:
    lease = {
        "holder": holder,
        "machine": _machine(),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "beat": beat,
    }
    return json.dumps(lease) + "\n"
