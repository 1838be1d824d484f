"""After which steps a run saves, and after which it stops before its time: the same steps in all of its
processes.
"""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from babel_jax.distributed.signals import STOPS, handled, preempted, say, swallowed

Stopped = Callable[[int], signal.Signals | None]

_SAID = (
    "stopping after this step, with a checkpoint",
    "still writing the checkpoint; once more Ctrl-C ends at once, without it",
)
_INTERRUPTS_TO_END = len(_SAID) + 1


@contextlib.contextmanager
def stop_requests() -> Iterator[Stopped]:
    """Holds Ctrl-C, SIGTERM and SIGHUP back and gives a function that says after each step whether one came.

    A second Ctrl-C changes nothing, as the checkpoint is being written then; a third stops at once, without
    one. The function takes the number of steps done, ever more. All processes must call it after every step:
    it then says so in all of them after the same one, whichever got the signal. That costs no communication
    until there is one.
    """
    came = swallowed()
    interrupts = 0
    several = jax.distributed.is_initialized()

    def note(number: int, _: FrameType | None) -> None:
        nonlocal interrupts
        came.append(signal.Signals(number))
        if number == signal.SIGINT:
            interrupts += 1
            if interrupts >= _INTERRUPTS_TO_END:
                raise KeyboardInterrupt
            say(f"babel: {_SAID[interrupts - 1]}")
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def stopped(step: int) -> signal.Signals | None:
        if not several:
            return came[0] if came else None
        if not multihost_utils.reached_preemption_sync_point(step):
            return None
        # The same in all: one that ends otherwise than the others is lost to them.
        interrupted = multihost_utils.process_allgather(np.asarray(signal.SIGINT in came)).any()
        return signal.SIGINT if interrupted else signal.SIGTERM

    # Of several processes, JAX itself listens to SIGTERM, and tells the others.
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGHUP) if several else (signal.SIGINT, *STOPS):
            stack.enter_context(handled(number, note))
        yield stopped


@contextlib.contextmanager
def preempted_by_sigterm() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Preempted, as Ctrl-C raises KeyboardInterrupt: at once, so between steps
    `stop_requests` is to hold them back. Of several processes JAX listens to SIGTERM, and SIGHUP is handed to
    it."""
    if jax.distributed.is_initialized():
        with handled(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM)):
            yield
    else:
        with preempted():
            yield


class SaveTimes:
    """Says after each step whether a checkpoint is due: `every` so many steps, and where `minutes` have gone
    by since the last.

    The minutes are those of process 0. The others ask it: it answers in how many steps they are to ask again,
    which is at half of what is left. So a few questions are asked for each checkpoint, and none where there
    is one process.
    """

    def __init__(
        self, start: int, every: int, minutes: float | None, clock: Callable[[], float] = time.monotonic
    ):
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
        return (
            1
            if jax.process_count() == 1
            else max(1, math.floor(min(left / max(seconds_a_step, 1e-9), 1e6) / 2))
        )


def _of_first(number: int) -> int:
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))
