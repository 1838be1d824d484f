"""Scalars for TensorBoard, written in the thread that calls.

tensorboardX's own SummaryWriter writes in another thread, from a queue. On a full disk that thread ends, and
the next write waits for ever.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def _without(*modules: str) -> Iterator[None]:
    """Makes imports of these modules fail during the block. Modules that are imported already stay."""
    hidden = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


# tensorboardX imports torch and boto3 if they are installed, and has no switch for that. The imports take two
# seconds, and nothing here uses them.
with _without("torch", "boto3"):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar


class Board:
    """A file of events in a folder. Without `writes` nothing is written."""

    def __init__(self, folder: Path, first_step: int, writes: bool):
        """Earlier files may have values of `first_step` and later, from an interrupted run; TensorBoard
        leaves them out.
        """
        self._events: EventsWriter | None = None
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            # Two starts within a second have files of their own.
            self._events = EventsWriter(str(folder / "events"), f".{os.getpid()}.{time.time_ns() % 10**9}")
            # A file must begin with its version. START makes TensorBoard drop later steps of earlier files.
            for event in (
                Event(file_version="brain.Event:2"),
                Event(session_log=SessionLog(status=SessionLog.START)),
            ):
                event.step = first_step
                self._write(event)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Notes a value; `flush` writes it. Raises OSError as files do."""
        self._write(Event(step=step, summary=scalar(name, value)))

    def flush(self) -> None:
        """Hands all to the system."""
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Writes what waits and closes the file."""
        if self._events is not None:
            self._events.close()

    def _write(self, event: Event) -> None:
        if self._events is not None:
            event.wall_time = time.time()
            self._events.write_event(event)
