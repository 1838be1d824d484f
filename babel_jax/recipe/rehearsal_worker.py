"""A part of a rehearsal in a separate process: runs the recipe one or more times on the CPU devices that the
environment forces.

Reads {"config", "base", "runs": [{"mesh", "preempt_after"}], "seen"} from standard input. A run
gets SIGTERM after the step `preempt_after`, unless that is null. Writes the programs that it compiled to the
file `seen`.
"""

import json
import logging
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from babel_jax.config import Config
from babel_jax.config.file import parse_settings
from babel_jax.distributed.stopping import preempted_by_sigterm
from babel_jax.errors import BadInput, Preempted
from babel_jax.files import write_text
from babel_jax.model.decoder import abstract_params
from babel_jax.recipe.recipe import run_recipe
from babel_jax.tpu.kinds import ORBAX_PROGRAM
from babel_jax.tpu.program import Program
from babel_jax.tpu.programs import training_programs
from babel_jax.tpu.shapes import base_from_json
from babel_jax.training.hooks import Hook, Moment
from babel_jax.training.mesh import make_mesh
from babel_jax.workers import received


class Compiled(logging.Handler):
    """Collects the programs that JAX compiles, with name and bytes of arguments; programs with fewer bytes
    than `least` are left out.
    """

    _LOGGER = logging.getLogger("jax._src.interpreters.pxla")

    def __init__(self, least: int):
        super().__init__(logging.DEBUG)
        self.least, self.seen = least, dict[str, int]()

    def __enter__(self) -> "Compiled":
        self._LOGGER.addHandler(self)
        self._LOGGER.setLevel(logging.DEBUG)
        self._LOGGER.propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        self._LOGGER.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Records one program."""
        # The message of a compilation has two arguments first: the program's name, and its arguments.
        if (
            not str(record.msg).startswith("Compiling")
            or not isinstance(record.args, tuple)
            or len(record.args) < 2
        ):
            return
        name, arguments = str(record.args[0]), record.args[1]
        size = _bytes(arguments)
        if size >= self.least:
            self.seen[name] = max(size, self.seen.get(name, 0))


def missing(seen: dict[str, int], planned: list[Program]) -> list[str]:
    """The compiled programs that are not in the plan, or are larger than the largest one of their name
    there.
    """
    known: dict[str, int] = {}
    for program in planned:
        name = ORBAX_PROGRAM if program.function is None else program.function.__name__
        size = _bytes(jax.tree.leaves((program.arguments, dict(program.named))))
        known[name] = max(size, known.get(name, 0))
    unplanned = []
    for name, size in sorted(seen.items()):
        # JAX's versions write the name as jit_NAME or jit(NAME).
        plain = name.removeprefix("jit_").removeprefix("jit(").removesuffix(")")
        if size > known.get(plain, 0):
            planned_size = f", planned {known[plain]:,}" if plain in known else ""
            unplanned.append(f"{plain} ({size:,} bytes of arguments{planned_size})")
    return unplanned


def _bytes(arguments: Any) -> int:
    total = 0
    for argument in arguments:
        if hasattr(argument, "shape") and hasattr(argument, "dtype"):
            # A key of JAX's random numbers has a dtype without a size.
            itemsize = argument.dtype.itemsize if isinstance(argument.dtype, np.dtype) else 4
            total += math.prod(argument.shape) * itemsize
    return total


class Preempt(Hook):
    """Sends this process SIGTERM before a step, as a cloud does: the run stops after that step."""

    def __init__(self, steps: int | None):
        """steps: the number of steps taken when the run stops; None never stops it."""
        self._steps = steps

    def before(self, moment: Moment) -> None:
        """Sends the signal before the last step."""
        if moment.taken == self._steps:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """All requested runs, one after the other."""
    request = received()
    base = base_from_json(request["base"])
    logging.basicConfig(format="%(message)s")
    logging.getLogger("babel").setLevel(logging.INFO)
    # Programs with weights count; those with tables of positions or batches of a few tokens do not.
    matrices = [leaf for leaf in jax.tree.leaves(abstract_params(base.config)) if len(leaf.shape) > 1]
    sizes = [_bytes([leaf]) for leaf in matrices]
    least = min(size for size in sizes if size > 2**13)
    try:
        programs, lacking = set[str](), list[str]()
        for requested in request["runs"]:
            # Each run has its own mesh; all other settings are the same.
            training = {**request["config"]["training"], "mesh": requested["mesh"]}
            config = parse_settings(Config, {**request["config"], "training": training}, "rehearsal")
            with Compiled(least) as compiled:
                try:
                    with preempted_by_sigterm():
                        run_recipe(config, hooks=[Preempt(requested["preempt_after"])])
                except Preempted as stopped:
                    if requested["preempt_after"] is None:
                        raise
                    print(f"preempted: {stopped}", file=sys.stderr)
            planned = training_programs(config, base, make_mesh(config.training.mesh))
            programs |= compiled.seen.keys()
            lacking += missing(compiled.seen, planned)
    except BadInput as error:
        print(f"babel: {error}", file=sys.stderr)
        return 2
    write_text(Path(request["seen"]), json.dumps({"programs": sorted(programs), "missing": lacking}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
