"""A mesh of devices as the model's functions under `jax.shard_map` see it: the part of each device, and where
parameters lie.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PyTree

from babel_jax.config import ModelConfig
from babel_jax.model.decoder import describe
from babel_jax.model.parallel import AXES, CONTEXT, FSDP, RING, Parallelism, mesh_axes


def torus(devices: Sequence[Any]) -> tuple[int, ...]:
    """The extents of the torus that TPU devices form, those over 1; empty for other devices."""
    coordinates = np.array([device.coords for device in devices if hasattr(device, "coords")])
    if not coordinates.size:
        return ()
    return tuple(int(extent) for extent in coordinates.max(0) - coordinates.min(0) + 1 if extent > 1)


def parallelism_on(mesh: Mesh, whole_windows: bool = False) -> Parallelism:
    """The part of each device of the mesh; see `Parallelism` for `whole_windows`.

    XLA for TPU has no gather over three dimensions of a torus, and no scatter over all of one: both run in
    stages.
    """
    sizes = {axis: mesh.shape[axis] for axis in AXES if mesh.shape[axis] > 1}
    platform = mesh.devices.flat[0].platform
    one, ring = (tuple(axis for axis in axes if axis in sizes) for axes in ((FSDP,), (RING, CONTEXT)))
    scatters = tuple(axes for axes in (one, ring) if axes)
    gathers = (
        tuple(reversed(scatters))
        if len(torus(list(mesh.devices.flat))) > 2
        else tuple(filter(None, (one + ring,)))
    )
    return Parallelism(tuple(sizes.items()), gathers, scatters, platform, whole_windows)


def param_specs(config: ModelConfig) -> PyTree[PartitionSpec]:
    """The mesh axes of each parameter."""
    return jax.tree.map(lambda parameter: PartitionSpec(*mesh_axes(parameter.logical_axes)), describe(config))
