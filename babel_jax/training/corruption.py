"""Silent data corruption: a chip that computes wrong numbers without an error is found, and its host is
named.

Fleets of accelerators have such chips (Hochschild et al. 2021, "Cores that don't count"; the Gemini report
2023, section 3, replays steps). There are two checks. The gradients of a step are computed twice and must be
equal bit by bit. Parameters that are replicated must be equal on all devices.
"""

import math
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PyTree, UInt32

from babel_jax.config import ModelConfig, OptimizerSettings, TrainingSettings
from babel_jax.distributed.agreement import texts_of_all
from babel_jax.errors import BadInput
from babel_jax.model.parallel import AXES, DATA, WINDOW_AXES
from babel_jax.model.sharding import param_specs
from babel_jax.training.mesh import replicated
from babel_jax.training.step import summed_gradients

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


class BitChecks:
    """The checks for one model on one mesh. The programs `of_gradients` and `of_params` are compiled at their
    first use.

    `has_replicas`: the mesh has several copies of the parameters, which `check_replicas` compares.
    """

    def __init__(
        self, config: ModelConfig, settings: OptimizerSettings, training: TrainingSettings, mesh: Mesh
    ):
        self._mesh = mesh
        self.has_replicas = mesh.shape[DATA] > 1
        everywhere = replicated(mesh)
        specs = param_specs(config)
        gradients_of = summed_gradients(config, training, settings.z_loss, mesh)

        def of_gradients(params: PyTree[Array], batch: dict[str, Array]) -> UInt32[Array, "devices values"]:
            total, windows, gradients = gradients_of(params, batch)
            # The losses of windows come first: `check_gradients` needs them as the first column.
            values = (windows.nats, gradients, total)
            return _by_device(values, (PartitionSpec(WINDOW_AXES), specs, PartitionSpec()), mesh)

        def of_params(params: PyTree[Array]) -> UInt32[Array, "devices leaves"]:
            return _by_device(params, specs, mesh)

        # All processes see the checksums of all devices, so all of them raise the same error.
        self.of_gradients = jax.jit(of_gradients, out_shardings=everywhere)
        self.of_params = jax.jit(of_params, out_shardings=everywhere)
        self._params_specs = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))

    def check_gradients(self, step: int, params: PyTree[Array], batch: dict[str, Array]) -> None:
        """Computes losses and gradients twice. Where a bit differs, raises BadInput on all processes, with
        the hosts of the faulty devices.

        The first column is the checksum of the losses of a device's own windows. Devices that differ there
        are the faulty ones, because sums over devices spread a wrong gradient to all devices.
        """
        first, second = (
            np.asarray(self.of_gradients(params, batch)),
            np.asarray(self.of_gradients(params, batch)),
        )
        different = first != second
        if not different.any():
            return
        # The first column names the device itself; the others may only have received its sum.
        rows = different[:, 0] if different[:, 0].any() else different.any(axis=1)
        raise BadInput(
            f"step {step}: the gradients of one batch, computed twice, differ on "
            f"{self._named(np.flatnonzero(rows))}: a chip computes "
            "wrong numbers; take the host out of the job and resume from the last checkpoint"
        )

    def check_replicas(self, step: int, params: PyTree[Array]) -> None:
        """Compares parameters that several devices hold.

        Raises BadInput, on all processes, with the hosts of those that differ.
        """
        if not self.has_replicas:
            return
        # One number for each leaf and device: little is sent, whatever the size of the model.
        sums = np.asarray(self.of_params(params))
        wrong: set[int] = set()
        for leaf, spec in enumerate(self._params_specs):
            for group in _groups_of_replicas(self._mesh, spec):
                wrong |= _minority(sums[group, leaf], group)
        if wrong:
            raise BadInput(
                f"step {step}: parameters that should be the same on all replicas differ on "
                f"{self._named(sorted(wrong))}: a chip or a link "
                "is faulty; take the host out of the job and resume from the last checkpoint"
            )

    def _named(self, devices: Sequence[int] | np.ndarray) -> str:
        """Hosts and device ids, of devices given by their index in the mesh."""
        # All processes call this, because each knows its own name alone.
        hosts = texts_of_all(socket.gethostname())
        flat = self._mesh.devices.flat
        by_host: dict[str, list[str]] = {}
        for number in devices:
            device = flat[int(number)]
            by_host.setdefault(hosts[device.process_index], []).append(str(device.id))
        return ", ".join(f"host {host} (devices {', '.join(ids)})" for host, ids in by_host.items())


def refuse_without_determinism(platform: str, flags: str) -> None:
    """Raises BadInput where `training.recheck_every` would stop a sound run: on a GPU, sums by atomic
    operations have no fixed order.
    """
    if platform == "gpu" and _DETERMINISTIC not in flags:
        raise BadInput(
            f"training.recheck_every on a GPU needs sums in a fixed order: set XLA_FLAGS={_DETERMINISTIC}, "
            "or leave it out"
        )


def _by_device(
    values: PyTree[Array], specs: PyTree[PartitionSpec], mesh: Mesh
) -> UInt32[Array, "devices values"]:
    """A checksum of each leaf's part on each device; rows in the order of `mesh.devices.flat`."""

    def of_own_parts(values: PyTree[Array]) -> UInt32[Array, "1 values"]:
        return jnp.stack([_checksum(leaf) for leaf in jax.tree.leaves(values)])[None]

    if mesh.size == 1:
        return of_own_parts(values)
    return jax.shard_map(
        of_own_parts, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(AXES), check_vma=False
    )(values)


def _checksum(part: Array) -> UInt32[Array, ""]:
    """The sum of all bit patterns, modulo 2**32: a single bit that differs changes it."""
    # Bits, and not values: a NaN is not equal to itself, and 0.0 is equal to -0.0.
    bits = jax.lax.bitcast_convert_type(part, jnp.dtype(f"uint{8 * part.dtype.itemsize}"))
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)


def _groups_of_replicas(mesh: Mesh, spec: PartitionSpec) -> list[np.ndarray]:
    """Groups of devices that hold the same part of a leaf, by their index in `mesh.devices.flat`."""
    cut: set[Any] = set()
    for axes in spec:
        cut |= {axes} if isinstance(axes, str) else set(axes or ())
    # Axes that cut the leaf first: each row of the rest is then one group of replicas.
    order = sorted(range(len(AXES)), key=lambda number: AXES[number] not in cut)
    places = np.arange(mesh.size).reshape(mesh.devices.shape).transpose(order)
    replicas = math.prod(mesh.shape[axis] for axis in AXES if axis not in cut)
    return list(places.reshape(-1, replicas))


def _minority(sums: np.ndarray, group: np.ndarray) -> set[int]:
    """The devices whose checksum is not the most frequent one. All devices, where two checksums are equally
    frequent.
    """
    # With two replicas nobody knows which one is right, so both are named.
    counts = Counter(sums.tolist()).most_common()
    if len(counts) == 1:
        return set()
    if counts[0][1] == counts[1][1]:
        return set(group.tolist())
    most_frequent = counts[0][0]
    return {int(device) for device in group[sums != most_frequent]}
