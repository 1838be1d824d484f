"""Signals that end a command: they stop it in order, and later signals do not interrupt the stop.

Ctrl-C raises KeyboardInterrupt; a second one ends the process at once; a line answers each. SIGTERM (a
machine is taken away) and SIGHUP (a terminal is closed) raise Preempted in commands that can be resumed.
Python discards an exception that a handler raises inside of a callback, such as those that JAX gives to the
garbage collector; such a signal is sent again.
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

from babel_jax.distributed.ending import begin_to_end, end_together, watches
from babel_jax.errors import BadInput, Preempted
from babel_jax.progress import under_way

Handler = Callable[[int, FrameType | None], None]
STOPS = (signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130  # exit status, as in shells: 128 + SIGINT
_SECONDS_TO_SEND_AGAIN = 0.05
_MOST_ACTION_BYTES = 1024  # more than a `struct sigaction` has on any system
_SECONDS_TO_HANDLE = 0.2
_came: list[signal.Signals] = []  # of STOPS, within `preempted`
_blocks: list["_Answers"] = []  # of `interrupts_answered`, the innermost last
_handled = threading.Event()  # by a handler, and not yet heard by the thread
_stopped_in: list[str] = []


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

    # A library that wants to handle this signal gets the old handler back, and changes nothing.
    signal.signal = for_other_signals  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = install
        # None: the handler was not installed by Python, and only sigaction restores it.
        if before is not None:
            signal.signal(number, before)
        libc.sigaction(number, action, None)
        # The handlers are in place again, so the signal that was held back reaches its own.
        if came:
            signal.raise_signal(number)


@contextlib.contextmanager
def interruptible(first: str = "stopping; again to end at once") -> Iterator[None]:
    """In the block, the first Ctrl-C raises KeyboardInterrupt; the second ends the process at once, like a
    kill, without a traceback. Each is answered at once by a line on standard error, the first one by `first`.
    """

    def stop() -> NoReturn:
        raise KeyboardInterrupt

    with (
        interrupts_answered(first, lambda: "ended at once", stop),
        _sent_again(KeyboardInterrupt, lambda: signal.SIGINT, lambda: _blocks[-1].expect_again()),
    ):
        yield


@contextlib.contextmanager
def interrupts_answered(first: str, last: Callable[[], str], then: Callable[[], None]) -> Iterator[None]:
    """In the block, the first Ctrl-C is answered with the line `first`, and `then` is called; the second is
    answered with `last()`, and the process ends at once, without a traceback. Its files are then as after a
    kill, so the same command resumes or begins again.

    Handlers of Python wait while the main thread runs C code, such as XLA's compiler. So a thread hears
    Ctrl-C too, and answers if the handler does not.
    """
    block = _Answers(first, last, then)
    _blocks.append(block)
    try:
        with handled(signal.SIGINT, block.handle), _heard_by_thread():
            yield
    finally:
        _blocks.remove(block)


class _Answers:
    """The answers to the Ctrl-C of one block; each is answered once, by the handler or by the thread."""

    def __init__(self, first: str, last: Callable[[], str], then: Callable[[], None]):
        self._first, self._last, self._then = first, last, then
        # Answered by the thread, and not handled yet; and handled, but to come again.
        self._early = self._again = self._count = 0

    def handle(self, *_: object) -> None:
        """The handler, in the main thread."""
        # The thread has answered this Ctrl-C already.
        if self._early:
            self._early -= 1
        else:
            _handled.set()
            if self._again:
                self._again -= 1
            else:
                self._answer()
        self._then()

    def answer_early(self) -> None:
        """Called by the thread if the handler does not answer."""
        self._early += 1
        # A Ctrl-C that comes again was answered when it came first: it is not a second one.
        if self._again:
            self._again -= 1
        else:
            self._answer()

    def expect_again(self) -> None:
        """The last Ctrl-C was lost in a callback, and comes again."""
        self._again += 1

    def _answer(self) -> None:
        self._count += 1
        if self._count == 1:
            _stopped_in.append(under_way())
            say(f"babel: {self._first}")
        else:
            line = self._last()
            say(f"babel: {line}")
            end_at_once(line)


def stopped_in() -> str:
    """The work that was under way at the last Ctrl-C, such as `prepare, 1 of 3 languages`; else empty."""
    return _stopped_in[-1] if _stopped_in else ""


@contextlib.contextmanager
def _heard_by_thread() -> Iterator[None]:
    """In the outermost block of the main thread, another thread reads the number of each signal."""
    if threading.current_thread() is not threading.main_thread() or len(_blocks) > 1:
        yield
        return
    _handled.clear()
    # Python's handler in C writes the number of each signal into this pipe at once, also during C code.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    hearing = threading.Thread(target=_hear, args=(reading,), name="babel hears Ctrl-C", daemon=True)
    hearing.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        # The thread ends at the end of the pipe.
        os.close(writing)
        hearing.join(2 * _SECONDS_TO_HANDLE)


def _hear(reading: int) -> None:
    while number := os.read(reading, 1):
        if number[0] != signal.SIGINT:
            continue
        # While Python code runs, the handler comes first. The thread answers only if it does not.
        if _handled.wait(_SECONDS_TO_HANDLE):
            _handled.clear()
        elif _blocks:
            _blocks[-1].answer_early()
    os.close(reading)


def end_now(*_: object) -> NoReturn:
    """A handler of Ctrl-C while Python itself ends, where tracebacks would come."""
    os._exit(INTERRUPTED)


def end_at_once(line: str) -> NoReturn:
    """Ends the process, and the others of its job, as after a kill; `line` says why."""
    if watches():
        begin_to_end()
        end_together(INTERRUPTED, line)
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started in the block do not get the terminal's Ctrl-C: this process ends them."""
    # A signal that comes meanwhile is not lost: another thread of this process takes it, or it waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


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
        # A message for the user stays as it is, also after a signal.
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
        # A moment later, when the callback has ended.
        again = threading.Timer(_SECONDS_TO_SEND_AGAIN, os.kill, (os.getpid(), number()))
        again.daemon = True
        again.start()

    sys.unraisablehook = seen
    try:
        yield
    finally:
        sys.unraisablehook = hook
