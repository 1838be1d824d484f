"""A program of a run as `babel plan` compiles it, and the memory of its arrays."""

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree


class Program(NamedTuple):
    """A jitted function, and the shapes of the arguments of its largest call.

    kind: its kind of work. points: the points of the run at which it is called. function: None if Orbax
    copies arrays and no program of ours runs. named: its keyword arguments. beside: the other arrays on the
    devices during the call. seq_len: the length of the windows of a train step, else 0. compiler_options:
    those of a train step.
    """

    kind: str
    points: tuple[str, ...]
    function: Any
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
        """Equal if two programs compile to the same executable."""
        leaves, structure = jax.tree.flatten((self.arguments, dict(self.named)))
        return (self.kind, id(self.function), structure, tuple(map(str, leaves)))


def device_bytes(arrays: PyTree[jax.ShapeDtypeStruct]) -> int:
    """The bytes that arrays take on each device; those in host memory do not count."""
    total = 0
    for leaf in jax.tree.leaves(arrays):
        if leaf.sharding.memory_kind != "pinned_host":
            total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def copied_bytes(arrays: PyTree[jax.ShapeDtypeStruct]) -> int:
    """The bytes that Orbax copies on one device while it saves: of a shard that n devices have, one n-th."""
    total = 0
    for leaf in jax.tree.leaves(arrays):
        shard = device_bytes([leaf])
        # How many devices have the same shard: the devices of the mesh by the number of different shards.
        copies = (
            leaf.sharding.mesh.size
            * math.prod(leaf.sharding.shard_shape(leaf.shape))
            // max(1, math.prod(leaf.shape))
        )
        total += shard // copies if copies > 1 else 0
    return total


def merged(programs: Iterable[Program]) -> list[Program]:
    """Merges programs with equal keys; the result has all their points, and the largest `beside`."""
    by_key: dict[Any, Program] = {}
    for program in programs:
        if (known := by_key.get(program.key)) is not None:
            beside = max(known.beside, program.beside, key=device_bytes)
            points = tuple(dict.fromkeys([*known.points, *program.points]))
            program = known._replace(points=points, beside=beside)
        by_key[program.key] = program
    return list(by_key.values())
