"""From a mesh of devices to the `Parallelism` of the model's functions, and the sharding of parameters."""

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
    """The extents over 1 of the torus that TPU devices form; empty for other devices."""
    coordinates = np.array([device.coords for device in devices if hasattr(device, "coords")])
    if not coordinates.size:
        return ()
    return tuple(int(extent) for extent in coordinates.max(0) - coordinates.min(0) + 1 if extent > 1)


def parallelism_on(mesh: Mesh, whole_windows: bool = False) -> Parallelism:
    """The `Parallelism` of a mesh, which says what `whole_windows` means.

    XLA for TPU has no all-gather over three dimensions of a torus, and no reduce-scatter over all dimensions
    of one. So both run in stages.
    """
    sizes = {axis: mesh.shape[axis] for axis in AXES if mesh.shape[axis] > 1}
    platform = mesh.devices.flat[0].platform
    fsdp = tuple(axis for axis in (FSDP,) if axis in sizes)
    ring = tuple(axis for axis in (RING, CONTEXT) if axis in sizes)
    scatter_stages = tuple(axes for axes in (fsdp, ring) if axes)
    # One stage over all axes. A torus of three dimensions needs two.
    gather_stages = tuple(axes for axes in (fsdp + ring,) if axes)
    if len(torus(list(mesh.devices.flat))) > 2:
        gather_stages = tuple(reversed(scatter_stages))
    return Parallelism(tuple(sizes.items()), gather_stages, scatter_stages, platform, whole_windows)


def param_specs(config: ModelConfig) -> PyTree[PartitionSpec]:
    """The mesh axes of each parameter."""
    return jax.tree.map(lambda parameter: PartitionSpec(*mesh_axes(parameter.logical_axes)), describe(config))
