"""What a parameter is: shape, type, logical axes and initializer, declared once, where the module that uses
it is defined.

Modules are built abstract (`nnx.Param` over `jax.ShapeDtypeStruct`), so that a model of any size can be
described without memory. Outside of modules the parameters are one plain nested dict of arrays. Its paths are
the names that Hugging Face uses, split at the dots, without the layer index: all layers of a decoder are
stacked along a leading axis with the logical name `layers`.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray, PyTree

Initializer = Callable[..., Array]
# A leaf, or its shape and type alone.
Shaped = Array | jax.ShapeDtypeStruct
M = TypeVar("M", bound=nnx.Module)


@dataclass(frozen=True)
class Parameter:
    """Description of one leaf of the parameter tree.

    `logical_axes` has a name or None for each axis; training/ maps the names to mesh axes. `initializer`
    takes (key, shape, dtype).
    """

    shape: tuple[int, ...]
    dtype: DTypeLike
    logical_axes: tuple[str | None, ...]
    initializer: Initializer


def declare(
    shape: tuple[int, ...], logical_axes: tuple[str | None, ...], initializer: Initializer
) -> nnx.Param[Any]:
    """A parameter of a module, without memory. Master weights are float32."""
    return nnx.Param(
        jax.ShapeDtypeStruct(shape, jnp.float32), logical_axes=logical_axes, initializer=initializer
    )


def stack(layer: M, count: int) -> M:
    """The same module with every parameter stacked `count` times along a new first axis, whose logical name
    is `layers`.
    """

    def stacked(param: nnx.Variable[Any]) -> nnx.Variable[Any]:
        one = param.get_value()
        return param.replace(
            jax.ShapeDtypeStruct((count, *one.shape), one.dtype), logical_axes=("layers", *param.logical_axes)
        )

    # The structure of the module stays; only the shapes and names of its parameters change.
    graphdef, state = nnx.split(layer)
    return nnx.merge(
        graphdef, jax.tree.map(stacked, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    )


def descriptions(module: nnx.Module) -> dict[str, Any]:
    """Nested dict of `Parameter`, read from an abstract module."""

    def described(param: nnx.Variable[Any]) -> Parameter:
        value = param.get_value()
        return Parameter(value.shape, value.dtype, param.logical_axes, param.initializer)

    variables = {path: described(param) for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    result: dict[str, Any] = traverse_util.unflatten_dict(variables)
    return result


def bind(module: M, params: PyTree[Array]) -> M:
    """The abstract module with the arrays of a plain nested dict in place.

    Raises ValueError where the paths differ.
    """
    graphdef, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


@partial(jax.jit, static_argnums=1)
def in_type(params: PyTree[Array], dtype: DTypeLike) -> PyTree[Array]:
    """All parameters in one type; each stays on its devices."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def initialized(described: dict[str, Any], key: PRNGKeyArray, dtype: DTypeLike) -> PyTree[Array]:
    """Arrays for a nested dict of `Parameter`.

    The random stream of a leaf depends on `key` and on its path alone: not on the other leaves, not on the
    mesh.
    """
    leaves = {}
    for path, parameter in traverse_util.flatten_dict(described, sep="/").items():
        key_of_leaf = jax.random.fold_in(key, zlib.crc32(path.encode()))
        leaves[path] = parameter.initializer(key_of_leaf, parameter.shape, dtype)
    return traverse_util.unflatten_dict(leaves, sep="/")
