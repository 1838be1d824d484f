"""Run by test_kills.py: runs a config in children, one after the other, until one of them ends by itself; the
caller kills the others.

It prints the number of each child's process, and at the end its status. The children are forked from a
process that has all imported and nothing of JAX, TensorStore or fsspec started, so that a start costs little.
"""

import os
import sys

import jax

from babel_jax.config.file import load_config
from babel_jax.recipe.recipe import run_recipe


def main(path):
    for _ in range(100):
        process = os.fork()
        if process == 0:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            run_recipe(load_config(path))
            os._exit(0)
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        if not os.WIFSIGNALED(status):
            print("status", status, flush=True)
            return


if __name__ == "__main__":
    main(sys.argv[1])
