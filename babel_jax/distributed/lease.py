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

from babel_jax.errors import BadInput
from babel_jax.files import only_process_in, read_json, write_text

log = logging.getLogger("babel")

NAME = "lease.json"
_SECONDS_BETWEEN_BEATS = 10.0
_BEATS_OF_PATIENCE = 8  # more than the 60 seconds for which gcsfuse, by default, shows a file as it was


@contextlib.contextmanager
def leased(folder: Path, beat: float = _SECONDS_BETWEEN_BEATS) -> Iterator[None]:
    """Keeps other jobs out of a folder while the block runs. Raises BadInput where one is in it.

    On this host a lock says so at once, and goes with its process. For other hosts, whose locks a network disk may not show, and on disks
    without locks, the holder writes a new number into lease.json every `beat` seconds: a lease whose number stands still for eight beats
    is of a job that was killed, and is taken over. Clocks of hosts are not compared. A holder that finds itself replaced, as it or its
    disk had hung, ends the process.
    """
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


def _is_over(found: dict[str, Any], locked: bool) -> bool:
    """Whether the job of a lease is known to have ended: it was on this machine, and has no lock or process any more."""
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
    log.info("%s: of a job on %s; waiting %.0f s for a sign of life", path, found.get("host"), beat * _BEATS_OF_PATIENCE)
    until = time.monotonic() + beat * _BEATS_OF_PATIENCE
    while time.monotonic() < until:
        time.sleep(beat / 4)
        now = _read(path)
        if now is None:
            return
        if now != found:
            where = f"process {now.get('process')} on {now.get('host')}"
            raise BadInput(f"{path.parent}: another job is at work in it ({where}); wait for that one, or give another out")


def _keep(path: Path, holder: str, beat: float, ended: threading.Event) -> None:
    number = 0
    while not ended.wait(beat):
        try:
            found = _read(path)
            if found is not None and found.get("holder") != holder:
                print(f"babel: {path.parent}: taken over by a job on {found.get('host')}; this one ends", file=sys.stderr, flush=True)
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


def _lease(holder: str, beat: int) -> str:
    lease = {"holder": holder, "machine": _machine(), "host": socket.gethostname(), "process": os.getpid(), "beat": beat}
    return json.dumps(lease) + "\n"
