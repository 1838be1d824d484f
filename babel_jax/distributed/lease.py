"""A run folder belongs to one job at a time, also where several hosts share the disk."""

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

from babel_jax.buckets import explain, kvstore
from babel_jax.errors import BadInput, one_line
from babel_jax.files import only_process_in, read_json, write_text
from babel_jax.places import url_of

log = logging.getLogger("babel")

NAME = "lease.json"
_SECONDS_BETWEEN_BEATS = 10.0
_BEATS_OF_PATIENCE = 8  # more than the 60 seconds for which gcsfuse, by default, shows a file as it was


@contextlib.contextmanager
def leased(folder: Path, beat: float = _SECONDS_BETWEEN_BEATS) -> Iterator[None]:
    """Keeps other jobs out of a folder while the block runs. Raises BadInput where one is in it.

    On this host a lock says so at once, and goes with its process. For other hosts, whose locks a network
    disk may not show, and on disks without locks, the holder writes a new number into lease.json every `beat`
    seconds: a lease whose number stands still for eight beats is of a job that was killed, and is taken over.
    Clocks of hosts are not compared. A holder that finds itself replaced, as it or its disk had hung, ends
    the process. In a bucket every write is on the condition that nobody else has written since.
    """
    if (url := url_of(folder)) is not None:
        with _leased_in_bucket(url, beat):
            yield
        return
    with only_process_in(folder) as locked:
        path, holder, ended = folder / NAME, uuid.uuid4().hex, threading.Event()
        if not locked and not path.is_file():
            # The one of two jobs that comes first makes the file, the other finds it.
            with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as file:
                file.write(_lease(holder, 0))
        found = _read(path)
        if found is not None and found.get("holder") != holder and not _is_over(found, bool(locked)):
            _wait_for_silence(path, found, beat)
        _write(path, holder, 0)
        keeper = threading.Thread(target=_keep, args=(path, holder, beat, ended), name="lease", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            ended.set()
            keeper.join()
            if (_read(path) or {}).get("holder") == holder:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def alone_in(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keeps other processes out of a folder: by a lock, as `only_process_in` does, and by a lease where the
    file system has no locks.
    """
    with contextlib.ExitStack() as held:
        locked = held.enter_context(only_process_in(folder, wait))
        # Into a folder that cannot be written to, another process writes as little.
        if not locked and os.access(folder, os.W_OK):
            held.enter_context(leased(folder))
        yield


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


def _wait_for_silence(path: Path, found: dict[str, Any], beat: float) -> None:
    log.info(
        "%s: of a job on %s; waiting %.0f s for a sign of life",
        path,
        found.get("host"),
        beat * _BEATS_OF_PATIENCE,
    )
    until = time.monotonic() + beat * _BEATS_OF_PATIENCE
    while time.monotonic() < until:
        time.sleep(beat / 4)
        now = _read(path)
        if now is None:
            return
        if now != found:
            where = f"process {now.get('process')} on {now.get('host')}"
            raise BadInput(
                f"{path.parent}: another job is at work in it ({where}); wait for that one, or give another "
                "out"
            )


def _keep(path: Path, holder: str, beat: float, ended: threading.Event) -> None:
    number = 0
    while not ended.wait(beat):
        try:
            found = _read(path)
            if found is not None and found.get("holder") != holder:
                print(
                    f"babel: {path.parent}: taken over by a job on {found.get('host')}; this one ends",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(2)
            number += 1
            _write(path, holder, number)
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


def _write(path: Path, holder: str, beat: int) -> None:
    write_text(path, _lease(holder, beat))


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
            raise BadInput(
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

    Raises BadInput where it gives one.
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
            raise BadInput(
                f"{url}: another job is at work in it (process {found.get('process')} on "
                f"{found.get('host')}); wait for that one, or give "
                "another out"
            )
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
