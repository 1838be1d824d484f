"""Goodput: the part of a run's wall time spent in steps that count, and where the rest went, over all
restarts.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path

from babel_jax.errors import BadInput
from babel_jax.files import write_text
from babel_jax.run_files import GoodputFile, read_as

log = logging.getLogger("babel")


class Spent(StrEnum):
    """The uses of wall time. If a step is repeated after a restart, its first time counts as `lost`. The time
    between two starts counts as `down`.
    """

    STEP = "step"
    COMPILE = "compile"
    DATA = "data"
    CHECKPOINT = "checkpoint"
    EVALUATION = "evaluation"
    SETUP = "setup"
    LOST = "lost"
    DOWN = "down"


_EPOCH = time.time() - time.monotonic()


def seconds_since_epoch() -> float:
    """As `time.time` at the start of the process; after that by a clock that nobody can set."""
    return _EPOCH + time.monotonic()


class Goodput:
    """The seconds of a run by their use (`Spent`). Each moment counts once.

    The seconds are in a file, so that a resumed run adds to them.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = seconds_since_epoch):
        """Resumes the counts of the file at `path`, if there is one.

        `clock` gives seconds since the epoch, and only goes forward.
        """
        self._path, self._clock, self._now = path, clock, Spent.SETUP
        self.seconds = dict.fromkeys(Spent, 0.0)
        self._since = self._written = clock()
        self._last_step = -1
        try:
            before = read_as(path, GoodputFile)
        except FileNotFoundError:
            return
        # A damaged file costs some figures. Training need not stop for it.
        except BadInput as problem:
            log.warning("%s; goodput is counted from now on", problem)
            return
        # From the end of the last start to the beginning of this one, the run was down.
        self.seconds |= {on: before["seconds"].get(on, 0.0) for on in Spent}
        self._last_step = before.get("last_step", -1)
        self.seconds[Spent.DOWN] += max(0.0, self._since - (before.get("until") or self._since))

    @contextlib.contextmanager
    def spent(self, on: Spent) -> Iterator[None]:
        """The time of the block goes to `on`, less that of blocks inside it."""
        before = self._turn(on)
        try:
            yield
        finally:
            self._turn(before)

    def lose(self, seconds: dict[int, float]) -> None:
        """Counts repeated steps as lost; `seconds` has the time that each took at first."""
        # Steps after `last_step` were never counted.
        lost = sum(time for step, time in seconds.items() if step <= self._last_step)
        # The times come from metrics.jsonl, another file, so their sum may be larger than the steps counted
        # here.
        lost = min(lost, self.seconds[Spent.STEP])
        self.seconds[Spent.STEP] -= lost
        self.seconds[Spent.LOST] += lost

    def fraction(self) -> float:
        """The part of the time so far that went to steps that count."""
        self._turn(self._now)
        return self.seconds[Spent.STEP] / max(sum(self.seconds.values()), 1e-9)

    def save(self, last_step: int, at_most_every: float = 0.0) -> None:
        """Writes the file, unless that was done less than `at_most_every` seconds ago.

        Steps up to `last_step` are in it.
        """
        self._turn(self._now)
        if self._since - self._written >= at_most_every:
            self._written, self._last_step = self._since, last_step
            kept = {
                "seconds": {str(name): seconds for name, seconds in self.seconds.items()},
                "until": self._since,
                "last_step": last_step,
            }
            write_text(self._path, json.dumps(kept, indent=2) + "\n")

    def _turn(self, on: Spent) -> Spent:
        # One timer: what ends here begins the next, so that no moment counts twice.
        before, now = self._now, self._clock()
        self.seconds[before] += max(0.0, now - self._since)
        self._since, self._now = now, on
        return before


def goodput_of(path: Path) -> dict[str, float] | None:
    """The fraction of a run's wall time for each use, from its file; None without a file that can be read."""
    try:
        seconds = read_as(path, GoodputFile)["seconds"]
    except (FileNotFoundError, BadInput):
        return None
    total = sum(seconds.values())
    return {name: value / total for name, value in seconds.items()} if total > 0 else None
