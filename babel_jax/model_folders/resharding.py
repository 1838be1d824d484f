"""The sharding of a leaf while it is read or written, and its move to the sharding that is wanted.

Files store tensors row by row, but training also shards columns. If a process read its columns directly, it
would read strided bytes, and all processes would read the same ranges. So a leaf is first sharded over all
devices by rows (and layers), so that one device reads each byte; then it is moved over the interconnect,
which is faster than any disk.

All shardings are on the wanted mesh, with its axes split into prime factors: rows that do not divide by a
whole axis may divide by a part of it. Each move takes axes from the end of one dimension to the end of
another (an all-to-all) or drops them (an all-gather), because XLA has a collective for each. Between
unrelated layouts, XLA would gather the whole leaf on every device.
"""

import functools
import itertools
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
    """The shardings of a leaf, from the one in which it is read to `wanted`.

    In the first sharding, each device has whole rows: contiguous bytes of every tensor of the leaf
    (`stacked`: one tensor a layer). Devices hold copies only if neither rows nor layers divide. With one
    device, and for shardings without a mesh, the leaf is read in the wanted sharding.
    """
    if not isinstance(wanted, NamedSharding) or wanted.mesh.size == 1:
        return [wanted]
    mesh, ends = _split(wanted, len(shape))
    # The dimensions to read by; rows first, because they divide by more numbers than layers do.
    by_bytes = (1, 0) if stacked else (0,)
    used = {axis for axes in ends for axis in axes}
    spread = _filled([axis for axis in mesh.axis_names if axis not in used], ends, by_bytes, mesh, shape)
    # The axes that shard columns, with their dimension. They shard rows first and are then moved.
    across = []
    for dimension, axes in enumerate(ends):
        if dimension not in by_bytes:
            across += [(axis, dimension) for axis in axes]
    rows_alone = [axes if dimension in by_bytes else [] for dimension, axes in enumerate(spread)]
    read = _filled([axis for axis, _ in across], rows_alone, by_bytes, mesh, shape)
    # Each dimension of `by_bytes` hands over its axes of columns in one move.
    steps = [read]
    for source in by_bytes:
        moved = [(axis, dimension) for axis, dimension in across if axis in read[source]]
        leaving = {axis for axis, _ in moved}
        step = []
        for dimension, axes in enumerate(steps[-1]):
            staying = [axis for axis in axes if axis not in leaving]
            arriving = [axis for axis, goal in moved if goal == dimension]
            step.append(staying + arriving)
        steps.append(step)
    steps.append(spread)
    return [*(NamedSharding(mesh, PartitionSpec(*map(tuple, step))) for step in steps), wanted]


def moved(values: Array, steps: list[Sharding]) -> Array:
    """An array in the first sharding of `steps`, moved to the last by way of the others."""
    if values.sharding.is_equivalent_to(steps[-1], values.ndim):
        result: Array = jax.device_put(values, steps[-1])
        return result

    return mover(tuple(steps[1:]), values.dtype)(values)


@functools.cache
def mover(steps: tuple[Sharding, ...], dtype: np.dtype) -> Callable[[Array], Array]:
    """The program of `moved`, for arrays of one dtype in the sharding before the first of `steps`."""
    # Moved as integers: XLA may compute bfloat16 in float32, on CPU also in collectives, which changes NaNs.
    # The barriers keep XLA from removing the two conversions.
    bits = _bits_of(dtype)

    def move_leaf(values: Array) -> Array:
        moving = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(values, bits))
        for step in steps:
            moving = jax.lax.with_sharding_constraint(moving, step)
        return jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(moving), dtype)

    return jax.jit(move_leaf, out_shardings=steps[-1])


