"""A program of a run as `babel plan` compiles it, and the memory of its arrays."""

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree


class Program(NamedTuple):
    """A jitted function with the arguments of its largest call, as shapes. `beside` has the other arrays on
    the devices during the call.

    `kind` is its kind of work, `points` are the points of the run at which it is called. `seq_len` is the
    length of the windows of a train step, else 0. `compiler_options` are those of a train step.
    """

    kind: str
    points: tuple[str, ...]
    function: Any  # None for a copy without a program of ours
    arguments: tuple[Any, ...]
    named: Mapping[str, Any] = MappingProxyType({})
    beside: Any = ()
    seq_len: int = 0
    compiler_options: Mapping[str, Any] = MappingProxyType({})

    @property
    def name(self) -> str:
        """The kind of work, and when."""
        return self.kind + (f": {', '.join(self.points)}" if self.points else "")

    @property
    def key(self) -> Any:
        """Equal for programs that compile to the same."""
        leaves, structure = jax.tree.flatten((self.arguments, dict(self.named)))
        return (self.kind, id(self.function), structure, tuple(map(str, leaves)))


def device_bytes(arrays: PyTree[jax.ShapeDtypeStruct]) -> int:
    """The memory that arrays take on each device."""
    total = 0
    for leaf in jax.tree.leaves(arrays):
        if leaf.sharding.memory_kind != "pinned_host":
            total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def copied_bytes(arrays: PyTree[jax.ShapeDtypeStruct]) -> int:
    """The memory of Orbax's copies on a device while it saves: its part of each array that other devices also
    have.
    """
    total = 0
    for leaf in jax.tree.leaves(arrays):
        shard = device_bytes([leaf])
        copies = (
            leaf.sharding.mesh.size
            * math.prod(leaf.sharding.shard_shape(leaf.shape))
            // max(1, math.prod(leaf.shape))
        )
        total += shard // copies if copies > 1 else 0
    return total


def merged(programs: Iterable[Program]) -> list[Program]:
    """Programs that compile to the same as one program, with all names, and with the largest `beside`."""
    by_key: dict[Any, Program] = {}
    for program in programs:
        if (known := by_key.get(program.key)) is not None:
            beside = max(known.beside, program.beside, key=device_bytes)
            points = tuple(dict.fromkeys([*known.points, *program.points]))
            program = known._replace(points=points, beside=beside)
        by_key[program.key] = program
    return list(by_key.values())
