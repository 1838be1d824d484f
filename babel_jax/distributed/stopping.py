"""The steps after which a run saves a checkpoint or stops early; they are the same in all its processes."""

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

from babel_jax.distributed.signals import STOPS, handled, interrupts_answered, preempted, swallowed

Stopped = Callable[[int], signal.Signals | None]

STOPPING = "stopping after this step; again to drop it"


@contextlib.contextmanager
def stop_requests(saved: Callable[[], int] = lambda: 0) -> Iterator[Stopped]:
    """Holds Ctrl-C, SIGTERM and SIGHUP back, and returns a function that tells after each step if one of them
    came. `saved()` is the number of steps in the last checkpoint.

    A second Ctrl-C ends the process at once, and with it what came after the last checkpoint. The function
    takes the number of steps done, which must increase. All processes must call it after every step: it then
    returns the signal on all of them after the same step. Without a signal this needs no communication.
    """
    came = swallowed()
    several = jax.distributed.is_initialized()

    def note(number: int, _: FrameType | None = None) -> None:
        came.append(signal.Signals(number))
        # JAX's own handler of SIGTERM tells the other processes.
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def dropped() -> str:
        if steps := saved():
            return f"dropped all after step {steps:,}; the same command resumes there"
        return "dropped all steps; the same command begins again"

    def stopped(step: int) -> signal.Signals | None:
        if not several:
            return came[0] if came else None
        # JAX agrees on a step that no process has passed yet.
        if not multihost_utils.reached_preemption_sync_point(step):
            return None
        # The same signal on all: a process that ends in another way would be lost to the others.
        interrupted = multihost_utils.process_allgather(np.asarray(signal.SIGINT in came)).any()
        return signal.SIGINT if interrupted else signal.SIGTERM

    # With several processes, JAX itself handles SIGTERM, and tells the others.
    with contextlib.ExitStack() as stack:
        stack.enter_context(interrupts_answered(STOPPING, dropped, lambda: note(signal.SIGINT)))
        for number in (signal.SIGHUP,) if several else STOPS:
            stack.enter_context(handled(number, note))
        yield stopped


@contextlib.contextmanager
def preempted_by_sigterm() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Preempted at once, as Ctrl-C raises KeyboardInterrupt; between steps,
    `stop_requests` must hold them back. With several processes, JAX handles SIGTERM, and SIGHUP is passed on
    to it.
    """
    if jax.distributed.is_initialized():
        with handled(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM)):
            yield
    else:
        with preempted():
            yield


class SaveTimes:
    """Tells after each step if a checkpoint is due: every `every` steps, and when `minutes` have passed since
    the last one.

    The minutes are those of process 0, which the others ask. It answers with the number of steps after which
    to ask again, at half of the remaining time. So there are a few questions for each checkpoint, and none
    with a single process.
    """

    def __init__(
        self, start: int, every: int, minutes: float | None, clock: Callable[[], float] = time.monotonic
    ):
        """start: the number of steps done. clock: returns seconds."""
        self._every, self._seconds, self._clock = every, None if minutes is None else 60 * minutes, clock
        self._saved_at, self._asked_step, self._asked_at, self._ask = clock(), start, clock(), start + 1

    def due(self, step: int) -> bool:
        """True if a checkpoint must be saved after `step` steps. It must be called after every step."""
        due = step % self._every == 0
        # All processes have the same answers, so they ask after the same step.
        if self._seconds is not None and step >= self._ask:
            wait = _of_first(self._steps_to_wait(step))
            due, self._ask = due or wait == 0, step + max(wait, 1)
        if due:
            self._saved_at = self._clock()
        return due

    def _steps_to_wait(self, step: int) -> int:
        """The steps until the next question; 0 if the minutes have passed."""
        assert self._seconds is not None
        now = self._clock()
        left = self._saved_at + self._seconds - now
        seconds_a_step = (now - self._asked_at) / (step - self._asked_step)
        self._asked_step, self._asked_at = step, now
        if left <= 0:
            return 0
        # A single process needs no communication, so it may ask after every step.
        if jax.process_count() == 1:
            return 1
        steps_left = min(left / max(seconds_a_step, 1e-9), 1e6)
        return max(1, math.floor(steps_left / 2))


def _of_first(number: int) -> int:
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))
