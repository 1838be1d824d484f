"""Products in int8 or float8, in training: each row of an operand is scaled to the range of the type.

Qwix (google/qwix) does the work: it quantizes, multiplies and defines the backward pass. Its public interface
replaces the products of a whole model. We replace those of `Linear` alone, and quantize weights before the
all-gather. So this file calls Qwix's internal functions.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Shaped

from babel_jax.config import MatmulType
from babel_jax.errors import BadInput
from babel_jax.hardware import narrow_peaks
from babel_jax.model.checkpoint_names import CheckpointName
from babel_jax.model.execution import Execution
from babel_jax.model.parallel import WEIGHT_AXES, mesh_axes

_TYPES: dict[MatmulType, Any] = {
    MatmulType.INT8: jnp.dtype(jnp.int8),
    MatmulType.FLOAT8: jnp.dtype(jnp.float8_e4m3fn),
}
# For gradients, float8 has more exponent bits and fewer mantissa bits (Micikevicius et al. 2022, FP8 Formats
# for Deep Learning).
_TYPES_OF_GRADIENTS = {jnp.dtype(jnp.int8): jnp.int8, jnp.dtype(jnp.float8_e4m3fn): jnp.float8_e5m2}
# rows @ weight.T, as `jax.lax.dot_general` takes it.
_DIMENSIONS = (((1,), (1,)), ((), ()))


class QuantizedWeight(NamedTuple):
    """A weight of `Linear`: about `values * scales[:, None]`.

    `wide` is the weight in the type of the activations. It only carries the gradient: JAX has no gradient for
    narrow values, so the weight gets that of `wide`. No product reads `wide`, so the compiler removes it.
    """

    values: Shaped[Array, "out in"]
    scales: Float[Array, "out"]
    wide: Float[Array, "out in"]


class RowScales(NamedTuple):
    """Scales of the rows of a weight, in the type of the activations. `own`: of the rows that this device
    has. `whole`: of all rows.
    """

    own: Float[Array, "*layers out_shard"]
    whole: Float[Array, "*layers out"]


def row_scales(
    weight: Float[Array, "*layers out in"],
    logical_axes: tuple[str | None, ...],
    execution: Execution,
) -> RowScales:
    """For each row (an output feature) its largest absolute value, divided by the largest number of the
    narrow type.

    If WEIGHT_AXES cut the axis `in`, the parts of a row are on several devices, which use one scale. If
    `tensor` cuts it, each device sums its own part of the row, and has a scale of its own.
    """
    from qwix._src.core.qarray import compute_scale_zero_point

    constant = jax.lax.stop_gradient(weight).astype(execution.compute_dtype)
    largest = jnp.max(jnp.abs(constant), axis=-1)
    axes_of_rows, axes_of_columns = mesh_axes(logical_axes)[-2:]
    if axes_of_columns == WEIGHT_AXES:
        largest = execution.parallel.max_over_weight_shards(largest)
    scales, _ = compute_scale_zero_point({"absmax": largest}, _narrow_type(execution))
    # Every device multiplies with the whole weight, so it needs the scales of all rows.
    whole = scales
    if axes_of_rows == WEIGHT_AXES:
        whole = execution.parallel.gather_over_weight_axes(scales, scales.ndim - 1)
    return RowScales(scales, whole)


def quantized_weight(
    weight: Float[Array, "out_shard in_shard"],
    scales: RowScales,
    logical_axes: tuple[str | None, ...],
    execution: Execution,
) -> QuantizedWeight:
    """The weight in `matmul_dtype`, all-gathered over WEIGHT_AXES as narrow values.

    So each device quantizes its shard alone, and sends half as many bytes as in bfloat16. Backward: the
    gradient is reduce-scattered in the type of the activations, as `Parallelism.gather_weight` does.
    """
    from qwix._src.core.qarray import quantize_with_scale_zero_point

    parallel, dtype = execution.parallel, execution.compute_dtype
    constant = jax.lax.stop_gradient(weight).astype(dtype)
    narrow = quantize_with_scale_zero_point(constant, _narrow_type(execution), scales.own[:, None], None)
    # The narrow values are gathered for the product. `wide` is gathered only for its backward pass.
    values = parallel.gather_over_weight_axes(narrow.qvalue, parallel.gathered_axis(logical_axes))
    values = checkpoint_name(values, CheckpointName.GATHERED_WEIGHT)
    wide = parallel.gather_weight(weight, logical_axes, dtype)
    return QuantizedWeight(values, scales.whole, wide.astype(dtype))


def _narrow_type(execution: Execution) -> Any:
    assert execution.matmul_dtype is not None
    return _TYPES[execution.matmul_dtype]


def layer_scales(layers: nnx.State[Any, Any], execution: Execution) -> nnx.State[Any, Any]:
    """The `row_scales` of every matrix in a stack of layers; None for other parameters. They are computed
    once a step.
    """

    def scales(param: nnx.Variable[Any]) -> nnx.Variable[Any]:
        value, axes = param.get_value(), param.logical_axes
        return param.replace(row_scales(value, axes, execution) if _is_matrix(axes[1:]) else None)

    return _mapped(scales, layers)


def quantize_layer(
    state: nnx.State[Any, Any],
    scales: nnx.State[Any, Any],
    execution: Execution,
) -> nnx.State[Any, Any]:
    """`quantized_weight` for all matrices of one layer of a stack; other parameters stay as they are."""

    def quantized(param: nnx.Variable[Any], row_scales: nnx.Variable[Any]) -> nnx.Variable[Any]:
        axes = param.logical_axes[1:]
        if not _is_matrix(axes):
            return param
        weight = quantized_weight(param.get_value(), row_scales.get_value(), axes, execution)
        return param.replace(weight)

    return _mapped(quantized, state, scales)


def _is_matrix(logical_axes: tuple[str | None, ...]) -> bool:
    """True for the weight of a `Linear`; `logical_axes` are those of one layer."""
    return len(logical_axes) > 1


def _mapped(change: Any, *states: nnx.State[Any, Any]) -> nnx.State[Any, Any]:
    result: nnx.State[Any, Any] = jax.tree.map(
        change, *states, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    return result


def quantized_product(x: Float[Array, "*batch in"], weight: QuantizedWeight) -> Float[Array, "*batch out"]:
    """x @ weight.T. Products are in the type of the weight's values (int8 is summed in int32); the result has
    the type of x.

    Each row of x (a token) has a scale, as each row of the weight has (see `row_scales`). The backward pass
    uses the narrow values of x and weight again. For each of its two products, it multiplies the gradient by
    the scales of the other operand, and then quantizes the rows of the gradient.
    """
    rows = x.reshape(-1, x.shape[-1])
    return jnp.asarray(_product(rows, weight)).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _product(rows: Array, weight: QuantizedWeight) -> Any:
    return _forward(rows, weight)[0]


def _forward(rows: Array, weight: QuantizedWeight) -> Any:
    # Imported where it is used: Qwix takes a second to import.
    from qwix._src.core import dot_general_qt as qwix
    from qwix._src.core.qarray import HowToQuantize, QArray, calibrate

    of_values = weight.values.dtype
    of_gradients = _TYPES_OF_GRADIENTS[of_values]
    config = qwix.DotGeneralQtConfig(
        lhs_qtype=of_values, dlhs_grad_qtype=of_gradients, drhs_grad_qtype=of_gradients
    )
    # One scale for each row of x, which is one token.
    largest = calibrate(rows, HowToQuantize(qtype=of_values, channelwise_axes=[0]))
    # A number a token: kept, so that the backward pass does not read the rows once more for it.
    largest = {key: checkpoint_name(value, CheckpointName.TOKEN_MAXIMA) for key, value in largest.items()}
    narrow = QArray(weight.values, weight.scales[:, None])
    return qwix.dot_general_qt_fwd(rows, narrow, largest, None, _DIMENSIONS, config)


def _backward(residuals: Any, gradient: Array) -> tuple[Array, QuantizedWeight]:
    from qwix._src.core.dot_general_qt import dot_general_qt_bwd

    gradient_of_x, of_weight, *_ = dot_general_qt_bwd(_DIMENSIONS, residuals, gradient)
    # Qwix's residuals: x and the weight as they were given, then both as they were multiplied.
    narrow = residuals[3]
    # JAX wants zeros of type float0 as the gradient of an array of integers.
    is_float = jnp.issubdtype(narrow.qvalue.dtype, jnp.floating)
    none: Any = (
        jnp.zeros_like(narrow.qvalue) if is_float else np.zeros(narrow.qvalue.shape, jax.dtypes.float0)
    )
    return gradient_of_x, QuantizedWeight(none, jnp.zeros_like(narrow.scale[:, 0]), of_weight)


_product.defvjp(_forward, _backward)


def check_matmul_type(matmul_dtype: MatmulType | None, device_kind: str) -> None:
    """Raises BadInput if devices of this kind are known to have no products in this type."""
    peaks = narrow_peaks(device_kind)
    if matmul_dtype is None or peaks is None or matmul_dtype in peaks:
        return
    valid = " or ".join(peaks)
    other = f"give {valid}, or leave it out" if peaks else "leave it out"
    raise BadInput(
        f"training.matmul_dtype = {matmul_dtype}: {device_kind} has no {matmul_dtype} products; {other}"
    )
