"""The train step: one pure function of a state, a batch and a rate, jitted once for each depth and each
choice of what is trained.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, PyTree

from babel_jax.config import ModelConfig, OptimizerSettings, TrainingSettings
from babel_jax.hardware import name_of_kind
from babel_jax.model.attention_kernels import kernel_for
from babel_jax.model.decoder import abstract_params, describe
from babel_jax.model.execution import Execution
from babel_jax.model.parallel import CONTEXT, ROW_AXES, WINDOW_AXES, Parallelism
from babel_jax.model.parameters import Parameter
from babel_jax.model.quantized import check_matmul_type
from babel_jax.model.sharding import parallelism_on, param_specs
from babel_jax.training.loss import WindowLosses, summed_loss
from babel_jax.training.mesh import batch_sharding, param_shardings, replicated
from babel_jax.training.optimizer import AdamW
from babel_jax.training.spikes import is_spike, no_recent, with_newest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that a run carries from step to step. The leaves are arrays, or their shapes, or their
    shardings.
    """

    params: PyTree
    opt_state: PyTree
    # Updates tried, and updates skipped in a row: int32[].
    step: Any
    skipped: Any
    # By language, in the order of the run: int32[languages].
    windows_seen: Any
    # Losses and gradient norms of the last steps: float32[2, RECENT_STEPS].
    recent: Any


SummedGradients = Callable[[PyTree[Array], dict[str, Array]], tuple[Array, WindowLosses, PyTree[Array]]]
Step = Callable[[TrainState, dict[str, Array], Float[Array, ""]], tuple[TrainState, dict[str, Array]]]


def initial_state(optimizer: AdamW, params: PyTree[Array], languages: int) -> TrainState:
    """The state before the first step, of a run with so many languages; may be traced."""
    step, skipped, windows_seen = (jnp.zeros(shape, jnp.int32) for shape in ((), (), (languages,)))
    return TrainState(params, optimizer.init(params), step, skipped, windows_seen, no_recent())


def state_shardings(config: ModelConfig, optimizer: AdamW, mesh: Mesh, offload: bool = False) -> TrainState:
    """A sharding for each leaf of the state. With `offload` the moments are in the memory of the hosts."""
    params, everywhere = param_shardings(config, mesh), replicated(mesh)
    moments = (
        jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), params) if offload else params
    )
    opt_state = optimizer.shardings(abstract_params(config), moments, everywhere)
    return TrainState(params, opt_state, everywhere, everywhere, everywhere, everywhere)


def summed_gradients(
    config: ModelConfig, training: TrainingSettings, z_loss: float, mesh: Mesh
) -> SummedGradients:
    """A function of parameters and batch to loss, losses of each window, and gradients, summed over all
    targets.

    It runs under `shard_map`: each device computes its own windows (or its own part of each window), in
    `gradient_accumulation` pieces.
    """
    # Everything that is static under jit is made here, once for each program.
    parallel, specs = parallelism_on(mesh), param_specs(config)
    execution = _execution(training, parallel, mesh.devices.flat[0].device_kind)

    def of_one(
        params: PyTree[Array], micro: dict[str, Array]
    ) -> tuple[tuple[Array, WindowLosses], PyTree[Array]]:
        # The kernel depends on how many tokens of a window a device has.
        tokens = micro["tokens"].shape[1] // parallel.sequence_chunks
        kernel = kernel_for(training.attention, config, tokens, parallel.platform, training.compute_dtype)
        chosen = dataclasses.replace(execution, kernel=kernel)

        def loss(params: PyTree[Array]) -> tuple[Array, WindowLosses]:
            return summed_loss(config, params, micro, z_loss, chosen)

        return jax.value_and_grad(loss, has_aux=True)(params)

    def of_own_windows(
        params: PyTree[Array], batch: dict[str, Array]
    ) -> tuple[Array, WindowLosses, PyTree[Array]]:
        # One piece needs no loop, and no second copy of the gradients to add to.
        if training.gradient_accumulation == 1:
            (total, windows), gradients = of_one(params, batch)
        else:
            total, windows, gradients = _accumulated(of_one, params, batch, training.gradient_accumulation)

        # Until here each device has sums over its own tokens alone.
        def of_all(gradient: Array, parameter: Parameter) -> Array:
            return parallel.all_reduce_gradient(gradient, parameter.logical_axes)

        windows = jax.tree.map(lambda rows: parallel.all_reduce(rows, (CONTEXT,)), windows)
        return (
            parallel.all_reduce(total, ROW_AXES),
            windows,
            jax.tree.map(of_all, gradients, describe(config)),
        )

    # On one device there are no collectives, so `shard_map` is not needed.
    if parallel.is_single_device:
        return of_own_windows
    # Each window's losses stay on the devices that have the window. The total is the same on all devices.
    windows = PartitionSpec(WINDOW_AXES)
    return jax.shard_map(
        of_own_windows,
        mesh=mesh,
        in_specs=(specs, windows),
        out_specs=(PartitionSpec(), windows, specs),
        check_vma=False,
    )


def _execution(training: TrainingSettings, parallel: Parallelism, device_kind: str) -> Execution:
    """The `Execution` of a step on devices of this kind. `of_one` adds the kernel of attention."""
    return Execution(
        jnp.dtype(training.compute_dtype),
        training.remat,
        parallel=parallel,
        scan_layers=training.scan_layers,
        matmul_dtype=training.matmul_dtype,
        # Narrow products read these values with the features along lanes.
        tokens_minor=name_of_kind(device_kind) == "v6e" and training.matmul_dtype is None,
    )


