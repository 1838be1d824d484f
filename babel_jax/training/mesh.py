"""The device mesh, and the one table from logical axes of parameters to its axes."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from babel_jax.config import ModelConfig
from babel_jax.errors import BadInput
from babel_jax.model.decoder import describe
from babel_jax.model.parameters import Parameter

AXES = ("data", "fsdp", "tensor")

# Every matrix has one axis of features inside a layer (sharded for tensor parallelism) and `embed` (sharded to spread memory).
RULES: dict[str | None, str | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "q_heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    None: None,
}


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh over all devices. `sizes` gives each of AXES its size, 1 if not named, -1 for what is left.

    Raises BadInput when the sizes do not multiply to the number of devices.
    """
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise BadInput(f"training.mesh: unknown axis {', '.join(sorted(unknown))}; valid axes: {', '.join(AXES)}")
    wanted = [sizes.get(axis, 1) for axis in AXES]
    devices = jax.device_count()
    known = math.prod(size for size in wanted if size != -1)
    if wanted.count(-1) > 1 or min(wanted) < -1 or 0 in wanted or devices % known or (-1 not in wanted and known != devices):
        given = ", ".join(f"{axis} = {size}" for axis, size in zip(AXES, wanted, strict=True))
        raise BadInput(f"training.mesh: {given} does not fit {devices} devices; the sizes must multiply to it, one of them may be -1")
    shape = tuple(devices // known if size == -1 else size for size in wanted)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def param_shardings(config: ModelConfig, mesh: Mesh) -> PyTree[NamedSharding]:
    """A sharding for each parameter. Raises BadInput where a mesh axis does not divide the axis of a parameter."""

    def sharding(parameter: Parameter) -> NamedSharding:
        axes = [RULES[name] for name in parameter.logical_axes]
        for size, name, axis in zip(parameter.shape, parameter.logical_axes, axes, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise BadInput(
                    f"training.mesh: {axis} = {mesh.shape[axis]} does not divide the model's {name} = {size}; "
                    f"sizes that do: {[divisor for divisor in range(1, jax.device_count() + 1) if size % divisor == 0]}"
                )
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(sharding, describe(config))


def check_batch(mesh: Mesh, global_batch_size: int, gradient_accumulation: int) -> None:
    """Raises BadInput where the windows of a micro-batch cannot be spread evenly over the mesh."""
    groups, windows = mesh.shape["data"] * mesh.shape["fsdp"], global_batch_size // gradient_accumulation
    if windows % groups:
        raise BadInput(
            f"training.global_batch_size = {global_batch_size}: micro-batches of {windows} windows do not divide by the {groups} devices "
            f"of data x fsdp; give a multiple of {groups * gradient_accumulation}, or another training.mesh"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Windows of a batch spread over the axes that hold different data."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def everywhere(value: np.generic, mesh: Mesh) -> jax.Array:
    """A number that all processes have, on every device. `jax.device_put` would have the processes compare it first, every time."""
    return jax.make_array_from_callback((), replicated(mesh), lambda _: np.asarray(value))


def global_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """The global arrays of a batch whose rows of this process are given."""
    return {name: jax.make_array_from_process_local_data(batch_sharding(mesh), rows) for name, rows in batch.items()}
