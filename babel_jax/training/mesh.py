"""The device mesh, and the sharding of parameters and batches over it. `model.parallel.RULES` is the table
from logical axes to mesh axes.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from babel_jax.config import ModelConfig
from babel_jax.config.settings import divisors
from babel_jax.errors import BadInput
from babel_jax.model.decoder import describe
from babel_jax.model.parallel import AXES, CONTEXT, DATA, FSDP, RING, TENSOR, WINDOW_AXES, mesh_axes
from babel_jax.model.sharding import param_specs, torus


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices`, by default all. `sizes` gives the size of each axis; 1 if not named, -1 for the
    rest of the devices.

    `data` is by default the number of slices, and else a multiple of it: between slices only sums of
    gradients are sent. `ring` is the part of `fsdp` along one dimension of the torus (see `Parallelism`). By
    default it follows from the devices' coordinates. Raises BadInput if the product of the sizes is not the
    number of devices.
    """
    devices = jax.devices() if devices is None else devices
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise BadInput(
            f"training.mesh: unknown axis {', '.join(sorted(unknown))}; valid axes: {', '.join(AXES)}"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # Only a whole number of replicas in each slice keeps gathers of weights within a slice, on its fast
    # links.
    wanted = {axis: sizes.get(axis, 1) for axis in (DATA, FSDP, CONTEXT, TENSOR)}
    wanted[DATA] = sizes.get(DATA, slices)
    fitted = _fitted(wanted, len(devices))
    if fitted[DATA] % slices:
        raise BadInput(
            f"training.mesh: data = {fitted[DATA]} with {slices} slices; leave it out, or give a multiple "
            f"of {slices}"
        )
    # The user gives fsdp as one number. A mesh has it as two axes, because a gather along one dimension of
    # the torus stays a gather (docs/log.md, "Collectives on TPU").
    ring = sizes.get(RING, 0) or _ring(devices, fitted)
    if ring < 1 or fitted[FSDP] % ring:
        raise BadInput(
            f"training.mesh: ring = {ring} is a part of fsdp = {fitted[FSDP]}; sizes that divide it: "
            f"{divisors(fitted[FSDP])}"
        )
    shape = (fitted[DATA], fitted[FSDP] // ring, ring, fitted[CONTEXT], fitted[TENSOR])
    # Between slices, only the axis data may have neighbours: all other axes get 1 there.
    if slices > 1:
        between = (slices, *[1] * (len(AXES) - 1))
        within = (shape[0] // slices, *shape[1:])
        placed = mesh_utils.create_hybrid_device_mesh(
            within, between, devices, allow_split_physical_axes=True
        )
    else:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Auto: outside of `shard_map` the compiler places small arrays and sums, such as the gradient norm.
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_for(config: ModelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh for a command that has no mesh setting.

    Parameters are sharded over as many devices of a slice as divide the model's features. If that is not all
    of them, the other devices hold copies (axis `data`).
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    return make_mesh({DATA: -1, FSDP: math.gcd(config.hidden_size, len(devices) // slices)}, devices)


def _fitted(wanted: dict[str, int], devices: int) -> dict[str, int]:
    # The sizes that are given; the one axis of -1 takes the rest.
    known = math.prod(size for size in wanted.values() if size != -1)
    values = list(wanted.values())
    given = ", ".join(f"{axis} = {size}" for axis, size in wanted.items())
    if values.count(-1) > 1 or min(values) < -1 or 0 in values:
        raise BadInput(
            f"training.mesh: {given} does not fit {devices} devices; sizes are 1 or more, one of them may "
            "be -1"
        )
    if devices % known or (-1 not in values and known != devices):
        # For the message: the nearest size for each axis with the others as they are.
        fits = []
        for axis, size in wanted.items():
            rest = known // size if size > 1 else known
            if size > 1 and devices % rest == 0:
                # Without a -1 one size alone makes the product fit. With a -1 any divisor fits: the two
                # nearest are named.
                near = (
                    [devices // rest]
                    if -1 not in values
                    else sorted(divisors(devices // rest), key=lambda d: abs(d - size))[:2]
                )
                fits.append(f"{axis} = {' or '.join(map(str, near))}")
        raise BadInput(
            (
                f"training.mesh: {given} does not fit {devices} devices; the sizes must multiply to it, one "
                "of them may be -1"
            )
            + (f"; with the others as they are, {', or '.join(fits)} would" if fits else "")
        )
    return {axis: devices // known if size == -1 else size for axis, size in wanted.items()}


def _ring(devices: Sequence[Any], sizes: dict[str, int]) -> int:
    """The number of devices along one dimension of the torus, divided by the devices that `context` and
    `tensor` take of it. 1 without a torus, or if fsdp is not larger.
    """
    extents = torus(devices)
    # With one dimension, or none, a gather over all of fsdp already runs along one dimension.
    if len(extents) < 2:
        return 1
    left = extents[-1] // math.gcd(extents[-1], sizes[CONTEXT] * sizes[TENSOR])
    return left if sizes[FSDP] % left == 0 and sizes[FSDP] > left else 1


def param_shardings(config: ModelConfig, mesh: Mesh) -> PyTree[NamedSharding]:
    """A sharding for each parameter.

    Raises BadInput where mesh axes do not divide the axis of a parameter.
    """
    described = describe(config)
    for parameter in jax.tree.leaves(described):
        for size, name, axes in zip(
            parameter.shape, parameter.logical_axes, mesh_axes(parameter.logical_axes), strict=True
        ):
            # Heads are cut whole: a device never has a part of a head.
            parts = math.prod(mesh.shape[axis] for axis in axes)
            whole = size // config.head_dim if name in ("q_heads", "kv_heads") else size
            if whole % parts:
                used = " x ".join(axis for axis in axes if mesh.shape[axis] > 1)
                raise BadInput(
                    f"training.mesh: {used} = {parts} does not divide the model's {name} = {whole}; "
                    f"sizes that do: {[divisor for divisor in divisors(whole) if divisor <= 2 * parts]}"
                )
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(config))


def check_batch(mesh: Mesh, global_batch_size: int, gradient_accumulation: int, seq_len: int) -> None:
    """Raises BadInput if the mesh does not divide the windows of a micro-batch, or the tokens of a window."""
    groups = math.prod(mesh.shape[axis] for axis in WINDOW_AXES)
    # Every micro-batch has the same number of windows on each device.
    windows = global_batch_size // gradient_accumulation
    if windows % groups:
        unit = groups * gradient_accumulation
        below = global_batch_size // unit * unit
        near = [size for size in (below, below + unit) if size]
        raise BadInput(
            f"training.global_batch_size = {global_batch_size}: micro-batches of {windows} windows do not "
            f"divide by the {groups} devices "
            f"of data x fsdp; give a multiple of {unit}, such as {' or '.join(map(str, near))}, or another "
            "training.mesh"
        )
    # Each device of `context` has one part of a window's first half and one of its second half.
    context = mesh.shape[CONTEXT]
    if context > 1 and seq_len % (2 * context):
        # For the message: the sizes of context that this window length allows.
        fit = []
        for size in divisors(seq_len):
            if size <= 2 * context and (size == 1 or seq_len % (2 * size) == 0):
                fit.append(size)
        raise BadInput(
            f"training.mesh: context = {context} cuts windows into {2 * context} parts, which does not "
            f"divide data.seq_len = {seq_len}; "
            f"sizes that do: {fit}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Windows of a batch, sharded over the axes that hold different windows.

    Each device has whole windows; `Parallelism.sequence_shard` cuts them.
    """
    return NamedSharding(mesh, PartitionSpec(WINDOW_AXES))


def everywhere(value: np.generic, mesh: Mesh) -> jax.Array:
    """A number that all processes have, on every device.

    `jax.device_put` would compare the number between processes each time.
    """
    return jax.make_array_from_callback((), replicated(mesh), lambda _: np.asarray(value))


@functools.cache
def window_share(mesh: Mesh) -> tuple[int, int]:
    """(number of this process's share, number of shares) of the windows of a batch.

    Processes that work on the same windows have the same share: the mesh cuts windows or features between
    them. Raises BadInput if two processes have only a part of their windows in common.
    """
    groups = math.prod(mesh.shape[axis] for axis in WINDOW_AXES)
    # The windows of each process, by the number of their first one.
    of_process: dict[int, set[int]] = {}
    places: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((groups,))
    for device, (group,) in places.items():
        of_process.setdefault(device.process_index, set()).add(group.start or 0)
    # Processes with the same windows are one share. Shares must be of one size and must not overlap: each
    # reads its own part of the batch.
    shares = sorted({tuple(sorted(own)) for own in of_process.values()})
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) > groups:
        raise BadInput(
            f"training.mesh: {dict(mesh.shape)} gives processes windows that overlap in part; give sizes "
            "that divide their devices"
        )
    return shares.index(tuple(sorted(of_process[jax.process_index()]))), len(shares)


def global_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """The global arrays of a batch, from this process's share of its windows (see `window_share`)."""
    sharding, (_, shares) = batch_sharding(mesh), window_share(mesh)
    arrays = {}
    for name, rows in batch.items():
        # All shares have the same number of windows, and this process has one share.
        shape = (len(rows) * shares, *rows.shape[1:])
        arrays[name] = jax.make_array_from_process_local_data(sharding, rows, shape)
    return arrays
