"""How a leaf lies on the devices while it is read or written, and how it moves from there to where it is
wanted.

Files hold tensors row by row, and training shards their columns as well. Read as they are wanted, a tensor's
columns are strided bytes that every process reads around. So a leaf is first spread over all devices by rows
(and layers), each byte read by one device, and then moved over the interconnect, which is faster than any
disk.

All is said on the wanted mesh itself with its axes split into their prime factors, so that a leaf whose rows
do not divide by a whole axis divides by part of it. Each move takes axes from the end of one dimension to the
end of another (an all-to-all) or drops them (an all-gather): XLA has a collective for those. Between
unrelated layouts it would gather the whole leaf on every device.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

Shape = tuple[int, ...]


def reading_steps(wanted: Sharding, shape: Shape, stacked: bool) -> list[Sharding]:
    """The shardings of a leaf from the one to read it by to `wanted`.

    Read by the first, each device has whole rows: contiguous bytes of every tensor of the leaf (`stacked`:
    one a layer). Devices hold copies only where neither rows nor layers divide. One device, and shardings
    that have no mesh, are read as they are.
    """
    if not isinstance(wanted, NamedSharding) or wanted.mesh.size == 1:
        return [wanted]
    mesh, ends = _split(wanted, len(shape))
    by_bytes = (1, 0) if stacked else (0,)  # rows first: they divide by more than layers do
    used = {axis for axes in ends for axis in axes}
    spread = _filled([axis for axis in mesh.axis_names if axis not in used], ends, by_bytes, mesh, shape)
    across = [
        (axis, dimension) for dimension, axes in enumerate(ends) if dimension not in by_bytes for axis in axes
    ]
    rows_alone = [axes if dimension in by_bytes else [] for dimension, axes in enumerate(spread)]
    read = _filled([axis for axis, _ in across], rows_alone, by_bytes, mesh, shape)
    steps = [read]
    for source in by_bytes:
        moved = [(axis, dimension) for axis, dimension in across if axis in read[source]]
        leaving = {axis for axis, _ in moved}
        steps.append(
            [
                [axis for axis in axes if axis not in leaving]
                + [axis for axis, goal in moved if goal == dimension]
                for dimension, axes in enumerate(steps[-1])
            ]
        )
    steps.append(spread)
    return [*(NamedSharding(mesh, PartitionSpec(*map(tuple, step))) for step in steps), wanted]


def moved(values: Array, steps: list[Sharding]) -> Array:
    """An array that lies as the first of `steps` says, moved to the last by way of the others."""
    if values.sharding.is_equivalent_to(steps[-1], values.ndim):
        return jax.device_put(values, steps[-1])

    return mover(tuple(steps[1:]), values.dtype)(values)


@functools.cache
def mover(steps: tuple[Sharding, ...], dtype: np.dtype) -> Callable[[Array], Array]:
    """The program of `moved`, for arrays of one type that lie as the step before the
    first of `steps` says.
    """
    # As bits: XLA may take bfloat16 for float32 on the way, on CPU in collectives too, which changes NaNs.
    # The barriers keep it from taking the two conversions for none.
    bits = jnp.dtype(f"uint{8 * dtype.itemsize}")

    def move_leaf(values: Array) -> Array:
        moving = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(values, bits))
        for step in steps:
            moving = jax.lax.with_sharding_constraint(moving, step)
        return jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(moving), dtype)

    return jax.jit(move_leaf, out_shardings=steps[-1])


def gathered(leaf: Array, layer: int | None) -> Array:
    """A leaf, or one layer of it, such that the devices of each process have all of it: spread over them by
    the mesh axes that do not cross processes, gathered along those that do."""
    if not isinstance(leaf, jax.Array):
        return leaf if layer is None else leaf[layer]
    if not isinstance(leaf.sharding, NamedSharding):
        if not leaf.is_fully_addressable:
            raise TypeError(f"arrays of several processes need a NamedSharding; this has {leaf.sharding}")
        return leaf if layer is None else leaf[layer]
    if layer is None and leaf.is_fully_addressable:
        return leaf
    return gatherer(leaf.sharding, leaf.ndim, leaf.dtype, layer is not None)(leaf, np.int32(layer or 0))


@functools.cache
def gatherer(
    sharding: NamedSharding, dimensions: int, dtype: np.dtype, stacked: bool
) -> Callable[[Array, Any], Array]:
    """The program of `gathered` for leaves that lie as `sharding` says; `stacked`: one layer, its number the
    second argument.
    """
    mesh, ends = _split(sharding, dimensions)
    process = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    inside = {name for axis, name in enumerate(mesh.axis_names) if (process == process.take([0], axis)).all()}
    kept = [tuple(axis for axis in axes if axis in inside) for axes in ends]
    before = sharding.update(spec=PartitionSpec(*sharding.spec[1:])) if stacked else sharding
    after = NamedSharding(mesh, PartitionSpec(*(kept[1:] if stacked else kept)))

    def gather_tensor(leaf: Array, layer: Array) -> Array:
        values = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False) if stacked else leaf
        return mover((before, after), dtype)(values)

    return jax.jit(gather_tensor, out_shardings=after)


def host_values(values: Array) -> np.ndarray:
    """The values of an array of which this process has all parts."""
    if not isinstance(values, jax.Array) or values.is_fully_addressable:
        return np.asarray(values)
    found = np.empty(values.shape, values.dtype)
    for shard in {str(shard.index): shard for shard in values.addressable_shards}.values():
        found[shard.index] = shard.data
    return found


def _split(sharding: NamedSharding, dimensions: int) -> tuple[Mesh, list[list[str]]]:
    """The mesh with its axes split into prime factors, and the names of those that shard each dimension."""
    mesh = sharding.mesh
    factors = {
        name: [(f"{name}.{number}", factor) for number, factor in enumerate(_primes(size))]
        for name, size in mesh.shape.items()
    }
    split = [factor for name in mesh.axis_names for factor in factors[name]]
    names = tuple(name for name, _ in split)
    fine = Mesh(
        mesh.devices.reshape([size for _, size in split]), names, axis_types=(AxisType.Auto,) * len(names)
    )
    spec = [*sharding.spec, *[None] * (dimensions - len(sharding.spec))]
    wholes = [() if entry is None else (entry,) if isinstance(entry, str) else entry for entry in spec]
    return fine, [[name for whole in entry for name, _ in factors[whole]] for entry in wholes]


def _filled(
    axes: list[str], ends: list[list[str]], order: tuple[int, ...], mesh: Mesh, shape: Shape
) -> list[list[str]]:
    """`ends` with each of `axes` added to the first dimension of `order` that it divides,
    where there is one.
    """
    filled = [list(axes) for axes in ends]
    for axis in axes:
        for dimension in order:
            if shape[dimension] % math.prod(mesh.shape[name] for name in (*filled[dimension], axis)) == 0:
                filled[dimension].append(axis)
                break
    return filled


def _primes(number: int) -> Iterator[int]:
    factor = 2
    while number > 1:
        while number % factor == 0:
            yield factor
            number //= factor
        factor += 1
