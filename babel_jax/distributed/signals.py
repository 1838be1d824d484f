"""Signals that end a command: they stop it in order, and later signals do not interrupt the stop.

Ctrl-C raises KeyboardInterrupt; a second one ends the process at once. SIGTERM (a machine is taken away) and
SIGHUP (a terminal is closed) raise Preempted in commands that can be resumed. Python discards an exception
that a handler raises inside of a callback, such as those that JAX gives to the garbage collector; such a
signal is sent again.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from babel_jax.errors import BadInput, Preempted

Handler = Callable[[int, FrameType | None], None]
STOPS = (signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130  # exit status, as in shells: 128 + SIGINT
_SECONDS_TO_SEND_AGAIN = 0.05
_MOST_ACTION_BYTES = 1024  # more than a `struct sigaction` has on any system
_came: list[signal.Signals] = []  # of STOPS, within `preempted`


@contextlib.contextmanager
def handled(number: signal.Signals, handler: Handler) -> Iterator[None]:
    """Handles a signal in the block.

    Does nothing outside the main thread, and for a SIGHUP that `nohup` has switched off.
    """
    if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
        yield
        return
    try:
        before = signal.signal(number, handler)
    except ValueError:  # not the main thread, which gets no signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(number, before)


@contextlib.contextmanager
def held_back(number: signal.Signals) -> Iterator[None]:
    """Holds a signal back until the block ends. Libraries in the block cannot replace its handler (`ray.init`
    would).

    Does nothing outside the main thread, where Python allows no change of handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Python does not see the handlers that C++ installs, such as that of jax.distributed; sigaction(2) sees
    # both kinds.
    libc, action = ctypes.CDLL(None), ctypes.create_string_buffer(_MOST_ACTION_BYTES)
    libc.sigaction(number, None, action)
    came: list[int] = []
    install, before = signal.signal, signal.signal(number, lambda *_: came.append(number))

    def for_other_signals(one: int, handler: Any) -> Any:
        return before if one == number else install(one, handler)

    signal.signal = for_other_signals  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = install
        if before is not None:
            signal.signal(number, before)
        libc.sigaction(number, action, None)
        if came:
            signal.raise_signal(number)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """In the block, the first Ctrl-C raises KeyboardInterrupt; the second ends the process at once, like a
    kill, without a traceback.
    """
    interrupts = 0

    def interrupt(*_: Any) -> NoReturn:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            end_at_once()
        raise KeyboardInterrupt

    def again() -> None:
        nonlocal interrupts
        interrupts -= 1

    with handled(signal.SIGINT, interrupt), _sent_again(KeyboardInterrupt, lambda: signal.SIGINT, again):
        yield


def end_at_once(*_: Any) -> NoReturn:
    """Ends the process. Its files are as after a kill, so the same command resumes or begins again."""
    say("babel: interrupted again; ended at once")
    os._exit(INTERRUPTED)


def say(line: str) -> None:
    """Writes a line to standard error. A signal handler may call it during any other output."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


@contextlib.contextmanager
def preempted(numbers: tuple[signal.Signals, ...] = STOPS) -> Iterator[None]:
    """In the block, SIGTERM and SIGHUP raise Preempted at once; `stop_requests` holds them back between
    steps.

    If JAX turns the exception into another error in one of its callbacks, the block also ends with Preempted.
    """
    _came.clear()

    def stop(number: int, _: FrameType | None) -> NoReturn:
        _came.append(signal.Signals(number))
        raise Preempted(f"stopped by {_came[0].name}")

    with contextlib.ExitStack() as stack:
        for number in numbers:
            stack.enter_context(handled(number, stop))
        stack.enter_context(_sent_again(Preempted, lambda: _came[-1]))
        try:
            yield
        except BadInput:
            raise
        except Exception as error:
            if _came:
                raise Preempted(f"stopped by {_came[0].name}") from error
            raise
        finally:
            _came.clear()


def swallowed() -> list[signal.Signals]:
    """The signals of STOPS that came since `preempted` began and whose exception was lost."""
    return list(_came)


@contextlib.contextmanager
def _sent_again(
    kind: type[BaseException], number: Callable[[], signal.Signals], before: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Sends a signal again if its exception, of this kind, was raised in a callback from which Python
    discards exceptions.
    """
    hook = sys.unraisablehook

    def seen(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, kind):
            hook(unraisable)
            return
        before()
        again = threading.Timer(_SECONDS_TO_SEND_AGAIN, os.kill, (os.getpid(), number()))
        again.daemon = True
        again.start()

    sys.unraisablehook = seen
    try:
        yield
    finally:
        sys.unraisablehook = hook
