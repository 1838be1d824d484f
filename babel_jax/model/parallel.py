"""The collectives of one device in a forward pass that a whole mesh computes: FSDP, tensor and context
parallelism.

Loss and gradients run under `jax.shard_map` over all axes of the mesh. So this file has their collectives,
and the compiler chooses only small ones (norm, metrics). When XLA for TPU chooses, it makes all-reduces of
whole matrices from the gathers of a three-dimensional torus, and from all scatters: twice the bytes. In
stages along the torus (`WEIGHT_AXES`) gathers stay gathers and scatters stay scatters.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from babel_jax.model.checkpoint_names import CheckpointName

# The mesh axes. data: between slices. fsdp and ring: parameters and windows; ring is the part of FSDP along
# one dimension of the torus, so that gathers and scatters run in two stages. context: parameters and the
# sequence. tensor: features.
DATA, FSDP, RING, CONTEXT, TENSOR = "data", "fsdp", "ring", "context", "tensor"
AXES = (DATA, FSDP, RING, CONTEXT, TENSOR)
WINDOW_AXES = (DATA, FSDP, RING)
# Axes over which devices hold different tokens. Rows that are not cut along the sequence are sharded over
# them.
ROW_AXES = (*WINDOW_AXES, CONTEXT)
WEIGHT_AXES = (FSDP, RING, CONTEXT)

# The one table from the logical axes of parameters to mesh axes. Every matrix has one axis of features inside
# a layer (split for tensor parallelism) and `embed` (split to spread memory). Vectors are split for tensor
# parallelism alone: gathering them would take longer than they are worth.
RULES: dict[str | None, tuple[str, ...]] = {
    "layers": (),
    "vocab": (TENSOR,),
    "embed": WEIGHT_AXES,
    "q_heads": (TENSOR,),
    "kv_heads": (TENSOR,),
    "mlp": (TENSOR,),
    None: (),
}

GPU = ("gpu", "cuda")  # platforms, as devices and as compilers name them


def mesh_axes(logical_axes: tuple[str | None, ...]) -> tuple[tuple[str, ...], ...]:
    """For each axis of a parameter with these logical axes the mesh axes that it is split over."""
    # A matrix has two axes beside `layers`. A vector, such as a norm or a bias, has one.
    matrix = sum(name != "layers" for name in logical_axes) > 1
    rules = (RULES[name] for name in logical_axes)
    return tuple(axes if matrix or axes == (TENSOR,) else () for axes in rules)


@dataclass(frozen=True)
class Parallelism:
    """The sizes of the mesh axes of the `shard_map` that this code runs in. The default is a single device:
    then methods that take an array return it unchanged.

    `gather_stages`: groups of mesh axes over which weights are gathered, in this order.
    `scatter_stages`: groups of mesh axes over which gradients of weights are summed and scattered, in order.
    `whole_windows`: rows are sharded over ROW_AXES, and each device has whole rows.
    """

    sizes: tuple[tuple[str, int], ...] = ()
    gather_stages: tuple[tuple[str, ...], ...] = ()
    scatter_stages: tuple[tuple[str, ...], ...] = ()
    platform: str = "cpu"
    whole_windows: bool = False
    _size: dict[str, int] = field(init=False, repr=False, compare=False, hash=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._size.update(self.sizes)

    def size(self, axis: str) -> int:
        """Devices along a mesh axis."""
        return self._size.get(axis, 1)

    @property
    def is_single_device(self) -> bool:
        """True where no axis has more than one device, so that no collective is needed."""
        return not self.sizes

    def all_reduce(self, x: Array, axes: tuple[str, ...]) -> Array:
        """The sum over all devices of these axes; not to be differentiated."""
        axes = tuple(axis for axis in axes if self.size(axis) > 1)
        return jax.lax.psum(x, axes) if axes else x

    # --- weights: sharded over WEIGHT_AXES, gathered before use (FSDP) -------------------------------------

    @property
    def weight_shards(self) -> int:
        """Devices over which the parameters of one slice are sharded."""
        return math.prod(self.size(axis) for axis in WEIGHT_AXES)

    def gather_weight(
        self, leaf: Float[Array, "..."], logical_axes: tuple[str | None, ...], dtype: DTypeLike
    ) -> Float[Array, "..."]:
        """All-gathers a parameter over WEIGHT_AXES, in `dtype`; its tensor-parallel shard stays a shard.

        Backward: the gradient is reduce-scattered over the same axes, in `dtype`. A leaf that is not sharded
        over WEIGHT_AXES is returned as it is, in its own type.
        """
        split = self.gathered_axis(logical_axes)
        if split is None:
            return leaf
        whole = _gathered(self.gather_stages, self.scatter_stages, split, leaf.astype(dtype))
        result: Float[Array, "..."] = checkpoint_name(whole, CheckpointName.GATHERED_WEIGHT)
        return result

    def gathered_axis(self, logical_axes: tuple[str | None, ...]) -> int | None:
        """The axis of a parameter that is sharded over WEIGHT_AXES, None if it has no such axis."""
        split = [axis for axis, axes in enumerate(mesh_axes(logical_axes)) if axes == WEIGHT_AXES]
        return split[0] if split and self.gather_stages else None

    def gather_over_weight_axes(self, leaf: Array, axis: int | None) -> Array:
        """All-gathers `axis` over WEIGHT_AXES (None: returns `leaf`); not to be differentiated."""
        return leaf if axis is None else _all_gathered(self.gather_stages, axis, leaf)

    def max_over_weight_shards(self, x: Array) -> Array:
        """The maximum over WEIGHT_AXES; not to be differentiated."""
        axes = tuple(axis for axis in WEIGHT_AXES if self.size(axis) > 1)
        return jax.lax.pmax(x, axes) if axes else x

    def gather_layer(self, state: nnx.State[Any, Any], dtype: DTypeLike) -> nnx.State[Any, Any]:
        """`gather_weight` for all parameters of one layer of a stack."""

        def gathered(param: nnx.Variable[Any]) -> nnx.Variable[Any]:
            return param.replace(self.gather_weight(param.get_value(), param.logical_axes[1:], dtype))

        if not self.gather_stages:
            return state
        result: nnx.State[Any, Any] = jax.tree.map(
            gathered, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )
        return result

    def all_reduce_gradient(
        self, gradient: Float[Array, "..."], logical_axes: tuple[str | None, ...]
    ) -> Float[Array, "..."]:
        """Sums a parameter's gradient over the devices that have other rows.

        Over the axes that the parameter is sharded over, `gather_weight` has summed it already.
        """
        # For example: a norm's weight is whole everywhere, so its gradient is summed over all ROW_AXES.
        split = {axis for axes in mesh_axes(logical_axes) for axis in axes}
        return self.all_reduce(gradient, tuple(axis for axis in ROW_AXES if axis not in split))

    # --- features: tensor parallelism (Shoeybi et al. 2019, Megatron-LM) -----------------------------------

    def column_parallel_input(self, x: PyTree[Array]) -> PyTree[Array]:
        """Marks an input that is replicated over the tensor axis (Megatron's f): identity forward, all-reduce
        of its gradient backward.
        """
        return _summed_backward(x) if self.size(TENSOR) > 1 else x

    def row_parallel_sum(self, x: Array) -> Array:
        """Sums products with shards of the features (Megatron's g): all-reduce over the tensor axis forward,
        identity backward.
        """
        return _summed_forward(x) if self.size(TENSOR) > 1 else x

    def first_feature(self, size: int) -> Int[Array, ""] | int:
        """The index of this device's first feature, where each device of the tensor axis has `size`."""
        return jax.lax.axis_index(TENSOR) * size if self.size(TENSOR) > 1 else 0

    def gather_features(self, x: Array) -> Array:
        """All-gathers the last axis of x over the tensor axis; not to be differentiated."""
        return jax.lax.all_gather(x, TENSOR, axis=x.ndim - 1, tiled=True) if self.size(TENSOR) > 1 else x

    def max_over_features(self, x: Array) -> Array:
        """The maximum over the tensor axis; not to be differentiated."""
        return jax.lax.pmax(x, TENSOR) if self.size(TENSOR) > 1 else x

    # --- the sequence: context parallelism -----------------------------------------------------------------

    @property
    def sequence_chunks(self) -> int:
        """Chunks of equal size that a window is cut into: two for each device of the context axis; one where
        windows are whole.
        """
        return 2 * self.size(CONTEXT) if self.size(CONTEXT) > 1 and not self.whole_windows else 1

    def chunks_by_half(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of chunks: a row for each half of a window, a column for each device of the context axis.

        The second row mirrors the first one. A token attends to those before it, so each pair of a chunk and
        its mirror image is the same amount of work (as in Llama 3, section 3.3.2). Example: for 2 devices
        ((0, 1), (3, 2)): device 0 has the chunks 0 and 3, device 1 has 1 and 2.
        """
        # The second half counts backwards from the last chunk.
        numbers = tuple(range(self.sequence_chunks))
        devices = self.size(CONTEXT)
        return (numbers[:devices], numbers[: -devices - 1 : -1]) if len(numbers) > 1 else (numbers,)

    def sequence_shard(self, rows: Array) -> Array:
        """The chunks of this device, cut from whole windows: [batch, source, ...] to [batch, time, ...]."""
        if self.sequence_chunks == 1:
            return rows
        # Which chunks they are is known on the device alone: its index is data in the program.
        size = rows.shape[1] // self.sequence_chunks
        chunks = jnp.array(self.chunks_by_half())[:, jax.lax.axis_index(CONTEXT)]
        return jnp.concatenate(
            [jax.lax.dynamic_slice_in_dim(rows, chunk * size, size, axis=1) for chunk in chunks], axis=1
        )

    def gather_sequence(self, rows: Float[Array, "batch time ..."]) -> Float[Array, "batch source ..."]:
        """Whole windows from the chunks of all devices: the inverse of `sequence_shard`.

        Backward: the gradient of each chunk is summed and scattered to its device.
        """
        if self.sequence_chunks == 1:
            return rows
        # The axis that is scattered in the backward pass is the first one, as in `_scattered`.
        chunks = jnp.stack(jnp.split(rows, 2, axis=1))
        chunks = jax.lax.all_gather(chunks, CONTEXT, tiled=True)
        # Gathered are the two chunks of device 0, of device 1, and so on: first halves are in order, second
        # halves in reverse.
        whole = jnp.concatenate([chunks[::2], chunks[::-2]])
        return jnp.concatenate(list(whole), axis=1)

    def context_shard(self, rows: Array, axis: int) -> Array:
        """The block of this device, where `axis` has a block for each device of the
        context axis, in order.
        """
        devices = self.size(CONTEXT)
        if devices == 1:
            return rows
        size = rows.shape[axis] // devices
        return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(CONTEXT) * size, size, axis)


SINGLE_DEVICE = Parallelism()


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gathered(gather_stages: Any, scatter_stages: Any, axis: int, leaf: Array) -> Array:
    return _all_gathered(gather_stages, axis, leaf)


def _all_gathered(stages: Any, axis: int, leaf: Array) -> Array:
    # Stages in order, each along one axis of the torus.
    leaf = jnp.moveaxis(leaf, axis, 0)
    for stage in stages:
        leaf = jax.lax.all_gather(leaf, stage, tiled=True)
    return jnp.moveaxis(leaf, 0, axis)


def _scattered(gather_stages: Any, scatter_stages: Any, axis: int, _: None, gradient: Array) -> tuple[Array]:
    # The scattered axis is the first one: XLA for TPU makes an all-reduce of a scatter along lanes.
    gradient = jnp.moveaxis(gradient, axis, 0)
    gradient = with_layout_constraint(gradient, Layout(major_to_minor=tuple(range(gradient.ndim))))
    for stage in scatter_stages:
        gradient = jax.lax.psum_scatter(gradient, stage, tiled=True)
    return (jnp.moveaxis(gradient, 0, axis),)


_gathered.defvjp(
    lambda gathers, scatters, axis, leaf: (_gathered(gathers, scatters, axis, leaf), None), _scattered
)


@jax.custom_vjp
def _summed_backward(x: PyTree[Array]) -> PyTree[Array]:
    return x


@jax.custom_vjp
def _summed_forward(x: Array) -> Array:
    result: Array = jax.lax.psum(x, TENSOR)
    return result


_summed_backward.defvjp(
    lambda x: (x, None), lambda _, gradient: (jax.tree.map(lambda g: jax.lax.psum(g, TENSOR), gradient),)
)
_summed_forward.defvjp(lambda x: (jax.lax.psum(x, TENSOR), None), lambda _, gradient: (gradient,))
