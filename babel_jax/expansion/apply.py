"""The parameters of a plan's deeper model, in memory or some rows at a time."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, PyTree, UInt32

from babel_jax.config import Init
from babel_jax.expansion.noise import noise_table, path_hash
from babel_jax.expansion.plan import ExpansionPlan, is_output, next_layer
from babel_jax.model.shapes import Place, is_stacked


def expand_params(params: PyTree[Array], plan: ExpansionPlan) -> PyTree[Array]:
    """The parameters of the deeper model: one gather along the layer axis for each leaf under the layers,
    then the changes of new layers.

    Every leaf keeps its dtype; noise is drawn from a table and added in float32. The noise depends only on
    the layer's seed, the leaf's path and the layer's position, so its bits are the same on any mesh. The
    function is pure: it may run inside jit with shardings. Raises BadInput for a plan of another depth.
    """
    leaves = traverse_util.flatten_dict(params)
    expanded = {}
    for place, leaf in leaves.items():
        if is_stacked(place):
            plan.check(leaf.shape[0], "plan")
            expanded[place] = _expand_leaf(leaf, jnp.uint32(path_hash(place)), plan, is_output(place))
        else:
            expanded[place] = leaf
    return traverse_util.unflatten_dict(expanded)


def expanding(shardings: PyTree[jax.sharding.Sharding]) -> Any:
    """`expand_params` jitted: (params, plan) to the deeper parameters, sharded by `shardings`.

    Each device computes its own part.
    """
    return jax.jit(expand_params, static_argnums=1, out_shardings=shardings)


@functools.partial(jax.jit, static_argnames=("plan", "is_output"))
def _expand_leaf(
    leaf: Float[Array, "source_layers ..."],
    path_hash: UInt32[Array, ""],
    plan: ExpansionPlan,
    is_output: bool,
) -> Float[Array, "target_layers ..."]:
    """One leaf of the deeper model; `is_output` is True for projections that `output_scale` multiplies."""
    # Each layer begins as the copy of its source.
    expanded = jnp.take(leaf, np.asarray(plan.source_layers), axis=0, mode="clip")

    def targets_with(init: Init) -> list[int]:
        return [target for target, layer in enumerate(plan.layers) if layer.init is init]

    # Copies are done by the gather; the other inits change some rows of it.
    zero, average, noise = targets_with(Init.ZERO), targets_with(Init.AVERAGE), targets_with(Init.NOISE)
    if zero:
        expanded = expanded.at[np.asarray(zero)].set(0)
    if average:
        # The mean of the copied layer and the source layer after it.
        next_layers = leaf[np.asarray([next_layer(plan, target) for target in average])]
        expanded = expanded.at[np.asarray(average)].set(_mean(expanded[np.asarray(average)], next_layers))
    if noise:
        # For `vmap`: each column has one row for each noisy layer.
        arguments = [_noise_arguments(plan, target, path_hash) for target in noise]
        columns = [jnp.stack(values) for values in zip(*arguments, strict=True)]
        noisy = jax.vmap(_with_noise)(expanded[np.asarray(noise)], *columns)
        expanded = expanded.at[np.asarray(noise)].set(noisy)

    # Last, because the scale is of the values that the layer begins with.
    scaled = [target for target, layer in enumerate(plan.layers) if is_output and layer.output_scale != 1.0]
    if scaled:
        scale = jnp.asarray([plan.layers[target].output_scale for target in scaled], jnp.float32)
        expanded = expanded.at[np.asarray(scaled)].set(jax.vmap(_scaled)(expanded[np.asarray(scaled)], scale))
    return expanded


@jax.jit
def _mean(left: Float[Array, "..."], right: Float[Array, "..."]) -> Float[Array, "..."]:
    return (0.5 * (left.astype(jnp.float32) + right.astype(jnp.float32))).astype(left.dtype)


@jax.jit
def _scaled(values: Float[Array, "..."], scale: Float[Array, ""]) -> Float[Array, "..."]:
    return (values.astype(jnp.float32) * scale).astype(values.dtype)


def _noise_arguments(plan: ExpansionPlan, target: int, path_hash: UInt32[Array, ""]) -> tuple[Array, ...]:
    layer = plan.layers[target]
    table = noise_table(layer.noise_mean, layer.noise_std)
    return jnp.uint32(layer.seed), path_hash, jnp.uint32(target), jnp.asarray(table)


def _with_noise(
    values: Float[Array, "rows ..."],
    seed: UInt32[Array, ""],
    path_hash: UInt32[Array, ""],
    target: UInt32[Array, ""],
    table: Float[Array, "65536"],
    first: UInt32[Array, ""] | int = 0,
) -> Float[Array, "rows ..."]:
    """`values` with noise. They are the rows from `first` on. Each row has its own random stream, so that a
    piece gets the same noise as the whole.
    """
    # Position and path are in the key, so no two leaves or layers get the same noise.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), path_hash), target)

    def noisy(row: Array, number: Array) -> Array:
        indices = jax.random.bits(jax.random.fold_in(key, number), row.shape, jnp.uint16)
        return (row.astype(jnp.float32) + table[indices]).astype(row.dtype)

    return jax.vmap(noisy)(values, first + jnp.arange(len(values), dtype=jnp.uint32))


_with_noise_compiled = jax.jit(_with_noise)


# A change uses all cores and more memory than the rest, so pieces are changed one after the other.
_one_at_a_time = threading.Lock()


def changed_rows(
    plan: ExpansionPlan,
    place: Place,
    target: int,
    rows: np.ndarray,
    first: int,
    next_rows: Callable[[], np.ndarray],
) -> np.ndarray:
    """Rows of one tensor of layer `target` of the deeper model, from row `first` on; the same bits as by
    `expand_params`.

    rows: the same rows of the source layer. next_rows: returns the same rows of the layer after the source
    layer. Threads may call this function.
    """
    layer = plan.layers[target]
    # The same jitted functions as for a model in memory, so both ways give the same bits.
    with _one_at_a_time, jax.default_device(jax.local_devices(backend="cpu")[0]):
        if layer.init is Init.NOISE:
            arguments = _noise_arguments(plan, target, jnp.uint32(path_hash(place)))
            rows = np.asarray(_with_noise_compiled(rows, *arguments, jnp.uint32(first)))
        if layer.init is Init.AVERAGE:
            rows = np.asarray(_mean(rows, next_rows()))
        if layer.output_scale != 1.0 and is_output(place):
            rows = np.asarray(_scaled(rows, jnp.float32(layer.output_scale)))
    return rows
