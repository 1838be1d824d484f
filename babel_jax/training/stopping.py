"""After which steps a run saves, and after which it stops before its time: the same steps in all of its processes."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from babel_jax.errors import Preempted

Stopped = Callable[[int], signal.Signals | None]


@contextlib.contextmanager
def stop_requests() -> Iterator[Stopped]:
    """Holds Ctrl-C and SIGTERM back and gives a function that says after each step whether one came; a second Ctrl-C stops at once.

    The function takes the number of steps done, ever more. All processes must call it after every step: it then says so in all of them
    after the same one, whichever got the signal. That costs no communication until there is one.
    """
    came: list[signal.Signals] = []
    several = jax.distributed.is_initialized()

    def note(number: int, _: FrameType | None) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(signal.Signals(number))
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def stopped(step: int) -> signal.Signals | None:
        if not several:
            return came[0] if came else None
        if not multihost_utils.reached_preemption_sync_point(step):
            return None
        # The same in all: one that ends otherwise than the others is lost to them.
        interrupted = multihost_utils.process_allgather(np.asarray(bool(came))).any()
        return signal.SIGINT if interrupted else signal.SIGTERM

    # Of several processes, JAX itself listens to SIGTERM, and tells the others.
    with contextlib.ExitStack() as handled:
        for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
            handled.enter_context(_handler(number, note))
        yield stopped


@contextlib.contextmanager
def preempted_by_sigterm() -> Iterator[None]:
    """SIGTERM raises Preempted, as Ctrl-C raises KeyboardInterrupt: at once, so between steps `stop_requests` is to hold it back."""

    def stop(*_: Any) -> NoReturn:
        raise Preempted("stopped by SIGTERM")

    with contextlib.nullcontext() if jax.distributed.is_initialized() else _handler(signal.SIGTERM, stop):
        yield


@contextlib.contextmanager
def _handler(number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    try:
        before = signal.signal(number, handler)
    except ValueError:  # not the main thread: signals do not come here
        yield
        return
    try:
        yield
    finally:
        signal.signal(number, before)


class SaveTimes:
    """Says after each step whether a checkpoint is due: `every` so many steps, and where `minutes` have gone by since the last.

    The minutes are those of process 0. The others ask it: it answers in how many steps they are to ask again, which is at half of what is
    left. So a few questions are asked for each checkpoint, and none where there is one process.
    """

    def __init__(self, start: int, every: int, minutes: float | None, clock: Callable[[], float] = time.monotonic):
        """`start` is the number of steps done; `clock` counts seconds."""
        self._every, self._seconds, self._clock = every, None if minutes is None else 60 * minutes, clock
        self._saved_at, self._asked_step, self._asked_at, self._ask = clock(), start, clock(), start + 1

    def due(self, step: int) -> bool:
        """Whether to save after `step` steps. To be called after every one."""
        due = step % self._every == 0
        if self._seconds is not None and step >= self._ask:
            wait = _of_first(self._steps_to_wait(step))
            due, self._ask = due or wait == 0, step + max(wait, 1)
        if due:
            self._saved_at = self._clock()
        return due

    def _steps_to_wait(self, step: int) -> int:
        assert self._seconds is not None
        now = self._clock()
        left = self._saved_at + self._seconds - now
        seconds_a_step = (now - self._asked_at) / (step - self._asked_step)
        self._asked_step, self._asked_at = step, now
        if left <= 0:
            return 0
        return 1 if jax.process_count() == 1 else max(1, math.floor(min(left / max(seconds_a_step, 1e-9), 1e6) / 2))


def _of_first(number: int) -> int:
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))
