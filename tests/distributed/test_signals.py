"""Signals that come at the wrong moment: in a callback, twice, or when nobody reads what is written."""

import contextlib
import gc
import signal
import subprocess
import sys
import time
import weakref

import pytest

from babel_jax.distributed.signals import STOPS, handled, held_back, interruptible, preempted, swallowed
from babel_jax.distributed.stopping import stop_requests
from babel_jax.errors import BadInput, Preempted


class Thing:
    pass


@pytest.fixture(autouse=True)
def untouched():
    """The handlers of the process, which other tests' libraries may have replaced, are after each test as
    before it.
    """
    before = [signal.getsignal(one) for one in (*STOPS, signal.SIGINT)]
    yield
    assert [signal.getsignal(one) for one in (*STOPS, signal.SIGINT)] == before


def callback_that_gets(sent):
    """A signal whose handler runs inside of a callback, from which Python lets no exception out."""
    thing = Thing()
    kept = weakref.ref(thing, lambda _: signal.raise_signal(sent))
    del thing
    return kept


def collected_while_getting(sent):
    """The same in the garbage collector, to which JAX gives a callback."""

    def callback(phase, _):
        if phase == "start":
            gc.callbacks.remove(callback)
            signal.raise_signal(sent)

    gc.callbacks.append(callback)
    gc.collect()


def patiently(place, sent):
    place(sent)
    time.sleep(10)


@pytest.mark.parametrize("place", [callback_that_gets, collected_while_getting])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_a_callback_is_not_lost(place, sent):
    with pytest.raises(Preempted, match=f"stopped by {sent.name}"), preempted():
        patiently(place, sent)


@pytest.mark.parametrize("place", [callback_that_gets, collected_while_getting])
def test_control_c_in_a_callback_is_not_lost(place):
    with pytest.raises(KeyboardInterrupt), interruptible():
        patiently(place, signal.SIGINT)


LONG_IN_C = """
import gc, hashlib, signal, time
from babel_jax.distributed.signals import interruptible

def lost(phase, _):
    if phase == "start" and not begun:
        begun.append(phase)
        signal.raise_signal(signal.SIGINT)

def in_c(phase, _):
    if phase == "stop" and len(begun) == 1:
        begun.append(phase)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)

begun = []
try:
    with interruptible():
        gc.callbacks += [lost, in_c]
        gc.collect()
        time.sleep(10)
except KeyboardInterrupt:
    print("in order")
"""


def test_control_c_that_comes_again_during_long_work_in_c_is_not_a_second_one():
    ended = subprocess.run([sys.executable, "-c", LONG_IN_C], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.returncode) == ("in order\n", 0), ended.stderr
    assert ended.stderr == "babel: stopping; again to end at once\n"


def test_a_signal_that_was_swallowed_stops_the_run_after_its_next_step():
    with preempted():
        with contextlib.suppress(BaseException):  # as a library may
            signal.raise_signal(signal.SIGTERM)
        assert swallowed() == [signal.SIGTERM]
        with stop_requests() as stopped:
            assert stopped(1) is signal.SIGTERM


def test_an_error_made_of_the_signal_is_the_signal():
    def library():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Preempted as stopped:
            raise RuntimeError(f"INTERNAL: CpuCallback error: {stopped}") from None

    with pytest.raises(Preempted), preempted():
        library()
    with pytest.raises(BadInput, match="no space"), preempted():
        raise BadInput("no space")
    with pytest.raises(RuntimeError, match="own fault"), preempted():
        raise RuntimeError("own fault")


def test_nohup_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with preempted(), stop_requests() as stopped:
            signal.raise_signal(signal.SIGHUP)
            assert stopped(1) is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back():
    def ours(*_):
        pass

    before = signal.getsignal(signal.SIGTERM)
    with handled(signal.SIGTERM, ours):
        assert signal.getsignal(signal.SIGTERM) is ours
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_library_replaces_no_handler_and_the_signal_comes_after_it():
    done = []

    def run():
        ours = signal.getsignal(signal.SIGTERM)
        with held_back(signal.SIGTERM):
            assert signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number)) is ours
            done.append("replaced")
        assert signal.getsignal(signal.SIGTERM) is ours
        with held_back(signal.SIGTERM):
            signal.raise_signal(signal.SIGTERM)
            done.append("signal")
        done.append("too late")

    with pytest.raises(Preempted), preempted():
        run()
    assert done == ["replaced", "signal"]


IN_C = """
import ctypes, signal, sys
from babel_jax.distributed.signals import held_back
libc = ctypes.CDLL(None)
libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.signal(signal.SIGTERM, 1)  # ignored, as a handler in C++ may be installed: Python does not know
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
with held_back(signal.SIGTERM):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
signal.raise_signal(signal.SIGTERM)
print("alive")
"""


def test_a_handler_in_c_is_put_back_too():
    ended = subprocess.run([sys.executable, "-c", IN_C], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.returncode) == ("alive\n", 0), ended.stderr


def command(does, shell=""):
    """The end of a command that does this in place of measuring a model."""
    script = (
        "import os, signal, sys, time\nfrom babel_jax import cli\nfrom babel_jax.commands import models\n"
        f"def measure(options):\n    {does}\nmodels._sensitivity = measure\n"
        "sys.argv = ['babel', 'sensitivity', 'MODEL']\nsys.exit(cli.main())\n"
    )
    line = [sys.executable, "-c", script]
    if not shell:
        return subprocess.run(line, capture_output=True, text=True, timeout=60)
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$@" {shell}', "bash", *line],
        capture_output=True,
        text=True,
        timeout=60,
    )


TWICE = (
    "try:\n        signal.raise_signal(signal.SIGINT)\n    finally:\n        "
    "signal.raise_signal(signal.SIGINT)"
)


def test_a_second_control_c_is_no_traceback():
    ended = command(TWICE)
    assert ended.returncode == 130
    assert ended.stderr == "babel: stopping; again to end at once\nbabel: ended at once\n"
    once = command("signal.raise_signal(signal.SIGINT)")
    assert once.returncode == 130
    assert once.stderr == "babel: stopping; again to end at once\nbabel: stopped; the same command resumes\n"


@pytest.mark.parametrize(
    "does", ["return {'summary': 'word ' * 100_000}", "print('x' * 1_000_000)\n    return {}"]
)
def test_nobody_reads_the_output(does):
    ended = command(does, "| head -c 10 > /dev/null")
    assert ended.stderr == ""
    assert ended.returncode in (0, 141)


def test_output_to_a_full_disk_is_one_line():
    ended = command("return {'summary': 'done'}", "> /dev/full")
    assert ended.stderr == "babel: standard output: No space left on device; the command itself is done\n"
    assert ended.returncode == 2


def test_help_for_nobody():
    ended = subprocess.run(
        [
            "bash",
            "-c",
            'set -o pipefail; "$@" --help | head -c 1 > /dev/null',
            "bash",
            sys.executable,
            "-m",
            "babel_jax.cli",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.stderr == ""


@pytest.mark.parametrize(
    "error",
    ["5, 'Input/output error', 'x'", "28, 'No space left on device', 'x'", "116, 'Stale file handle', 'x'"],
)
def test_a_disk_that_fails_is_one_line(error):
    ended = command(f"raise OSError({error})")
    assert ended.returncode == 2
    assert ended.stderr.startswith("babel: x: ")
    assert ended.stderr.count("\n") == 1
