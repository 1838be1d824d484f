"""Run by tests as one of several JAX processes, or alone: `babel train` on a tiny model, and in the hands of
the test where to stop.
"""

import os
import resource
import signal
import sys
from functools import partial

import jax

from babel_jax.cli import main
from babel_jax.recipe import beginning, vocabulary
from babel_jax.training import metrics
from babel_jax.training.metrics import Metrics
from babel_jax.training.run_state import Checkpoints


def at_step(step, act):
    """`act` is done once the given step has been."""
    log = Metrics.log

    def log_and_act(self, now, *rest):
        skipped = log(self, now, *rest)
        if now == step:
            act()
        return skipped

    Metrics.log = log_and_act


def at_save(step, act):
    """`act` is done once the checkpoint after so many steps has been begun."""
    save = Checkpoints.save

    def save_and_act(self, now, *rest):
        save(self, now, *rest)
        if now == step:
            act()

    Checkpoints.save = save_and_act


def after(module, name, act):
    """`act` is done once a function of a module has returned."""
    function = getattr(module, name)

    def call_and_act(*arguments):
        result = function(*arguments)
        act()
        return result

    setattr(module, name, call_and_act)


def at_growth(act):
    """`act` is done once the tables have grown, before anything of them is saved."""
    growing = beginning.growing

    def growing_and_act(shardings):
        program = growing(shardings)

        def grow_and_act(*arguments):
            grown = jax.block_until_ready(program(*arguments))
            act()
            return grown

        return grow_and_act

    beginning.growing = growing_and_act


def act_at(moment, act):
    """`act` is done at a moment: after step "7", at "save3", at "growth", or at "extension", while its files
    are being written.
    """
    if moment == "growth":
        at_growth(act)
    elif moment == "extension":
        after(vocabulary, "write_growth", act)
    elif moment.startswith("save"):
        at_save(int(moment.removeprefix("save")), act)
    else:
        at_step(int(moment), act)


if __name__ == "__main__":
    metrics._STEPS_BETWEEN_COMPARISONS = 5
    number = int(os.environ.get("JAX_PROCESS_ID", "0"))
    for order in os.environ.get("TEST_ORDERS", "").split():
        name, process, moment = order.split(":")
        if int(process) == number:
            # As on a full disk: no file of this process can grow beyond 100 bytes.
            full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
            act = (
                full if name == "FULL" else partial(os.kill, os.getpid(), getattr(signal, f"SIG{name}", None))
            )
            act_at(moment, act)
    sys.exit(main(sys.argv[1:]))
