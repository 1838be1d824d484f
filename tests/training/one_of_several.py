"""Run by tests as one of several JAX processes, or alone: `babel train` on a tiny model, and in the hands of
the test where to stop.
"""

import os
import resource
import signal
import sys
from functools import partial

from babel_jax.cli import main
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


if __name__ == "__main__":
    metrics._STEPS_BETWEEN_COMPARISONS = 5
    number = int(os.environ.get("JAX_PROCESS_ID", "0"))
    for order in os.environ.get("TEST_ORDERS", "").split():
        name, process, step = order.split(":")
        if int(process) == number:
            when = at_save if step.startswith("save") else at_step
            # As on a full disk: no file of this process can grow beyond 100 bytes.
            full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
            act = (
                full if name == "FULL" else partial(os.kill, os.getpid(), getattr(signal, f"SIG{name}", None))
            )
            when(int(step.removeprefix("save")), act)
    sys.exit(main(sys.argv[1:]))
