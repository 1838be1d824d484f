"""One job at a time in a folder, also where several hosts share the disk and where the disk has no locks."""

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
from babel_jax.files import only_process_in, read_json, unguessable, write_text
from babel_jax.places import copy_of, url_of

log = logging.getLogger("babel")

NAME = LEASE
_SECONDS_BETWEEN_BEATS = 10.0
_BEATS_OF_PATIENCE = 8  # more than the 60 seconds for which gcsfuse, by default, shows a file as it was
_WRITING_SECONDS = 0.5  # after which a lease that cannot be read is damaged, and not just being written
_LONGEST_WAIT_HOURS = 24.0  # for another process to finish
_LOOK_SECONDS, _TELL_SECONDS = 1.0, 60.0  # between two looks at a folder in use; between two messages


@contextlib.contextmanager
def leased(folder: Path, beat: float = _SECONDS_BETWEEN_BEATS) -> Iterator[None]:
    """Keeps other jobs out of a folder while the block runs. Raises InUse where one is in it.

    On this host a lock says so at once, and goes with its process. For other hosts, whose locks a network
    disk may not show, and on disks without locks, a lease says so (`lease_in`). In a bucket every write of
    the lease is on the condition that nobody else has written since.
    """
    if (url := url_of(folder)) is not None:
        with _leased_in_bucket(url, beat):
            yield
        return
    with only_process_in(folder) as locked, lease_in(folder / NAME, folder, beat, bool(locked)):
        yield


@contextlib.contextmanager
def alone_in_bucket(folder: Path) -> Iterator[None]:
    """Keeps other machines from making the same folder of a bucket while the block runs. Raises InUse where
    one makes it.

    Does nothing on disk, and for a folder within the run folder of a job, which has a lease.
    """
    copy = copy_of(folder)
    if copy is None or copy.root != folder or url_of(folder) is None:
        yield
        return
    with leased(folder):
        yield


@contextlib.contextmanager
def alone_in(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keeps other processes out of a folder while the block runs: by a lock, and by a lease where the file
    system has no locks.

    Where another process is in it, raises InUse; with `wait`, says so every minute, and raises InUse after
    _LONGEST_WAIT_HOURS.
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
        # Into a folder that cannot be written to, another process writes as little.
        if not locked and os.access(folder, os.W_OK):
            entered.enter_context(leased(folder))
        held.enter_context(entered.pop_all())


@contextlib.contextmanager
def lease_in(
    path: Path, folder: Path, beat: float = _SECONDS_BETWEEN_BEATS, locked: bool = False
) -> Iterator[None]:
    """Holds the lease of a folder, the file `path`, while the block runs. Raises InUse where another job has
    it.

    The holder writes a new number into the file every `beat` seconds: a lease whose number stays the same for
    eight beats is of a job that was killed, and is taken over. Clocks of hosts are not compared. A holder
    that finds itself replaced, as it or its disk had hung, ends the process. `locked` says that no other
    process of this machine can be in the folder.
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
    """The lease in a file; None without one, and where it stays unreadable longer than writing it takes."""
    until = time.monotonic() + _WRITING_SECONDS
    while (found := _read(path)) is None and path.exists() and time.monotonic() < until:
        time.sleep(_WRITING_SECONDS / 10)
    return found


def _take(path: Path, folder: Path, found: dict[str, Any] | None, lease: str) -> None:
    """Writes a lease in place of the one that was found to be over.

    Raises InUse where another job does so at the same moment: of two jobs one alone can move the old lease
    away, and one alone can make the new file.
    """
    aside = unguessable(path)
    with explain_os_errors(path):
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
    """Whether the job of a lease is known to have ended: it was on this machine, and has no lock or process
    any more.
    """
    if found.get("machine") != _machine():
        return False
    process = found.get("process")
    if locked or not isinstance(process, int) or process < 1:
        return locked
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


def _wait_for_silence(path: Path, folder: Path, found: dict[str, Any], beat: float) -> None:
    """Returns when a lease has not changed for long, or is gone; raises InUse when it changes."""
    begun, told = time.monotonic(), False
    while (waited := time.monotonic() - begun) < beat * _BEATS_OF_PATIENCE:
        # A living job shows itself before.
        if waited > 2 * beat and not told:
            seconds = beat * _BEATS_OF_PATIENCE - waited
            log.info(
                "%s: of a job on %s; waiting %.0f s for a sign of life", path, found.get("host"), seconds
            )
            told = True
        time.sleep(beat / 4)
        now = _read(path)
        if now is None:
            return
        if now != found:
            raise _in_use(folder, now)


def _keep(path: Path, folder: Path, holder: str, beat: float, ended: threading.Event) -> None:
    number = 0
    while not ended.wait(beat):
        try:
            found = _read(path)
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
    """Tells hosts and containers apart, and a host from itself before it was started anew."""
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
        with contextlib.suppress(ValueError):  # it then ends by its silence
            store.write(NAME, None, if_equal=held[0]).result()


def _exchanged(store: Any, generation: bytes, text: str) -> bytes | None:
    """The generation of the lease that was written in place of the one of `generation`; None where that is
    not there any more.
    """
    return store.write(NAME, text.encode(), if_equal=generation).result().generation or None


def _silent_in_bucket(store: Any, url: str, before: Any, beat: float) -> Any:
    """The lease as it is once its job has given no sign of life for long.

    Raises InUse where it gives one.
    """
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