def gathered(leaf: Array, layer: int | None) -> Array:
    """A leaf, or one layer of it, such that the devices of each process together have all of it: sharded by
    the mesh axes within a process, gathered along those that cross processes.
    """
    if not isinstance(leaf, jax.Array):
        return leaf if layer is None else leaf[layer]
    if not isinstance(leaf.sharding, NamedSharding):
        if not leaf.is_fully_addressable:
            raise TypeError(f"arrays of several processes need a NamedSharding; this has {leaf.sharding}")
        return leaf if layer is None else _layer_of(leaf, np.int32(layer))
    if layer is None and leaf.is_fully_addressable:
        return leaf
    return gatherer(leaf.sharding, leaf.ndim, leaf.dtype, layer is not None)(leaf, np.int32(layer or 0))


@jax.jit
def _layer_of(leaf: Array, layer: Array) -> Array:
    """One layer of a stacked leaf. It is cut out as integers, because some of XLA's emitters for CPU change
    NaNs of bfloat16.
    """
    bits = jax.lax.bitcast_convert_type(leaf, _bits_of(leaf.dtype))
    one = jax.lax.dynamic_index_in_dim(bits, layer, keepdims=False)
    return jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(one), leaf.dtype)


def _bits_of(dtype: np.dtype) -> np.dtype:
    """The unsigned integers of the same width."""
    return jnp.dtype(f"uint{8 * dtype.itemsize}")


@functools.cache
def gatherer(
    sharding: NamedSharding, dimensions: int, dtype: np.dtype, stacked: bool
) -> Callable[[Array, Any], Array]:
    """The program of `gathered` for leaves with this sharding. stacked: one layer, whose number is the second
    argument.
    """
    mesh, ends = _split(sharding, dimensions)
    process = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    inside = {name for axis, name in enumerate(mesh.axis_names) if (process == process.take([0], axis)).all()}
    # Axes that lie inside a process stay sharded.
    kept = []
    for axes in ends:
        kept.append(tuple(axis for axis in axes if axis in inside))
    # One layer of a stacked leaf has no axis of layers, so the specs lose their first entry.
    before = sharding.update(spec=PartitionSpec(*sharding.spec[1:])) if stacked else sharding
    after = NamedSharding(mesh, PartitionSpec(*(kept[1:] if stacked else kept)))

    def gather_tensor(leaf: Array, layer: Array) -> Array:
        values = _layer_of(leaf, layer) if stacked else leaf
        return mover((before, after), dtype)(values)

    return jax.jit(gather_tensor, out_shardings=after)


def host_values(values: Array) -> np.ndarray:
    """The values of an array of which this process has all parts."""
    if not isinstance(values, jax.Array) or values.is_fully_addressable:
        return np.asarray(values)
    # Several devices may hold the same part, which is copied once.
    values_on_host = np.empty(values.shape, values.dtype)
    for shard in {str(shard.index): shard for shard in values.addressable_shards}.values():
        values_on_host[shard.index] = shard.data
    return values_on_host


def _split(sharding: NamedSharding, dimensions: int) -> tuple[Mesh, list[list[str]]]:
    """The mesh with its axes split into prime factors, and the names of the factors that shard each
    dimension.
    """
    mesh = sharding.mesh
    # An axis "fsdp" of size 12 becomes "fsdp.0" (2), "fsdp.1" (2) and "fsdp.2" (3).
    factors: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for axis in mesh.axis_names:
        factors[axis] = []
        for number, factor in enumerate(_primes(mesh.shape[axis])):
            factors[axis].append(f"{axis}.{number}")
            sizes[f"{axis}.{number}"] = factor
    devices = mesh.devices.reshape(list(sizes.values()))
    fine = Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))

    # An entry of a spec is None, an axis, or several.
    ends: list[list[str]] = []
    for entry in [*sharding.spec, *[None] * (dimensions - len(sharding.spec))]:
        axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
        ends.append(list(itertools.chain.from_iterable(factors[axis] for axis in axes)))
    return fine, ends


def _filled(
    axes: list[str], ends: list[list[str]], order: tuple[int, ...], mesh: Mesh, shape: Shape
) -> list[list[str]]:
    """A copy of `ends` with each axis added to the first dimension in `order` that it divides. An axis that
    divides no dimension is left out.
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
