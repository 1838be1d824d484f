"""How one device takes part in a forward pass that a whole mesh computes: what it gathers, sums and slices.

The train step runs under `jax.shard_map` over all axes of the mesh, so that every collective stands here and
none is left to a compiler's choice. Left to it, XLA for TPU turns the gathers of a three-dimensional torus,
and the scatters of any, into all-reduces of whole matrices: twice the bytes. In stages along the torus
(`WEIGHT_AXES`) they stay what they are.
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

# Between slices; parameters and windows, in two stages; parameters and the sequence; features.
DATA, FSDP, RING, CONTEXT, TENSOR = "data", "fsdp", "ring", "context", "tensor"
AXES = (DATA, FSDP, RING, CONTEXT, TENSOR)
WINDOW_AXES = (DATA, FSDP, RING)
ROW_AXES = (
    *WINDOW_AXES,
    CONTEXT,
)  # of rows that are not cut: the devices that would share a window have rows of their own
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
GATHERED = "gathered"  # the name under which remat policies know gathered weights


def mesh_axes(logical_axes: tuple[str | None, ...]) -> tuple[tuple[str, ...], ...]:
    """For each axis of a parameter with these logical axes the mesh axes that it is split over."""
    matrix = sum(name != "layers" for name in logical_axes) > 1
    rules = (RULES[name] for name in logical_axes)
    return tuple(axes if matrix or axes == (TENSOR,) else () for axes in rules)


@dataclass(frozen=True)
class Placement:
    """The sizes of the mesh axes of the `shard_map` that this runs in; the default is one device, for which
    nothing here does anything.

    `scatter_stages` are the groups of axes over which the gradients of weights are summed and scattered, the
    first one first; `gather_stages` those over which weights are gathered. With `whole_windows` rows lie on
    ROW_AXES, and no device has a part of one.
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
        """Devices along an axis."""
        return self._size.get(axis, 1)

    @property
    def alone(self) -> bool:
        """Whether there is but one device, and nothing to gather or sum."""
        return not self.sizes

    @property
    def weight_parts(self) -> int:
        """Devices that the parameters of one slice are spread over."""
        return math.prod(self.size(axis) for axis in WEIGHT_AXES)

    def weights(
        self, leaf: Float[Array, "..."], logical_axes: tuple[str | None, ...], dtype: DTypeLike
    ) -> Float[Array, "..."]:
        """A parameter in full, but for the part of the features that this device works on; in `dtype` where
        there is anything to gather.

        Its gradient goes back the same way, in `dtype` on the wire: summed over the devices, each keeping its
        part.
        """
        split = [axis for axis, axes in enumerate(mesh_axes(logical_axes)) if axes == WEIGHT_AXES]
        if not split or not self.gather_stages:
            return leaf
        return checkpoint_name(
            _gathered(self.gather_stages, self.scatter_stages, split[0], leaf.astype(dtype)), GATHERED
        )

    def state(self, state: nnx.State, dtype: DTypeLike) -> nnx.State:
        """`weights` for the parameters of one layer of a stack."""

        def gathered(param: nnx.Variable) -> nnx.Variable:
            return param.replace(self.weights(param.get_value(), param.logical_axes[1:], dtype))

        if not self.gather_stages:
            return state
        return jax.tree.map(gathered, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))

    def into_features(self, x: PyTree[Array]) -> PyTree[Array]:
        """What every device of the tensor axis holds alike, on its way into products with its part of the
        features.

        Its gradient is the sum of theirs.
        """
        return _summed_backward(x) if self.size(TENSOR) > 1 else x

    def from_features(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The sum over the tensor axis of products with parts of the features."""
        return _summed_forward(x) if self.size(TENSOR) > 1 else x

    def own_features(self, size: int) -> Int[Array, ""] | int:
        """The first of `size` features, of those split over the tensor axis, that are this device's."""
        return jax.lax.axis_index(TENSOR) * size if self.size(TENSOR) > 1 else 0

    def all_features(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The features of all devices of the tensor axis, along the last axis of x; not
        to be differentiated.
        """
        return jax.lax.all_gather(x, TENSOR, axis=x.ndim - 1, tiled=True) if self.size(TENSOR) > 1 else x

    def largest_of_features(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The maximum over the tensor axis; not to be differentiated."""
        return jax.lax.pmax(x, TENSOR) if self.size(TENSOR) > 1 else x

    @property
    def window_parts(self) -> int:
        """Parts of equal size that a window is cut into: two for each device of the context axis, or one
        where there is one device.
        """
        return 2 * self.size(CONTEXT) if self.size(CONTEXT) > 1 and not self.whole_windows else 1

    def parts(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the parts of a window, by device of the context axis: of the first half, and of the
        second its mirror image.

        A token sees those before it, so together two such parts see as much as any other two (as in Llama 3,
        section 3.3.2).
        """
        numbers = tuple(range(self.window_parts))
        devices = self.size(CONTEXT)
        return (numbers[:devices], numbers[: -devices - 1 : -1]) if devices > 1 else (numbers,)

    def own_context(self, rows: Array, axis: int) -> Array:
        """Of what is made for all devices of the context axis, one behind the other along `axis`, what is
        this device's.
        """
        devices = self.size(CONTEXT)
        if devices == 1:
            return rows
        size = rows.shape[axis] // devices
        return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(CONTEXT) * size, size, axis)

    def own_places(self, rows: Array) -> Array:
        """Of whole windows, [batch, source, ...], the parts that are this device's, one behind the other:
        [batch, time, ...].
        """
        if self.window_parts == 1:
            return rows
        size = rows.shape[1] // self.window_parts
        own = jnp.array(self.parts())[:, jax.lax.axis_index(CONTEXT)]
        return jnp.concatenate(
            [jax.lax.dynamic_slice_in_dim(rows, part * size, size, axis=1) for part in own], axis=1
        )

    def all_places(self, rows: Float[Array, "batch time ..."]) -> Float[Array, "batch source ..."]:
        """Whole windows again; the gradient of each part goes back summed to the device that it is of."""
        if self.window_parts == 1:
            return rows
        # What is scattered in the backward pass stands first, as in `_scattered`.
        parts = jnp.stack(jnp.split(rows, 2, axis=1))
        parts = jax.lax.all_gather(parts, CONTEXT, tiled=True)
        whole = jnp.concatenate([parts[::2], parts[::-2]])
        return jnp.concatenate(list(whole), axis=1)

    def summed(self, x: Array, axes: tuple[str, ...]) -> Array:
        """The sum over all devices of these axes; not to be differentiated."""
        axes = tuple(axis for axis in axes if self.size(axis) > 1)
        return jax.lax.psum(x, axes) if axes else x


ALONE = Placement()


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gathered(gather_stages: Any, scatter_stages: Any, axis: int, leaf: Array) -> Array:
    leaf = jnp.moveaxis(leaf, axis, 0)
    for stage in gather_stages:
        leaf = jax.lax.all_gather(leaf, stage, tiled=True)
    return jnp.moveaxis(leaf, 0, axis)


def _scattered(gather_stages: Any, scatter_stages: Any, axis: int, _: None, gradient: Array) -> tuple[Array]:
    # What is scattered stands first: XLA for TPU makes an all-reduce of a scatter along lanes.
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
    return jax.lax.psum(x, TENSOR)


_summed_backward.defvjp(
    lambda x: (x, None), lambda _, gradient: (jax.tree.map(lambda g: jax.lax.psum(g, TENSOR), gradient),)
)
_summed_forward.defvjp(lambda x: (jax.lax.psum(x, TENSOR), None), lambda _, gradient: (gradient,))
