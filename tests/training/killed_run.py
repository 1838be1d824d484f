"""Run by test_kills.py: trains one run in children that are killed at random moments, until it is done; prints how often that was.

The children are forked from a process that has all imported and nothing of JAX started, so that a start costs little.
"""

import os
import random
import signal
import sys
import time

import jax

from babel_jax.config.file import load_config
from babel_jax.recipe import run_recipe


def child(path, overrides):
    run_recipe(load_config(path, overrides))


def main(path, folder, kills):
    chance, killed = random.Random(0), 0
    while True:
        process = os.fork()
        if process == 0:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            child(path, (f"out={folder}",))
            os._exit(0)
        # The first second is import and compilation mostly; what counts is to be hit there, in steps and in saves alike.
        until = time.monotonic() + chance.uniform(0.3, 3.0)
        while killed < kills and time.monotonic() < until:
            if os.waitpid(process, os.WNOHANG)[0]:
                break
            time.sleep(0.01)
        else:
            if killed < kills:
                os.kill(process, signal.SIGKILL)
                killed += 1
                os.waitpid(process, 0)
                continue
            _, status = os.waitpid(process, 0)
            print("KILLED", killed, status)
            return
        print("DONE EARLY", killed)
        return


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
