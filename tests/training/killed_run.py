"""Run by test_kills.py: trains one run in children that are killed at random moments, until it is done;
prints what each kill found.

The children are forked from a process that has all imported and nothing of JAX started, so that a start costs
little.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import jax

from babel_jax.config.file import load_config
from babel_jax.recipe.recipe import run_recipe
from babel_jax.training.run_state import newest_step


def started(path, folder):
    process = os.fork()
    if process == 0:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        run_recipe(load_config(path, (f"out={folder}",)))
        os._exit(0)
    return process


def steps_done(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def saving(folder):
    return any("tmp" in path.name for path in (folder / "checkpoints").glob("*"))


def main(path, folder, kills):
    chance, found = random.Random(0), []
    while len(found) < kills:
        # So near that all kills fall into the 400 steps of the run, wherever they are.
        until = newest_step(folder / "checkpoints") + chance.randrange(1, 20)
        process = started(path, folder)
        # A third of the kills falls on the start, a third on steps, and a third on a checkpoint that is being
        # written.
        moment = ("start", "steps", "save")[len(found) % 3]
        while moment != "start" and not (
            steps_done(folder) >= until and (moment == "steps" or saving(folder))
        ):
            if os.waitpid(process, os.WNOHANG)[0]:
                sys.exit(f"ended by itself, after the kills {found}")
        time.sleep(chance.uniform(0, {"start": 2.0, "steps": 0.02, "save": 0.01}[moment]))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        found.append((newest_step(folder / "checkpoints"), saving(folder)))
    _, status = os.waitpid(started(path, folder), 0)
    print(json.dumps({"kills": found, "status": status}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
