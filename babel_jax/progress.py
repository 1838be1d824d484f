"""Progress of long work: a bar on a terminal, and elsewhere a line of the log after five seconds and then
each minute.

Other processes than the first, and workers, stay silent: their log shows warnings only.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger("babel")

Row = TypeVar("Row")

SECONDS_TO_FIRST_LINE = 5.0
SECONDS_BETWEEN_LINES = 60.0
_SECONDS_BETWEEN_LOOKS = 1.0
_NOT_SHOWN = "TQDM_DISABLE"  # the variable of tqdm that hides bars

_active: list["Work[object]"] = []  # the outermost first
_lock = threading.RLock()
_clock: Callable[[], float] = time.monotonic
_last_line = float("-inf")  # of the clock


class Work(Generic[Row]):
    """Work that is under way; as a context manager, or around the rows of a loop.

    Each row that the loop has finished counts as one; else `update` counts. Without a total or a unit only
    the time is shown.
    """

    def __init__(
        self,
        what: str,
        rows: Iterable[Row] | None = None,
        *,
        total: int | None = None,
        unit: str = "",
        initial: int = 0,
        keep: bool = False,
        shown: bool = True,
    ):
        """unit: of the counts, in the plural; "B" for bytes.

        keep: the bar stays on the terminal after the end. shown: False shows nothing.
        """
        if total is None and isinstance(rows, Sized):
            total = len(rows)
        self.what, self.unit, self.total, self.done = what, unit, total, initial
        self._initial, self._rows, self._keep, self._shown = initial, rows, keep, shown
        self._note, self._told = "", False
        self._since = _clock()
        self._bar: "tqdm[Row] | None" = None

    def __iter__(self) -> Iterator[Row]:
        assert self._rows is not None
        with self:
            for row in self._rows:
                yield row
                self.update()

    def __enter__(self) -> "Work[Row]":
        self._since = _clock()
        if self._shown:
            # A bar without counts is drawn once the work takes long.
            if self.unit:
                self._draw()
            with _lock:
                _active.append(self)  # type: ignore[arg-type]
                _Pulse.start_if_none()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Counts so many as done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def note(self, text: str) -> None:
        """Shows a text beside the counts, such as the loss."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Ends the work. A bar is removed, unless it is kept."""
        with _lock:
            if self in _active:
                _active.remove(self)  # type: ignore[arg-type]
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def line(self) -> str:
        """The state as text: `reading sw: 2,000 of 3,000 rows, 0:01:10 so far, 0:00:35 left`."""
        seconds = _clock() - self._since
        parts = [self.counts()] if self.unit else []
        if self._note:
            parts.append(self._note)
        parts.append(f"{interval(seconds)} so far")
        # The rate is of this start alone: what was done before took no time now.
        new = self.done - self._initial
        if self.total is not None and 0 < new <= self.total - self._initial:
            parts.append(f"{interval(seconds / new * (self.total - self.done))} left")
        return f"{self.what}: {', '.join(parts)}"

    def counts(self) -> str:
        """The counts with their unit: `2,000 of 3,000 rows`."""
        if self.unit == "B":
            from tqdm import tqdm

            whole = "" if self.total is None else f" of {tqdm.format_sizeof(self.total, 'B')}"
            return f"{tqdm.format_sizeof(self.done, 'B')}{whole}"
        whole = "" if self.total is None else f" of {self.total:,}"
        return f"{self.done:,}{whole} {self.unit}"

    def _draw(self) -> None:
        # Here, since it takes longer to import than everything else that `babel --help` needs.
        from tqdm import tqdm

        self._bar = tqdm(
            desc=self.what,
            total=self.total,
            initial=self.done,
            unit=self.unit if self.unit == "B" else f" {self.unit}",
            unit_scale=self.unit == "B",
            leave=self._keep,
            disable=None,  # on anything but a terminal
            bar_format=None if self.unit else "{desc}: {elapsed}",
        )

    def show(self, is_terminal: bool) -> bool:
        """Draws the bar anew, or writes a line if one is due; returns True if it wrote one."""
        age = _clock() - self._since
        if is_terminal:
            if self._bar is None and age >= SECONDS_TO_FIRST_LINE:
                self._draw()
            if self._bar is not None:
                self._bar.refresh()
            return False
        if age < SECONDS_TO_FIRST_LINE:
            return False
        # The first line of a work comes at once; after that, one line a minute for all works together.
        is_first, self._told = not self._told, True
        if is_first or _clock() - _last_line >= SECONDS_BETWEEN_LINES:
            log.info("%s", self.line())
            return True
        return False


def working(what: str) -> Work[object]:
    """Work that has no counts, such as to compile a program."""
    return Work(what)


def under_way() -> str:
    """The outermost work with counts, as text: `prepare, 1 of 3 languages`. Empty if there is none."""
    for work in list(_active):
        if work.unit:
            return f"{work.what}, {work.counts()}"
    return ""


def look() -> None:
    """Shows all work that is under way; the innermost of several works says the line of a minute."""
    global _last_line
    is_terminal = sys.stderr.isatty()
    if os.environ.get(_NOT_SHOWN) and not is_terminal:
        return
    # From the innermost: its line is the most exact one, and then the minute is used up.
    for work in reversed(list(_active)):
        if work.show(is_terminal):
            _last_line = _clock()


def interval(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 0:01:05."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


class _Pulse(threading.Thread):
    """Looks at the work that is under way once a second, until there is none."""

    current: "_Pulse | None" = None

    @classmethod
    def start_if_none(cls) -> None:
        if cls.current is None:
            cls.current = cls(name="babel progress", daemon=True)
            cls.current.start()

    def run(self) -> None:
        while True:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            with _lock:
                if not _active:
                    _Pulse.current = None
                    return
            look()
