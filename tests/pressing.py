"""Run by tests: a `babel` command that gets Ctrl-C at given moments, as from a terminal: all processes of the
group get the signal.

TEST_PRESS is `module:name:call ...`: at that call of the function, counted from 1, the signal is sent.
"""

import functools
import importlib
import os
import signal
import sys

from babel_jax.cli import main


def press_at(place):
    module, path, wanted = place.split(":")
    owner = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def pressed(*arguments, **names):
        nonlocal calls
        calls += 1
        if calls == int(wanted):
            os.killpg(0, signal.SIGINT)
        return original(*arguments, **names)

    setattr(owner, name, pressed)


if __name__ == "__main__":
    for place in os.environ.get("TEST_PRESS", "").split():
        press_at(place)
    sys.exit(main(sys.argv[1:]))
