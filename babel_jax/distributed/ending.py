"""The end of a job in which one process fails: all processes end with the same exit status and one line each.

The process that fails first writes a note into the key-value store of JAX's coordination service. A thread of
each process reads it. The process may be in a collective operation that waits for the failed one, so the
thread ends its process itself after a short grace.

JAX aborts a process (status 134) whose coordination service has ended. So each process closes its connection
before it exits, and process 0, which runs the service, waits for the others.
"""

import atexit
import contextlib
import json
import logging
import os
import sys
import threading
from typing import Any, NoReturn

from babel_jax.errors import printable, shown

_NOTE, _LEAVE, _FINISHED = "babel leaves", "babel leaves together", "babel has finished"
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_OF_GRACE = 1.5
_SECONDS_TO_MEET = 5
_SECONDS_TO_DISCONNECT = 5
_LONGEST_WAIT_MS = 7 * 24 * 3600 * 1000
_LONGEST_LINE = 1000  # characters

_ends = threading.Lock()  # held by the thread that ends this process
_watches = threading.Event()
_finished = threading.Event()


def watch() -> None:
    """Starts the thread that ends this process if another process fails. Call it after joining."""
    watcher = threading.Thread(target=_watch, name="babel ends", daemon=True)
    watcher.start()
    _watches.set()

    def stop() -> None:
        # A process that fails after this one has finished ends this one too.
        with contextlib.suppress(Exception):
            _client().wait_at_barrier(_FINISHED, _LONGEST_WAIT_MS)
        _finished.set()
        watcher.join(2 * _SECONDS_BETWEEN_LOOKS)

    atexit.register(stop)  # runs before JAX's own, which closes the connection


def watches() -> bool:
    """True if this process is one of several, even while its connection is being closed."""
    return _watches.is_set()


def begin_to_end() -> None:
    """Call this before a process of several prints why it ends. Does not return if the thread of `watch` has
    printed it already: the process ends.
    """
    _ends.acquire()


def end_together(status: int, line: str) -> NoReturn:
    """Ends this process of several; the others end with the same status. `line` is the reason.

    If another process failed first, its status is used. Call `begin_to_end` first.
    """
    process, count = _jax().process_index(), _jax().process_count()
    note = json.dumps({"status": status, "line": line[:_LONGEST_LINE], "process": process, "of": count})
    with contextlib.suppress(Exception):
        _client().key_value_set(_NOTE, note)
    _meet_and_end((_note() or {"status": status})["status"])


def end(status: int) -> NoReturn:
    """Ends this process at once; its output is flushed."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _watch() -> None:
    while (note := _note()) is None:
        if _finished.wait(_SECONDS_BETWEEN_LOOKS):
            return
    # This process may be about to print its own message.
    if _finished.wait(_SECONDS_OF_GRACE) or not _ends.acquire(blocking=False):
        return
    # The acquired lock is kept: no other thread may print a reason now.
    print(
        shown(printable(f"babel: process {note['process']} of {note['of']} ended: {note['line']}")),
        file=sys.stderr,
    )
    _meet_and_end(note["status"])


def _note() -> dict[str, Any] | None:
    """The note of the process that failed first; None if none has failed, or the service does not answer."""
    with contextlib.suppress(Exception):
        note: dict[str, Any] = json.loads(_client().key_value_try_get(_NOTE))
        return note
    return None


def _meet_and_end(status: int) -> NoReturn:
    with contextlib.suppress(Exception):
        _client().wait_at_barrier(_LEAVE, _SECONDS_TO_MEET * 1000)
        # All processes are here, so none waits for a process that has ended.
        # A shutdown that hangs must not keep the process: then the timer ends it.
        late = threading.Timer(_SECONDS_TO_DISCONNECT, end, [status])
        late.daemon = True
        late.start()
        _jax().distributed.shutdown()
    end(status)


def _client() -> Any:
    return _jax()._src.distributed.global_state.client


def _jax() -> Any:
    import jax

    return jax
