"""A part of a rehearsal in a process of its own: runs the recipe on the CPU devices that the environment
forces, as often as is asked.

Reads {"config", "base", "new_layers", "runs": [{"mesh", "preempt_after"}], "seen"} from standard input. A run
gets SIGTERM after the step `preempt_after`, if that is not null. Writes what it compiled to the file `seen`.
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

from babel_jax.config import Config, ModelConfig
from babel_jax.config.file import parse_settings
from babel_jax.distributed.stopping import preempted_by_sigterm
from babel_jax.errors import BadInput, Preempted
from babel_jax.files import write_text
from babel_jax.model.decoder import abstract_params
from babel_jax.recipe.recipe import run_recipe
from babel_jax.tpu.kinds import ORBAX_PROGRAM
from babel_jax.tpu.programs import Program, training_programs
from babel_jax.training.hooks import Hook, Moment
from babel_jax.training.mesh import make_mesh


class Compiled(logging.Handler):
    """Collects the programs that JAX compiles: name and bytes of arguments, of those with as many bytes as
    `least`.
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
        """Notes the record of one program."""
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
    """The programs that were compiled and are not in the plan, or are larger than the largest there of their
    name.
    """
    known: dict[str, int] = {}
    for program in planned:
        name = ORBAX_PROGRAM if program.function is None else program.function.__name__
        size = _bytes(jax.tree.leaves((program.arguments, dict(program.named))))
        known[name] = max(size, known.get(name, 0))
    found = []
    for name, size in sorted(seen.items()):
        plain = name.removeprefix("jit_").removeprefix("jit(").removesuffix(")")
        if size > known.get(plain, 0):
            found.append(
                f"{plain} ({size:,} bytes of arguments"
                + (f", planned {known[plain]:,})" if plain in known else ")")
            )
    return found


def _bytes(arguments: Any) -> int:
    shaped = [one for one in arguments if hasattr(one, "shape") and hasattr(one, "dtype")]
    return sum(
        math.prod(one.shape) * (one.dtype.itemsize if isinstance(one.dtype, np.dtype) else 4)
        for one in shaped
    )


class Preempt(Hook):
    """Sends this process SIGTERM before a step, as a cloud does: the run stops after that step."""

    def __init__(self, steps: int | None):
        """`steps` are taken when the run stops; None: it is never stopped."""
        self._steps = steps

    def before(self, moment: Moment) -> None:
        """Sends the signal, where it is the time."""
        if moment.taken == self._steps:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """All runs that are asked for, one after the other."""
    request = json.load(sys.stdin)
    base = parse_settings(ModelConfig, request["base"], "model")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("babel").setLevel(logging.INFO)
    # Weights count; tables of positions and batches of a few tokens do not.
    least = min(
        _bytes([leaf])
        for leaf in jax.tree.leaves(abstract_params(base))
        if len(leaf.shape) > 1 and _bytes([leaf]) > 2**13
    )
    try:
        programs, lacking = set[str](), list[str]()
        for asked in request["runs"]:
            training = {**request["config"]["training"], "mesh": asked["mesh"]}
            config = parse_settings(Config, {**request["config"], "training": training}, "rehearsal")
            with Compiled(least) as compiled:
                try:
                    with preempted_by_sigterm():
                        run_recipe(config, hooks=[Preempt(asked["preempt_after"])])
                except Preempted as stopped:
                    if asked["preempt_after"] is None:
                        raise
                    print(f"preempted: {stopped}", file=sys.stderr)
            planned = training_programs(config, base, request["new_layers"], make_mesh(config.training.mesh))
            programs |= compiled.seen.keys()
            lacking += missing(compiled.seen, planned)
    except BadInput as error:
        print(f"babel: {error}", file=sys.stderr)
        return 2
    write_text(Path(request["seen"]), json.dumps({"programs": sorted(programs), "missing": lacking}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