def _accumulated(
    of_one: Callable[..., tuple[tuple[Array, WindowLosses], PyTree[Array]]],
    params: PyTree[Array],
    batch: dict[str, Array],
    pieces: int,
) -> tuple[Array, WindowLosses, PyTree[Array]]:
    """The sums of `of_one(params, piece)` over the pieces of a batch: of losses and of gradients; the losses
    of each window are in the order of the batch.
    """
    # Piece i has the windows i, i + pieces, i + 2 * pieces, ... of the global batch, on any number of
    # devices.
    micro_batches = jax.tree.map(lambda rows: _interleaved(rows, pieces), batch)

    def add(
        so_far: tuple[Array, PyTree[Array]], micro: dict[str, Array]
    ) -> tuple[tuple[Array, PyTree[Array]], WindowLosses]:
        (total, windows), gradients = of_one(params, micro)
        return (so_far[0] + total, jax.tree.map(jnp.add, so_far[1], gradients)), windows

    # Gradients add up in the type of the parameters.
    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    (total, gradients), windows = jax.lax.scan(add, start, micro_batches)
    # The inverse of `_interleaved`: back to the order of the batch.
    windows = jax.tree.map(lambda rows: rows.swapaxes(0, 1).reshape(-1), windows)
    return total, windows, gradients


def train_step(
    optimizer: AdamW,
    gradients_of: SummedGradients,
    state: TrainState,
    batch: dict[str, Array],
    rate: Float[Array, ""],
    offload: bool = False,
    skip_spikes: float | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One update, and its metrics: loss, gradient_norm and skipped; by language nats, targets, tokens and
    windows_seen.

    Tokens are counted without padding. windows_seen counts all steps up to this one.

    A loss or gradient that is not finite leaves parameters and moments as they are, bit by bit. So does a
    loss or gradient norm more than `skip_spikes` standard deviations above those of the steps before.
    """
    params = state.params
    total, windows, gradients = gradients_of(params, batch)
    # One factor turns sums into means and clips, so that clipping needs no pass over the gradients of its
    # own.
    targets = jnp.maximum(jnp.sum(windows.targets), 1).astype(jnp.float32)
    norm = optimizer.norm(gradients) / targets
    factor = jnp.minimum(1.0, optimizer.clip_norm / (norm + 1e-12)) / targets
    loss = jnp.sum(windows.nats) / targets
    # Whether the update is kept is decided on the devices: for an `if` the host would wait for the step.
    newest = jnp.stack([loss, norm])
    kept = jnp.isfinite(norm) & jnp.isfinite(total)
    if skip_spikes is not None:
        kept &= ~is_spike(newest, state.recent, skip_spikes)
    gradients = jax.tree.map(lambda gradient: gradient * factor, gradients)
    params, opt_state = optimizer.update(gradients, state.opt_state, params, rate, kept, offload)

    # `language` is the index of each window's language in the run's order, so one sum gives all languages.
    def by_language(values: Array) -> Array:
        return jax.ops.segment_sum(values, batch["language"], num_segments=len(state.windows_seen))

    skipped = jnp.where(kept, 0, state.skipped + 1)
    windows_seen = state.windows_seen + by_language(jnp.ones_like(batch["language"]))
    metrics = {
        "loss": loss,
        "gradient_norm": norm,
        "skipped": skipped,
        "nats": by_language(windows.nats),
        "targets": by_language(windows.targets),
        "tokens": by_language(jnp.sum(batch["segment_ids"] > 0, axis=1)),
        "windows_seen": windows_seen,
    }
    recent = with_newest(state.recent, newest)
    return TrainState(params, opt_state, state.step + 1, skipped, windows_seen, recent), metrics


def _interleaved(rows: Array, parts: int) -> Array:
    return rows.reshape(-1, parts, *rows.shape[1:]).swapaxes(0, 1)


def placed_state(
    optimizer: AdamW, params: PyTree[Array], shardings: TrainState, languages: int
) -> TrainState:
    """`initial_state` on the mesh.

    No device ever holds more of the moments than its shard. Donates `params`.
    """
    result: TrainState = beginning(optimizer, shardings, languages)(jax.device_put(params, shardings.params))
    return result


def beginning(optimizer: AdamW, shardings: TrainState, languages: int) -> Any:
    """`initial_state` jitted, with the parameters donated."""

    def begin_training(params: PyTree[Array]) -> TrainState:
        return initial_state(optimizer, params, languages)

    return jax.jit(begin_training, out_shardings=shardings, donate_argnums=0)


def compiled_step(
    config: ModelConfig, optimizer: AdamW, settings: OptimizerSettings, training: TrainingSettings, mesh: Mesh
) -> Step:
    """`train_step` jitted for a mesh, with the state donated.

    States must have `state_shardings`, so that it compiles once.
    """

    def train(
        state: TrainState, batch: dict[str, Array], rate: Float[Array, ""]
    ) -> tuple[TrainState, dict[str, Array]]:
        return train_step(
            optimizer,
            gradients_of,
            state,
            batch,
            rate,
            training.offload_optimizer_state,
            training.skip_spikes,
        )

    check_matmul_type(training.matmul_dtype, mesh.devices.flat[0].device_kind)
    gradients_of = summed_gradients(config, training, settings.z_loss, mesh)
    shardings = state_shardings(config, optimizer, mesh, training.offload_optimizer_state)
    everywhere = replicated(mesh)
    return jax.jit(
        train,
        in_shardings=(shardings, batch_sharding(mesh), everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )
