"""Run by test_ending.py: one of several processes of `babel train`, whose run fails as
the test wants: WHO:HOW."""

import os
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from babel_jax.cli import main
from babel_jax.commands import runs
from babel_jax.distributed import cluster
from babel_jax.distributed.agreement import agreed
from babel_jax.errors import BadInput

WHO, HOW = sys.argv[1].split(":")
REASON = "refused for a reason"


def train(_):
    cluster.join()
    me = os.environ["JAX_PROCESS_ID"] == WHO
    multihost_utils.process_allgather(np.zeros(1))
    if HOW == "agreed":
        with agreed():
            if me:
                raise BadInput(REASON)
    if me and HOW == "late":
        time.sleep(1)
    if me:
        raise ValueError("a bug") if HOW == "crash" else BadInput(REASON)
    if HOW == "late":
        return {"summary": f"finished on {jax.process_count()} processes"}
    # Waits for the process that has failed.
    return {"summary": str(multihost_utils.process_allgather(np.zeros(1)))}


if __name__ == "__main__":
    runs._train = train
    sys.exit(main(["train", "none.toml"]))
